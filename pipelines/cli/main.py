"""The `rcd` command. Flags are declared in flags.py, file_flags.py and plan_flags.py; other modules are imported when
their command runs."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import cleandoc
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from pipelines.cli import file_flags, flags, plan_flags
from pipelines.run.messages import user_message

# Flags -> function in pipelines.cli that takes them and returns the exit code.
COMMANDS: dict[str, tuple[type, str]] = {
    "calibrate": (flags.CalibrateFlags, "calibrate:calibrate"),
    "chat": (flags.ChatFlags, "chat:chat"),
    "convert": (file_flags.ConvertFlags, "convert:convert"),
    "data inspect": (file_flags.DataInspectFlags, "data:inspect"),
    "doctor": (flags.DoctorFlags, "doctor:doctor"),
    "down": (flags.DownFlags, "local:down"),
    "evaluate": (flags.EvaluateFlags, "evaluate:evaluate"),
    "export": (file_flags.ExportFlags, "export:export"),
    "fit": (file_flags.FitFlags, "fit:fit"),
    "generate": (flags.GenerateFlags, "generate:generate"),
    "plan": (plan_flags.PlanFlags, "overview:plan"),
    "predict": (flags.PredictFlags, "predict:predict"),
    "push": (file_flags.PushFlags, "push:push"),
    "report": (flags.ReportFlags, "report:report"),
    "runs": (flags.RunsFlags, "runs:runs"),
    "serve check": (flags.ServeCheckFlags, "serve:check"),
    "signals inspect": (file_flags.SignalsInspectFlags, "signals:inspect"),
    "signals plan": (plan_flags.SignalsPlanFlags, "plan_signals:plan_signals"),
    "trace": (file_flags.TraceFlags, "trace:trace"),
    "train plan": (plan_flags.TrainPlanFlags, "plan:plan_training"),
    "up": (flags.UpFlags, "local:up"),
}
GROUPS = {
    "data": "Look at training data.",
    "serve": "Check a Serve config before it is deployed.",
    "signals": "Inspect reference signals, or plan them.",
    "train": "Plan a training: memory, GPUs, hours.",
}
# Commands without a required flag.
OPTIONAL = (flags.DoctorFlags, flags.DownFlags, flags.EvaluateFlags, flags.RunsFlags, flags.UpFlags)


def make_app() -> App:
    """The command line, without any of the commands' modules."""
    app = App(
        "rcd",
        help="Residual Context Diffusion: models and runs.\n\nrcd COMMAND --help lists the flags of a command.",
        help_format="plaintext",
        version=lambda: f"rcd {version('rcd-ray')}",
        version_flags=("--version",),
        result_action="return_value",
        default_parameter=Parameter(
            name_transform=lambda name: name,
            negative_bool=(),
            negative_iterable=(),
            allow_repeating=True,  # the last value wins
            show_default=lambda value: None if value in ((), False, None) else str(value),
        ),
    )
    for name, text in GROUPS.items():
        app.command(App(name, help=text))
    for name, (declared, target) in COMMANDS.items():
        *group, last = name.split()
        parent = app[group[0]] if group else app
        parent.command(_command(declared, target), name=last, help=cleandoc(declared.__doc__ or ""))
    return app


def _command(declared: type, target: str) -> Callable[..., int]:
    def run(options: Any) -> int:
        module, _, function = target.partition(":")
        return int(getattr(import_module(f"pipelines.cli.{module}"), function)(options))

    run.__annotations__ = {"options": Annotated[declared, flags.Flags]}
    run.__defaults__ = (declared(),) if declared in OPTIONAL else None
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 2 and one line on stderr for what the user can correct; 1,
    without a word, where nobody reads the output any more (`rcd plan --recipe demo | head -1`)."""
    try:
        code = _run(argv)
        sys.stdout.flush()  # here, because an error at the interpreter's exit cannot be caught
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return 1  # as rich does


def _nobody_reads() -> bool:
    """Whether standard output is what is broken, not another connection. What is left in its buffer is dropped."""
    output = sys.stdout.fileno()
    waiting = select.poll()
    waiting.register(output, 0)
    if not any(event & select.POLLERR for _, event in waiting.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _run(argv: Sequence[str] | None) -> int:
    try:
        return int(make_app()(argv, exit_on_error=False, print_error=False) or 0)
    except BrokenPipeError:
        raise
    except CycloptsError as error:
        command = " ".join(("rcd", *(error.command_chain or ())))
        message: str | None = f"{' '.join(str(error).split())} `{command} --help` lists the flags."
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""The `rcd` command: one module per sub-command, imported when it is asked for, so that `rcd --help` is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from pipelines.run.messages import user_message
from rcd_core.errors import UserError

# Each module has add_arguments(parser) and run(options) -> exit code.
COMMANDS = {
    "calibrate": ("pipelines.cli.calibrate", "choose T_res of a checkpoint, look at its discarded predictions"),
    "chat": ("pipelines.cli.chat", "talk to a served model"),
    "down": ("pipelines.cli.local", "stop the local Ray head and every process that it started"),
    "evaluate": ("pipelines.cli.evaluate", "evaluate checkpoints, or a served model"),
    "generate": ("pipelines.cli.generate", "generate text with a checkpoint"),
    "report": ("pipelines.cli.report", "compare the evaluations of runs"),
    "runs": ("pipelines.cli.runs", "list runs and the state of their stages"),
    "serve": ("pipelines.cli.serve", "check a Serve config before it is deployed"),
    "signals": ("pipelines.cli.signals", "look at reference signals, or plan them"),
    "train": ("pipelines.cli.train", "plan trainings: memory, GPUs, hours"),
    "up": ("pipelines.cli.local", "start a local Ray head, or reuse the running one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="rcd", description="Residual Context Diffusion: runs and models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in argv[:1]:
            import_module(module).add_arguments(command)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        print(f"error: {' '.join(unknown)} is not an option of this command; see --help", file=sys.stderr)
        return 2
    try:
        return int(import_module(COMMANDS[options.command][0]).run(options))
    except UserError as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return 2


def _message(error: UserError) -> str | None:
    return str(error) if type(error) is UserError else user_message(error)


if __name__ == "__main__":
    sys.exit(main())

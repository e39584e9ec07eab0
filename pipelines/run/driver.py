"""Runs the stages of a recipe: checks, plan, lease, stages in order, report. Called by full.py and the stage files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NoReturn

from rich.table import Table

from pipelines.ray_cluster.connection import connect
from pipelines.ray_cluster.resources import describe_bundles, wait_for_resources
from pipelines.ray_cluster.stage_gauges import stage_gauges
from pipelines.recipe.inputs import check_inputs
from pipelines.recipe.load import dump_recipe, load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.commits import Commits, hub_names, known_or_asked, pinned, require_commits
from pipelines.run.directory import RunDirectory, Stage, StageContext, remove_temporary, resolve, run_stage
from pipelines.run.keys import key_of
from pipelines.run.lease import Lease
from pipelines.run.messages import make_console, user_message
from pipelines.run.plan import Decision, decide, make_plan, require_runnable, select_stages, with_dependents
from pipelines.run.readable import require_readable
from pipelines.run.stages import stages_of
from pipelines.run.stopping import Stopper
from rcd_core.errors import UserError
from rcd_core.io.retries import be_patient

Registry = Callable[[Recipe], dict[str, Stage]]


def main(argv: Sequence[str] | None = None, *, only: Sequence[str] = ("*",), registry: Registry = stages_of) -> int:
    """The command line. Returns the exit code: 0, or 2 with one message on stderr for an error that the user can fix.

    only: patterns of the stages that this program runs; the default for --stages.
    """
    options = _parser().parse_args([_spelled(arg) for arg in (sys.argv[1:] if argv is None else argv)])
    try:
        storage = [f"storage={json.dumps(options.storage)}"] if options.storage else []
        recipe = load_recipe(options.recipe, [*options.set, *storage])
        return _Job(recipe, registry(recipe), options, only).main()
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def run_recipe(
    recipe: Recipe,
    only: Sequence[str],
    *,
    keep: str,
    redo: Sequence[str] = (),
    dry_run: bool = False,
    verbose: bool = False,
) -> int:
    """Run the stages of a recipe that match `only`. keep: how the caller's user keeps results of other settings.
    Returns the exit code; raises UserError."""
    options = argparse.Namespace(
        stages=None, redo=list(redo), repair=False, teardown=False, dry_run=dry_run, verbose=verbose
    )
    return _Job(recipe, stages_of(recipe), options, only, keep).main()


def stage_main(*only: str) -> NoReturn:
    """The main function of a stage file: `if __name__ == "__main__": stage_main("prepare")`."""
    sys.exit(main(only=only))


def _spelled(argument: str) -> str:
    """--dry_run is --dry-run, as for the `rcd` command."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run the stages of a recipe; finished stages are skipped.")
    add = parser.add_argument
    add("--recipe", default="demo", help="name of a shipped recipe or path of a YAML file (default: demo)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, e.g. target.train.steps=100")
    add("--storage", metavar="DIR", help="absolute directory or URI for runs; short for --set storage=DIR")
    add("--stages", metavar="A,B", help="run only these; patterns like 'target*' work")
    add("--redo", action="append", default=[], metavar="STAGE", help="repeat a stage and its dependents")
    add("--repair", action="store_true", help="verify finished signals and recompute damaged shards")
    add("--dry-run", action="store_true", help="print the effective recipe, the plan and the resources; run nothing")
    add("--teardown", action="store_true", help="remove the served application of this run")
    add("--verbose", action="store_true", help="show Ray's progress bars and logs")
    return parser


@dataclass
class _Job:
    recipe: Recipe
    stages: dict[str, Stage]
    options: argparse.Namespace
    only: Sequence[str]
    keep: str = "--set name=NAME starts another run"

    def __post_init__(self) -> None:
        self.console = make_console()
        self.run = RunDirectory(self.recipe.run_directory)
        self.commits: Commits | None = None
        self.chosen = [name for name in self.stages if any(fnmatch(name, pattern) for pattern in self.only)]
        if self.options.stages is not None:
            if not self.options.stages.strip(", "):
                raise UserError(f"--stages is {self.options.stages!r}; name stages, or leave it out for all of them")
            allowed = self.chosen
            self.chosen = select_stages(
                self.stages, [part.strip() for part in self.options.stages.split(",")], "--stages"
            )
            if foreign := [name for name in self.chosen if name not in allowed]:
                raise UserError(
                    f"--stages: this program runs {', '.join(allowed)}; for {', '.join(foreign)} use full.py"
                )
        redo = select_stages(self.stages, self.options.redo, "--redo") if self.options.redo else []
        if absent := [name for name in redo if name not in self.chosen]:
            raise UserError(
                f"--redo {absent[0]}: not among the stages to run, {', '.join(self.chosen)}; add it to --stages"
            )
        self.redo = [name for name in with_dependents(self.stages, redo) if name in self.chosen]

    def main(self) -> int:
        if self.options.teardown:
            return self._teardown()
        if self.options.repair:
            self.chosen = [name for name in self.chosen if self.stages[name].repair]
            if not self.chosen:
                raise UserError("--repair: only stage signals can be repaired, and it is not among the stages to run")
        check_inputs(self.recipe)
        plan = self._plan(self.redo)
        to_run = (self.stages[name] for name in self.chosen if plan[name].action != "skip")
        notes = [n for stage in to_run if stage.check for n in resolve(stage.check)(self.recipe) or ()]
        if self.options.dry_run:
            self._show(plan)
            for note in notes:
                self.console.print(note, markup=False, highlight=False, soft_wrap=True)
        require_runnable(self.stages, plan, self.chosen, self.run, self.keep)
        return 0 if self.options.dry_run else self._start()

    def _plan(self, redo: Sequence[str] = ()) -> dict[str, Decision]:
        try:
            if self.commits is None:
                names = hub_names(value for stage in self.stages.values() for value in stage.outside.values())
                stored = [self.run.commits(stage) for stage in self.stages] if names else []
                self.commits = known_or_asked(names, {k: v for one in stored for k, v in one.items() if v})
            return make_plan(self.recipe, self.stages, self.run, redo, self.commits)
        except OSError as error:
            raise UserError(f"storage {self.recipe.storage} is not readable: {error}; correct --storage") from error

    def _show(self, plan: dict[str, Decision]) -> None:
        print(dump_recipe(self.recipe))
        table = Table("stage", "action", "why", "resources", title=f"plan for {self.run.path}")
        for name in self.chosen:
            decision = plan[name]
            resources = describe_bundles(decision.stage.bundles) if decision.action != "skip" else ""
            table.add_row(name, decision.action, decision.why, resources)
        self.console.print(table)

    def _start(self) -> int:
        """Run the stages under the lease. SIGTERM, Ctrl-C or a lost lease terminate the process inside this method."""
        lease = Lease(self.run.path, on_lost=lambda reason: stopper.stop(reason, 1))
        with Stopper(lease.release) as stopper:
            try:
                lease.acquire(self._say)
            except OSError as error:
                raise UserError(f"storage {self.recipe.storage} is not writable: {error}; correct --storage") from error
            self.run.lease = lease
            be_patient()  # the storage has just answered
            try:
                self._repair() if self.options.repair else self._drive(stopper)
            finally:
                lease.release()
        return 0

    def _drive(self, stopper: Stopper) -> None:
        plan = self._plan(self.redo)  # another job may have finished something before we had the lease
        require_runnable(self.stages, plan, self.chosen, self.run, self.keep)
        to_run = [plan[name].stage for name in self.chosen if plan[name].action != "skip"]
        for stage in to_run:
            require_commits(stage.outside, self.commits or {})
        self._say(f"run {self.run.path}: {len(to_run)} of {len(self.chosen)} stages to run")
        for stage in to_run:  # before anything is removed or computed
            self._wait(stage)
        require_readable(self.run, self.stages, self.redo, self._say)
        for name in reversed(self.redo):  # dependents first, so that a kill leaves no stale results
            self.run.remove_stage(name)
        self.run.write_recipe(self.recipe)
        started = time.monotonic()
        table = Table("stage", "state", "seconds")
        for name in self.chosen:
            state, manifest = self._run_one(self.stages[name], stopper)
            table.add_row(name, state, f"{manifest['seconds']:.1f}")
        table.add_row("all", "this job", f"{time.monotonic() - started:.1f}", style="bold")
        self.console.print(table)
        for name in self.chosen:
            if report := self.stages[name].report:
                resolve(report)(self._context(self.stages[name]))

    def _run_one(self, stage: Stage, stopper: Stopper) -> tuple[str, dict[str, Any]]:
        # Re-evaluate now that the earlier stages have run and all inputs are known.
        inputs = {name: (self.run.manifest(name) or {}).get("fingerprint") for name in stage.inputs}
        decision = decide(self.recipe, stage, self.run, inputs, commits=self.commits)
        if decision.action == "refuse":
            require_runnable(self.stages, self._plan(), [stage.name], self.run, self.keep)
        if decision.action == "skip" and decision.manifest:
            self._say(f"{stage.name}: skipped, {decision.why}")
            remove_temporary(stage, self.run)  # the last job may have been killed before it did
            return "skipped (already done)", decision.manifest
        self._wait(stage, free=True)
        self._say(f"{stage.name}: starts, {decision.why}", style="bold")
        stopper.install()  # Ray Train replaces the SIGINT handler
        with stage_gauges(self.recipe.name, stage.name):
            manifest = run_stage(stage, self._context(stage, decision.material), decision.material)
        self._say(f"{stage.name}: done in {manifest['seconds']:.1f} s", style="bold")
        return "done", manifest

    def _say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def _wait(self, stage: Stage, free: bool = False) -> None:
        if stage.needs_cluster:
            connect(self.options.verbose)
            timeout_s = self.recipe.resources.timeout_s
            wait_for_resources(stage.bundles, timeout_s, f"stage {stage.name}", free=free, say=self._say)

    def _context(self, stage: Stage, material: dict[str, Any] | None = None) -> StageContext:
        manifest = self.run.manifest(stage.name)
        return StageContext(
            recipe=pinned(self.recipe, self.commits or {}),
            run=self.run,
            stage=stage.name,
            key=key_of(material) if material else manifest["key"] if manifest else "",
            inputs=stage.inputs,
            console=self.console,
            verbose=self.options.verbose,
        )

    def _repair(self) -> None:
        """Fix finished results in place. Keys and fingerprints stay."""
        plan = self._plan()
        for name in self.chosen:
            if plan[name].action != "skip":
                raise UserError(f"--repair: stage {name} is not done ({plan[name].why}); run without --repair")
            stage = self.stages[name]
            self._wait(stage, free=True)
            if summary := resolve(str(stage.repair))(self._context(stage)):
                self.run.replace_summary(name, summary)
            self._say(f"{name}: repaired" if summary else f"{name}: nothing to repair", style="bold")

    def _teardown(self) -> int:
        for name in self.chosen:
            if teardown := self.stages[name].teardown:
                connect(self.options.verbose)
                resolve(teardown)(self._context(self.stages[name]))
        return 0

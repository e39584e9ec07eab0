"""Drives the stages of a recipe: checks, plan, lease, stages in order, report. full.py and the stage files call it."""

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
from pipelines.recipe.inputs import check_inputs
from pipelines.recipe.load import dump_recipe, load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, Stage, StageContext, resolve, run_stage
from pipelines.run.keys import key_of
from pipelines.run.lease import Lease
from pipelines.run.messages import make_console, user_message
from pipelines.run.plan import Decision, decide, make_plan, require_runnable, select_stages, with_dependents
from pipelines.run.stages import stages_of
from pipelines.run.stopping import Stopper
from rcd_core.errors import UserError

Registry = Callable[[Recipe], dict[str, Stage]]


def main(argv: Sequence[str] | None = None, *, only: Sequence[str] = ("*",), registry: Registry = stages_of) -> int:
    """The command line. Returns the exit code: 0, or 2 with one message on stderr for what the user can mend.

    only: patterns of the stages this program drives; its default for --stages.
    """
    options = _parser().parse_args(argv)
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
    recipe: Recipe, only: Sequence[str], *, redo: Sequence[str] = (), dry_run: bool = False, verbose: bool = False
) -> int:
    """Drive the stages of a recipe that match `only`. Returns the exit code; UserError for what the user can mend."""
    options = argparse.Namespace(
        stages=None, redo=list(redo), repair=False, teardown=False, dry_run=dry_run, verbose=verbose
    )
    return _Job(recipe, stages_of(recipe), options, only).main()


def stage_main(*only: str) -> NoReturn:
    """Run as a program the stages that match the patterns: `if __name__ == "__main__": stage_main("prepare")`."""
    sys.exit(main(only=only))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Run the stages of a recipe; what is done already is skipped.")
    add = parser.add_argument
    add("--recipe", default="demo", help="name of a packaged recipe or path of a YAML file (default: demo)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, e.g. target.train.steps=100")
    add("--storage", metavar="DIR", help="absolute directory or URI of the runs; short for --set storage=DIR")
    add("--stages", metavar="A,B", help="only these; patterns like 'target*' work")
    add("--redo", action="append", default=[], metavar="STAGE", help="make a stage, and what depends on it, again")
    add("--repair", action="store_true", help="check the bytes of finished signals, compute damaged shards again")
    add("--dry-run", action="store_true", help="print effective recipe, plan and resources; start nothing")
    add("--teardown", action="store_true", help="remove what this recipe's run has deployed")
    add("--verbose", action="store_true", help="show Ray's own progress bars and logs")
    return parser


@dataclass
class _Job:
    recipe: Recipe
    stages: dict[str, Stage]
    options: argparse.Namespace
    only: Sequence[str]

    def __post_init__(self) -> None:
        self.console = make_console()
        self.run = RunDirectory(self.recipe.run_directory)
        self.chosen = [name for name in self.stages if any(fnmatch(name, pattern) for pattern in self.only)]
        if self.options.stages:
            own = self.chosen
            self.chosen = select_stages(
                self.stages, [part.strip() for part in self.options.stages.split(",")], "--stages"
            )
            if foreign := [name for name in self.chosen if name not in own]:
                raise UserError(f"--stages: this program runs {', '.join(own)}; for {', '.join(foreign)} use full.py")
        redo = select_stages(self.stages, self.options.redo, "--redo") if self.options.redo else []
        if absent := [name for name in redo if name not in self.chosen]:
            raise UserError(f"--redo {absent[0]}: not among the stages to run, {', '.join(self.chosen)}; add it there")
        self.redo = [name for name in with_dependents(self.stages, redo) if name in self.chosen]

    def main(self) -> int:
        if self.options.teardown:
            return self._teardown()
        if self.options.repair:
            self.chosen = [name for name in self.chosen if self.stages[name].repair]
            if not self.chosen:
                raise UserError("--repair: only signals can be repaired, and they are not among the stages to run")
        check_inputs(self.recipe)
        plan = self._plan(self.redo)
        if self.options.dry_run:
            self._show(plan)
        require_runnable(self.stages, plan, self.chosen, self.run)
        return 0 if self.options.dry_run else self._start()

    def _plan(self, redo: Sequence[str] = ()) -> dict[str, Decision]:
        try:
            return make_plan(self.recipe, self.stages, self.run, redo)
        except OSError as error:
            raise UserError(f"storage {self.recipe.storage} cannot be read: {error}; mend --storage") from error

    def _show(self, plan: dict[str, Decision]) -> None:
        print(dump_recipe(self.recipe))
        table = Table("stage", "action", "why", "resources", title=f"plan for {self.run.path}")
        for name in self.chosen:
            decision = plan[name]
            asked = describe_bundles(decision.stage.bundles) if decision.action != "skip" else ""
            table.add_row(name, decision.action, decision.why, asked)
        self.console.print(table)

    def _start(self) -> int:
        """Drive the stages under the lease. A stop (SIGTERM, Ctrl-C, lease lost) ends the process in here."""
        lease = Lease(self.run.path, on_lost=lambda reason: stopper.stop(reason, 1))
        with Stopper(lease.release) as stopper:
            try:
                lease.acquire(self._say)
            except OSError as error:
                raise UserError(f"storage {self.recipe.storage} cannot be written: {error}; mend --storage") from error
            self.run.lease = lease
            try:
                self._repair() if self.options.repair else self._drive(stopper)
            finally:
                lease.release()
        return 0

    def _drive(self, stopper: Stopper) -> None:
        plan = self._plan(self.redo)  # another job may have finished something before we had the lease
        require_runnable(self.stages, plan, self.chosen, self.run)
        to_run = [plan[name].stage for name in self.chosen if plan[name].action != "skip"]
        self._say(f"run {self.run.path}: {len(to_run)} of {len(self.chosen)} stages to run")
        for stage in to_run:  # before anything is removed or computed
            self._wait(stage)
        for name in reversed(self.redo):  # results before what they were made from: a kill leaves no stale ones
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
        # The key again, now that the stages before have run and all its inputs are known.
        inputs = {name: (self.run.manifest(name) or {}).get("fingerprint") for name in stage.inputs}
        decision = decide(self.recipe, stage, self.run, inputs)
        if decision.action == "refuse":
            require_runnable(self.stages, self._plan(), [stage.name], self.run)
        if decision.action == "skip" and decision.manifest:
            self._say(f"{stage.name}: skipped, {decision.why}")
            return "skipped, done before", decision.manifest
        self._wait(stage, free=True)
        self._say(f"{stage.name}: starts, {decision.why}", style="bold")
        stopper.install()  # Ray Train leaves a SIGINT handler of its own
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
            recipe=self.recipe,
            run=self.run,
            stage=stage.name,
            key=key_of(material) if material else manifest["key"] if manifest else "",
            inputs=stage.inputs,
            console=self.console,
            verbose=self.options.verbose,
        )

    def _repair(self) -> None:
        """Mend finished results in place: same key, and for what depends on them the same content."""
        plan = self._plan()
        for name in self.chosen:
            if plan[name].action != "skip":
                raise UserError(f"--repair: stage {name} is not done here ({plan[name].why}); run without --repair")
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

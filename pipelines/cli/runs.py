"""`rcd runs`: lists the runs of a storage directory and the state of their stages."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipelines.cli.flags import RunsFlags
from pipelines.cli.terminal import absolute_path
from pipelines.run.directory import RunDirectory
from pipelines.run.lease import describe_lease, read_lease
from rcd_core.errors import UserError
from rcd_core.io import storage


def runs(flags: RunsFlags) -> int:
    list_runs(absolute_path(flags.storage), Console())
    return 0


def list_runs(directory: str, console: Console) -> None:
    """Print one row per run of a storage directory. Raises UserError if the directory does not exist."""
    if not storage.exists(directory):
        raise UserError(f"--storage {directory} does not exist; give the `storage` of your recipes, or run one first")
    if storage.exists(storage.join(directory, "recipe.yaml")):
        raise UserError(f"--storage {directory} is a run; give the directory that holds it")
    table = Table("run", "done", "partial", "in use by")
    for path in storage.list_directories(directory):
        if storage.exists(storage.join(path, "recipe.yaml")):
            done, partial = stage_states(path)
            lease = read_lease(path)
            table.add_row(
                storage.basename(path), " ".join(done), " ".join(partial), describe_lease(lease) if lease else ""
            )
    if table.row_count:
        console.print(table)
    else:
        console.print(f"no runs in {directory}", markup=False)


def stage_states(run_directory: str) -> tuple[list[str], list[str]]:
    """(finished stages in the order of finishing, stages that have started but not finished)."""
    run = RunDirectory(run_directory)
    names = [storage.basename(path) for path in storage.list_directories(run_directory)]
    manifests = {name: run.manifest(name) for name in names}
    done = sorted((m["created"], name) for name, m in manifests.items() if m)
    return [name for _, name in done], [n for n in names if manifests[n] is None and run.partial_key(n)]

"""Before --redo removes finished results: can what their stages read be read at all?

Prepared examples are read to the end, models of the run are compared with their stored digests, and shards of signals
must have their sizes (a training compares their digests as it reads them). A model in an object store is not
downloaded for this: its files must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pipelines.run.directory import RunDirectory, Stage
from rcd_core.errors import UserError
from rcd_core.io import checksums, storage
from rcd_core.io.threads import in_threads

_EXAMPLES = ("train", "validation", "test")


def require_readable(
    run: RunDirectory, stages: Mapping[str, Stage], redo: Collection[str], say: Callable[[str], None]
) -> None:
    """Raise UserError, before anything is removed, for a damaged result that a stage to be repeated reads."""
    kept = dict.fromkeys(name for stage in redo for name in stages[stage].inputs if name not in redo)
    for name in kept:
        if (manifest := run.manifest(name)) is None:
            continue  # it runs in this job
        say(f"--redo: reading what {name} has made, before anything is removed")
        try:
            _read(run.stage_directory(name), manifest["summary"])
        except (UserError, OSError) as error:
            users = ", ".join(stage for stage in redo if name in stages[stage].inputs)
            raise UserError(
                f"--redo {users}: nothing was removed, because the result of stage {name}, which it reads, is damaged: "
                f"{error}; repeat that stage, too: --redo {name}"
            ) from error


def _read(directory: str, summary: Mapping[str, Any]) -> None:
    files = [storage.join(directory, split, name) for split in _EXAMPLES for name in summary.get(split) or ()]
    for _ in in_threads(_decode, files):
        pass
    sizes = dict(zip(summary.get("shards") or (), summary.get("shard_bytes") or (), strict=False))
    for name, num_bytes in sizes.items():
        path = storage.join(directory, name)
        if not storage.exists(path) or storage.size(path) != num_bytes:
            raise UserError(f"{path} is missing or has another size than the {num_bytes} bytes that were written")
    if "weights_sha256" not in summary:
        return
    model = storage.join(directory, "model")
    if not storage.exists(storage.join(model, "config.json")):
        raise UserError(f"{model} has no config.json")
    if not storage.is_uri(model):
        checksums.verify(Path(model), Path(model).glob("*.safetensors"))


def _decode(path: str) -> None:
    from rcd_core.training.data.examples import open_parquet  # torch, which --help does not need

    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group)

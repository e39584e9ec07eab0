"""A job of three small stages in place of the real ones, for tests of the driver: as a module, or run as a program.

    first -> second -> third

Each stage leaves a line in <run>/../calls.txt, so that tests see what ran; second can be made to hang or fail.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.recipe.model import Recipe
from pipelines.run import lease
from pipelines.run.directory import Stage, StageContext
from pipelines.run.driver import main
from rcd_core.errors import UserError
from rcd_core.io import storage


def stages(recipe: Recipe) -> dict[str, Stage]:
    here = __name__ if __name__ != "__main__" else "fake_job"
    common: dict[str, Any] = {"function": f"{here}:run", "needs_cluster": False}
    found = [
        Stage(name="first", sections=("noise",), **common),
        Stage(name="second", inputs=("first",), sections=("signals",), **common),
        Stage(name="third", inputs=("second",), sections=("evaluate",), report=f"{here}:report", **common),
    ]
    return {stage.name: stage for stage in found}


def run(context: StageContext) -> dict[str, Any]:
    with (Path(context.run.path).parent / "calls.txt").open("a") as calls:
        calls.write(f"{context.stage}\n")
    outputs = [storage.join(context.input_dir(name), "out.txt") for name in context.inputs]
    upstream = "".join(storage.read_bytes(path).decode() for path in outputs)
    kept = storage.exists(storage.join(context.directory, "partial.txt"))
    storage.write_bytes(storage.join(context.directory, "partial.txt"), b"kept between attempts")
    if context.stage == "second":
        if "FAKE_FAIL" in os.environ:
            raise UserError("second.thing is wrong")
        if "FAKE_HANG" in os.environ:
            print("hanging", flush=True)
            time.sleep(600)
    storage.write_bytes(storage.join(context.directory, "out.txt"), f"{upstream}{context.stage};".encode())
    return {"resumed": kept}


def report(context: StageContext) -> None:
    print("report: " + storage.read_bytes(storage.join(context.directory, "out.txt")).decode())


if __name__ == "__main__":
    lease.HEARTBEAT_S, lease.TAKEOVER_S, lease._PAUSE_S = 0.2, 2.0, 0.2
    sys.exit(main(registry=stages))

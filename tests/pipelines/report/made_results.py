"""results.json of made-up answers, computed by the real statistics, for tests of tables, plots and pages."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluation.actor import ROWS
from pipelines.evaluation.results import MethodInfo, analyse
from rcd_core import DecodeSettings

THRESHOLDS = (0.6, 0.7, 0.8, 0.9, 1.0)
HARDWARE = {"devices": [{"device": "Abacus", "threads": 1, "torch": "2.13"}], "actors": 2, "batch_size": 8}


def info(name: str, title: str, **changes: Any) -> MethodInfo:
    baseline = None if name == "seqd" else "seqd"
    defaults = {"model": "target", "start": None, "block_length": 8, "trained_with": None, "baseline": baseline}
    return MethodInfo(**{**defaults, "name": name, "title": title, **changes})


def answers(
    arm: str, speed: float, skill: float, problems: int = 60, samples: int = 1, reference: int = 0, timed: bool = True
) -> pa.Table:
    """Rows of a method. Accuracy rises with the threshold to 0.5 + skill, passes from 12 / speed to 60 / speed."""
    hard = np.random.default_rng(5).random(problems)  # the same problems for all methods
    rows = []
    for t, threshold in enumerate(THRESHOLDS):
        for i, sample in product(range(problems), range(samples)):
            luck = np.random.default_rng([i, sample]).normal(0, 0.05)
            rows.append({
                "arm": arm, "threshold": threshold, "example_id": f"{i:03d}", "sample": sample,
                "correct": bool(hard[i] + luck < 0.5 + skill * (t / 4) ** 0.5), "tokens": 120,
                "denoise": round((12 + 12 * t) / speed), "reference": reference, "prefill": 1, "store": 0,
                "reference_weight": 0.45 if reference else 0.0, "reference_flops_weight": 0.4 if reference else 0.0,
                "seconds": 0.01 * (1 + t) / speed if timed else None, "finish_reason": "stop", "completion": "",
            })  # fmt: skip
    return pa.Table.from_pylist(rows, schema=ROWS)


def made(
    speed: float = 1.5, skill: float = 0.45, grader: str = "default", differ: int | None = None, **changes: Any
) -> dict[str, Any]:
    """SeqD against one RCD method of this speed and skill. differ: answers that another grader judges differently.
    changes: arguments of `answers` for both."""
    table = pa.concat_tables(
        [answers("seqd", 1.0, 0.45, **changes), answers("target/zero", speed, skill, **{"reference": 1, **changes})]
    )
    judged = pa.array([None if differ is None else i < differ for i in range(len(table))], pa.bool_())
    table = table.set_column(table.column_names.index("graders_differ"), "graders_differ", judged)
    plain = asdict(DecodeSettings(block_length=8, seed=0))
    return analyse(
        recipe="<made up>",
        task="sudoku",
        seed=3,
        methods=[
            info("seqd", "SeqD", model="baseline"),
            info("target/zero", "RCD, zero start", start="zero", trained_with={"dropout": 0.25, "source": "signals"}),
        ],
        table=table,
        settings={"seqd": plain, "target/zero": {**plain, "residual": True, "start": "zero", "alpha_scale": 1.7312}},
        accuracy_levels=(0.9,),
        hardware=HARDWARE,
        grader=grader,
    )

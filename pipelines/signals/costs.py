"""Estimates the cost of reference signals before any work: rows, bytes, device hours, and when a cache pays off.

    reference FLOP       = 2 N_ref    x tokens that enter the model     N: parameters
    one target's FLOP    = 6 N_target x tokens that enter the model     (forward and backward)
    device hours         = FLOP / (peak FLOP/s x MFU x 3600)
    break-even targets   = (hours of the cached rows + storage, in the same hours) / online hours of one target

SDAR reads a row twice, [noisy | clean]; LLaDA once. Online, every target pays for each row that it trains on. The cache
pays once for each (example, draw), however many epochs and targets use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory
from pipelines.signals.plan import planned_rows
from rcd_core.errors import UserError

PASSES = {"sdar": 2, "llada": 1}  # how often a row's tokens enter the model in one forward pass of training
LOGPROB_BITS = 13  # of 16, after compression (plan.predicted_bytes)


@dataclass(frozen=True)
class Volume:
    """Amounts of data. tokens, masked: in all cached rows. trained_tokens: in all rows that one target trains on.

    exact: counted from prepared examples; otherwise an upper bound from the recipe's limits.
    """

    examples: int
    rows: int
    tokens: int
    masked: int
    trained_tokens: int
    vocab_size: int
    exact: bool


@dataclass(frozen=True)
class Costs:
    """Device hours. break_even: with this many targets the cache costs as much as online signals."""

    reference_hours: float
    online_hours: float
    target_hours: float
    break_even: float


def volume(recipe: Recipe) -> Volume:
    """From the manifest of the stage `prepare` if it is done, otherwise from the recipe.

    Raises UserError if neither says how many examples there are or how large the vocabulary is.
    """
    manifest = RunDirectory(recipe.run_directory).manifest("prepare")
    # p = (1 - eps) t + eps with t uniform: the mean share of labelled tokens that are masked.
    share = (1.0 + recipe.noise.eps) / 2.0
    chunks: Mapping[str, Any] | None = manifest["summary"].get("chunks") if manifest else None
    if manifest is not None and chunks is not None:
        examples, tokens, labelled = (int(np.sum(chunks[name])) for name in ("rows", "tokens", "labelled"))
        vocab_size = int(manifest["summary"]["vocab_size"])
    else:
        if recipe.data.num_train is None:
            raise UserError(
                "data.num_train is null and the examples are not prepared, so their number is unknown; give "
                "--examples, or run `full.py --recipe ... --stages prepare` first"
            )
        if recipe.tokenizer.path is not None:
            raise UserError(
                f"tokenizer.path {recipe.tokenizer.path!r}: a plan does not read its vocabulary; "
                "run `full.py --recipe ... --stages prepare` first"
            )
        examples, vocab_size = recipe.data.num_train, recipe.tokenizer.vocab_size
        tokens = labelled = examples * recipe.data.max_length
    rows = planned_rows(recipe, examples)
    train = recipe.training("target").train.resolved(examples)
    trained = train.steps * train.batch_size
    return Volume(
        examples=examples,
        rows=rows,
        tokens=tokens * rows // examples,
        masked=round(labelled * rows / examples * share),
        trained_tokens=tokens * trained // examples,
        vocab_size=vocab_size,
        exact=chunks is not None,
    )


def column_bytes(amounts: Volume, top_k: int) -> dict[str, float]:
    """Predicted bytes of each column after compression; the stage plans its shards by the sum.

    With adaptive k, topk_ids and topk_logprobs are at most this large.
    """
    id_bits = (amounts.vocab_size - 1).bit_length()
    kept = amounts.masked * min(top_k, amounts.vocab_size)
    bits = {
        "example_id, draw, p_mask": 64 * amounts.rows,
        "input_ids": id_bits * amounts.tokens,
        "labels": id_bits * amounts.tokens,
        "topk_ids": id_bits * kept,
        "topk_logprobs": LOGPROB_BITS * kept,
        "entropy, tail_mass, masked_positions": 64 * amounts.masked,
    }
    return {name: value / 8 for name, value in bits.items()}


def costs(
    amounts: Volume, passes: int, reference: float, target: float, flops_per_s: float, storage_hours: float
) -> Costs:
    """reference, target: parameters. flops_per_s: peak times MFU. storage_hours: cost of keeping the cache."""
    per_hour = flops_per_s * 3600
    cached = 2 * reference * passes * amounts.tokens / per_hour
    online = 2 * reference * passes * amounts.trained_tokens / per_hour
    trained = 6 * target * passes * amounts.trained_tokens / per_hour
    return Costs(cached, online, trained, (cached + storage_hours) / online)

"""What reference signals will cost, before any work: rows, bytes, the reference's time, and when a cache pays.

    reference FLOP       = 2 N_ref    x tokens that enter the model     N: parameters
    one target's FLOP    = 6 N_target x tokens that enter the model     (forward and backward)
    device hours         = FLOP / (peak FLOP/s x MFU x 3600)
    break-even targets   = (hours of the cached rows + storage, in the same hours) / online hours of one target

SDAR sees a row twice, [noisy | clean]; LLaDA once. Online, every target pays for each row it trains on; the cache pays
once for each (example, draw), however many epochs and targets use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory
from pipelines.signals.plan import wanted_rows
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import checkpoint_directory

PASSES = {"sdar": 2, "llada": 1}  # how often a row's tokens enter the model in one training forward pass
LOGPROB_BITS = 13  # of 16, after compression (signal_plan.predicted_bytes)


@dataclass(frozen=True)
class Volume:
    """How much there is. exact: counted from prepared examples, else from the recipe's limits, an upper bound. tokens
    and masked: over all cached rows; trained_tokens: over all rows that one target trains on."""

    examples: int
    rows: int
    tokens: int
    masked: int
    trained_tokens: int
    vocab_size: int
    exact: bool


@dataclass(frozen=True)
class Costs:
    """Device hours, and shares of them. break_even: targets from which the cache costs no more than online."""

    reference_hours: float
    online_hours: float
    target_hours: float
    break_even: float


def volume(recipe: Recipe) -> Volume:
    """From the manifest of the stage prepare where it is done, else from the recipe. UserError where neither says."""
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
                "data.num_train is null and the examples are not prepared, so their number is not known; "
                "run `full.py --recipe ... --stages prepare` first, or set data.num_train"
            )
        if recipe.tokenizer.path is not None:
            raise UserError(
                f"the vocabulary of tokenizer.path {recipe.tokenizer.path!r} is not read for a plan; "
                "run `full.py --recipe ... --stages prepare` first"
            )
        examples, vocab_size = recipe.data.num_train, recipe.tokenizer.vocab_size
        tokens = labelled = examples * recipe.data.max_length
    rows = wanted_rows(recipe, examples)
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


def column_bytes(found: Volume, top_k: int) -> dict[str, float]:
    """Predicted bytes of each column after packing; the sum is what the stage plans its shards by. With adaptive k
    topk_ids and topk_logprobs are at most this."""
    id_bits = (found.vocab_size - 1).bit_length()
    kept = found.masked * min(top_k, found.vocab_size)
    bits = {
        "example_id, draw, p_mask": 64 * found.rows,
        "input_ids": id_bits * found.tokens,
        "labels": id_bits * found.tokens,
        "topk_ids": id_bits * kept,
        "topk_logprobs": LOGPROB_BITS * kept,
        "entropy, tail_mass, masked_positions": 64 * found.masked,
    }
    return {name: value / 8 for name, value in bits.items()}


def parameters(source: str | ModelConfig, vocab_size: int, flag: str) -> int:
    """Of a model to be made, or of a local checkpoint from its files' headers; nothing is loaded or downloaded."""
    if isinstance(source, ModelConfig):
        width, head = source.hidden_size, source.resolved_head_dim
        attention = 2 * width * head * (source.num_heads + source.num_kv_heads)
        layer = attention + 3 * width * source.intermediate_size + 2 * width
        tables = vocab_size * width * (1 if source.tie_embeddings else 2)
        return source.num_layers * layer + tables + width
    if not Path(source).is_dir():
        raise UserError(f"checkpoint {source!r} is not on this machine; say how large it is with {flag}, e.g. 1.7e9")
    from safetensors import safe_open

    total = 0
    for path in sorted(checkpoint_directory(source).glob("*.safetensors")):
        with safe_open(str(path), framework="numpy") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return total


def costs(
    found: Volume, passes: int, reference: float, target: float, flops_per_s: float, storage_hours: float
) -> Costs:
    """reference, target: parameters; flops_per_s: peak times MFU; storage_hours: what keeping the cache costs."""
    per_hour = flops_per_s * 3600
    cached = 2 * reference * passes * found.tokens / per_hour
    online = 2 * reference * passes * found.trained_tokens / per_hour
    trained = 6 * target * passes * found.trained_tokens / per_hour
    return Costs(cached, online, trained, (cached + storage_hours) / online)

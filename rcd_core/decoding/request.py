"""From a user's request to a Sequence: defaults are filled in, faults are reported, canvas and blocks are laid out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from rcd_core.decode_settings import CONSTANT_RULES, DecodeSettings, ResolvedSettings, Start
from rcd_core.decoding.compat import CompatSequence
from rcd_core.decoding.editing import EditingSequence
from rcd_core.decoding.live_blocks import LiveBlocksSequence
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.sub_blocks import SubBlocksSequence, sub_blocks
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import NUM_SEED_BITS

# A block that is not activated commits by a bound; blocks behind it are not seen, and a cached pass has no second one.
MAX_PLANNED_STEPS = 8192  # of a block, by a schedule that may plan more passes than tokens
_WITH_LIVE_BLOCKS: dict[str, tuple[Any, ...]] = {
    "policy": ("low_confidence_dynamic", "entropy_bounded"),
    "residual_scope": ("block",),
    "editing_threshold": (None,),
    "cfg_scale": (0.0,),
}


def resolve_settings(settings: DecodeSettings, model: DiffusionModel, has_reference: bool) -> ResolvedSettings:
    """Fill every default from the checkpoint, then from the family. Raises UserError for a setting that the model does
    not support."""
    rcd = model.info.rcd
    block_length = settings.block_length or model.info.block_length
    live_blocks = settings.max_live_blocks is not None
    if live_blocks and not model.whole_canvas and (model.blocks_from_prompt_end or model.shifted):
        raise UserError(f"max_live_blocks is {settings.max_live_blocks}, which this family does not have; leave it out")
    block_causal = live_blocks or not model.whole_canvas
    sub_length = _sub_block_length(settings, model, block_length)
    allowed_caches = ("none", "block") if block_causal else ("none", "prefix", "dual")
    if sub_length is not None:
        allowed_caches = ("none", "block", "dual")
        if settings.compat_passes:
            raise UserError(f"compat_passes is true, but blocks with sub-blocks ({sub_length}) have none; leave it out")
    cache = settings.cache or ("block" if block_causal else "none")
    if cache not in allowed_caches:
        case = f"{model.family} with max_live_blocks" if live_blocks else model.family
        raise UserError(f"cache is {cache!r}; allowed for {case}: {', '.join(allowed_caches)}")
    for name, allowed in _WITH_LIVE_BLOCKS.items() if live_blocks else ():
        if (value := getattr(settings, name)) not in allowed:
            raise UserError(f"{name} is {value!r}; allowed with max_live_blocks: {', '.join(map(str, allowed))}")
    if settings.cfg_scale and (cache != "none" or not model.whole_canvas):
        raise UserError(f"cfg_scale is {settings.cfg_scale}; guidance is LLaDA's and needs cache='none'")
    if settings.residual_scope == "all_masked" and not model.whole_canvas:
        raise UserError("residual_scope is 'all_masked'; this model sees no later blocks, use 'block'")
    if settings.residual_scope == "all_masked" and cache == "dual":
        raise UserError("residual_scope is 'all_masked' with cache='dual', whose passes cover one block; use 'block'")
    if settings.editing_threshold is not None:
        _check_editing(settings, model, sub_length)
    steps = settings.denoising_steps or block_length
    schedule = settings.schedule or model.default_schedule
    most = block_length if schedule == "even" else max(block_length, MAX_PLANNED_STEPS)
    if steps > most:
        limit = f"block_length, {block_length}" if schedule == "even" else str(most)
        raise UserError(f"denoising_steps is {steps}; it must be at most {limit}")
    for token in settings.stop_token_ids or ():
        if not 0 <= token < model.vocab_size:
            raise UserError(f"stop_token_ids holds {token}; ids run from 0 to {model.vocab_size - 1}")
    start: Start = settings.start or rcd.get("start") or model.default_start
    if model.loophole is not None and settings.residual:
        _check_loopholing(settings, start, live_blocks, sub_length)
    if settings.residual and not has_reference and (start == "reference" or settings.residual_source == "reference"):
        name = "residual_source" if settings.residual_source == "reference" else "start"
        raise UserError(f"{name} is 'reference' but no reference model is loaded; load one, or set start='zero'")
    alpha = settings.alpha or rcd.get("alpha") or "normalized_entropy"
    alpha_scale = settings.alpha_scale or rcd.get("alpha_scale")
    if settings.residual and alpha == "calibrated_entropy" and alpha_scale is None:
        raise UserError(
            "alpha is 'calibrated_entropy' but the checkpoint stores no alpha_scale; set alpha_scale (nats)"
        )
    if settings.residual and alpha == "learned" and model.learned_alpha is None:
        raise UserError("alpha is 'learned' but the checkpoint has no learned network; choose another rule")
    stops = model.info.eos_token_ids if settings.stop_token_ids is None else settings.stop_token_ids
    seed = settings.seed
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1)[0] & ((1 << NUM_SEED_BITS) - 1))
    resolved = {
        "block_length": block_length,
        "denoising_steps": steps,
        "schedule": schedule,
        "sub_block_length": sub_length,
        "cache": cache,
        "start": start,
        "residual_temperature": settings.residual_temperature or rcd.get("residual_temperature") or 1.0,
        "alpha": alpha,
        "alpha_scale": alpha_scale,
        "stop_token_ids": tuple(stops),
        "seed": seed,
    }
    return ResolvedSettings(**{**vars(settings), **resolved})


def _check_editing(settings: DecodeSettings, model: DiffusionModel, sub_length: int | None) -> None:
    name = f"editing_threshold is {settings.editing_threshold:g}"
    if model.whole_canvas:
        raise UserError(f"{name}, but {model.family}'s blocks see what follows them; leave it out")
    if sub_length is not None:
        raise UserError(f"{name}, which does not go with sub-blocks; leave one of them out")
    if settings.compat_passes:
        raise UserError(f"{name}, which does not go with compat_passes; leave one of them out")


def _sub_block_length(settings: DecodeSettings, model: DiffusionModel, block_length: int) -> int | None:
    """None: blocks are not divided, and no block takes its first token from the one before."""
    length = settings.sub_block_length
    if length is None:
        if model.whole_canvas or not model.shifted:
            return None
        default = model.default_sub_block_length or block_length
        return block_length if block_length % default else default
    name = f"sub_block_length is {length}"
    if model.whole_canvas or model.blocks_from_prompt_end:
        raise UserError(f"{name}, but this model's attention has no blocks counted from position 0; leave it out")
    if settings.max_live_blocks is not None:
        raise UserError(f"{name}, which does not go with max_live_blocks; leave one of them out")
    if block_length % length:
        raise UserError(f"{name}; it must divide block_length, {block_length}")
    return length


def _check_loopholing(settings: DecodeSettings, start: Start, live_blocks: bool, sub_length: int | None) -> None:
    """The model feeds back its states, so what concerns distributions, and blocks that share a state, do not apply."""
    reasons = {
        f"start is {start!r}": start in ("reference", "dirichlet"),
        "residual_source is 'reference'": settings.residual_source == "reference",
        f"residual_top_k is {settings.residual_top_k}": settings.residual_top_k is not None,
        f"alpha is {settings.alpha!r}": settings.alpha is not None,
        "residual_scope is 'all_masked'": settings.residual_scope == "all_masked",
        f"max_live_blocks is {settings.max_live_blocks}": live_blocks,
        f"sub_block_length is {sub_length}": sub_length is not None,
        "compat_passes is true": settings.compat_passes,
        f"editing_threshold is {settings.editing_threshold}": settings.editing_threshold is not None,
    }
    for name, refused in reasons.items():
        if refused:
            remedy = "set start to 'zero' or 'self'" if name.startswith("start") else "leave it out"
            raise UserError(f"{name}, which does not go with this model's Loopholing; {remedy}, or set residual=False")


def uncalibrated(settings: DecodeSettings, model: DiffusionModel) -> str | None:
    """A warning if the model's own predictions become residuals at a T_res that was never calibrated or chosen."""
    chosen = settings.residual_temperature or model.info.rcd.get("calibration")
    chosen = chosen or (settings.alpha or model.info.rcd.get("alpha")) in CONSTANT_RULES
    chosen = chosen or model.info.rcd.get("source") in ("self", "self_same")  # trained on its own predictions: T_res 1
    chosen = chosen or model.loophole is not None  # states have no temperature
    # Training writes 1 into every checkpoint; another value was chosen by someone.
    chosen = chosen or model.info.rcd.get("residual_temperature") not in (None, 1.0)
    if not settings.residual or settings.residual_source != "self" or chosen:
        return None
    return (
        "residual_temperature (T_res) was never calibrated for this checkpoint, so 1 is used; run `rcd calibrate` "
        "(for a model of a run `rcd export`), or set residual_temperature"
    )


def make_sequence(
    model: DiffusionModel,
    ids: list[int],
    settings: DecodeSettings,
    *,
    infill: bool,
    has_reference: bool,
    committed: list[int] | None = None,
    num_logprobs: int | None = None,
    num_candidates: int = 0,
) -> Sequence:
    """Check one request and lay out its canvas and blocks. Raises UserError naming the field.

    committed: new tokens of finished blocks, to resume a request that another engine began. With the same seed it ends
    with the same tokens. Ignored for infill and with several live blocks, which start again. num_logprobs: of Sequence;
    not for infill. num_candidates: of Sequence.
    """
    name = "canvas" if infill else "prompt"
    resolved = resolve_settings(settings, model, has_reference)
    try:
        given = np.asarray(ids, dtype=np.int64)
    except OverflowError:
        known = f"ids run from 0 to {model.vocab_size - 1}"
        raise UserError(f"the {name} holds a token id of more than 64 bits; {known}") from None
    if given.ndim != 1 or not len(given):
        raise UserError(f"the {name} is empty; give at least one token")
    if given.min() < 0 or given.max() >= model.vocab_size:
        bad = int(given.max() if given.max() >= model.vocab_size else given.min())
        raise UserError(f"the {name} holds token id {bad}; ids run from 0 to {model.vocab_size - 1}")
    holds_mask = bool((given == model.mask_token_id).any())
    if infill and not holds_mask:
        raise UserError(f"the canvas holds no mask token (id {model.mask_token_id}); there is nothing to fill")
    if not infill and holds_mask:
        raise UserError(f"the prompt holds the mask token (id {model.mask_token_id}); use infill to fill it")
    b = resolved.block_length
    origin = 0
    if model.blocks_from_prompt_end:
        origin = int(np.argmax(given == model.mask_token_id)) if infill else len(given)
    total = len(given)
    if not infill:
        total = origin + -(-(len(given) + resolved.max_new_tokens - origin) // b) * b
    if total > model.max_positions:
        raise UserError(
            f"{total} positions are needed ({len(given)} given, max_new_tokens {resolved.max_new_tokens}, "
            f"rounded up to blocks of {b}); the model has {model.max_positions}"
        )
    canvas = np.full(total, model.mask_token_id, dtype=np.int64)
    canvas[: len(given)] = given
    if committed and not infill and (resolved.max_live_blocks or 1) == 1:
        canvas[len(given) :][: len(committed)] = committed
    masked, divided = canvas == model.mask_token_id, resolved.sub_block_length
    if divided is not None:
        blocks = sub_blocks(masked, b, divided, model.shifted)
    else:
        starts = range(origin, len(canvas), b)
        blocks = [(s, min(s + b, len(canvas))) for s in starts if masked[s : s + b].any()]
    if not blocks:
        raise UserError(f"committed holds {len(committed or ())} tokens, so no masked token is left to decode")
    if infill and num_logprobs is not None:
        raise UserError("logprobs do not go with infill; leave the field out")
    kind = CompatSequence if resolved.compat_passes else Sequence
    if resolved.max_live_blocks is not None:
        kind = LiveBlocksSequence
    elif divided is not None:
        kind = SubBlocksSequence
    elif resolved.editing_threshold is not None:
        kind = EditingSequence
    num_prompt = len(canvas) if infill else len(given)
    made = kind(model, resolved, canvas, num_prompt, infill, blocks, num_logprobs=num_logprobs)
    made.num_candidates = num_candidates
    return made


def check_failures(sequences: Iterable[Sequence]) -> None:
    """Raise UserError if requests have failed. Called when the others are finished."""
    errors = [s.error for s in sequences if s.error is not None]
    if errors:
        raise UserError(f"{len(errors)} requests failed; the first one: {errors[0]}")

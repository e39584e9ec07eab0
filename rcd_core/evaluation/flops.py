"""What a pass costs in FLOPs, so that a reference pass can be counted in passes of its target.

    FLOPs of a pass = 2 * layers * (2 D d (H + G) + 3 D F) * Q        projections and MLP of every token that enters
                    + 4 * layers * H d * Q * K                        scores and weighted sum of the attention
                    + 2 * V D * N                                     head

A multiplication and an addition are two FLOPs; norms, softmax and embeddings are left out. Work that only fills a
cache (the prompt, finished blocks) is in neither of the two passes that are compared, as it is in no rate of
evaluation.py: both go over one block with its context in the cache, where the family has a cache.

Shapes: Q tokens that enter, K keys they see, N positions whose tokens are predicted, D width, F intermediate width,
H query heads, G key/value heads, d head width, V vocabulary, p denoising passes of a block.
"""

from __future__ import annotations

from rcd_core.decoding.generation import Generation
from rcd_core.decoding.sequence import Sequence
from rcd_core.families.base import DiffusionModel
from rcd_core.training.plan import ModelShape


def pass_flops(shape: ModelShape, *, queries: float, keys: float, predicted: float) -> float:
    """Of one row. queries, keys, predicted: Q, K, N, which may be means where the others do not vary with them."""
    projections = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    layer = 2 * (projections + 3 * shape.hidden_size * shape.intermediate_size) * queries
    attention = 4 * shape.num_heads * shape.head_dim * queries * keys
    return shape.num_layers * (layer + attention) + 2 * shape.head_parameters * predicted


def shape_of(model: DiffusionModel) -> ModelShape:
    return ModelShape.of_backbone(model.family, model.config)  # type: ignore[arg-type]


def reference_weight(request: Sequence, done: Generation, reference: ModelShape) -> float:
    """FLOPs of a reference pass over those of a denoising pass of the target, both as means over the blocks of `done`.

    request: as `Decoder.check` lays it out. The reference's pass predicts all masked positions of its block; the
    target's passes are taken to commit the block evenly, so they predict n (p + 1) / (2 p) positions of n on average. A
    pair of passes with guidance counts as the one pass that the engine calls it.
    """
    model, settings = request.model, request.settings
    length, target = len(request.canvas), shape_of(model)
    blocks = [block for block in request.blocks if block[1] <= len(done.canvas_ids)] or request.blocks[:1]
    p = max(1.0, done.num_forwards.denoise / len(blocks))
    own = asked = 0.0
    for start, end in blocks:
        masked = float(request.initially_masked[start : length if request.wide else end].sum())
        predicted = masked * (p + 1) / (2 * p)
        if settings.residual_source == "reference":  # asked before each pass, of what is masked then
            masked = predicted
        if model.blocks_from_prompt_end:  # LLaDA: every pass sees the whole canvas
            later = {"none": length, "prefix": length - start, "dual": end - start}[settings.cache or "none"]
            own += pass_flops(target, queries=(length + (p - 1) * later) / p, keys=length, predicted=predicted)
            asked += pass_flops(reference, queries=length, keys=length, predicted=masked)
        else:
            entering = end if settings.cache == "none" else end - start
            own += pass_flops(target, queries=entering, keys=end, predicted=predicted)
            asked += pass_flops(reference, queries=end - start, keys=end, predicted=masked)
    return asked / (own * (2 if settings.cfg_scale else 1))

"""FLOPs of a pass, to express the cost of a reference pass in target passes.

    FLOPs of a pass = 2 * layers * (2 D d (H + G) + 3 D F) * Q        projections and MLP of the query tokens
                    + 4 * layers * H d * Q * K                        attention scores and weighted sums
                    + 2 * V D * N                                     LM head

A multiply-add is two FLOPs. Norms, softmax and embeddings are omitted. Passes that only fill a cache (prompt, finished
blocks) are not counted, as in the rates of outcomes.py: the compared passes process one block, with its prefix in the
cache if the family has one.

Shapes: Q query tokens, K visible keys, N predicted positions, D width, F columns of the MLP that a token meets, H query
heads, G key/value heads, d head width, V vocabulary, p denoising passes per block.
"""

from __future__ import annotations

from rcd_core.decoding.generation import Generation
from rcd_core.decoding.sequence import Sequence
from rcd_core.families.base import DiffusionModel
from rcd_core.training.plan import ModelShape


def pass_flops(shape: ModelShape, *, queries: float, keys: float, predicted: float) -> float:
    """FLOPs of a pass over one row. queries, keys, predicted: Q, K, N, or means of them."""
    projections = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    layer = 2 * (projections + 3 * shape.hidden_size * shape.active_columns) * queries
    attention = 4 * shape.num_heads * shape.head_dim * queries * keys
    return shape.num_layers * (layer + attention) + 2 * shape.head_parameters * predicted


def shape_of(model: DiffusionModel) -> ModelShape:
    return ModelShape.of_backbone(model.family, model.whole_config)  # type: ignore[arg-type]


def reference_weight(request: Sequence, done: Generation, reference: ModelShape) -> float:
    """FLOPs of a reference pass / FLOPs of a denoising pass of the target, as means over the blocks of `done`.

    request: the result of `Decoder.check`. A reference pass predicts all n masked positions of its block. The target is
    assumed to commit a block evenly, so a pass predicts n (p + 1) / (2 p) positions on average, and to run one block a
    pass: with several live blocks this is an upper bound. The two passes of classifier-free guidance count as one, as
    in the engine.
    """
    model, settings = request.model, request.settings
    length, target = len(request.canvas), shape_of(model)
    blocks = [block for block in request.blocks if not request.is_next_token(block[0])]
    blocks = [block for block in blocks if block[1] <= len(done.canvas_ids)] or blocks[:1]
    p = max(1.0, done.num_forwards.denoise / len(blocks))
    target_flops = reference_flops = 0.0
    for start, end in blocks:
        masked = float(request.initially_masked[start : request.scope_end(start, end)].sum())
        predicted = masked * (p + 1) / (2 * p)
        if settings.residual_source == "reference":  # runs before each pass, on the positions still masked
            masked = predicted
        if not request.block_causal:  # LLaDA: every pass sees the whole canvas
            later = {"none": length, "prefix": length - start, "dual": end - start}[settings.cache or "none"]
            target_flops += pass_flops(target, queries=(length + (p - 1) * later) / p, keys=length, predicted=predicted)
            reference_flops += pass_flops(reference, queries=length, keys=length, predicted=masked)
        else:
            keys = request.visible_end(start, end)
            whole = keys - start + (start - request.grid) % settings.block_length  # of a sub-block: its block's
            queries = keys if settings.cache == "none" else whole
            target_flops += pass_flops(target, queries=queries, keys=keys, predicted=predicted)
            reference_flops += pass_flops(reference, queries=whole, keys=keys, predicted=masked)
    return reference_flops / (target_flops * (2 if settings.cfg_scale else 1))

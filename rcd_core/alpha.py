"""The rules for alpha by name, apart from what computes them: settings must be readable without torch."""

from __future__ import annotations

from typing import Literal

AlphaRule = Literal[
    "normalized_entropy",  # H / ln V: Eq. 3, the paper's method
    "calibrated_entropy",  # min(1, H / h), h stored with the checkpoint: ours, any V (issue 2, experiments)
    "confidence",  # max p            | the ablation of the paper's Fig. 5
    "inverse_entropy",  # 1 - H / ln V |
    "inverse_confidence",  # 1 - max p |
    "fixed",  # 0.3 everywhere         |
    "one",  # standard residual        |
    "top1",  # the top-1 token's embedding as residual, alpha = H / ln V
    "uniform",  # the mean of the block's entropies, each as above, at all of its masked positions
    "learned",  # a small network of entropy and max p, trained with the target, stored with the checkpoint
    "ramp",  # decoding only: grows with the passes, for models that never saw a residual (dInfer's IterSmooth)
]

SCALED = ("calibrated_entropy", "uniform", "learned")  # divide the entropy by alpha_scale where there is one
UNMOVED = ("fixed", "one", "ramp")  # no temperature of the prediction changes them
SPREAD = ("uniform", "ramp")  # alpha follows from more than the position's own prediction

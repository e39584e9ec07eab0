"""DecodeSettings: one name for one thing in Python, recipes, the command line and HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from rcd_core.errors import UserError

Policy = Literal["sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "random"]
Start = Literal["reference", "zero", "self", "dirichlet"]
CacheMode = Literal["none", "block", "prefix", "dual"]
# Computed in alpha.py. The names live here because settings are read without torch.
AlphaRule = Literal[
    "normalized_entropy",  # H / ln V: Eq. 3, the paper's method
    "calibrated_entropy",  # min(1, H / alpha_scale), alpha_scale stored with the checkpoint: ours
    "confidence",  # max p, like the next four from the ablation of the paper's Fig. 5
    "inverse_entropy",  # 1 - H / ln V
    "inverse_confidence",  # 1 - max p
    "fixed",  # 0.3 everywhere
    "one",  # 1 everywhere, the standard residual
    "top1",  # H / ln V with the embedding of the most probable token as residual
    "uniform",  # the mean of H / alpha_scale (or H / ln V) over the block's masked positions
    "learned",  # a small network of entropy and max p, trained with the target and stored with the checkpoint
    "ramp",  # control of an experiment, decoding only: grows with the passes of a block (dInfer's IterSmooth)
]
SCALED_RULES = ("calibrated_entropy", "uniform", "learned")  # divide the entropy by alpha_scale if it is set
CONSTANT_RULES = ("fixed", "one", "ramp")  # do not depend on the prediction, so T_res does not change them
BLOCK_RULES = ("uniform", "ramp")  # depend on more than the position's own prediction


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How one request is decoded. None means: the checkpoint's value, else the family's default.

    denoising_steps: passes a block is planned for (None = block_length); fixes the smallest commit per pass.
    confidence_threshold: commit every masked token above it (low_confidence_dynamic), at least the planned number.
    entropy_bound: nats; entropy_bounded commits the most certain tokens whose entropies sum to less.
    policy "random" is LLaDA's random remasking: the planned number of masked tokens, drawn by the seed.
    filtered_confidence: confidence after top-k and top-p, as SDAR's generate.py has it; False is before both.
    logits_eos_inf: never predict an end of sequence; confidence_eos_eot_inf: commit ends of sequence or turn last (both
    LLaDA's, semantics.md 2.2).
    residual: feed discarded distributions back (RCD, Eq. 2); False is plain block decoding.
    start: the first residual of a block (method.md 6). residual_temperature: T_res (None: the checkpoint's, else 1), on
    alpha only, unless delta_temperature is "residual". residual_top_k: sparse delta with mean tail; None is dense.
    compat_passes: True makes exactly the passes the authors' code makes (a separate store pass per block).
    """

    __pydantic_config__ = {"extra": "forbid"}

    block_length: int | None = None
    denoising_steps: int | None = None
    max_new_tokens: int = 256
    policy: Policy = "low_confidence_dynamic"
    confidence_threshold: float = 0.85
    entropy_bound: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    filtered_confidence: bool = False
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    stop_token_ids: tuple[int, ...] | None = None
    cache: CacheMode | None = None
    compat_passes: bool = False
    residual: bool = False
    residual_source: Literal["self", "reference"] = "self"
    start: Start | None = None
    residual_temperature: float | None = None
    delta_temperature: Literal["one", "residual"] = "one"
    alpha: AlphaRule | None = None
    alpha_scale: float | None = None
    residual_top_k: int | None = None
    residual_scope: Literal["block", "all_masked"] = "block"
    trace: bool = False

    def __post_init__(self) -> None:
        self._choice("policy", get_args(Policy))
        self._choice("start", (None, *get_args(Start)))
        self._choice("cache", (None, *get_args(CacheMode)))
        self._choice("alpha", (None, *get_args(AlphaRule)))
        self._choice("residual_source", ("self", "reference"))
        self._choice("delta_temperature", ("one", "residual"))
        self._choice("residual_scope", ("block", "all_masked"))
        for name in ("block_length", "denoising_steps", "max_new_tokens", "top_k", "residual_top_k"):
            self._require(name, lambda v: isinstance(v, int) and v >= 1, "an integer of at least 1")
        self._require("confidence_threshold", lambda v: 0.0 <= v <= 1.0, "a number in [0, 1]")
        self._require("top_p", lambda v: 0.0 < v <= 1.0, "a number in (0, 1]")
        for name in ("temperature", "cfg_scale"):
            self._require(name, lambda v: 0.0 <= v < float("inf"), "a finite number of at least 0")
        for name in ("entropy_bound", "residual_temperature", "alpha_scale"):
            self._require(name, lambda v: 0.0 < v < float("inf"), "a finite number above 0")
        if self.filtered_confidence and not self.temperature:
            raise UserError("filtered_confidence is true but temperature is 0, where nothing is drawn; set temperature")
        if self.policy == "entropy_bounded" and self.entropy_bound is None:
            raise UserError("policy is 'entropy_bounded' but entropy_bound is not set; give nats, for example 0.35")

    def _choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise UserError(f"{name} is {value!r}; allowed: {', '.join(str(a) for a in allowed)}")

    def _require(self, name: str, holds: Any, wanted: str) -> None:
        value = getattr(self, name)
        if value is None and name not in ("max_new_tokens", "confidence_threshold"):
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
            raise UserError(f"{name} is {value!r}; it must be {wanted}")

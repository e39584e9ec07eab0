"""DecodeSettings: one name for one thing in Python, recipes, the command line and HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from rcd_core.errors import UserError

Policy = Literal[
    "sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "random", "independent"
]
Schedule = Literal["even", "time", "linear"]
RankBy = Literal["confidence", "entropy", "margin"]
Start = Literal["reference", "zero", "self", "dirichlet"]
CacheMode = Literal["none", "block", "prefix", "dual"]
DecodeAttention = Literal["auto", "sdpa", "eager", "varlen", "flash"]  # attention/paged_backends.py
Weights = Literal["full", "int8", "int4", "fp8"]  # families/quantise.py
ConvertAttention = Literal["blocks", "canvas"]  # families/convert.py
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
CONFIDENCE_RULES = ("confidence", "inverse_confidence", "learned")  # need max p, at T_res as the entropy
CONSTANT_RULES = ("fixed", "one", "ramp")  # do not depend on the prediction, so T_res does not change them
BLOCK_RULES = ("uniform", "ramp")  # depend on more than the position's own prediction
COUNTS = (
    *("block_length", "sub_block_length", "denoising_steps", "max_new_tokens", "top_k", "residual_top_k"),
    "max_live_blocks",
)
SHARES = ("confidence_threshold", "block_add_threshold", "decoded_token_threshold", "editing_threshold")


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """How one request is decoded. None means the checkpoint's value, else the family's default.

    sub_block_length: a pass commits tokens of the first sub-block of a block that has masks (decoding/sub_blocks.py).
    denoising_steps: planned passes per block (None = block_length), which sets the smallest number of commits per pass.
    schedule: how the planned passes share the commits: "even"; or "time", Dream's: as the time t falls from 1 to .001,
    a pass plans the share 1 - s/t of the masks that are left, rounded down, and the last pass all; or "linear", dLLM's:
    the same down to 0, rounded to even. None: the family's.
    policy: which masked tokens a pass commits (decoding/policies.py). confidence_threshold: low_confidence_dynamic
    commits every masked token above it, but at least the planned number. entropy_bound: nats; entropy_bounded commits
    the most certain tokens whose entropies sum to less.
    rank_by: which tokens come first where low_confidence_static or low_confidence_dynamic commits a number of them: the
    most confident, those with the least entropy, or those farthest ahead of the next probable token.
    filtered_confidence: confidence after top-k and top-p, as in SDAR's generate.py, instead of before both.
    cfg_scale, logits_eos_inf (never predict EOS), confidence_eos_eot_inf (commit EOS and end of turn last): LLaDA's.
    residual: feed discarded distributions back (RCD, Eq. 2); False is plain block decoding. residual_source
    "reference": the reference predicts every residual (the paper's Fig. 5), not only a block's first one.
    start: the first residual of a block: of the reference, none, of a pass of its own, or of a random distribution.
    residual_temperature: T_res, applied to alpha, and to delta only if delta_temperature is "residual".
    residual_top_k: delta from the k largest entries with the tail's mass on the mean; None uses all.
    residual_scope "all_masked": also of masks beyond the block (LLaDA).
    max_live_blocks: blocks that are denoised at once, as D2F does (decoding/live_blocks.py); None: one after the other,
    with the family's own attention. block_add_threshold, decoded_token_threshold: decoded share of a block from which
    the next one is added, and from which the next one commits at least one token a pass; D2F's defaults.
    editing_threshold: a pass replaces tokens of the block where it is surer than this of another one, as LLaDA2.1 does
    (decoding/editing.py); None: what is committed stays. max_post_steps: most passes of a block that has no masks left.
    compat_passes: for exact comparison with the authors' code, makes the same passes (decoding/compat.py).
    """

    __pydantic_config__ = {"extra": "forbid"}

    block_length: int | None = None
    sub_block_length: int | None = None
    denoising_steps: int | None = None
    schedule: Schedule | None = None
    max_new_tokens: int = 256
    policy: Policy = "low_confidence_dynamic"
    confidence_threshold: float = 0.85
    entropy_bound: float | None = None
    rank_by: RankBy = "confidence"
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
    max_live_blocks: int | None = None
    block_add_threshold: float = 0.5
    decoded_token_threshold: float = 0.9
    editing_threshold: float | None = None
    max_post_steps: int = 16
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
        self._choice("rank_by", get_args(RankBy))
        self._choice("schedule", (None, *get_args(Schedule)))
        self._choice("start", (None, *get_args(Start)))
        self._choice("cache", (None, *get_args(CacheMode)))
        self._choice("alpha", (None, *get_args(AlphaRule)))
        self._choice("residual_source", ("self", "reference"))
        self._choice("delta_temperature", ("one", "residual"))
        self._choice("residual_scope", ("block", "all_masked"))
        for name in COUNTS:
            self._require(name, lambda v: isinstance(v, int) and v >= 1, "an integer of at least 1")
        # D2F's code returns no token for a block_add_threshold above 1, and may never end for the other one.
        for name in SHARES:
            self._require(name, lambda v: 0.0 <= v <= 1.0, "a number in [0, 1]")
        self._require("max_post_steps", lambda v: isinstance(v, int) and v >= 0, "an integer of at least 0")
        self._require("seed", lambda v: isinstance(v, int) and -(1 << 63) <= v < 1 << 63, "an integer of 64 bits")
        self._require("top_p", lambda v: 0.0 < v <= 1.0, "a number in (0, 1]")
        for name in ("temperature", "cfg_scale"):
            self._require(name, lambda v: 0.0 <= v < float("inf"), "a finite number of at least 0")
        for name in ("entropy_bound", "residual_temperature", "alpha_scale"):
            self._require(name, lambda v: 0.0 < v < float("inf"), "a finite number above 0")
        if self.filtered_confidence and not self.temperature and self.top_k is None and self.top_p is None:
            raise UserError(
                "filtered_confidence is true but nothing is filtered; set top_k or top_p, or temperature above 0"
            )
        if self.policy == "entropy_bounded" and self.entropy_bound is None:
            raise UserError("policy is 'entropy_bounded' but entropy_bound is not set; give nats, for example 0.35")

    def _choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise UserError(f"{name} is {value!r}; allowed: {', '.join(str(a) for a in allowed)}")

    def _require(self, name: str, is_valid: Any, requirement: str) -> None:
        value = getattr(self, name)
        if value is None and name not in ("max_new_tokens", "max_post_steps", *SHARES[:3]):
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_valid(value):
            raise UserError(f"{name} is {value!r}; it must be {requirement}")


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(DecodeSettings):
    """DecodeSettings with every default filled in (decoding/request.py: resolve_settings)."""

    block_length: int
    denoising_steps: int
    schedule: Schedule
    seed: int
    stop_token_ids: tuple[int, ...]
    cache: CacheMode
    start: Start
    residual_temperature: float
    alpha: AlphaRule

    @property
    def temperatures(self) -> dict[str, float]:
        """Algorithm 2, lines 23-25: T_res applies to alpha, and to delta only if delta_temperature is "residual"."""
        t = self.residual_temperature
        return {"alpha_temperature": t, "delta_temperature": t if self.delta_temperature == "residual" else 1.0}

    @property
    def is_greedy(self) -> bool:
        """The most probable token with its probability in the whole prediction; nothing else changes the logits."""
        changed = self.temperature or self.logits_eos_inf or self.confidence_eos_eot_inf or self.cfg_scale
        return not changed

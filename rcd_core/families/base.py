"""DiffusionModel: the interface of every model family, over transformers' own layers.

Shapes: B rows, Q query tokens, N of them, L tokens, V vocabulary, D width.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from rcd_core.alpha import LearnedAlpha
from rcd_core.attention.layouts import PADDING, Layout, block_causal
from rcd_core.decode_settings import Schedule, Start
from rcd_core.families.added import backbone_weights, save_added, take_added
from rcd_core.families.config import ModelConfig
from rcd_core.families.experts import each_expert, unstacked
from rcd_core.families.files import CALIBRATION_FILE, CheckpointFiles
from rcd_core.families.weights import MAX_SHARD_BYTES, StoredTensor, write_json, write_weights
from rcd_core.io import checksums
from rcd_core.loopholing import Loophole
from rcd_core.ops.checkpointing import Mode, checkpointed
from rcd_core.ops.ranks import ALONE, Ranks
from rcd_core.ops.rms_norm import use_rms_norm
from rcd_core.ops.some_rows import with_mlp_at

# transformers imports torchao where it is installed, which then warns of each GPU kernel that it cannot load.
logging.getLogger("torchao").setLevel(logging.ERROR)


@dataclass
class CheckpointInfo:
    """Facts of a checkpoint other than its weights. rcd: the RCD settings stored with it, calibration included."""

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    block_length: int
    rcd: dict[str, Any] = field(default_factory=dict)
    turn_end_ids: tuple[int, ...] = ()  # end a chat turn, not a sequence (LLaDA's <|eot_id|>)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.eos_token_ids, *self.turn_end_ids)))


def read_ids(
    files: CheckpointFiles, mask: int | None, eos: tuple[int, ...], fields: tuple[str, ...], block_length: int
) -> CheckpointInfo:
    """Of the files; the other arguments are the family's defaults. fields: of config.json, for the block length. The
    padding id defaults to the first eos id. UserError: no mask token."""
    found, mask_id = files.eos_token_ids(eos), files.mask_token_id(mask)
    return CheckpointInfo(
        mask_token_id=mask_id,
        eos_token_ids=found,
        pad_token_id=files.pad_token_id((*found, *eos, mask_id)[0]),
        block_length=files.block_length(fields, block_length),
        rcd=files.rcd(),
    )


class _Embedding(nn.Embedding):
    """embedding(ids), or function(weight, ids) for another use of the table. It runs inside forward(), where FSDP2 and
    ZeRO-3 have gathered the weight."""

    def forward(self, input: Tensor, function: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        return super().forward(input) if function is None else function(self.weight, input)


class _Head(nn.Linear):
    """linear(hidden), or function(weight, hidden), as above."""

    def forward(self, input: Tensor, function: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        return super().forward(input) if function is None else function(self.weight, input)


class DiffusionModel(nn.Module):
    """A masked-diffusion transformer. Row i of the hidden states predicts token i, or token i + 1 where `shifted`:
    `predictors` is the only place that knows.

    `backbone` is one of transformers' causal language models; its layers run with our attention layouts.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # of config.json
    transformers_name: ClassVar[str]  # of the backbone and its configuration
    threshold_inclusive: ClassVar[bool]  # commit at confidence >= threshold (Fast-dLLM) or > threshold (SDAR)
    has_experts: ClassVar[bool] = False  # a mixture of experts
    shifted: ClassVar[bool] = False  # row i of the logits predicts token i + 1, as in autoregressive models
    whole_canvas: ClassVar[bool]  # a token sees all of the canvas (LLaDA), or no later block (SDAR)
    blocks_from_prompt_end: ClassVar[bool]  # LLaDA counts blocks from the prompt's end, SDAR from position 0
    default_schedule: ClassVar[Schedule] = "even"
    default_sub_block_length: ClassVar[int | None] = None  # None: the block's
    default_start: ClassVar[Start]  # how a block starts (version 2 of the paper)
    activation_checkpointing: Mode = False  # in training
    mask_shift: nn.Parameter | None  # (D,) of the mask token's embedding, in training with adapters

    def __init__(self, backbone: Any, info: CheckpointInfo) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_parameter("mask_shift", None)
        if type(backbone.model.embed_tokens) is nn.Embedding:  # not split over ranks, which is for decoding only
            backbone.model.embed_tokens.__class__, backbone.lm_head.__class__ = _Embedding, _Head
        use_rms_norm(backbone)
        self.info = info
        self.name = "this model"  # the checkpoint's path, for messages
        self.attention = "auto"  # the backend of decoding
        self.learned_alpha: LearnedAlpha | None = None  # only for targets trained with alpha "learned"
        self.loophole: Loophole | None = None  # only for targets trained with source "loopholing"
        self.ranks: Ranks = ALONE  # that hold the weights together; `config` is of this rank's layers
        self.whole_config = backbone.config

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def mask_token_id(self) -> int:
        return self.info.mask_token_id

    @property
    def vocab_size(self) -> int:
        return int(self.embedding.num_embeddings)

    @property
    def max_positions(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def embedding(self) -> nn.Embedding:
        return self.backbone.model.embed_tokens  # type: ignore[no-any-return]

    @property
    def lm_head(self) -> nn.Linear:
        return self.backbone.lm_head  # type: ignore[no-any-return]

    @property
    def lm_head_weight(self) -> Tensor:
        return self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def num_parameters(self) -> int:
        """Of the whole model, on however many ranks."""
        if self.ranks.size == 1:
            return sum(p.numel() for p in self.parameters())
        with torch.device("meta"):
            whole = sum(int(p.numel()) for p in self.backbone_class()(self.whole_config).parameters())
        added = [network for network in (self.learned_alpha, self.loophole) if network is not None]
        return whole + sum(p.numel() for network in added for p in network.parameters())

    def with_weights(self, weights: Mapping[str, Tensor]) -> DiffusionModel:
        """A model like this one that holds `weights` (the gathered state dict of a sharded training) without a copy."""
        with torch.device("meta"):
            backbone = self.backbone_class()(self.config)
        backbone.load_state_dict(backbone_weights(weights), assign=True)
        if self.config.tie_word_embeddings:
            backbone.tie_weights()
        model = type(self)(backbone, self.info)
        take_added(model, weights)
        return model

    @abstractmethod
    def attention_block(self, block_length: int) -> int | None:
        """Block length of the attention layout: block_length for SDAR, None (bidirectional) for LLaDA."""

    @abstractmethod
    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(config.json, weights) in the authors' format and names."""

    # -- transformers' classes. Its model code takes seconds to import, so that happens when a model is made.
    @classmethod
    def config_class(cls) -> Any:
        return getattr(transformers, f"{cls.transformers_name}Config")

    @classmethod
    def backbone_class(cls) -> Any:
        return getattr(transformers, f"{cls.transformers_name}ForCausalLM")

    # -- reading checkpoints
    @classmethod
    def matches(cls, config: dict[str, Any], has_experts: bool, name: str) -> bool:
        """Whether a config.json is of this family. name: of the released model."""
        return config.get("model_type") in cls.model_types and has_experts == cls.has_experts

    @classmethod
    @abstractmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        """config.json -> a configuration of config_class().

        has_head: whether the weights contain an LM head; decides weight tying if config.json does not.
        Raises UserError for missing fields and for networks that the backbone cannot compute.
        """

    @classmethod
    @abstractmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        """Special ids, block length and RCD settings; missing values get the family's defaults."""

    @classmethod
    def backbone_name(cls, name: str) -> str:
        """The authors' name of a tensor -> the backbone's name."""
        return name

    @classmethod
    def expand(cls, entry: StoredTensor, config: dict[str, Any]) -> Iterator[tuple[str, StoredTensor]]:
        """The backbone's weights in a stored tensor, each expert by itself. config: config.json."""
        yield from each_expert(cls.backbone_name(entry.name), entry)

    @classmethod
    def new_config(cls, sizes: ModelConfig, vocab_size: int) -> Any:
        """The configuration, of config_class(), of a model with fresh weights."""
        return cls.config_class()(
            vocab_size=vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            head_dim=sizes.resolved_head_dim,
            max_position_embeddings=sizes.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            tie_word_embeddings=sizes.tie_embeddings,
        )

    # -- computation
    def hidden(
        self, embeds: Tensor, positions: Tensor, layout: Layout | None = None, at: Tensor | None = None
    ) -> Tensor:
        """(B, Q, D) input embeddings at absolute positions (B, Q) -> (B, Q, D) final hidden states. at (N,): only of
        these of the B Q tokens, (N, D).

        layout None: every token sees every token.
        """
        stream = self.stream(embeds, positions, layout, at)
        if at is not None:
            stream = stream.flatten(0, 1)[at]
        return self.backbone.model.norm(stream)  # type: ignore[no-any-return]

    def stream(
        self, embeds: Tensor, positions: Tensor, layout: Layout | None = None, at: Tensor | None = None
    ) -> Tensor:
        """`hidden` before the final norm, of all tokens; right only at `at`, if given."""
        body = self.backbone.model
        rotary = body.rotary_emb(embeds, positions)
        h, last = embeds, body.layers[-1]
        for layer in body.layers:
            call = partial(layer, attention_mask=layout, position_ids=positions, position_embeddings=rotary)
            compiled = "forward" in vars(layer)  # once, for all numbers of tokens (strategies.py)
            if layer is last and at is not None and h.device.type == "cpu" and not compiled:
                call = partial(with_mlp_at, layer.mlp, torch.unique(at) if self.shifted else at, call)
            h = checkpointed(call, h, self.activation_checkpointing)
        return h

    def predictors(self, rows: Any, is_first: Any) -> Any:
        """The rows of hidden states that predict the tokens at `rows`, both integers (tensors or arrays). is_first: the
        row before is of another sequence, or not in this pass; then a shifted model's own row serves, as in the
        authors' code (of the first token of a canvas, and of a slice, whose first token is known)."""
        return rows - 1 + is_first if self.shifted else rows

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) logits."""
        return self.ranks.whole(nn.functional.linear(hidden, self.lm_head_weight), self.vocab_size)

    def logits(
        self, input_ids: Tensor, block_length: int | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(B, L) ids -> (B, L, V) under the family's layout. attention_mask (B, L): 0 hides a padding key."""
        block = self.attention_block(block_length or self.info.block_length)
        num_rows, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device).expand(num_rows, -1)
        layout = None
        if block is not None or attention_mask is not None:
            lengths = torch.full((num_rows,), length, device=input_ids.device)
            blocks = None if block is None else torch.full_like(lengths, block)
            layout = block_causal(positions, lengths, length, blocks)
            if attention_mask is not None:
                code = torch.where(attention_mask.bool(), layout.code, PADDING)
                layout = replace(layout, code=code, lengths=None)
        rows = torch.arange(length, device=input_ids.device)
        embeds = self.embedding(input_ids)
        if self.loophole is not None:
            embeds = self.loophole(embeds)
        return self.head(self.hidden(embeds, positions, layout)[:, self.predictors(rows, rows == 0)])

    # -- writing checkpoints
    def save_pretrained(
        self, directory: str | Path, tokenizer: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Write a checkpoint in the authors' format, in shards of at most max_shard_bytes.

        config.json contains the RCD settings as `rcd`; added networks get files of their own. SHA256SUMS has the
        digests of the weights, which `load_model` checks. config.json is removed first and written last, so that an
        unfinished checkpoint does not load. The T_res of weights that were there before is removed as well.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", CALIBRATION_FILE):
            (directory / name).unlink(missing_ok=True)
        config, weights = self.official_files()
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        write_weights(directory, weights, max_shard_bytes)
        save_added(self, directory)
        checksums.write(directory, directory.glob("*.safetensors"))
        eos = self.info.eos_token_ids
        ids = {"eos_token_id": eos[0] if len(eos) == 1 else list(eos), "pad_token_id": self.info.pad_token_id}
        write_json(directory / "generation_config.json", ids)
        if self.info.rcd:
            config["rcd"] = self.info.rcd
        write_json(directory / "config.json", config)

    def common_fields(self) -> dict[str, Any]:
        """Fields of config.json that every family writes.

        As in the authors' files there is one eos id, the one that is also the padding id;
        generation_config.json lists all of them.
        """
        eos, pad = self.info.eos_token_ids, self.info.pad_token_id
        return {
            "eos_token_id": pad if pad in eos else next(iter(eos), None),
            "mask_token_id": self.info.mask_token_id,
            "pad_token_id": pad,
            "rms_norm_eps": self.config.rms_norm_eps,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": self.config.vocab_size,
        }

    def stored_weights(self) -> dict[str, Tensor]:
        """The backbone's weights by name, each expert by itself, without a tied head."""
        weights = unstacked(self.backbone.state_dict())
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        return weights

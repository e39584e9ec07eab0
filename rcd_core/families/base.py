"""DiffusionModel: what every family gives the rest of the project, over transformers' own layers.

Shapes: B rows, Q query tokens, L tokens, V vocabulary, D width.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rcd_core.attention import block_causal_mask
from rcd_core.decoding.settings import Start
from rcd_core.errors import UserError


@dataclass
class CheckpointInfo:
    """What a checkpoint says about itself beyond its weights. `rcd` holds the RCD settings stored with it."""

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    block_length: int
    rcd: dict[str, Any] = field(default_factory=dict)
    turn_end_ids: tuple[int, ...] = ()  # ends of a chat turn that are no end of sequence (LLaDA's <|eot_id|>)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.eos_token_ids, *self.turn_end_ids)))


class KVCache(Protocol):
    """What a transformer layer asks of a cache: store new keys and values, return all that the queries may see."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]: ...


class DiffusionModel(nn.Module):
    """A masked-diffusion transformer: logits[i] predicts token i, no shift.

    `backbone` is transformers' Qwen3ForCausalLM or LlamaForCausalLM; we run its layers with our own layouts.
    """

    family: ClassVar[str]
    threshold_inclusive: ClassVar[bool]  # commit at confidence >= threshold (Fast-dLLM) or > threshold (SDAR)
    blocks_from_prompt_end: ClassVar[bool]  # LLaDA counts blocks from the prompt's end, SDAR from position 0
    default_start: ClassVar[Start]  # method.md 6: v2's start of a block per family

    def __init__(self, backbone: Any, info: CheckpointInfo) -> None:
        super().__init__()
        self.backbone = backbone
        self.info = info

    # -- facts
    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def mask_token_id(self) -> int:
        return self.info.mask_token_id

    @property
    def vocab_size(self) -> int:
        return int(self.embedding.weight.shape[0])

    @property
    def max_positions(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def embedding(self) -> nn.Embedding:
        return self.backbone.model.embed_tokens  # type: ignore[no-any-return]

    @property
    def lm_head_weight(self) -> Tensor:
        return self.backbone.lm_head.weight  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @abstractmethod
    def attention_block(self, block_length: int) -> int | None:
        """Block length of the attention layout: the block's own for SDAR, None (bidirectional) for LLaDA."""

    @abstractmethod
    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(config.json, weights) in the authors' own format and names."""

    # -- computation
    def hidden(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, Q, D) input embeddings at absolute (B, Q) positions -> (B, Q, D) final hidden states."""
        body = self.backbone.model
        rotary = body.rotary_emb(embeds, positions)
        h = embeds
        for layer in body.layers:
            h = layer(h, attention_mask=mask, position_ids=positions, position_embeddings=rotary, past_key_values=cache)
        return body.norm(h)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) logits."""
        return nn.functional.linear(hidden, self.lm_head_weight)

    def logits(
        self, input_ids: Tensor, block_length: int | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(B, L) ids -> (B, L, V) under the family's layout; attention_mask (B, L) hides padding keys."""
        block = self.attention_block(block_length or self.info.block_length)
        num_rows, length = input_ids.shape
        positions = torch.arange(length, device=input_ids.device).expand(num_rows, -1)
        mask = None
        if block is not None or attention_mask is not None:
            lengths = torch.full((num_rows,), length, device=input_ids.device)
            mask = block_causal_mask(positions, lengths, length, block)
            if attention_mask is not None:
                mask = mask & attention_mask.bool()[:, None, None, :]
        return self.head(self.hidden(self.embedding(input_ids), positions, mask))

    # -- files
    def save_pretrained(self, directory: str | Path, tokenizer: Any = None) -> None:
        """Write config.json and model.safetensors in the authors' format, and the tokenizer if given."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config, weights = self.official_files()
        if self.info.rcd:
            config["rcd"] = self.info.rcd
        (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)


def require_fields(config: dict[str, Any], names: tuple[str, ...], where: Path) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise UserError(f"{where}: config.json lacks {', '.join(missing)}; is the download complete?")

"""An autoregressive model as the start of a diffusion model: another family's layout, a mask token, no new layers.

| model_type | becomes, by attention: `blocks` | `canvas` | `blocks`, shift | `canvas`, shift |
| --- | --- | --- | --- | --- |
| qwen3 | sdar | a2d-qwen3 | - | - |
| qwen2 | a2d-qwen2 | a2d-qwen2 | Fast_dLLM_Qwen | Dream |
| llama | a2d-llama | a2d-llama | - | - |

attention: block-causal, or over the whole canvas. shift: keep the logits one position behind, as autoregressive models
have them. Without it training moves them.
The rows of the mask token, and of all tokens that the conversion adds, are the mean of the old tokens' rows, in the
embedding and in an untied head. So the model starts from what it knows of an average token.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rcd_core.decode_settings import ConvertAttention
from rcd_core.errors import UserError
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.files import CheckpointFiles
from rcd_core.families.loading import checkpoint_directory, load_model
from rcd_core.text.tokenizer import MOST_ADDED, mask_token_id, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS: dict[tuple[ConvertAttention, bool], dict[str, str]] = {
    ("blocks", False): {"qwen3": "sdar", "qwen2": "a2d-qwen2", "llama": "a2d-llama"},
    ("canvas", False): {"qwen3": "a2d-qwen3", "qwen2": "a2d-qwen2", "llama": "a2d-llama"},
    ("blocks", True): {"qwen2": "Fast_dLLM_Qwen"},
    ("canvas", True): {"qwen2": "Dream"},
}
_BLOCK_FIELDS = {"blocks": ("block_size", "bd_size"), "canvas": ("block_length",)}  # of config.json
_ROUND_TO = 64  # rows of a grown embedding: matrix products on GPUs are slow for odd sizes


def converted(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    shift: bool = False,
    attention: ConvertAttention = "blocks",
    dtype: torch.dtype | None = None,
) -> DiffusionModel:
    """The checkpoint `path` as a diffusion model, on the CPU in eval mode. dtype None: the checkpoint's.

    tokenizer: the model's own, with a mask token (`text.tokenizer.add_mask_token`).
    Raises UserError for a checkpoint that is no Qwen2, Qwen3 or Llama, or whose tokenizer is another one.
    """
    files = CheckpointFiles.read(checkpoint_directory(path), path)
    kind, mask = convertible(path, shift, attention), mask_token_id(tokenizer)
    size = max(tokenizer.get_vocab().values()) + 1
    info = CheckpointInfo(
        mask_token_id=mask,
        eos_token_ids=tuple(dict.fromkeys((*stop_token_ids(tokenizer), *files.eos_token_ids(())))),
        pad_token_id=tokenizer.pad_token_id,
        block_length=block_length,
    )
    # The new ids may lie outside the embedding until it has grown.
    fields = {"model_type": kind, "mask_token_id": 0, "pad_token_id": 0}
    fields |= dict.fromkeys(_BLOCK_FIELDS[attention], block_length)
    model = load_model(path, dtype, fields=fields)
    if size > model.vocab_size + MOST_ADDED:
        raise UserError(
            f"{path}: the embedding has {model.vocab_size} rows, but the tokenizer {tokenizer.name_or_path!r} has "
            f"{size} tokens; set tokenizer.path to the model's own"
        )
    first = min(size, model.vocab_size)
    _set_rows(model, [i for i in range(first) if i != mask], sorted({*range(model.vocab_size, size), mask}))
    model.info = info
    return model


def convertible(path: str, shift: bool, attention: ConvertAttention) -> str:
    """The model_type that a checkpoint gets. Raises UserError if there is none."""
    kind = str(CheckpointFiles.read(checkpoint_directory(path), path).config.get("model_type"))
    if kind in _KINDS[attention, shift]:
        return _KINDS[attention, shift][kind]
    plain = _KINDS[attention, False]
    if kind in plain:
        raise UserError(f"{path}: convert.shift is true, but no family shifts the logits of {kind}; set it to false")
    raise UserError(
        f"{path}: model_type is {kind!r}, but convert is for autoregressive models: {', '.join(plain)}; set convert "
        "to null for a diffusion model"
    )


def _set_rows(model: DiffusionModel, known: Sequence[int], new: Sequence[int]) -> None:
    """Give the rows `new` the mean of the rows `known`; the tables grow where they must."""
    needed = max(new) + 1
    size = model.vocab_size if needed <= model.vocab_size else -(-needed // _ROUND_TO) * _ROUND_TO
    rows = [*new, *range(max(needed, model.vocab_size), size)]
    tied = model.config.tie_word_embeddings
    tables: list[Any] = [model.embedding] if tied else [model.embedding, model.lm_head]
    for table in tables:
        table.weight = nn.Parameter(_with_rows(table.weight.detach(), known, rows, size), requires_grad=False)
    if tied:
        model.lm_head.weight = model.embedding.weight
    model.embedding.num_embeddings = model.lm_head.out_features = model.config.vocab_size = size


def _with_rows(table: Tensor, known: Sequence[int], rows: Sequence[int], size: int) -> Tensor:
    """(V, D) -> (size, D)."""
    mean = table[torch.tensor(known)].mean(0, dtype=torch.float32).to(table.dtype)
    grown = torch.cat([table, mean.expand(size - len(table), -1)])
    grown[torch.tensor(rows)] = mean
    return grown

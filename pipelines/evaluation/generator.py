"""Loads a model with its tokenizer and reference, for `rcd generate` and lm-eval, and converts text to ids and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

from rcd_core.decode_settings import DecodeSettings, Weights
from rcd_core.decoding.decoder import Decoder
from rcd_core.decoding.sequence import Sequence
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.ranks import ALONE, Ranks
from rcd_core.tasks.base import MASK_TEXT

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass
class Generator:
    """A decoder with its tokenizer (None: token ids only). settings: of the user, without the checkpoint's defaults.
    fixed_length: the user has set max_new_tokens; otherwise it shrinks to the positions that the model has left."""

    decoder: Decoder
    tokenizer: Any
    settings: DecodeSettings
    fixed_length: bool

    @property
    def has_template(self) -> bool:
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def sequence(self, ids: list[int], infill: bool, trace: bool = False) -> Sequence:
        """A request for the engine. Raises UserError naming the setting."""
        model, settings = self.decoder.model, replace(self.settings, trace=self.settings.trace or trace)
        if not infill and not self.fixed_length:
            block_length = settings.block_length or model.info.block_length
            room = (model.max_positions - len(ids)) // block_length * block_length
            settings = replace(settings, max_new_tokens=max(1, min(settings.max_new_tokens, room)))
        return self.decoder.check(ids, settings, infill=infill)

    def encode(self, text: str, infill: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode text: {error.reason}") from error
        if infill:
            mask = self.tokenizer.convert_ids_to_tokens(self.decoder.model.mask_token_id)
            if mask is None:
                raise UserError(f"--infill: the tokenizer has no token {self.decoder.model.mask_token_id}, the mask")
            text = text.replace(MASK_TEXT, mask)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def converse(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation in the chat template."""
        from rcd_core.text.tokenizer import render_chat

        try:
            text = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        except UserError as error:
            raise UserError(f"{error}; or give --raw") from error
        return self.encode(text)

    def decode(self, ids: list[int], special: bool = True) -> str:
        if self.tokenizer is None:
            return "".join(f"{i} " for i in ids)
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special))

    def text(self, sequence: Sequence) -> str:
        """The committed text: the answer without special tokens, or the canvas. After Ctrl-C, masks that precede
        committed tokens are shown."""
        output, mask_id = sequence.output(), self.decoder.model.mask_token_id
        ids = output.canvas_ids if sequence.infill else output.token_ids
        while not sequence.infill and ids and ids[-1] == mask_id:
            ids = ids[:-1]
        parts = [(masked, list(run)) for masked, run in groupby(ids, lambda i: i == mask_id)]
        texts = [MASK_TEXT * len(run) if masked else self.decode(run, sequence.infill) for masked, run in parts]
        return "".join(texts) if self.tokenizer else " ".join(str(i) for i in ids)


def load_generator(
    model_dir: str,
    ref_model_dir: str | None,
    explicit: Mapping[str, Any],
    *,
    dtype: str = "auto",
    device: str | None = None,
    attention: str = "auto",
    weights: Weights = "full",
    mask_id: int | None = None,
    needs_tokenizer: bool = True,
    ranks: Ranks = ALONE,
    verbose: bool = False,
) -> Generator:
    """Load a model, its tokenizer and the reference, if the settings use one.

    explicit: fields of DecodeSettings that the user has set; the rest depends on the checkpoint. dtype "auto": the
    checkpoint's. device None: CUDA if available. mask_id: raises if the checkpoint has another one. Raises UserError
    naming the flag of `rcd generate`.
    """
    from rcd_core.families.loading import checkpoint_directory
    from rcd_core.text.tokenizer import load_tokenizer, stop_token_ids

    load = partial(_load, dtype=dtype, device=device, attention=attention, weights=weights, ranks=ranks)
    with _prefix_errors("--model_dir"):
        directory = checkpoint_directory(model_dir)
        tokenizer = None
        if any((directory / name).exists() for name in TOKENIZER_FILES):
            tokenizer = load_tokenizer(directory)
        elif needs_tokenizer:
            files = " or ".join(TOKENIZER_FILES[:2])
            raise UserError(f"{directory} has no tokenizer ({files}); add one, or give token ids with --prompt_ids")
        model = load(directory)
    if mask_id not in (None, model.mask_token_id):
        raise UserError(f"--mask_id is {mask_id}; the checkpoint's is {model.mask_token_id}: leave it out")
    settings = DecodeSettings(**explicit)
    if tokenizer is not None and settings.stop_token_ids is None:
        stops = dict.fromkeys((*model.info.eos_token_ids, *stop_token_ids(tokenizer)))
        settings = replace(settings, stop_token_ids=tuple(stops))
    settings = _with_residual_defaults(settings, explicit, model, ref_model_dir is not None)
    reference = None
    if ref_model_dir and settings.residual and "reference" in (settings.start, settings.residual_source):
        with _prefix_errors("--ref_model_dir"):
            reference = load(ref_model_dir)
            _check_reference(reference, model)
    elif ref_model_dir:
        reason = f"start is {settings.start!r}" if settings.residual else "residual is off"
        print(f"note: --ref_model_dir is not used, since {reason}", file=sys.stderr)
    if verbose:
        print(f"model: {_describe(model)}", file=sys.stderr)
        if reference is not None:
            print(f"reference: {_describe(reference)}", file=sys.stderr)
    return Generator(Decoder(model, reference), tokenizer, settings, "max_new_tokens" in explicit)


def _with_residual_defaults(
    settings: DecodeSettings, explicit: Mapping[str, Any], model: DiffusionModel, reference: bool
) -> DecodeSettings:
    """Residuals default to on for an RCD checkpoint and with a reference; with a reference, start defaults to it."""
    if "residual" not in explicit:
        settings = replace(settings, residual=bool(model.info.rcd) or reference)
    if reference and settings.start is None and settings.residual_source == "self":
        settings = replace(settings, start="reference")
    return settings


def _check_reference(reference: DiffusionModel, model: DiffusionModel) -> None:
    """Residuals mix the target's embeddings by the reference's token ids, so both need the same vocabulary."""
    for name in ("vocab_size", "mask_token_id"):
        own, expected = getattr(reference, name), getattr(model, name)
        if own != expected:
            raise UserError(f"its {name} is {own}, that of --model_dir {expected}; give one with the same tokenizer")


def _describe(model: DiffusionModel) -> str:
    size = f"{model.num_parameters():,} parameters, vocabulary {model.vocab_size:,}"
    return f"{model.family}, {size}, {str(model.dtype).removeprefix('torch.')} on {model.device}"


def _load(
    path: Any, *, dtype: str, device: str | None, attention: str, weights: Weights, ranks: Ranks
) -> DiffusionModel:
    import torch

    from pipelines.ray_cluster.hardware import device_of
    from rcd_core.families.loading import load_model

    device = device or device_of(None)[0]
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).splitlines()[0]
        raise UserError(f"--device is {device!r}, which cannot be used here: {reason}; try --device cpu") from error
    torch_dtype = None if dtype == "auto" else getattr(torch, dtype)
    return load_model(path, dtype=torch_dtype, device=device, attention=attention, ranks=ranks, weights=weights)


@contextmanager
def _prefix_errors(flag: str) -> Iterator[None]:
    """Put the flag in front of UserErrors that do not name one, on one line."""
    try:
        yield
    except UserError as error:
        message = " ".join(str(error).split())
        raise UserError(message if message.startswith("--") else f"{flag}: {message}") from error

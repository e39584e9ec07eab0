"""The model `rcd` for lm-eval (EleutherAI's harness, 0.4.10 or newer), which decodes generation tasks by diffusion.

lm_eval --model rcd --model_args target=CKPT,reference=CKPT,confidence_threshold=0.9 --tasks gsm8k --apply_chat_template

lm-eval finds it by the entry point `lm_eval.models`. Releases up to 0.4.13 ignore entry points; run them through this
file with the same arguments: python -m pipelines.evaluation.lm_eval --model rcd ...

model_args: target, reference, dtype, attention, and every field of DecodeSettings by name. Tasks that compare
log-likelihoods raise UserError, because a diffusion model only has bounds of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

try:
    from lm_eval.api.model import LM  # type: ignore[import-not-found]
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    raise SystemExit("error: lm-eval is not installed: pip install 'rcd-ray[lm-eval]'") from None

from pipelines.evaluation.generator import Generator, load_generator
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.decoder import Decoder
from rcd_core.errors import UserError
from rcd_core.noise import seed_of
from rcd_core.text.tokenizer import render_chat

MAX_BATCH = 32
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SUPPORTED = {"until", "do_sample", "temperature", "top_p", "top_k", *_LENGTHS}


@register_model("rcd")
class RcdLM(LM):
    """Raises UserError for unknown model_args, and for requests with unsupported generation arguments."""

    def __init__(
        self,
        target: str | None = None,
        reference: str | None = None,
        dtype: str = "auto",
        attention: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if target is None:
            raise UserError("model_args: target is missing; name a checkpoint, as in target=/path/to/model")
        if unknown := sorted(set(settings) - {field.name for field in fields(DecodeSettings)}):
            raise UserError(f"model_args: {unknown[0]} is neither target, reference, dtype, attention nor a setting")
        self.generator = _load(target, reference, dtype, attention, device, settings)
        self.name = target
        size = max_batch_size or (MAX_BATCH if batch_size in (None, "auto") else int(batch_size))
        self.decoder = Decoder(self.generator.decoder.model, self.generator.decoder.reference, max_batch=size)
        self.seed = self.generator.settings.seed or 0

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.generator.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.generator.has_template:
            raise UserError(f"the tokenizer of {self.name} has no chat template; leave out --apply_chat_template")
        return render_chat(
            self.generator.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers in the order of the requests, each truncated at the first of its `until` strings. Whole
        blocks are decoded, so the truncated part has cost passes too."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        arguments = [request.args for request in requests]
        repeats: Counter[str] = Counter()
        prompts, settings = [], []
        for context, kwargs in arguments:
            prompts.append(self.generator.encode(context))
            settings.append(replace(self._settings(kwargs), seed=_seed(self.seed, context, repeats[context])))
            repeats[context] += 1  # a task may request several samples of one prompt
        texts = [""] * len(arguments)
        outputs = self.decoder.as_completed(prompts, settings, infill=False)
        for i, output in tqdm(outputs, total=len(arguments), disable=disable_tqdm, desc="rcd"):
            texts[i] = _truncate(self.generator.decode(output.token_ids, special=False), _until(arguments[i][1]))
            self.cache_hook.add_partial("generate_until", arguments[i], texts[i])
        return texts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        _refuse()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        _refuse()

    def _settings(self, kwargs: Mapping[str, Any]) -> DecodeSettings:
        """The generation arguments of a task on top of model_args."""
        if unknown := sorted(set(kwargs) - _SUPPORTED):
            known = ", ".join(sorted(_SUPPORTED))
            raise UserError(f"generation_kwargs: {unknown[0]} is {kwargs[unknown[0]]!r}; supported are {known}")
        changes: dict[str, Any] = {}
        if (length := next((kwargs[name] for name in _LENGTHS if kwargs.get(name) is not None), None)) is not None:
            changes["max_new_tokens"] = int(length)
        changes |= {name: kwargs[name] for name in ("top_p", "top_k") if kwargs.get(name) is not None}
        if changes.get("top_k") in (0, -1):  # both switch it off
            changes["top_k"] = None
        sample, temperature = kwargs.get("do_sample"), kwargs.get("temperature")
        if sample and temperature is not None and not float(temperature):
            raise UserError("generation_kwargs: do_sample is true but temperature is 0")
        if sample is False:
            changes["temperature"] = 0.0
        elif temperature is not None:
            changes["temperature"] = float(temperature)
        elif sample and not self.generator.settings.temperature:
            changes["temperature"] = 1.0  # the default of other models
        return replace(self.generator.settings, **changes)


def _load(
    target: str, reference: str | None, dtype: str, attention: str, device: str | None, settings: Mapping[str, Any]
) -> Generator:
    """With the defaults of `rcd generate`: a reference, or an RCD checkpoint, switches residuals on."""
    explicit = dict(settings)
    if explicit.get("top_k") == 0:  # off, as in `rcd generate`
        explicit["top_k"] = None
    if "stop_token_ids" in explicit:
        explicit["stop_token_ids"] = tuple(explicit["stop_token_ids"])
    try:
        return load_generator(target, reference, explicit, dtype=dtype, attention=attention, device=device)
    except UserError as error:
        message = str(error).replace("--ref_model_dir", "reference").replace("--model_dir", "target")
        raise UserError(f"model_args: {message}") from error


def _refuse() -> NoReturn:
    raise UserError(
        "the model rcd supports generate_until tasks only: a diffusion model has bounds of log-likelihoods, which this "
        "task cannot compare; choose a generative variant of the task"
    )


def _seed(seed: int, context: str, number: int) -> int:
    return seed_of(seed, context, number)


def _until(kwargs: Mapping[str, Any]) -> list[str]:
    until = kwargs.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def _truncate(text: str, until: Sequence[str]) -> str:
    ends = [index for stop in until if (index := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def main() -> None:
    """The command line of lm-eval, with the model `rcd` registered."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

    cli_evaluate()


if __name__ == "__main__":
    main()

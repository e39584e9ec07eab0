"""The model `rcd` of lm-eval (EleutherAI's harness, 0.4.10 or newer): its generation tasks, decoded by diffusion.

lm_eval --model rcd --model_args target=CKPT,reference=CKPT,confidence_threshold=0.9 --tasks gsm8k --apply_chat_template

lm-eval finds it by the entry point `lm_eval.models`. Releases that do not look for entry points yet (0.4.13 and before)
are run through this file, with the same arguments: python -m pipelines.evaluation.lm_eval --model rcd ...

model_args: target, reference, dtype, attention, and every field of DecodeSettings under its own name. Tasks that
compare log-likelihoods are refused: a diffusion model has bounds of them at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

from lm_eval.api.model import LM  # type: ignore[import-not-found]
from lm_eval.api.registry import register_model  # type: ignore[import-not-found]

from pipelines.evaluation.generator import Generator, load_generator
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.decoder import Decoder
from rcd_core.decoding.request import NUM_SEED_BITS
from rcd_core.errors import UserError
from rcd_core.noise import hash_key

MAX_BATCH = 32
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_HONOURED = {"until", "do_sample", "temperature", "top_p", "top_k", *_LENGTHS}


@register_model("rcd")
class RcdLM(LM):
    """UserError for arguments that there are not, and for a request whose generation arguments cannot be honoured."""

    def __init__(
        self,
        target: str | None = None,
        reference: str | None = None,
        dtype: str = "auto",
        attention: str = "sdpa",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if target is None:
            raise UserError("model_args: target is not given; name a checkpoint, as in target=/path/to/model")
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
        found = self.generator.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(found)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers in the order of the requests, each cut before the first of its `until` strings. A block is
        finished before its text is looked at, so what was cut has cost passes too."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        asked = [request.args for request in requests]
        seen: Counter[str] = Counter()
        prompts, settings = [], []
        for context, kwargs in asked:
            prompts.append(self.generator.encode(context))
            wanted = self._settings(kwargs)
            settings.append(replace(wanted, seed=_seed(self.seed, context, seen[context])))
            seen[context] += 1  # a task may ask several times for answers to one prompt
        texts = [""] * len(asked)
        finished = self.decoder.as_completed(prompts, settings, infill=False)
        for i, output in tqdm(finished, total=len(asked), disable=disable_tqdm, desc="rcd"):
            texts[i] = _cut(self.generator.decode(output.token_ids, special=False), _until(asked[i][1]))
            self.cache_hook.add_partial("generate_until", asked[i], texts[i])
        return texts

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        _refuse()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        _refuse()

    def _settings(self, kwargs: Mapping[str, Any]) -> DecodeSettings:
        """What a task asks for, on top of model_args."""
        if unknown := sorted(set(kwargs) - _HONOURED):
            known = ", ".join(sorted(_HONOURED))
            raise UserError(f"generation_kwargs: {unknown[0]} is {kwargs[unknown[0]]!r}; honoured are {known}")
        given: dict[str, Any] = {}
        if (length := next((kwargs[name] for name in _LENGTHS if kwargs.get(name) is not None), None)) is not None:
            given["max_new_tokens"] = int(length)
        given |= {name: kwargs[name] for name in ("top_p", "top_k") if kwargs.get(name) is not None}
        if given.get("top_k") in (0, -1):  # both mean that all are kept
            given["top_k"] = None
        sample, temperature = kwargs.get("do_sample"), kwargs.get("temperature")
        if sample and temperature is not None and not float(temperature):
            raise UserError("generation_kwargs: do_sample is true but temperature is 0, where nothing is drawn")
        if sample is False:
            given["temperature"] = 0.0
        elif temperature is not None:
            given["temperature"] = float(temperature)
        elif sample and not self.generator.settings.temperature:
            given["temperature"] = 1.0  # what others take it for
        return replace(self.generator.settings, **given)


def _load(
    target: str, reference: str | None, dtype: str, attention: str, device: str | None, settings: Mapping[str, Any]
) -> Generator:
    """As `rcd generate` loads: residuals on for an RCD checkpoint and with a reference, which is then started from."""
    given = dict(settings)
    if given.get("top_k") == 0:  # off, as on the command line
        given["top_k"] = None
    if "stop_token_ids" in given:
        given["stop_token_ids"] = tuple(given["stop_token_ids"])
    try:
        return load_generator(target, reference, given, dtype=dtype, attention=attention, device=device)
    except UserError as error:
        message = str(error).replace("--ref_model_dir", "reference").replace("--model_dir", "target")
        raise UserError(f"model_args: {message}") from error


def _refuse() -> NoReturn:
    raise UserError(
        "the model rcd answers generate_until tasks only: log-likelihoods of a diffusion model are bounds by sampling, "
        "not what this task compares; choose a generative variant of the task"
    )


def _seed(seed: int, context: str, number: int) -> int:
    return hash_key(seed, context, number) & ((1 << NUM_SEED_BITS) - 1)


def _until(kwargs: Mapping[str, Any]) -> list[str]:
    until = kwargs.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def main() -> None:
    """lm-eval's own command line, where the model `rcd` is known."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

    cli_evaluate()


if __name__ == "__main__":
    main()

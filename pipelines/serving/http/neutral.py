"""Fields of OpenAI's and vLLM's APIs that this server has no use for. Clients send them with values that ask for
nothing, so these values are accepted. Other values are refused under the field's name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

# field -> the values, besides null, that ask for nothing
BODY: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "images": ([],),  # this and the next two are LiteLLM's
    "provider_specific_fields": ({}, {"refusal": None}),
    "thinking_blocks": ([],),
    "refusal": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
    "type": ("text",),  # lm-eval's
}
REASONS = {
    "echo": "of lm-eval, use tasks of generate_until: a diffusion model has no log-likelihoods of a prompt to return",
}
PART: dict[str, tuple[Any, ...]] = {"annotations": ([],), "cache_control": ()}
STREAM: dict[str, tuple[Any, ...]] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}


@dataclass(frozen=True, eq=False)  # Annotated caches by equality, for which 1 is True
class Only:
    """Marks a field that accepts these values alone. reason: added to the refusal of others."""

    values: tuple[Any, ...]
    reason: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [*([{"enum": list(self.values)}] if self.values else []), {"type": "null"}]}

    def _check(self, value: Any) -> Any:
        if value is None or any(_equal(value, neutral) for neutral in self.values):
            return value
        reason = f" ({self.reason})" if self.reason else ""
        raise ValueError(f"this server supports only {_listed(self.values)} here; leave the field out{reason}")


def fields(values: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Fields for pydantic.create_model, by name."""
    return {name: (Annotated[Any, Only(neutral, REASONS.get(name, ""))], None) for name, neutral in values.items()}


def rows() -> list[tuple[str, str]]:
    """(field, accepted values) of request bodies, for the documentation."""
    return [(f"`{name}`", _listed(BODY[name], "`")) for name in sorted(BODY)]


def _equal(value: Any, neutral: Any) -> bool:
    """Equality of JSON: true is not 1, but 1.0 is."""
    return value == neutral and isinstance(value, bool) is isinstance(neutral, bool)


def _listed(values: tuple[Any, ...], quote: str = "") -> str:
    return " or ".join(f"{quote}{json.dumps(value)}{quote}" for value in (*values, None))

"""The ways in which public data sets write conversations, and how a row of each becomes one.

A file's dialect is found from its columns. `data.dialect` of a recipe chooses another one. The list is in order of
preference; pipelines/README.md shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcd_core.tasks.files import BadRow

Record = Mapping[str, Any]
Conversation = list[dict[str, str]]  # {role: system, user or assistant; content}; the last one is the assistant's

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Dialect:
    """columns: those a file must have, optional: those that are used as well. read: a row -> its turns, unchecked."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Record], list[Any]]
    optional: tuple[str, ...] = ()


def _turns(column: str) -> Callable[[Record], list[Any]]:
    def read(row: Record) -> list[Any]:
        turns: Any = row.get(column)
        if isinstance(turns, str):  # a csv file, or a column of JSON text
            try:
                turns = json.loads(turns)
            except ValueError:
                raise BadRow(f"{column!r} is no list of turns", turns) from None
        if not isinstance(turns, list | tuple):
            raise BadRow(f"{column!r} is no list of turns", repr(turns))
        return [*_system(row), *turns]

    return read


def _pair(question: str, answer: str, more: str = "") -> Callable[[Record], list[Any]]:
    """more: a column that is added to the question after an empty line."""

    def read(row: Record) -> list[Any]:
        asked: Any = row.get(question)
        replied: Any = row.get(answer)
        if not isinstance(asked, list | tuple):
            asked = [{"role": "user", "content": _joined(asked, row.get(more))}]
        if not isinstance(replied, list | tuple):
            replied = [{"role": "assistant", "content": replied}]
        return [*_system(row), *asked, *replied]

    return read


def _generations(row: Record) -> list[Any]:
    """OpenR1: several answers, of which the first that was verified counts, else the first."""
    answers = row.get("generations")
    if not isinstance(answers, list | tuple) or not answers:
        raise BadRow("'generations' is no list of answers", repr(answers))
    for column in ("correctness_math_verify", "correctness_llama"):
        marks = row.get(column) or ()
        verified = [answer for answer, mark in zip(answers, marks, strict=False) if mark is True]
        if verified:
            answers = verified
            break
    return [{"role": "user", "content": row.get("problem")}, {"role": "assistant", "content": answers[0]}]


def _system(row: Record) -> list[Any]:
    system = row.get("system") or row.get("system_prompt")
    return [{"role": "system", "content": system}] if system else []


def _joined(text: Any, more: Any) -> Any:
    return f"{text.rstrip()}\n\n{more}" if isinstance(text, str) and isinstance(more, str) and more.strip() else text


_SYSTEM = ("system", "system_prompt")
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("messages", ("messages",), _turns("messages"), _SYSTEM),
        Dialect("conversations", ("conversations",), _turns("conversations"), _SYSTEM),
        Dialect("conversation", ("conversation",), _turns("conversation"), _SYSTEM),
        Dialect(
            "generations", ("problem", "generations"), _generations, ("correctness_math_verify", "correctness_llama")
        ),
        Dialect("prompt-completion", ("prompt", "completion"), _pair("prompt", "completion"), _SYSTEM),
        Dialect("prompt-response", ("prompt", "response"), _pair("prompt", "response"), _SYSTEM),
        Dialect(
            "instruction-output",
            ("instruction", "output"),
            _pair("instruction", "output", "input"),
            ("input", *_SYSTEM),
        ),
        Dialect(
            "instruction-response",
            ("instruction", "response"),
            _pair("instruction", "response", "context"),
            ("context", *_SYSTEM),
        ),
        Dialect("question-answer", ("question", "answer"), _pair("question", "answer"), _SYSTEM),
        Dialect("question-response", ("question", "response"), _pair("question", "response"), _SYSTEM),
        Dialect("query-response", ("query", "response"), _pair("query", "response"), _SYSTEM),
    )
}


def find_dialect(columns: Sequence[str]) -> Dialect | None:
    """The first dialect whose columns a file has."""
    return next((d for d in DIALECTS.values() if set(d.columns) <= set(columns)), None)


def conversation(turns: Sequence[Any], keep_reasoning: bool = True) -> Conversation:
    """Turns of any spelling, checked. Turns after the last answer are left out.

    keep_reasoning: whether an answer keeps what the model thought before it, in <think> tags or in a field of its own.
    Raises BadRow for an unknown role, for content that is no text, and if there is no answer or no turn before it.
    """
    messages = [_message(turn, keep_reasoning) for turn in turns]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer", repr(turns))
    messages = messages[: answers[-1] + 1]
    if not any(message["role"] == "user" for message in messages[: answers[0]]):
        raise BadRow("an answer without a question", repr(turns))
    return messages


def _message(turn: Any, keep_reasoning: bool) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise BadRow("a turn is no object", repr(turn))
    name = turn.get("role") or turn.get("from")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"a turn of {name!r}"[:60], repr(turn))
    if turn.get("tool_calls"):
        raise BadRow("a turn calls tools", repr(turn))
    content = _content(next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None))
    if role == "assistant":
        thought = turn.get("reasoning_content") or turn.get("thinking")
        if not keep_reasoning:
            content = _THOUGHTS.sub("", content)
        elif isinstance(thought, str) and thought.strip():
            content = f"<think>\n{thought.strip()}\n</think>\n\n{content}"
    if not content.strip():
        raise BadRow(f"an empty turn of the {role}", repr(turn))
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise BadRow("a turn is not valid Unicode", ascii(content)) from error
    return {"role": role, "content": content}


def _content(value: Any) -> str:
    """Text, or the texts of a list of parts."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        parts = [part.get("text") for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        if parts and len(parts) == len(value) and all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    raise BadRow("a turn is no text", repr(value))

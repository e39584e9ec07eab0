"""Encodes problems as token ids, labels and padding, as in the fine-tuning of SDAR and LLaDA.

Labels are -100 on the prompt (infill: on the anchor and the given cells) and the token elsewhere. The end of the turn
and the padding to whole blocks are labelled too: both families learn to fill an answer's last block with padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rcd_core.errors import UserError
from rcd_core.tasks.base import MASK_TEXT, Problem, Task
from rcd_core.tasks.dialects import Conversation
from rcd_core.tasks.files import BadRow
from rcd_core.tasks.rows import Row
from rcd_core.text.tokenizer import chat_texts, mask_token_id, render_chat, split_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
UNLABELLED = -100
TOO_SHORT = "below data.min_length"  # the recipe's choice, not a fault of the row


@dataclass(frozen=True, slots=True)
class TrainExample:
    """input_ids and labels have equal lengths, a multiple of pad_multiple. prompt_length: before any label."""

    input_ids: list[int]
    labels: list[int]
    prompt_length: int


@dataclass(frozen=True, slots=True)
class PromptExample:
    """prompt_ids: the model's input; for an infill task the canvas with mask ids."""

    prompt_ids: list[int]
    prompt: str
    answer: str


class Encoder:
    """Encodes rows of one task with one tokenizer. Methods raise BadRow for rows that cannot be used."""

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        pad_multiple: int,
        max_length: int,
        min_length: int | None = None,
        all_turns: bool = True,
    ) -> None:
        """all_turns: whether a conversation trains all answers or its last one."""
        self.all_turns = all_turns
        self.task, self.tokenizer = task, tokenizer
        self.pad_multiple, self.max_length, self.min_length = pad_multiple, max_length, min_length or 0
        self.mask_id = mask_token_id(tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if not isinstance(pad, int):
            raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has neither pad_token nor eos_token; set one")
        self.pad_id = pad
        if not task.infill:
            chat_texts(tokenizer, "question", "answer")  # a template that no row can use

    def problem(self, row: Mapping[str, str]) -> Problem:
        return _problem(self.task, row)

    def train_row(self, row: Row) -> tuple[str, TrainExample]:
        """(content id, example) of a row."""
        item = example_of(row, self.task)
        return content_id(item), self.train(item)

    def test_row(self, row: Row) -> tuple[str, PromptExample]:
        """(content id, prompt) of a row. The last answer of a conversation is the right one."""
        item, messages = example_of(row, self.task), row.conversation
        if messages is None:
            assert isinstance(item, Problem)
            return content_id(item), self.test(item)
        problem = self.problem({"question": messages[-2]["content"], "answer": messages[-1]["content"]})
        text = self._rendered(lambda: render_chat(self.tokenizer, messages[:-1], add_generation_prompt=True))
        (prompt,) = self._tokenize(text)
        self._check_length(len(prompt), "the prompt")
        return content_id(item), PromptExample(prompt, problem.prompt, problem.answer)

    def train(self, item: Problem | Conversation) -> TrainExample:
        """Encode prompt, response and padding with their labels."""
        if not isinstance(item, Problem):
            return self._padded(*self._conversation(item))
        prompt, ids = self._ids(item)
        if self.task.infill:
            labels = [token if p == self.mask_id else UNLABELLED for p, token in zip(prompt, ids, strict=True)]
            return self._padded(ids, labels)
        return self._padded(prompt + ids, [UNLABELLED] * len(prompt) + ids)

    def _conversation(self, messages: Conversation) -> tuple[list[int], list[int]]:
        """(ids, labels) with labels on all answers, or the last one, each with the end of its turn."""
        segments = self._rendered(lambda: split_answers(self.tokenizer, messages, self.all_turns))
        ids: list[int] = []
        labels: list[int] = []
        for text, is_answer in segments:
            (part,) = self._tokenize(text)
            ids += part
            labels += part if is_answer else [UNLABELLED] * len(part)
        if self.mask_id in ids:
            raise BadRow("mask token in the text", repr(messages))
        return ids, labels

    def _rendered(self, render: Callable[[], _T]) -> _T:
        try:
            return render()
        except UserError as error:
            raise BadRow("refused by the chat template", str(error)) from error

    def _padded(self, ids: list[int], labels: list[int]) -> TrainExample:
        if len(ids) < self.min_length:
            raise BadRow(TOO_SHORT)
        num_padding = -len(ids) % self.pad_multiple
        self._check_length(len(ids) + num_padding, "prompt, response and padding")
        padding = [self.pad_id] * num_padding
        prompt_length = next(i for i, label in enumerate([*labels, 0]) if label != UNLABELLED)
        return TrainExample(ids + padding, labels + padding, prompt_length)

    def test(self, problem: Problem) -> PromptExample:
        """Encode the prompt only: neither a long answer nor data.min_length excludes a test problem."""
        prompt, _ = self._ids(problem)
        self._check_length(len(prompt), "the prompt")
        return PromptExample(prompt, problem.prompt, problem.answer)

    def _ids(self, problem: Problem) -> tuple[list[int], list[int]]:
        """(prompt, response) ids. Raises BadRow for a mask token anywhere but on an infill canvas."""
        if self.task.infill:
            mask_text = self.tokenizer.convert_ids_to_tokens(self.mask_id)
            texts = problem.prompt.replace(MASK_TEXT, str(mask_text)), problem.response
        else:
            texts = self._rendered(lambda: chat_texts(self.tokenizer, problem.prompt, problem.response))
        prompt, response = self._tokenize(*texts)
        if self.mask_id in response or (not self.task.infill and self.mask_id in prompt):
            raise BadRow("mask token in the text", problem.prompt)
        if self.task.infill:
            if len(prompt) != len(response):
                raise BadRow("infill: lengths differ", f"canvas {len(prompt)} tokens, response {len(response)}")
            if any(p not in (self.mask_id, r) for p, r in zip(prompt, response, strict=True)):
                raise BadRow("infill: the response changes given tokens", problem.prompt)
            if self.mask_id not in prompt:
                raise BadRow("infill: nothing to fill", problem.prompt)
        return prompt, response

    def _tokenize(self, *texts: str) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # one slow call
        return ids

    def _check_length(self, length: int, what: str) -> None:
        if length > self.max_length:
            raise BadRow("above data.max_length", f"{what}: {length} tokens, at most {self.max_length}")


def example_of(row: Row, task: Task) -> Problem | Conversation:
    """A row's problem, or its conversation where it is more than a question and an answer. Raises BadRow."""
    if row.bad is not None:
        raise row.bad
    if row.conversation is None:
        return _problem(task, row.values or {})
    roles = [message["role"] for message in row.conversation]
    if roles != ["user", "assistant"]:
        return row.conversation
    question, answer = (message["content"] for message in row.conversation)
    return Problem(question, answer, answer)


def _problem(task: Task, values: Mapping[str, str]) -> Problem:
    try:
        return task.problem(values)
    except UserError as error:
        raise BadRow("not a problem of this task", str(error)) from error


def content_id(item: Problem | Conversation) -> str:
    """16 hex digits of a hash of the text: the same example has the same id in every dataset."""
    text = f"{item.prompt}\0{item.response}" if isinstance(item, Problem) else json.dumps(item, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

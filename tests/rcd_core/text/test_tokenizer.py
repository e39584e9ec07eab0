"""The trained tokenizer: lossless, and like a released checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rcd_core.errors import UserError
from rcd_core.tasks import Problem, get_task
from rcd_core.tasks.files import BadRow
from rcd_core.text.encoding import Encoder
from rcd_core.text.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    chat_texts,
    load_tokenizer,
    mask_token_id,
    stop_token_ids,
    tokenizer_sha256,
    train_tokenizer,
)

TEXTS = [text for i in range(200) for text in get_task("arithmetic").synthetic(i, "train", 0).values()]
TOKENIZER = train_tokenizer(TEXTS, 400)


def _ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("a  b .")
@example("don 't , no")
@example("日本\u0000\r\n\t🙂")
@example("<|im_end|>x<|MASK|>")
def test_encoding_is_lossless(text: str) -> None:
    assert TOKENIZER.decode(_ids(text)) == text


def test_digits_are_single_tokens_also_between_masks() -> None:
    problem = get_task("sudoku").problem(get_task("sudoku").synthetic(0, "train", 0))
    assert len(_ids(problem.prompt)) == len(_ids(problem.response)) == 37
    assert [TOKENIZER.decode([i]) for i in _ids("#12<|MASK|>3")] == ["#", "1", "2", "<|MASK|>", "3"]
    assert len(_ids("2026 x 99")) == len(_ids(" x ")) + 6


def test_common_words_are_single_tokens() -> None:
    assert len(_ids("assistant")) == len(_ids("user")) == len(_ids(" many")) == 1


def test_training_is_repeatable_and_depends_on_the_texts() -> None:
    assert tokenizer_sha256(train_tokenizer(TEXTS, 400)) == tokenizer_sha256(TOKENIZER)
    assert tokenizer_sha256(train_tokenizer(TEXTS[:100], 400)) != tokenizer_sha256(TOKENIZER)
    other = train_tokenizer(TEXTS, 400)
    other.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer_sha256(other) != tokenizer_sha256(TOKENIZER)


def test_vocabulary_keeps_within_its_size() -> None:
    assert len(TOKENIZER) <= 400
    assert len(train_tokenizer(["#123"], 400)) < 280  # too little text for more
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size is 100.*260"):
        train_tokenizer(TEXTS, 100)


def test_special_tokens() -> None:
    vocabulary = TOKENIZER.get_vocab()
    assert [vocabulary[text] for text in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert TOKENIZER.eos_token_id == TOKENIZER.pad_token_id == 0
    assert mask_token_id(TOKENIZER) == 3
    assert stop_token_ids(TOKENIZER) == (0, 2)
    assert TOKENIZER.decode(_ids("a<|im_end|><|endoftext|>"), skip_special_tokens=True) == "a"


def test_chat_template_is_chatml() -> None:
    prompt, response = chat_texts(TOKENIZER, "2+2?", "4")
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert response == "4<|im_end|>\n"


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_sha256(loaded) == tokenizer_sha256(TOKENIZER)
    assert (mask_token_id(loaded), stop_token_ids(loaded), loaded.pad_token_id) == (3, (0, 2), 0)
    assert chat_texts(loaded, "a", "b") == chat_texts(TOKENIZER, "a", "b")
    assert loaded(TEXTS[0])["input_ids"] == _ids(TEXTS[0])


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        load_tokenizer(str(tmp_path / "gone"))
    bare = train_tokenizer(TEXTS, 400)
    bare.chat_template = None
    with pytest.raises(UserError, match="chat_template"):
        chat_texts(bare, "a", "b")
    faults = [
        "{{ messages | length }}",
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        {"tool_use": "{{ 1 }}"},
    ]
    for template in faults:
        bare.chat_template = template
        with pytest.raises(UserError, match="chat template"):
            chat_texts(bare, "a", "b")
        with pytest.raises(UserError, match="chat template"):  # before any row
            Encoder(get_task("qa"), bare, 8, 64)
    Encoder(get_task("sudoku"), bare, 8, 64)  # its canvases need no template


def test_a_row_that_the_template_refuses_is_a_bad_row() -> None:
    picky = train_tokenizer(TEXTS, 400)
    fault = "{% if 'odd' in messages[0]['content'] %}{{ raise_exception('odd') }}{% endif %}"
    picky.chat_template = fault + CHAT_TEMPLATE
    encoder = Encoder(get_task("qa"), picky, 8, 64)
    encoder.train(Problem("even", "2", "2"))
    with pytest.raises(BadRow, match="chat template"):
        encoder.train(Problem("odd", "3", "3"))

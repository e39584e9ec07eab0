"""What the terminal draws of a canvas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.cli.live_view import SequenceCanvas, printable
from rcd_core import Decoder, DecodeSettings, Engine, load_model
from rcd_core.tasks.base import MASK_TEXT
from rcd_core.text.tokenizer import load_tokenizer


def test_printable() -> None:
    assert printable("a\tb\x1b]0;x\x07\x9b\u202e\u2028\r\nü漢🙂\u200d") == (
        "a\\tb\\x1b]0;x\\x07\\x9b\\u202e\\u2028\\r\nü漢🙂\u200d"
    )
    assert printable("a\nb", newline="↵") == "a↵b"


def test_the_drawing_holds_given_committed_and_masked_tokens(checkpoints: Path) -> None:
    """Every token of a canvas is drawn once, committed bytes of one character together, guesses with their shade."""
    target = checkpoints / "target"
    tokenizer: Any = load_tokenizer(target)
    decoder = Decoder(load_model(target))
    ids = tokenizer(f"漢{MASK_TEXT}the{MASK_TEXT}{MASK_TEXT}")["input_ids"]
    sequence = decoder.check(ids, DecodeSettings(residual=True, trace=True), infill=True)
    engine = Engine(decoder.model, None, max_batch=1, max_length=len(ids))
    engine.add(sequence)
    canvas = SequenceCanvas(sequence, tokenizer.decode)
    assert canvas.text(coloured=True).plain == "漢·the··"
    engine.step()
    step, left = sequence.steps[-1], sequence.live[0].masked_positions.tolist()
    assert left and set(left) == set(step.masked) - set(step.committed)
    guesses = {p: printable(tokenizer.decode([i]), "↵") for p, i in zip(step.masked, step.argmax, strict=True)}
    text = canvas.text(coloured=True)
    want = "漢" + guesses[ids.index(decoder.model.mask_token_id)] + "the"
    assert text.plain == want + "".join(guesses[p] for p in sorted(guesses)[1:])
    assert sum("on rgb" in str(span.style) for span in text.spans) == len(left)
    plain = canvas.text(coloured=False).plain
    assert len(plain) == len(text.plain) + len(left)
    while engine.busy:
        engine.step()
    assert canvas.text(coloured=True).plain == printable(tokenizer.decode(sequence.output().canvas_ids))
    assert canvas.text(coloured=True, limit=1).plain != ""

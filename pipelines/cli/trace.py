"""Traces as files: what `rcd generate --trace_file` writes, and `rcd trace`, which shows one in a browser."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence as Many
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pipelines.cli.file_flags import TraceFlags
from pipelines.cli.terminal import absolute_path
from pipelines.serving.http.viewer import VERSION, trace_server
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import TASKS, check
from rcd_core.tasks.base import MASK_TEXT

if TYPE_CHECKING:  # `rcd trace` needs no torch
    from pipelines.evaluation.generator import Generator
    from rcd_core.decoding.sequence import Sequence

CANDIDATES = 5  # of each predicted position, as the playground asks for
_REMEDY = "save one with `rcd generate --trace_file FILE`, or on the playground"


def trace(flags: TraceFlags) -> int:
    """Serve the page with a trace until Ctrl-C, or until nobody has asked for it for a while."""
    if not flags.idle_minutes > 0:
        raise UserError(f"--idle_minutes is {flags.idle_minutes:g}; it must be more than 0")
    content = _read(flags.file)
    with trace_server(content, storage.basename(flags.file), flags.port) as server:
        end = f"Ctrl-C ends it, and so do {flags.idle_minutes:g} minutes without a request."
        print(f"{server.url} shows {flags.file}. {end}", file=sys.stderr, flush=True)
        try:
            server.run(60 * flags.idle_minutes)
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return 0


def _read(path: str) -> bytes:
    """Raises UserError for what is no trace; the page checks the answers in it."""
    try:
        content: bytes = storage.read_bytes(absolute_path(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {_REMEDY}") from error
    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON, so it is no trace; {_REMEDY}") from error
    version = found.get("rcd_trace") if isinstance(found, dict) else None
    if version != VERSION:
        raise UserError(f"{path} is no trace: its rcd_trace is {version!r} instead of {VERSION}; {_REMEDY}")
    return content


def save_trace(path: str, generator: Generator, name: str, sequences: Many[Sequence], seconds: float) -> None:
    """Write decoded sequences, which have traces. name: of the model, for the page. seconds: that all took."""
    titles = [name] if len(sequences) == 1 else [f"{name}, prompt {n + 1}" for n in range(len(sequences))]
    answers = [_answer(generator, title, s, seconds) for title, s in zip(titles, sequences, strict=True)]
    storage.write_bytes(path, json.dumps({"rcd_trace": VERSION, "answers": answers}).encode())


def _answer(generator: Generator, title: str, s: Sequence, seconds: float) -> dict[str, Any]:
    output, settings = s.output(), s.settings
    mask = generator.decoder.model.mask_token_id
    text, template = generator.text(s), _template(generator, s) if s.infill else None
    num_tokens = sum(token != mask for token in output.token_ids)
    # What a checkpoint was trained for is not known here; a prompt that is a problem of no task has no verdict.
    tasks = [name for name, task in TASKS.items() if task.infill] if template else []
    verdicts = [verdict for task in tasks if (verdict := check(task, template or "", text)) is not None]
    return {
        "title": title,
        "note": f"residual on, start {settings.start}" if settings.residual else "residual off",
        "prompt": None if s.infill else generator.decode(s.canvas[: s.num_prompt].tolist()),
        "template": template,
        "text": text,
        "num_tokens": num_tokens,
        "valid": verdicts[0] if verdicts else None,
        "rcd": {
            "settings": asdict(settings),
            "forwards": asdict(output.num_forwards),
            "tokens_per_forward": round(num_tokens / max(1, output.num_forwards.denoise), 3),
            "tokens_per_pass": round(num_tokens / max(1.0, _passes(generator, s)), 3),
            "reference_failures": output.reference_failures,
            "seconds": round(seconds, 4),
        },
        "steps": [step.readable(generator.decode) for step in output.steps],
    }


def _passes(generator: Generator, s: Sequence) -> float:
    """Passes that choose tokens, as the report counts them: those of the reference by their FLOPs."""
    from rcd_core.decoding.reference import LocalReference
    from rcd_core.evaluation.flops import reference_weight, shape_of

    output, reference = s.output(), generator.decoder.reference
    forwards = output.num_forwards
    if not forwards.reference or not isinstance(reference, LocalReference):
        return forwards.denoise
    return forwards.denoise + forwards.reference * reference_weight(s, output, shape_of(reference.model))


def _template(generator: Generator, s: Sequence) -> str:
    """The canvas before decoding, with MASK_TEXT for each mask."""
    runs = groupby(zip(s.canvas.tolist(), s.initially_masked.tolist(), strict=True), lambda pair: pair[1])
    parts = [(masked, [token for token, _ in run]) for masked, run in runs]
    return "".join(MASK_TEXT * len(ids) if masked else generator.decode(ids) for masked, ids in parts)

"""`rcd generate`: answers of a checkpoint to prompts, to stdin, or in a chat; in this process and without Ray."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from pipelines.cli.flags import GenerateFlags, decode_settings
from pipelines.cli.live_view import SequenceCanvas, live_view
from pipelines.cli.terminal import (
    INTERRUPTED,
    can_draw,
    converse,
    print_text,
    read_stdin,
    statistics_line,
    turn,
    writable_file,
)
from pipelines.cli.trace import CANDIDATES, save_trace
from pipelines.evaluation.generator import Generator, load_generator
from pipelines.ray_cluster.hardware import device_of
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.request import check_failures, uncalibrated
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.tensor_parallel import follow, make_engine, release
from rcd_core.errors import UserError
from rcd_core.ops.ranks import torchrun_ranks
from rcd_core.process import ProcessSettings
from rcd_core.tasks.base import MASK_TEXT

MAX_BATCH = 64


def generate(flags: GenerateFlags) -> int:
    settings = decode_settings(flags.decode)
    DecodeSettings(**settings)  # raises before the minutes that loading may take
    _check(flags)
    ProcessSettings(verify_weights=not flags.no_verify, deterministic=flags.deterministic).apply()
    if flags.trace_file is not None:
        flags = replace(flags, trace_file=writable_file("--trace_file", flags.trace_file))
    ranks = torchrun_ranks(flags.tensor_parallel, flags.device or device_of(None)[0])
    generator = load_generator(
        flags.model_dir,
        flags.ref_model_dir,
        settings,
        dtype=flags.dtype,
        device=flags.device,
        attention=flags.attention,
        weights=flags.weights,
        mask_id=flags.mask_id,
        needs_tokenizer=not flags.prompt_ids,
        ranks=ranks,
        verbose=flags.verbose and ranks.rank == 0,
    )
    model, reference = generator.decoder.model, generator.decoder.reference
    if ranks.rank:
        follow(model, reference if isinstance(reference, LocalReference) else None)
        return 0
    try:
        return _generate(generator, flags)
    finally:
        release(model)


def _generate(generator: Generator, flags: GenerateFlags) -> int:
    if not (flags.prompt or flags.prompt_ids or flags.json) and sys.stdin.isatty():
        return _chat(generator, flags)
    return _answer(generator, flags, _inputs(generator, flags))


def _check(flags: GenerateFlags) -> None:
    """Raises UserError for flags that contradict each other."""
    if flags.prompt and flags.prompt_ids:
        raise UserError("--prompt and --prompt_ids are both given; give texts or token ids")
    if flags.json and flags.show:
        raise UserError("--json and --show are both given; stdout holds one or the other")
    if flags.infill and "max_new_tokens" in flags.decode:
        raise UserError("--max_new_tokens has no effect with --infill, which fills the masks only; leave it out")
    if flags.ref_model_dir is None and flags.decode.get("residual") is not False:
        for name in ("start", "residual_source"):
            if flags.decode.get(name) == "reference":
                raise UserError(f"--{name} is reference, which needs a reference model; give --ref_model_dir")
    if flags.prompt_length is not None and flags.prompt_length < 1:
        raise UserError(f"--prompt_length is {flags.prompt_length}; it must be at least 1")
    if flags.delay and not flags.show:
        raise UserError("--delay has no effect without --show; give both")
    if not 0 <= flags.delay < float("inf"):
        raise UserError(f"--delay is {flags.delay}; it must be a number of seconds, 0 or more")
    if flags.trust_remote_code:
        print("note: --trust_remote_code is ignored; a checkpoint's code is never run", file=sys.stderr)


# -- from prompts to answers -----------------------------------------------------------------------------------------


def _inputs(generator: Generator, flags: GenerateFlags) -> list[Sequence]:
    """Requests from the flags, or from stdin."""
    if flags.prompt_ids:
        try:
            prompts = [[int(i) for i in text.replace(",", " ").split()] for text in flags.prompt_ids]
        except ValueError as error:
            raise UserError(f'--prompt_ids: {error}; give integers, for example "1 2 3"') from error
    else:
        prompts = [_ids(generator, flags, [turn(text)]) for text in flags.prompt or [read_stdin()]]
    return [_request(generator, flags, ids) for ids in prompts]


def _ids(generator: Generator, flags: GenerateFlags, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation; with --raw, --infill or without a chat template, of its last text alone."""
    if flags.raw or flags.infill or not generator.has_template:
        return generator.encode(messages[-1]["content"], flags.infill)
    return generator.converse(messages)


def _request(generator: Generator, flags: GenerateFlags, ids: list[int]) -> Sequence:
    limit = flags.prompt_length
    if limit is not None and len(ids) > limit:
        raise UserError(f"--prompt_length is {limit}, but the prompt has {len(ids)} tokens; shorten it")
    sequence = generator.sequence(ids, flags.infill, trace=flags.show or flags.trace_file is not None)
    if flags.trace_file is not None:
        sequence.num_candidates = CANDIDATES
    return sequence


def _answer(generator: Generator, flags: GenerateFlags, sequences: list[Sequence]) -> int:
    """Decode; print the texts in order, then the statistics. Returns the exit code."""
    if flags.verbose:
        print(f"settings: {json.dumps(asdict(sequences[0].settings))}", file=sys.stderr)
    started = time.monotonic()
    batches = [[s] for s in sequences] if can_draw(flags.show) else [sequences]
    complete = True
    for batch in batches:
        complete = _decode(generator, flags, batch)
        if not flags.json:
            for sequence in batch:
                print_text(generator.text(sequence))
        if not complete:
            break
    seconds = time.monotonic() - started
    report = _report(generator, sequences, seconds)
    if flags.trace_file is not None:
        save_trace(flags.trace_file, generator, flags.model_dir, sequences, seconds)
    if flags.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        notes = ["interrupted"] * (not complete) + [f"{len(sequences)} prompts"] * (len(sequences) > 1)
        unsure = uncalibrated(generator.settings, generator.decoder.model)
        warning = " · T_res was never calibrated: rcd calibrate" if unsure else ""
        print(statistics_line(report, *notes) + warning, file=sys.stderr)
    return 0 if complete else INTERRUPTED


def _decode(generator: Generator, flags: GenerateFlags, sequences: list[Sequence]) -> bool:
    """Run the engine until all are finished. Returns False after Ctrl-C; the sequences then hold what was committed."""
    decoder = generator.decoder
    engine = make_engine(
        decoder.model,
        decoder.reference,
        max_batch=min(MAX_BATCH, len(sequences)),
        max_length=max(len(s.canvas) for s in sequences),
    )
    for sequence in sequences:
        engine.add(sequence)
    with _interruptible() as interrupted:
        if not can_draw(flags.show):
            while engine.busy and not interrupted:
                engine.step()
        else:
            with live_view(SequenceCanvas(sequences[0], generator.decode), Console()) as draw:
                while engine.busy and not interrupted:
                    engine.step()
                    draw()
                    time.sleep(flags.delay)
    check_failures(sequences)
    return not engine.busy


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Yields a list to which Ctrl-C adds, so that a pass is never cut short. A second one raises KeyboardInterrupt."""
    signals: list[int] = []

    def record(number: int, _: Any) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = signal.signal(signal.SIGINT, record)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


# -- statistics ------------------------------------------------------------------------------------------------------


def _report(generator: Generator, sequences: list[Sequence], seconds: float) -> dict[str, Any]:
    """What --json prints. The names are those of the HTTP API."""
    results = [_result(generator, s) for s in sequences]
    forwards = {kind: sum(r["forwards"][kind] for r in results) for kind in results[0]["forwards"]}
    num_tokens = sum(r["num_tokens"] for r in results)
    return {
        "results": results,
        "num_tokens": num_tokens,
        "forwards": forwards,
        "tokens_per_forward": round(num_tokens / max(1, forwards["denoise"]), 3),
        "seconds": round(seconds, 4),
    }


def _result(generator: Generator, sequence: Sequence) -> dict[str, Any]:
    output, mask_id = sequence.output(), generator.decoder.model.mask_token_id
    num_tokens = sum(i != mask_id for i in output.token_ids)
    result = {
        "text": generator.text(sequence),
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason if sequence.finished else "interrupted",
        "num_prompt_tokens": sequence.num_prompt,
        "num_tokens": num_tokens,
        "forwards": asdict(output.num_forwards),
        "tokens_per_forward": round(num_tokens / max(1, output.num_forwards.denoise), 3),
        "settings": asdict(output.settings),
    }
    if sequence.infill:
        result["canvas_ids"] = output.canvas_ids
    if output.settings.trace:
        result["steps"] = [asdict(step) for step in output.steps]
    return result


# -- a conversation in the terminal ----------------------------------------------------------------------------------


def _chat(generator: Generator, flags: GenerateFlags) -> int:
    def answer(messages: list[dict[str, str]]) -> str:
        sequence = _request(generator, flags, _ids(generator, flags, messages))
        _answer(generator, flags, [sequence])
        return generator.text(sequence).replace(MASK_TEXT, "")  # left by Ctrl-C; a prompt must not contain them

    converse(answer)
    return 0

"""`rcd generate`: a checkpoint's answer to prompts, to what is piped in, or to you, in this process and without Ray.

rcd generate --model_dir MODEL --prompt "..." --show
echo "..." | rcd generate --model_dir MODEL
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console

from pipelines.cli.live_view import live_view
from pipelines.cli.terminal import (
    INTERRUPTED,
    converse,
    print_text,
    read_stdin,
    refuse_in_one_line,
    statistics_line,
    turn,
)
from pipelines.evaluation.decode_flags import add_decode_flags, add_flag, errors_as_flags, given_settings
from pipelines.evaluation.generator import Generator, load_generator
from rcd_core.attention.backends import BACKENDS
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.request import uncalibrated
from rcd_core.decoding.sequence import Sequence
from rcd_core.errors import UserError
from rcd_core.tasks.base import MASK_TEXT

MAX_BATCH = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rcd generate --model_dir DIR [--ref_model_dir DIR] [--prompt TEXT] [--show] [flags]"
    parser.allow_abbrev = False
    refuse_in_one_line(parser, "rcd generate")
    model = parser.add_argument_group("model")
    add_flag(model, "--model_dir", required=True, metavar="DIR", help="checkpoint: a directory, a URI or a hub id")
    add_flag(model, "--ref_model_dir", metavar="DIR", help="reference: warm-starts each block's residuals")
    add_flag(model, "--dtype", choices=DTYPES, default="auto", help="default: auto, the checkpoint's own")
    add_flag(model, "--device", help="default: cuda where there is one, else cpu")
    add_flag(model, "--attention", choices=tuple(BACKENDS), default="sdpa", help="default: sdpa")
    add_flag(model, "--mask_id", type=int, metavar="ID", help="checked against the checkpoint's, which is used")
    add_flag(model, "--trust_remote_code", action="store_true", help="not needed: no code of a checkpoint is run")
    given = parser.add_argument_group("input", "One user turn each; without any, stdin: a chat in a terminal.")
    add_flag(given, "--prompt", action="append", metavar="TEXT", help="may be repeated: a batch")
    add_flag(given, "--prompt_ids", action="append", metavar="IDS", help='token ids, "1 2 3"; ids are printed')
    add_flag(given, "--raw", action="store_true", help="no chat template: the text is continued as it stands")
    add_flag(given, "--infill", action="store_true", help=f"fill the {MASK_TEXT} places of the text and nothing else")
    add_flag(given, "--prompt_length", type=int, metavar="N", help="refuse prompts of more tokens")
    output = parser.add_argument_group("output", "Text on stdout, statistics on stderr.")
    add_flag(output, "--show", action="store_true", help="draw the denoising live, where stdout is a terminal")
    add_flag(output, "--delay", type=float, default=0.0, metavar="S", help="seconds to wait after each pass drawn")
    add_flag(output, "--json", action="store_true", help="text, ids, settings and statistics as one JSON object")
    add_flag(output, "--verbose", action="store_true", help="say on stderr which models and settings are in effect")
    add_decode_flags(parser)


def run(options: argparse.Namespace) -> int:
    with errors_as_flags():
        DecodeSettings(**given_settings(options))  # before minutes of loading
    _check(options)
    try:
        generator = load_generator(options)
        if not (options.prompt or options.prompt_ids or options.json) and sys.stdin.isatty():
            return _chat(generator, options)
        return _answer(generator, options, _inputs(generator, options))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def _check(options: argparse.Namespace) -> None:
    """Combinations that contradict each other. Raises UserError naming the flags."""
    if options.prompt and options.prompt_ids:
        raise UserError("--prompt and --prompt_ids are both given; give texts or token ids")
    if options.json and options.show:
        raise UserError("--json and --show are both given; stdout holds one or the other")
    if options.infill and "max_new_tokens" in options:
        raise UserError("--max_new_tokens does not go with --infill, which fills every mask and adds nothing")
    if options.prompt_length is not None and options.prompt_length < 1:
        raise UserError(f"--prompt_length is {options.prompt_length}; it must be at least 1")
    if options.delay and not options.show:
        raise UserError("--delay is given without --show, whose passes it spaces out; give both")
    if not 0 <= options.delay < float("inf"):
        raise UserError(f"--delay is {options.delay}; it must be a number of seconds, 0 or more")
    if options.trust_remote_code:
        print("note: --trust_remote_code is not needed; no code of a checkpoint is ever run", file=sys.stderr)


# -- from prompts to answers -----------------------------------------------------------------------------------------


def _inputs(generator: Generator, options: argparse.Namespace) -> list[Sequence]:
    """The requests that flags or stdin make."""
    if options.prompt_ids:
        try:
            prompts = [[int(i) for i in text.replace(",", " ").split()] for text in options.prompt_ids]
        except ValueError as error:
            raise UserError(f'--prompt_ids: {error}; give integers, for example "1 2 3"') from error
    else:
        prompts = [_ids(generator, options, [turn(text)]) for text in options.prompt or [read_stdin()]]
    return [_request(generator, options, ids) for ids in prompts]


def _ids(generator: Generator, options: argparse.Namespace, messages: list[dict[str, str]]) -> list[int]:
    """The conversation; or, with --raw, --infill or a tokenizer without a chat template, its last text as it stands."""
    if options.raw or options.infill or not generator.has_template:
        return generator.encode(messages[-1]["content"], options.infill)
    return generator.converse(messages)


def _request(generator: Generator, options: argparse.Namespace, ids: list[int]) -> Sequence:
    limit = options.prompt_length
    if limit is not None and len(ids) > limit:
        raise UserError(f"--prompt_length is {limit}, but the prompt has {len(ids)} tokens; shorten it")
    return generator.sequence(ids, options.infill, trace=options.show)


def _answer(generator: Generator, options: argparse.Namespace, sequences: list[Sequence]) -> int:
    """Decode, print the texts in order and the statistics. Returns the exit code."""
    if options.verbose:
        print(f"settings: {json.dumps(asdict(sequences[0].settings))}", file=sys.stderr)
    started = time.monotonic()
    batches = [[s] for s in sequences] if _draws(options) else [sequences]
    complete = True
    for batch in batches:
        complete = _decode(generator, options, batch)
        if not options.json:
            for sequence in batch:
                print_text(generator.text(sequence))
        if not complete:
            break
    report = _report(generator, sequences, time.monotonic() - started)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        notes = ["interrupted"] * (not complete) + [f"{len(sequences)} prompts"] * (len(sequences) > 1)
        unsure = uncalibrated(generator.settings, generator.decoder.model)
        warning = " · T_res was never calibrated: rcd calibrate" if unsure else ""
        print(statistics_line(report, *notes) + warning, file=sys.stderr)
    return 0 if complete else INTERRUPTED


def _decode(generator: Generator, options: argparse.Namespace, sequences: list[Sequence]) -> bool:
    """Run the engine until all are done. False: Ctrl-C came first, and the sequences hold what was committed."""
    decoder = generator.decoder
    engine = Engine(
        decoder.model,
        decoder.reference,
        max_batch=min(MAX_BATCH, len(sequences)),
        max_length=max(len(s.canvas) for s in sequences),
    )
    for sequence in sequences:
        engine.add(sequence)
    with _interruptible() as interrupted:
        if not _draws(options):
            while engine.busy and not interrupted:
                engine.step()
        else:
            with live_view(sequences[0], generator.decode, Console()) as draw:
                while engine.busy and not interrupted:
                    engine.step()
                    draw()
                    time.sleep(options.delay)
    return not engine.busy


def _draws(options: argparse.Namespace) -> bool:
    """Only a terminal that understands cursor movements is drawn on."""
    console = Console()
    return bool(options.show) and console.is_terminal and not console.is_dumb_terminal


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C fills the list, so that a pass is never left half done; a second one raises KeyboardInterrupt."""
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


# -- statistics ------------------------------------------------------------------------------------------------------


def _report(generator: Generator, sequences: list[Sequence], seconds: float) -> dict[str, Any]:
    """What --json prints; the names are those of the HTTP interface."""
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


def _chat(generator: Generator, options: argparse.Namespace) -> int:
    def answer(messages: list[dict[str, str]]) -> str:
        sequence = _request(generator, options, _ids(generator, options, messages))
        _answer(generator, options, [sequence])
        return generator.text(sequence).replace(MASK_TEXT, "")  # left by a Ctrl-C, and refused in a prompt

    converse(answer)
    return 0

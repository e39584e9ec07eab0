"""The flags of every `rcd` command: one dataclass per command, whose docstring is the command's help.

Commands import torch, Ray or pydantic, which takes seconds. This module does not, so that `--help` is immediate.
`--a_b` and `--a-b` are the same flag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

from cyclopts import Group, Parameter, Token

from pipelines.recipe.descriptions import DESCRIPTIONS
from rcd_core.decode_settings import DecodeAttention, DecodeSettings, Weights


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    return int(tokens[0].value)


Int = Annotated[int, Parameter(converter=_whole)]  # cyclopts would round 2.5
Flags = Parameter(name="*")  # the fields of a class become flags of their own
Device = Literal["A100", "H100", "H200", "B200", "L40S", "L4"]
FEW = {"consume_multiple": (1, 1 << 16)}  # several values after one flag


DETERMINISTIC = "Repeat results bit for bit, one request at a time; pipelines/README.md says where that holds."
NO_VERIFY = "Load weights whose bytes are not those of their stored digests."


def _section(title: str, about: str = "", sort_key: int = 0) -> Callable[..., Parameter]:
    """A titled part of a command's help -> what declares a flag in it, from its help text."""
    group = Group(title, help=about, sort_key=sort_key)
    return lambda text, **options: Parameter(help=text, group=group, **options)


# -- decoding --------------------------------------------------------------------------------------------------------

# The names in the authors' scripts.
ALIASES = {
    "policy": "--remasking_strategy",
    "entropy_bound": "--eb_threshold",
    "max_new_tokens": "--gen_length",
    "stop_token_ids": "--stopping_criteria_idx",
}


def _decode_flags(served: bool = False) -> dict[str, Any]:
    """A flag for every field of DecodeSettings. served: a server has defaults of its own."""
    about = "Without a value: the served model's." if served else "Without a default here: the checkpoint's, else off."
    section = _section("Decoding", about, sort_key=9)
    integers = {int: Int, int | None: Int | None, tuple[int, ...] | None: tuple[Int, ...] | None}
    hints, flags = get_type_hints(DecodeSettings), {}
    for setting in dataclasses.fields(DecodeSettings):
        name, default = setting.name, setting.default
        text = DESCRIPTIONS["DecodeSettings"][name].replace("null:", "default:")
        if default is not None and default is not False and not served:
            text += f" Default: {default}."
        options = {"negative_bool": "no-", "consume_multiple": name == "stop_token_ids", "alias": ALIASES.get(name)}
        flags[name] = Annotated[integers.get(hints[name], hints[name]), section(text, **options)]
    return flags


if TYPE_CHECKING:
    DecodeFlags = dict[str, Any]
    ServedFlags = dict[str, Any]
else:  # a dictionary of the flags that were given: which ones is needed where defaults depend on the checkpoint
    DecodeFlags = Annotated[TypedDict("DecodeFlags", _decode_flags(), total=False), Flags]
    ServedFlags = Annotated[TypedDict("ServedFlags", _decode_flags(served=True), total=False), Flags]


def decode_settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings given as flags, for DecodeSettings(**...), which checks them."""
    return flags | {"top_k": None} if flags.get("top_k") == 0 else dict(flags)  # the authors' scripts write 0 for off


# -- commands --------------------------------------------------------------------------------------------------------

MODEL = _section("Model", sort_key=1)
PROMPT = _section("Input", "One user turn each. Without any: stdin; in a terminal, a chat.", sort_key=2)
OUTPUT = _section("Output", "Text on stdout, statistics on stderr.", sort_key=3)


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """Generate text with a checkpoint in this process, without Ray.

    rcd generate --model_dir MODEL --prompt "..." --show
    echo "..." | rcd generate --model_dir MODEL
    """

    model_dir: Annotated[str, MODEL("Checkpoint: directory, URI or hub id.")]
    ref_model_dir: Annotated[str | None, MODEL("Reference model, which warm-starts the residuals of a block.")] = None
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], MODEL("auto: the checkpoint's.")] = "auto"
    device: Annotated[str | None, MODEL("Default: cuda if available, else cpu.")] = None
    attention: Annotated[DecodeAttention, MODEL("auto: the fastest that runs here.")] = "auto"
    weights: Annotated[Weights, MODEL("Keep the layers' weights quantised, to save memory.")] = "full"
    tensor_parallel: Annotated[Int, MODEL("Processes that hold the model together; start them with torchrun.")] = 1
    deterministic: Annotated[bool, MODEL(DETERMINISTIC)] = False
    no_verify: Annotated[bool, MODEL(NO_VERIFY, name="--no-verify")] = False
    mask_id: Annotated[Int | None, MODEL("Must equal the checkpoint's mask token id, which is used.")] = None
    trust_remote_code: Annotated[bool, MODEL("Accepted and ignored: a checkpoint's code is never run.")] = False

    prompt: Annotated[tuple[str, ...], PROMPT("May be repeated: a batch.", allow_leading_hyphen=True)] = ()
    prompt_ids: Annotated[tuple[str, ...], PROMPT('Token ids, as "1 2 3"; prints ids.')] = ()
    raw: Annotated[bool, PROMPT("Continue the text without a chat template.")] = False
    infill: Annotated[bool, PROMPT("Fill the <|MASK|> tokens of the text, and add nothing.")] = False
    prompt_length: Annotated[Int | None, PROMPT("Refuse prompts of more tokens.")] = None

    show: Annotated[bool, OUTPUT("Draw the denoising in the terminal.")] = False
    delay: Annotated[float, OUTPUT("Seconds to wait after each pass drawn.")] = 0.0
    json: Annotated[bool, OUTPUT("Print text, ids, settings and statistics as one JSON object.")] = False
    trace_file: Annotated[
        str | None, OUTPUT("Also write every pass, for `rcd trace` and the playground.", metavar="FILE")
    ] = None
    verbose: Annotated[bool, OUTPUT("Print models and settings on stderr.")] = False

    decode: DecodeFlags = dataclasses.field(default_factory=dict)


SERVER = _section("Endpoint", "An API key is read from the environment variable RCD_API_KEY.", sort_key=1)
TURN = _section("Input", "Without --prompt: stdin as one turn; in a terminal, a chat.", sort_key=2)


@dataclass(frozen=True, kw_only=True)
class ChatFlags:
    """Talk to a served model and see the denoising as it happens.

    rcd chat --url http://127.0.0.1:8000
    echo "..." | rcd chat --url http://127.0.0.1:8000 --model rcd-demo
    """

    url: Annotated[str, SERVER("For example http://127.0.0.1:8000")]
    model: Annotated[str | None, SERVER("Model id. Default: the first that the endpoint lists.")] = None
    prompt: Annotated[str | None, TURN("One turn instead of a chat.", allow_leading_hyphen=True)] = None
    raw: Annotated[bool, TURN("Continue the text without a chat template (/v1/completions).")] = False
    infill: Annotated[bool, TURN("Fill the <|MASK|> tokens of the text, and add nothing.")] = False
    no_show: Annotated[bool, OUTPUT("Do not draw the denoising in a terminal.", name="--no-show")] = False
    decode: ServedFlags = dataclasses.field(default_factory=dict)


CHECKPOINTS = _section("Checkpoints", "Directories, URIs or hub ids.", sort_key=1)
ENDPOINT = _section("A live endpoint instead", "RCD_API_KEY or OPENAI_API_KEY is sent, if set.", sort_key=2)
TASK = _section("Problems and settings", sort_key=3)
WHERE = _section("Ray", "For checkpoints. Without an address: a local Ray that ends with the command.", sort_key=4)


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Evaluate checkpoints, or a served model.

    rcd evaluate --target RCD --task gsm8k --test test.jsonl --output DIR
    rcd evaluate --url URL --model ID --task gsm8k --test test.jsonl --output DIR
    """

    target: Annotated[str | None, CHECKPOINTS("RCD model; without it only the baseline is evaluated.")] = None
    baseline: Annotated[str | None, CHECKPOINTS("SeqD: same start and training, without residuals.")] = None
    residual_off: Annotated[bool, CHECKPOINTS("Add the target without residuals; this is not SeqD.")] = False
    reference: Annotated[str | None, CHECKPOINTS("Reference model; adds the reference start.")] = None

    url: Annotated[str | None, ENDPOINT("OpenAI-compatible, for example http://127.0.0.1:8000/v1")] = None
    model: Annotated[str | None, ENDPOINT("Model id.")] = None
    baseline_model: Annotated[str | None, ENDPOINT("Model id of the endpoint to compare with.")] = None
    concurrency: Annotated[Int, ENDPOINT("Requests at a time.")] = 8
    reference_flops_weight: Annotated[float, ENDPOINT("Cost of a reference pass in target passes.")] = 1.0

    task: Annotated[str | None, TASK("gsm8k, math500, aime24, sudoku, qa, ...; a wrong name lists all.")] = None
    test: Annotated[tuple[str, ...], TASK(".jsonl, .parquet, hf://..., or synthetic; repeatable.", metavar="FILE")] = ()
    also: Annotated[
        tuple[str, ...], TASK("A further task of the same evaluation, as NAME=FILE; repeatable.", metavar="TASK=FILE")
    ] = ()
    output: Annotated[str | None, TASK("Directory or URI of the results; the same command resumes there.")] = None
    settings: Annotated[str | None, TASK("Shipped settings file, for example paper-sdar-b64.")] = None
    list_settings: Annotated[bool, TASK("List the shipped settings files and exit.")] = False
    thresholds: Annotated[tuple[float, ...] | None, TASK("Confidence thresholds to sweep.", **FEW)] = None
    starts: Annotated[tuple[str, ...] | None, TASK("First residual of a block: zero, reference.", **FEW)] = None
    block_lengths: Annotated[tuple[Int, ...] | None, TASK("Default: that of the checkpoint.", **FEW)] = None
    samples: Annotated[Int | None, TASK("Answers per problem, for a temperature above 0.")] = None
    num_examples: Annotated[Int | None, TASK("Use the first N problems. Default: all.")] = None
    grader: Annotated[
        Literal["default", "official"] | None, TASK("official: as GSM8K's and MATH's graders, instead of by value.")
    ] = None
    seed: Annotated[Int, TASK("Seed of sampling.")] = 0
    deterministic: Annotated[bool, TASK(DETERMINISTIC)] = False
    no_verify: Annotated[bool, CHECKPOINTS(NO_VERIFY, name="--no-verify")] = False
    set: Annotated[
        tuple[str, ...],
        TASK("Any key of a recipe; decode.x is short for evaluate.decode.x. Repeatable.", metavar="KEY=VALUE"),
    ] = ()

    address: Annotated[str | None, WHERE("Ray cluster. Default: RAY_ADDRESS.")] = None
    actors: Annotated[Int | None, WHERE("Decoding processes. Default: one per GPU, else one.")] = None
    gpus: Annotated[
        float | None, WHERE("GPUs of each process. Default: 1 if the cluster has GPUs or may add nodes, else 0.")
    ] = None
    redo: Annotated[tuple[str, ...], WHERE("Run a finished stage again: prepare, evaluate.", metavar="STAGE")] = ()
    dry_run: Annotated[bool, WHERE("Print the recipe and the plan; start nothing.")] = False
    verbose: Annotated[bool, WHERE("Show Ray's logs and progress bars.")] = False


DATA = _section("Held-out training examples", "Never test problems, as T_res is fitted to them.", sort_key=2)
CALIBRATION = _section("Output", "T_res on stdout, the search on stderr.", sort_key=3)


@dataclass(frozen=True, kw_only=True)
class CalibrateFlags:
    """Choose T_res of a checkpoint; measure how good its discarded predictions are.

    A model of a run is copied by rcd export first.

    rcd calibrate --target RCD --reference REF --task gsm8k --data held_out.jsonl
    rcd calibrate --target ANY --task gsm8k --data held_out.jsonl --report a.html
    """

    target: Annotated[str, CHECKPOINTS("RCD model; T_res is written into it.")]
    reference: Annotated[
        str | None, CHECKPOINTS("Model whose signals it was trained on. Without it: only the discarded predictions.")
    ] = None

    no_verify: Annotated[bool, CHECKPOINTS(NO_VERIFY, name="--no-verify")] = False

    task: Annotated[str, DATA("gsm8k, math, sudoku, qa, ...; a wrong name lists all.")]
    data: Annotated[str, DATA(".jsonl or .parquet, as data.train of a recipe; or synthetic.", metavar="FILE")]
    field: Annotated[tuple[str, ...], DATA("As data.fields of a recipe; repeatable.", metavar="OURS=COLUMN")] = ()
    num_examples: Annotated[Int, DATA("Use the first N examples.")] = 256
    match: Annotated[
        Literal["decoding", "training"],
        DATA("Query the reference on the states that decoding visits, or on examples under its training noise."),
    ] = "decoding"
    noise_seed: Annotated[Int, DATA("Seed of the masks for the reference.")] = 0
    alpha_temperature: Annotated[float, DATA("Temperature of the signals.")] = 1.0

    report: Annotated[str | None, CALIBRATION("Also write an HTML page with all curves.", metavar="FILE")] = None
    json: Annotated[bool, CALIBRATION("Print all numbers as one JSON object.")] = False
    deterministic: Annotated[bool, CALIBRATION(DETERMINISTIC)] = False
    dry_run: Annotated[bool, CALIBRATION("Write nothing into the checkpoint.")] = False

    decode: DecodeFlags = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PredictFlags:
    """Say from a plain checkpoint and prompts whether residuals may pay, before any training.

    It decodes the prompts, with a confidence threshold of 0.9 unless given, and measures how much masked positions
    learn from certain tokens and from choices. Decode as you will serve: block length and number of new tokens matter.

    rcd predict --baseline CKPT --task gsm8k --test test.jsonl
    """

    baseline: Annotated[str, CHECKPOINTS("Diffusion model that has learned the task, without residuals.")]
    no_verify: Annotated[bool, CHECKPOINTS(NO_VERIFY, name="--no-verify")] = False
    task: Annotated[str, TASK("gsm8k, math, sudoku, qa, ...; a wrong name lists all.")]
    test: Annotated[str, TASK(".jsonl or .parquet, as data.test of a recipe; or synthetic.", metavar="FILE")]
    field: Annotated[tuple[str, ...], TASK("As data.fields of a recipe; repeatable.", metavar="OURS=COLUMN")] = ()
    num_examples: Annotated[Int, TASK("Decode the first N prompts.")] = 256
    json: Annotated[bool, TASK("Print all numbers as one JSON object.")] = False
    decode: DecodeFlags = dataclasses.field(default_factory=dict)


FLAG = _section("Flags")
STATE = FLAG("File that remembers the running head.", metavar="FILE")


@dataclass(frozen=True)
class ReportFlags:
    """Compare the evaluations of runs, in the terminal and as one HTML page.

    rcd report ~/rcd-runs/demo-s0 s3://bucket/rcd/demo-s1 --output compared.html
    """

    runs: Annotated[tuple[str, ...], FLAG("Directories or URIs of runs, or of `rcd evaluate --output`.")]
    _: KW_ONLY
    output: Annotated[str | None, FLAG("Also write one HTML page: a path or URI.", metavar="FILE")] = None
    arms: Annotated[tuple[str, ...] | None, FLAG("Only these methods; patterns like 'target/*' work.", **FEW)] = None


@dataclass(frozen=True, kw_only=True)
class RunsFlags:
    """List runs and the state of their stages."""

    storage: Annotated[str, FLAG("Directory or URI of the runs.", metavar="DIR")] = "~/rcd-runs"


@dataclass(frozen=True, kw_only=True)
class DownFlags:
    """Stop the local Ray head and every process that it started."""

    state: Annotated[Path | None, STATE] = None


@dataclass(frozen=True, kw_only=True)
class UpFlags:
    """Start a local Ray head, or reuse the running one."""

    dashboard_port: Annotated[Int | None, FLAG("Port for jobs and the dashboard. Default: 8265.")] = None
    port: Annotated[Int | None, FLAG("Port that the job's HTTP endpoint will use; it must be free.")] = None
    state: Annotated[Path | None, STATE] = None


@dataclass(frozen=True, kw_only=True)
class DoctorFlags:
    """What this machine has, what is missing, and for which feature. Changes nothing."""

    storage: Annotated[str, FLAG("Directory or URI for runs.")] = "~/rcd-runs"
    offline: Annotated[bool, FLAG("Do not ask the model hub.")] = False


@dataclass(frozen=True)
class ServeCheckFlags:
    """Name every mistake in a Serve config; start nothing.

    rcd serve check cluster/serve.yaml
    """

    config: Annotated[str, FLAG("YAML file for `serve deploy`.")]

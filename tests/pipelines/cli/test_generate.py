"""`rcd generate` on the golden checkpoints and on small fresh ones: flags, texts, errors, and the live drawing.

The drawing is looked at as a user would see it: the command runs under a real pseudo terminal.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from pipelines.cli import main as cli
from pipelines.cli.flags import CalibrateFlags, GenerateFlags, decode_settings
from pipelines.cli.live_view import printable
from pipelines.cli.plan_flags import TrainPlanFlags
from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.calibration.distance import Match
from rcd_core.decode_settings import DecodeAttention
from rcd_core.tasks.base import MASK_TEXT
from rcd_core.text.tokenizer import load_tokenizer
from rcd_core.training.plan import MEMORY
from tests.pipelines.cli.terminal import in_terminal

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
SDAR = json.loads((GOLDEN / "sdar_vectors.json").read_text())["generate"]
RCD = json.loads((GOLDEN / "rcd" / "rcd_vectors.json").read_text())["decode"]


def generate(*arguments: Any) -> int:
    """In this process: importing torch for every case would take longer than all tests together."""
    return cli.main(["generate", *map(str, arguments)])


def expected(directory: Path, text: str, **settings: Any) -> str:
    """The answer to one user turn by the library itself."""
    tokenizer: Any = load_tokenizer(directory)
    turn = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    out = Decoder(load_model(directory)).generate([ids], DecodeSettings(**settings))[0]
    return str(tokenizer.decode(out.token_ids, skip_special_tokens=True))


# -- flags


def parse(*arguments: str) -> GenerateFlags:
    words = ["generate", "--model_dir", "m", *arguments]
    _, bound, _ = cli.make_app().parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments["options"]


def settings_of(*arguments: str) -> dict[str, Any]:
    return decode_settings(parse(*arguments).decode)


@pytest.mark.parametrize("name", [field.name for field in fields(DecodeSettings)])
def test_every_setting_is_a_flag_in_both_spellings(name: str) -> None:
    kind = get_type_hints(DecodeSettings)[name]
    kinds = [kind, *get_args(kind), *(inner for part in get_args(kind) for inner in get_args(part))]
    for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
        if bool in kinds:
            assert settings_of(flag) == {name: True}
            assert settings_of(flag.replace("--", "--no-", 1)) == {name: False}
        elif words := [k for k in kinds if isinstance(k, str)]:
            assert settings_of(flag, words[-1]) == {name: words[-1]}
        elif name == "stop_token_ids":
            assert settings_of(flag, "3", "4") == {name: (3, 4)}
            assert settings_of(flag) == {name: ()}
        else:
            assert settings_of(flag, "1") == {name: 1}
    assert settings_of() == {}


def test_top_k_0_is_off_as_in_the_scripts() -> None:
    assert settings_of("--top_k", "0") == {"top_k": None}


def test_choices_are_those_of_the_library() -> None:
    """flags.py repeats them, as importing the library would make --help slow."""
    hints = get_type_hints(GenerateFlags)
    assert hints["attention"] == DecodeAttention
    assert set(get_args(get_type_hints(TrainPlanFlags)["device"])) == set(MEMORY)
    assert get_type_hints(CalibrateFlags)["match"] == Match


@pytest.mark.parametrize(
    "strategy", ["sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded"]
)
def test_the_flags_of_sdars_script_give_its_traces(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = [c for c in SDAR if c["strategy"] == strategy and len(c["prompt"]) > 8][-1]
    optional = {"--confidence_threshold": case["threshold"], "--eb_threshold": case["eb_threshold"]}
    flags = [str(part) for flag, value in optional.items() if value is not None for part in (flag, value)]
    code = generate(
        *("--model_dir", GOLDEN / "sdar_tiny", "--trust_remote_code", "--mask_id", 511, "--dtype", "float32"),
        *("--block_length", case["block_length"], "--denoising_steps", case["denoising_steps"]),
        *("--gen_length", case["gen_length"], "--remasking_strategy", strategy, *flags),
        *("--prompt_ids", " ".join(map(str, case["prompt"])), "--compat_passes", "--device", "cpu"),
        *("--stopping_criteria_idx", *(case["stop"] or [])),
    )
    out, err = capsys.readouterr()
    assert code == 0
    answer = case["final_ids"][len(case["prompt"]) :][: case["gen_length"]]
    if case["stop"]:
        answer = answer[: min(answer.index(i) for i in case["stop"] if i in answer)]
    assert out == " ".join(map(str, answer)) + "\n"
    assert f" in {case['n_denoise']} passes" in err
    assert "--trust_remote_code" in err


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_a_reference_turns_residuals_on_and_starts_from_it(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = next(c for c in RCD if c["family"] == family and c["start"] == "warm" and c["T_res"] == 1.5)
    code = generate(
        *("--model_dir", GOLDEN / f"{family}_tiny", "--ref_model_dir", GOLDEN / "rcd" / f"{family}_ref_tiny"),
        *("--block-length", case["block_length"], "--gen-length", case["gen_length"]),
        *("--confidence-threshold", case["threshold"], "--residual-temperature", case["T_res"]),
        *("--delta-temperature", "residual" if case["delta_from"] == "T_res" else "one"),
        *("--residual-scope", case["scope"], "--stop-token-ids", "--json"),
        *("--prompt-ids", ",".join(map(str, case["prompt"]))),
    )
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert code == 0
    assert result["settings"]["residual"] and result["settings"]["start"] == "reference"
    assert case["prompt"] + result["token_ids"] == case["final_ids"][: len(case["prompt"]) + case["gen_length"]]
    assert result["forwards"]["reference"] == case["n_reference"]
    assert result["forwards"]["denoise"] == case["n_target_denoise"]


def test_an_rcd_checkpoint_has_residuals_by_default(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def residual(*flags: str, checkpoint: str = "target") -> bool:
        words = ("--model_dir", checkpoints / checkpoint, "--prompt", "fox", "--gen_length", 8, "--json")
        assert generate(*words, *flags) == 0
        return bool(json.loads(capsys.readouterr().out)["results"][0]["settings"]["residual"])

    assert residual()
    assert not residual("--no-residual")
    assert not residual(checkpoint="reference")


def test_a_reference_that_is_not_used_is_said(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ("--model_dir", checkpoints / "target", "--ref_model_dir", checkpoints / "reference", "--prompt", "fox")
    assert generate(*both, "--gen_length", 8, "--start", "zero", "--verbose") == 0
    err = capsys.readouterr().err
    assert "--ref_model_dir is not used, since start is 'zero'" in err
    assert '"start": "zero"' in err and "model: sdar" in err


# -- texts


def test_piped_text_is_one_user_turn_and_stdout_holds_only_the_answer(checkpoints: Path) -> None:
    program = (
        "import sys; from pipelines.cli.main import main; code = main(); print('ray' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "generate", "--model_dir", str(checkpoints / "target"), "--show"]
    done = subprocess.run(
        [*command, "--max_new_tokens", "20"], input=b"the fox\nthe dog\n", cwd=ROOT, capture_output=True
    )
    want = expected(checkpoints / "target", "the fox\nthe dog", max_new_tokens=20, residual=True)
    assert done.stdout.decode() == want + "\n"
    statistics, ray_imported = done.stderr.decode().splitlines()
    assert re.match(r"\d+ tokens in \d+ passes · \d\.\d\d tokens per forward · besides 1 prefill · ", statistics)
    assert statistics.endswith(" · T_res was never calibrated: rcd calibrate")
    assert ray_imported == "False"


def test_several_prompts_are_a_batch_and_each_gets_its_own(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, texts = checkpoints / "target", ["the fox", "a much longer prompt about the dog", "漢字"]
    prompts = [part for text in texts for part in ("--prompt", text)]
    assert generate("--model_dir", target, *prompts, "--max_new_tokens", 12, "--json", "--trace") == 0
    report = json.loads(capsys.readouterr().out)
    want = [expected(target, text, max_new_tokens=12, residual=True) for text in texts]
    assert [r["text"] for r in report["results"]] == want
    assert report["num_tokens"] == sum(r["num_tokens"] for r in report["results"])
    assert report["forwards"]["denoise"] == sum(len(r["steps"]) for r in report["results"])


def test_raw_and_infill(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = checkpoints / "target"
    tokenizer: Any = load_tokenizer(target)
    decoder, settings = Decoder(load_model(target)), DecodeSettings(residual=True, max_new_tokens=8)
    assert generate("--model_dir", target, "--raw", "--prompt", "the fox", "--max_new_tokens", 8) == 0
    ids = tokenizer("the fox")["input_ids"]
    assert capsys.readouterr().out == tokenizer.decode(decoder.generate([ids], settings)[0].token_ids) + "\n"
    assert generate("--model_dir", target, "--infill", "--prompt", f"the {MASK_TEXT}{MASK_TEXT} dog") == 0
    ids = tokenizer(f"the {MASK_TEXT}{MASK_TEXT} dog")["input_ids"]
    filled = capsys.readouterr().out
    assert filled == tokenizer.decode(decoder.infill([ids], settings)[0].canvas_ids) + "\n"
    assert filled.startswith("the ") and filled.endswith(" dog\n") and MASK_TEXT not in filled


def test_without_max_new_tokens_the_answer_fits_the_model(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--model_dir", checkpoints / "esc", "--prompt", "the fox", "--json") == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert 200 < result["num_tokens"] < 256 == DecodeSettings().max_new_tokens
    assert result["text"] == "\x1b" * result["num_tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt x --top_k z", "--top_k"),
        ("--prompt x --top_k 2.5", "--top_k"),
        ("--prompt x --top-k -1", "top_k is -1"),
        ("--prompt x --remasking-strategy best", '"best"'),
        ("--prompt x --policy entropy_bounded", "entropy_bound is not set"),
        ("--prompt x --cache dual", "cache is 'dual'"),
        ("--prompt x --start reference", "--ref_model_dir"),
        ("--prompt x --ref_model_dir GOLDEN/sdar_tiny", "--ref_model_dir: its vocab_size is 512"),
        ("--prompt x --ref_model_dir /nowhere", "--ref_model_dir: checkpoint '/nowhere'"),
        ("--prompt x --model_dir /nowhere", "--model_dir: checkpoint '/nowhere'"),
        ("--prompt x --model_dir GOLDEN/sdar_tiny", "tokenizer.json"),
        ("--prompt x --device warp", "--device is 'warp'"),
        ("--prompt x --mask_id 9", "--mask_id is 9"),
        ("--prompt x --tensor_parallel 2", "tensor_parallel is 2"),
        ("--prompt x --prompt_ids 1", "--prompt and --prompt_ids"),
        ("--prompt_ids 1,b", "--prompt_ids: "),
        ("--prompt_ids 1,999999", "999999"),
        ("--prompt x --max_new_tokens 999", "max_new_tokens"),
        ("--prompt x --prompt_length 2", "--prompt_length is 2"),
        ("--prompt x --json --show", "--json and --show"),
        ("--prompt x --delay 1", "--delay"),
        ("--prompt x --thresholds 0.5", "--thresholds"),
        ("--prompt <|MASK|>", "infill"),
        ("--prompt x --infill", "mask token"),
    ],
)
def test_mistakes_are_one_line_that_names_the_flag(
    checkpoints: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    words = flags.replace("GOLDEN", str(GOLDEN)).split(" ")
    model = () if "--model_dir" in words else ("--model_dir", checkpoints / "target")
    assert generate(*model, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


# -- the drawing


def test_show_draws_the_masks_and_ends_with_the_plain_text(checkpoints: Path) -> None:
    target = checkpoints / "target"
    flags = ("--prompt", "the fox", "--max_new_tokens", 30, "--show")
    screen, code = in_terminal("generate", "--model_dir", target, *flags)
    assert code == 0
    lines = screen.text.splitlines()
    assert "\n".join(lines[:-1]) == printable(expected(target, "the fox", max_new_tokens=30, residual=True)).rstrip()
    assert " tokens per forward · " in lines[-1]
    assert "·" * 4 in screen.frames[0] and "block 1/" in screen.frames[0]  # before the first pass: masks only
    passes = [int(n) for frame in screen.frames for n in re.findall(r"(\d+) passes ·", frame)]
    assert passes == sorted(passes) and len(set(passes)) > 5
    assert len({style for style in screen.styles if "48;2;" in style}) > 3  # shades by entropy


def test_control_characters_never_reach_the_terminal_and_without_colours_shades_are_characters(
    checkpoints: Path,
) -> None:
    flags = ("--prompt", "the fox", "--max_new_tokens", 8, "--show", "--policy", "sequential")
    screen, code = in_terminal("generate", "--model_dir", checkpoints / "esc", *flags, NO_COLOR="1")
    assert code == 0
    assert screen.text.splitlines()[0] == r"\x1b" * 8
    assert any(re.search(r"[░▒▓█]\\x1b", frame) for frame in screen.frames)  # guesses are escaped as well
    assert not any(";" in style or style.startswith(("3", "4")) for style in screen.styles)


def test_ctrl_c_ends_with_what_was_committed(checkpoints: Path) -> None:
    target = checkpoints / "target"
    screen, code = in_terminal(
        "generate",
        *("--model_dir", target, "--prompt", "the fox", "--max_new_tokens", 200, "--show", "--delay", 0.05),
        keys=[("9 passes", "\x03")],
    )
    assert code == 130
    assert "interrupted · " in screen.text and "Traceback" not in screen.text
    whole = printable(expected(target, "the fox", max_new_tokens=200, residual=True))
    first_block = screen.text.split(MASK_TEXT)[0].split("\n")[0].rstrip("\ufffd")  # a character may be half committed
    assert first_block and whole.startswith(first_block)


def test_a_conversation_keeps_its_history(checkpoints: Path) -> None:
    """In a terminal that cannot be drawn on, so --show changes nothing."""
    target = checkpoints / "target"
    screen, code = in_terminal(
        "generate",
        *("--model_dir", target, "--max_new_tokens", 8, "--show"),
        keys=[("> ", "the fox\n"), ("prefill", ""), ("> ", "the dog\n"), ("prefill", ""), ("> ", "/clear\n")]
        + [("> ", "the fox\n"), ("prefill", ""), ("> ", "/exit\n")],
        TERM="dumb",
    )
    assert code == 0 and not screen.frames
    tokenizer: Any = load_tokenizer(target)
    decoder, settings = Decoder(load_model(target)), DecodeSettings(residual=True, max_new_tokens=8)
    turns: list[dict[str, str]] = []
    answers = []
    for text in ("the fox", "the dog"):
        turns.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        out = decoder.generate([tokenizer(prompt, add_special_tokens=False)["input_ids"]], settings)[0]
        answers.append(tokenizer.decode(out.token_ids, skip_special_tokens=True))
        turns.append({"role": "assistant", "content": answers[-1]})
    spoken = re.split(r"> [^\n]*\n", screen.text)[1:]
    said = [re.split(r"\n\d+ tokens in", part)[0] for part in spoken if "tokens in" in part]
    assert said == [printable(answers[0]), printable(answers[1]), printable(answers[0])]
    assert answers[1] != expected(target, "the dog", max_new_tokens=8, residual=True)  # else the history had no say

"""The model `rcd` in lm-eval, with a tiny checkpoint and a local task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.errors import UserError
from rcd_core.text.tokenizer import load_tokenizer
from tests.pipelines.serving.serve_run import SMALLER, START, save_model

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["3"], do_sample: false, max_gen_toks: 16}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_model(directory / "target", START, 0)
    save_model(directory / "reference", SMALLER, 1)
    return directory / "target"


def model(target: Path, **args: Any) -> Any:
    from lm_eval.api.registry import get_model

    import pipelines.evaluation.lm_eval  # noqa: F401  as the entry point does

    text = ",".join(f"{name}={value}" for name, value in ({"target": target} | args).items())
    return get_model("rcd").create_from_arg_string(text, {"batch_size": 2, "device": "cpu"})


def instances(*arguments: tuple[str, dict[str, Any]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, args, i) for i, args in enumerate(arguments)]


def test_answers_equal_those_of_the_library(target: Path) -> None:
    """In the order of the requests, truncated at the first stop string, each sampled with its own seed."""
    rcd = model(target, residual=True, start="zero", confidence_threshold=0.5, temperature=0.8)
    prompt = rcd.apply_chat_template([{"role": "user", "content": "words"}])
    texts = ["digits", prompt, "digits", "12"]
    arguments = [(text, {"max_gen_toks": 8 * (i + 1)}) for i, text in enumerate(texts)]
    answers = rcd.generate_until(instances(*arguments), disable_tqdm=True)
    tokenizer, decoder = load_tokenizer(target), Decoder(load_model(target))
    for (text, kwargs), answer, number in zip(arguments, answers, (0, 0, 1, 0), strict=True):
        settings = DecodeSettings(
            residual=True, start="zero", confidence_threshold=0.5, temperature=0.8,
            max_new_tokens=kwargs["max_gen_toks"], seed=_seed(text, number),
            stop_token_ids=tuple(rcd.generator.settings.stop_token_ids),
        )  # fmt: skip
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        token_ids = decoder.generate([ids], settings)[0].token_ids
        assert answer == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert answers == rcd.generate_until(instances(*arguments), disable_tqdm=True)
    whole = answers[3]
    stop = whole[len(whole) // 2]
    until = arguments[3][1] | {"until": ["absent", stop]}
    assert rcd.generate_until(instances(("12", until)), disable_tqdm=True) == [whole[: whole.index(stop)]]


def _seed(text: str, number: int) -> int:
    from pipelines.evaluation.lm_eval import _seed as seed_of

    return seed_of(0, text, number)


def test_generation_arguments_are_applied_or_refused(target: Path) -> None:
    rcd = model(target, temperature=0.3, max_new_tokens=24)
    assert rcd._settings({}).temperature == 0.3 and rcd._settings({}).max_new_tokens == 24
    assert rcd._settings({"do_sample": False, "temperature": 0.9}).temperature == 0
    assert rcd._settings({"temperature": 0.9, "top_p": 0.5, "top_k": 0, "max_tokens": 7}).top_p == 0.5
    assert rcd._settings({"max_gen_toks": 9, "max_tokens": 7}).max_new_tokens == 9
    assert model(target)._settings({"do_sample": True}).temperature == 1
    for kwargs, named in (
        ({"num_beams": 4}, "num_beams is 4"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample"),
        ({"temperature": -1.0}, "temperature is -1"),
    ):
        with pytest.raises(UserError, match=named):
            rcd._settings(kwargs)
    for refused in (rcd.loglikelihood, rcd.loglikelihood_rolling):
        with pytest.raises(UserError, match="generate_until"):
            refused([])


def test_a_reference_switches_residuals_on(target: Path) -> None:
    warm = model(target, reference=target.parent / "reference").generator
    assert warm.settings.residual and warm.settings.start == "reference" and warm.decoder.reference is not None
    for args, named in (
        ({"thresholds": 0.5}, "thresholds"),
        ({"reference": "/none"}, "model_args: reference: "),
        ({"confidence_threshold": 2}, "confidence_threshold is 2"),
    ):
        with pytest.raises(UserError, match=named):
            model(target, **args)


@pytest.mark.drill
def test_the_command_of_lm_eval_runs_a_task(target: Path, tmp_path: Path) -> None:
    """On a task from a local file: its score and its samples are those of the model."""
    rcd = model(target, confidence_threshold=0.5)
    prompts = ["words 1", "digits 2", "words 3"]
    answers = rcd.generate_until(instances(*((p, {"until": ["3"], "max_gen_toks": 16}) for p in prompts)))
    correct = ["wrong", *answers[1:]]
    rows = [{"question": prompt, "answer": text} for prompt, text in zip(prompts, correct, strict=True)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(TASK.format(data=data))
    command = [sys.executable, "-m", "pipelines.evaluation.lm_eval", "--model", "rcd", "--tasks", "words"]
    command += ["--model_args", f"target={target},confidence_threshold=0.5", "--include_path", str(tmp_path / "tasks")]
    command += ["--output_path", str(tmp_path / "out"), "--device", "cpu", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    ran = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["results"]["words"]["exact_match,none"] == pytest.approx(2 / 3)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    logged = [json.loads(line)["filtered_resps"][0] for line in samples.read_text().splitlines()]
    assert sorted(logged) == sorted(answers)

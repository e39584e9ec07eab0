"""ProcessSettings.deterministic: the same bits again, whatever else is decoded, and in another process."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.decoding.engine import Engine
from rcd_core.precision import _doubled_sums
from rcd_core.process import ProcessSettings

GOLDEN = Path(__file__).parents[1] / "golden"
RCD = DecodeSettings(
    residual=True, start="reference", residual_temperature=1.2, confidence_threshold=0.3, max_new_tokens=24, trace=True
)
PROMPTS = [list(range(5, 5 + n)) for n in (7, 3, 12, 9, 20, 5)]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ProcessSettings(deterministic=True).apply()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # NaN where nothing was written
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return load_model(GOLDEN / "sdar_tiny"), load_model(GOLDEN / "rcd" / "sdar_ref_tiny")


def confidences(decoder: Decoder, prompts: list[list[int]], settings: DecodeSettings) -> list[list[float]]:
    """Every confidence of every pass, by prompt."""
    return [[c for step in out.steps for c in step.confidence] for out in decoder.generate(prompts, settings)]


@pytest.mark.parametrize("settings", [RCD, replace(RCD, temperature=0.7, top_p=0.9, seed=3)])
def test_a_request_is_the_same_alone_and_among_others(
    settings: DecodeSettings, models: tuple[Any, Any], deterministic: None
) -> None:
    """Bit for bit, with a reference whose contexts others have used before. Without the mode most bits differ."""
    alone = [confidences(Decoder(*models), [prompt], settings)[0] for prompt in PROMPTS]
    decoder = Decoder(*models)
    assert confidences(decoder, PROMPTS, settings) == alone
    order = random.Random(0).sample(range(len(PROMPTS)), len(PROMPTS))
    again = confidences(decoder, [PROMPTS[i] for i in order], settings)
    assert again == [alone[i] for i in order]


def test_the_switch_decides_and_nothing_else(models: tuple[Any, Any], deterministic: None) -> None:
    sizes: Any = {"max_batch": 8, "max_length": 64, "reuse_prefixes": True, "fixed_shapes": True}
    engine = Engine(models[0], None, **sizes)
    assert (engine.max_batch, engine.reuse_prefixes, engine._runner.fixed_shapes) == (1, False, False)
    torch.use_deterministic_algorithms(False)
    assert Engine(models[0], None, **sizes).max_batch == 8


def test_running_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    for width in (1, 2, 3, 64, 1000):
        values = torch.rand(3, width, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(_doubled_sums(values), values.cumsum(-1))


TRAINING = """
import hashlib, sys, torch
from rcd_core.process import ProcessSettings
ProcessSettings(deterministic=True).apply()
assert torch.are_deterministic_algorithms_enabled()
from tests.rcd_core.training.test_loop import run
from rcd_core.training.settings import ResidualSettings
from rcd_core.noise import NoiseSettings
model, _ = run(sys.argv[1], residual=ResidualSettings(source=sys.argv[2], dropout=0.2, alpha="normalized_entropy"),
               noise=NoiseSettings(draws=2))
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


@pytest.mark.parametrize("source", ["self"])
def test_two_trainings_have_the_same_bits(source: str, tmp_path: Path) -> None:
    """In two processes that hash and allocate differently. PyTorch would raise at an operation without a deterministic
    kernel for the CPU."""
    from tests.rcd_core.training.helpers import write_examples

    examples = write_examples(tmp_path, 12)
    digests = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", TRAINING, examples, source],
            env={**os.environ, "PYTHONHASHSEED": seed, "MALLOC_PERTURB_": seed},
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.split()[-1])
    assert len(digests) == 1 and len(digests.pop()) == len(hashlib.sha256().hexdigest())


def test_a_process_gets_what_a_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os, torch; from rcd_core.process import ProcessSettings; from rcd_core.io import checksums\n"
        "ProcessSettings().apply(); assert not torch.are_deterministic_algorithms_enabled()\n"
        "assert checksums.SWITCH not in os.environ\n"
        "ProcessSettings(verify_weights=False, deterministic=True).apply()\n"
        "print(os.environ['CUBLAS_WORKSPACE_CONFIG'], os.environ[checksums.SWITCH])"
    )
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [":4096:8", "0"]

"""Tokens per second of this engine and of another release's, in turns, on the same random weights and requests.

    git worktree add ../old e92298d
    python -m tests.benchmarks.releases --other ../old [--threads 2] [--repeats 7]

6 layers of width 256, V = 8,000; greedy, two tokens of a block a pass. Each release runs in a process of its own, from
its own checkout. Also says how many tokens differ, which near ties can cause.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, int]] = {
    "16 requests, blocks of 32": {"requests": 16, "block_length": 32},
    "16 requests, blocks of 4": {"requests": 16, "block_length": 4},
    "one request, blocks of 32": {"requests": 1, "block_length": 32},
}
SIZES = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 768}
VOCAB, NEW_TOKENS = 8000, 128


class Worker:
    """A release in a process of its own."""

    def __init__(self, root: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker"],
            cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, task: str, residual: bool) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([task, residual]) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))


def work() -> None:
    """Uses only names that both releases have."""
    import torch

    from rcd_core import Decoder, DecodeSettings, ModelConfig, new_model
    from rcd_core.families.base import CheckpointInfo

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    info = CheckpointInfo(mask_token_id=VOCAB - 1, eos_token_ids=(VOCAB - 2,), pad_token_id=VOCAB - 3, block_length=32)
    model = new_model(ModelConfig(family="sdar", **SIZES), vocab_size=VOCAB, info=info, seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, VOCAB - 4, (32 + 4 * i,), generator=generator).tolist() for i in range(16)]
    decoder = Decoder(model, max_batch=16)
    for line in sys.stdin:
        task, residual = json.loads(line)
        block_length = TASKS[task]["block_length"]
        settings = DecodeSettings(
            block_length=block_length, denoising_steps=block_length // 2, max_new_tokens=NEW_TOKENS,
            confidence_threshold=1.0, stop_token_ids=(), residual=residual, start="zero" if residual else None,
        )  # fmt: skip
        began = time.perf_counter()
        found = decoder.generate(prompts[: TASKS[task]["requests"]], settings)
        seconds = time.perf_counter() - began
        ids = [token for output in found for token in output.token_ids]
        print(json.dumps({"tokens_per_s": len(ids) / seconds, "ids": ids}), flush=True)


def main() -> None:
    from tests.benchmarks.probe import header

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="a checkout of the other release")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(header(), flush=True)
    this, other = (Worker(root.resolve(), options.threads) for root in (Path.cwd(), options.other))
    results = {}
    for task in TASKS:
        for residual in (False, True):
            name = f"{task}, {'RCD' if residual else 'SeqD'}"
            pairs = [(this.run(task, residual), other.run(task, residual)) for _ in range(options.repeats + 1)][1:]
            ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
            mine, theirs = (statistics.median(p[i]["tokens_per_s"] for p in pairs) for i in (0, 1))
            differ = sum(x != y for x, y in zip(pairs[0][0]["ids"], pairs[0][1]["ids"], strict=True))
            results[name] = {"ratio": statistics.median(ratios), "tokens_per_s": mine, "other_tokens_per_s": theirs}
            print(
                f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the other's "
                f"tokens/s; {mine:.0f} and {theirs:.0f}; {differ} of {len(pairs[0][0]['ids'])} tokens differ",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--worker"] else main()

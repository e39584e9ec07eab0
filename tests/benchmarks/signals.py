"""Reference signals: throughput of the stage, memory of the encoding, bytes on disk, accuracy of the sparse form.

    python -m tests.benchmarks.signals --data /data/gsm8k_train.jsonl [--demo ~/rcd-runs/demo] [--repeats 3]

One thread per process, at most two cores, a few minutes. --demo uses reference, target and examples of a finished run
of that recipe instead of training small ones. Without --data the word problems are skipped. --only selects parts
(memory, fidelity, trained, throughput); only throughput needs Ray. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipelines.signals.inspect import measure_sizes, report_lines
from rcd_core.evaluation.signal_fidelity import Kind
from tests.benchmarks.probe import header, idle_probe
from tests.benchmarks.signals_data import GSM8K, SUDOKU, Workload, finished_run, make, random_reference
from tests.benchmarks.signals_fidelity import as_json, table, trained
from tests.benchmarks.signals_memory import in_fresh_process

PARTS = ("memory", "fidelity", "trained", "throughput")
POSITIONS = 12_000
TRAINED = [Kind(8, None, "renormalise"), Kind(8), Kind(32), Kind(32, 0.99)]
SIZE_RULES: list[tuple[int, float | None]] = [(32, None), (32, 0.99), (32, 0.999)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="GSM8K's training questions as JSON Lines")
    parser.add_argument("--demo", type=Path, help="directory of a finished run of the recipe `demo`")
    parser.add_argument("--repeats", type=int, default=3, help="of the throughput comparison")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), flush=True)
    results: dict[str, Any] = {"gpu": "not measured"}
    start = time.perf_counter()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rcd-bench-")))
        if "memory" in options.only:
            memory(results)
        workloads = []
        if {"fidelity", "trained", "throughput"} & set(options.only):
            workloads.append(demo(options.demo, scratch))
        if "throughput" in options.only:
            throughput(results, workloads[0], scratch, options.repeats)
        if "fidelity" in options.only:
            if options.data and options.data.exists():
                workloads.append(make(GSM8K, scratch / "gsm8k", options.data, 4000))
            else:
                print(f"word problems skipped: --data {options.data} does not exist")
            results["fidelity"] = {}
            for workload in workloads:
                report = table(workload, POSITIONS)
                print(f"\nfidelity, {workload.name}:", *report_lines(report), sep="\n", flush=True)
                results["fidelity"][workload.name] = as_json(report)
        if "trained" in options.only:
            changes = trained(workloads[0], 100, TRAINED, 2e-3, 64)
            print(f"\nloss after training on each kind: {changes}")
            results["trained"] = changes
    results["idle_probe"] = idle_probe()
    results["seconds"] = round(time.perf_counter() - start)
    print(json.dumps(results))


def demo(directory: Path | None, scratch: Path) -> Workload:
    return finished_run(directory.expanduser()) if directory else make(SUDOKU, scratch / "sudoku", None, 16_384)


def memory(results: dict[str, Any]) -> None:
    """4,096 tokens at SDAR's vocabulary."""
    runs = [in_fresh_process("--width", "1024"), in_fresh_process("--width", "2048", "--dtype", "bfloat16")]
    for run in runs:
        print(f"memory: {run}", flush=True)
    results["encode_extra_gib"] = max(run["extra_gib"] for run in runs)


def throughput(results: dict[str, Any], tiny: Workload, scratch: Path, repeats: int) -> None:
    """The demo's reference, where overhead weighs most, and one large enough to be worth a cache."""
    from tests.benchmarks.signals_throughput import compare, make_job, own_ray, stage

    large = random_reference(scratch / "random")
    jobs = {"demo": make_job(tiny, 2048, 8, 16_384), "large": make_job(large, 8, 8, 4096)}
    with own_ray():
        for name, job in jobs.items():
            probe = idle_probe()
            result = compare(job, repeats) | {"idle_probe": [probe, idle_probe()]}
            print(f"throughput, {name}: {json.dumps(result)}", flush=True)
            results.setdefault("throughput", {})[name] = result
        for name in ("pipeline_vs_forward", "two_actor_vs_bare_scaling"):
            results[name] = results["throughput"]["large"][name]["median"]
            results[f"{name}_demo"] = results["throughput"]["demo"][name]["median"]
        results["sizes"] = []
        for top_k, mass in SIZE_RULES:
            job = jobs["demo"]
            job = replace(job, rule=replace(job.rule, top_k=top_k, keep_mass=mass))
            kept = scratch / f"signals-{top_k}-{mass}"
            rate = stage(job, 1, keep=kept)
            shards = sorted(path.name for path in kept.glob("*.parquet"))
            masked = sum(json.loads((kept / f"{name}.json").read_text())["masked_tokens"] for name in shards)
            sizes = measure_sizes(str(kept), shards, masked)
            results["sizes"].append(
                {
                    "k": top_k,
                    "mass": mass,
                    "kept": round(sizes.kept / sizes.masked, 2),
                    "bytes_per_kept_entry": round(sizes.per_kept_entry, 2),
                    "bytes_rest_per_token": round(sizes.rest_per_token, 2),
                    "bytes_per_masked_token": round(sum(sizes.columns.values()) / masked, 2),
                    "tokens_per_s": round(rate.tokens_per_s),
                    "cpu_s_per_million": round(rate.cpu_s_per_million, 2),
                }
            )
            print(f"size: {results['sizes'][-1]}", flush=True)
        results |= {name: results["sizes"][0][name] for name in ("bytes_per_kept_entry", "bytes_rest_per_token")}


if __name__ == "__main__":
    main()

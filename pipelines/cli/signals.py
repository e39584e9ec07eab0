"""`rcd signals inspect`: what a directory of reference signals holds, and how faithful it is."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from pipelines.cli.file_flags import SignalsInspectFlags
from pipelines.cli.terminal import writable_file
from pipelines.signals.inspect import (
    Sizes,
    kept_histogram,
    measure_fidelity,
    measure_sizes,
    picture,
    read_manifest,
    report_lines,
)
from rcd_core.calibration.entropy_histogram import entropy_quantile
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.process import ProcessSettings

QUANTILES = (0.1, 0.5, 0.9, 0.99, 0.999)


def inspect(flags: SignalsInspectFlags) -> int:
    console = Console(soft_wrap=True)
    directory = os.path.expanduser(flags.directory).rstrip("/")
    if (flags.reference is None) != (flags.target is None):
        raise UserError("fidelity needs both --reference and --target; give both or neither")
    if flags.sample < 1:
        raise UserError(f"--sample is {flags.sample}; it must be at least 1 masked position")
    ProcessSettings(verify_weights=not flags.no_verify).apply()
    manifest = read_manifest(directory)
    output = writable_file("--output", flags.output) if flags.output else None
    sizes = measure_sizes(directory, manifest["shards"], int(manifest["masked_tokens"]))
    tokens = int(manifest["tokens"])
    console.print(
        f"{len(manifest['shards'])} shards, {sizes.rows:,} rows, {tokens:,} tokens, {sizes.masked:,} of them masked "
        f"({sizes.masked / max(1, tokens):.1%}); {manifest['family']}, V = {manifest['vocab_size']:,}",
        highlight=False,
    )
    for reason, count in manifest["bad_rows"].items():
        console.print(f"bad rows: {count} x {reason}", markup=False)
    console.print(_size_table(sizes))
    kept = kept_histogram(directory, manifest["shards"], sizes)
    console.print(_kept_line(kept), highlight=False)
    histogram = manifest["entropy_histogram"]
    nats = ", ".join(f"{q:g}: {entropy_quantile(histogram, q):.3f}" for q in QUANTILES) if sizes.masked else "none"
    console.print(f"entropy, nats, by quantile: {nats}", highlight=False)
    report = None
    if flags.reference is not None and flags.target is not None:
        report, rule = measure_fidelity(directory, manifest, flags.reference, flags.target, flags.sample)
        scale = "" if rule.alpha_scale is None else f", h = {rule.alpha_scale:.3f}"
        console.print(
            f"fidelity, alpha {rule.alpha}{scale}:", *report_lines(report), sep="\n", markup=False, highlight=False
        )
    if output:
        storage.write_bytes(output, picture(histogram, report))
        console.print(f"picture: {output}", markup=False, highlight=False)
    return 0


def _size_table(sizes: Sizes) -> Table:
    table = Table("column", "MB", "bytes per masked token")
    for name, size in sorted(sizes.columns.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{size / 1e6:.3f}", f"{size / max(1, sizes.masked):.2f}")
    total = sum(sizes.columns.values())
    table.add_section()
    table.add_row("all", f"{total / 1e6:.3f}", f"{total / max(1, sizes.masked):.2f}")
    table.add_row("per kept entry", "", f"{sizes.per_kept_entry:.2f}")
    table.add_row("without the entries", "", f"{sizes.rest_per_token:.2f}")
    return table


def _kept_line(kept: dict[int, int]) -> str:
    if len(kept) == 1:
        return f"k: {next(iter(kept))} at every position"
    total, mean = sum(kept.values()), sum(k * n for k, n in kept.items()) / sum(kept.values())
    shares, below = [], 0
    for k, count in kept.items():
        below += count
        shares.append((below / total, k))
    quantiles = ", ".join(f"{q:g}: {next(k for share, k in shares if share >= q)}" for q in (0.1, 0.5, 0.9, 1.0))
    return f"k, by quantile: {quantiles}; mean {mean:.2f}"

"""Inspects a directory of reference signals: sizes by column, kept entries, entropies, fidelity, and a plot of them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from rcd_core.calibration.entropy_histogram import MAX_NATS, NUM_BINS
from rcd_core.errors import UserError
from rcd_core.evaluation.signal_fidelity import Report, Rule, kinds_up_to, measure
from rcd_core.families.loading import load_model
from rcd_core.io import storage
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.batches import collate
from rcd_core.training.data.signal_cache import SignalSource, noise_of, require_match
from rcd_core.training.objective import TrainingBatch

ENTRY_COLUMNS = ("topk_ids", "topk_logprobs", "num_kept")
BATCH_ROWS = 32


@dataclass(frozen=True)
class Sizes:
    """Compressed bytes by column, without headers, footers and sidecars. masked: positions. kept: entries."""

    columns: Mapping[str, int]
    rows: int
    masked: int
    kept: int

    @property
    def per_kept_entry(self) -> float:
        return sum(self.columns.get(name, 0) for name in ENTRY_COLUMNS) / max(1, self.kept)

    @property
    def rest_per_token(self) -> float:
        """Bytes per masked token of all other columns."""
        return sum(n for name, n in self.columns.items() if name not in ENTRY_COLUMNS) / max(1, self.masked)


def read_manifest(directory: str) -> dict[str, Any]:
    """The summary in the manifest of a finished stage `signals`. Raises UserError if there is none."""
    path = storage.join(directory, "manifest.json")
    try:
        manifest = storage.read_json(path)
        summary: dict[str, Any] = manifest["summary"]
        _ = summary["shards"], summary["masked_tokens"], summary["entropy_histogram"]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the directory <run>/signals of a finished stage") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not the manifest of a stage `signals`; give the directory <run>/signals") from error
    return summary


def measure_sizes(directory: str, shards: Sequence[str], masked: int) -> Sizes:
    """From the Parquet footers alone."""
    columns: Counter[str] = Counter()
    rows = kept = 0
    for name in shards:
        with _open_shard(storage.join(directory, name)) as file:
            metadata = file.metadata
            rows += metadata.num_rows
            for g in range(metadata.num_row_groups):
                group = metadata.row_group(g)
                for c in range(group.num_columns):
                    column = group.column(c)
                    field = column.path_in_schema.split(".")[0]
                    columns[field] += column.total_compressed_size
                    if field == "topk_ids":
                        kept += column.statistics.num_values if column.statistics else column.num_values
    return Sizes(dict(columns), rows, masked, kept)


def kept_histogram(directory: str, shards: Sequence[str], sizes: Sizes) -> dict[int, int]:
    """Kept entries -> number of positions. Reads one narrow column if k is adaptive, otherwise nothing."""
    if "num_kept" not in sizes.columns:
        return {sizes.kept // max(1, sizes.masked): sizes.masked}
    counts: Counter[int] = Counter()
    for name in shards:
        with _open_shard(storage.join(directory, name)) as file:
            for g in range(file.metadata.num_row_groups):
                values = file.read_row_group(g, columns=["num_kept"])["num_kept"].combine_chunks().flatten()
                unique, numbers = np.unique(values.to_numpy(zero_copy_only=False), return_counts=True)
                counts.update(dict(zip(unique.tolist(), numbers.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def measure_fidelity(
    directory: str, manifest: Mapping[str, Any], reference: str, target: str, positions: int
) -> tuple[Report, Rule]:
    """Compares the stored signals, and every other kind, with dense predictions at the first `positions` masked ones.

    Training order is shuffled, so the first positions are a random sample. The alpha rule is the target's own.
    """
    models = load_model(reference), load_model(target)
    for model, whose in zip(models, ("the reference's", "the target's"), strict=True):
        require_match(manifest, {"vocab_size": model.vocab_size, "mask_token_id": model.mask_token_id}, whose)
    stored = models[1].info.rcd
    rule = Rule(
        alpha=stored.get("alpha", "normalized_entropy"),
        alpha_scale=stored.get("alpha_scale"),
        learned=models[1].learned_alpha,
        alpha_temperature=float(manifest["alpha_temperature"]),
        delta_temperature=float(manifest["delta_temperature"]),
    )
    batches = _batches(SignalSource(directory, manifest), manifest, models[0].info.pad_token_id, positions)
    return measure(*models, batches, kinds_up_to(models[0].vocab_size), rule), rule


def _batches(
    source: SignalSource, manifest: Mapping[str, Any], pad_token_id: int, positions: int
) -> Iterator[tuple[TrainingBatch, ReferenceSignals | None]]:
    num_masked, index = 0, 0
    while num_masked < positions and index < source.num_rows:
        rows = [source.row(g) for g in range(index, min(index + BATCH_ROWS, source.num_rows))]
        index += len(rows)
        rows = [row for row in rows if not row.reason]
        if rows:
            batch, signals = collate(
                rows,
                mask_token_id=int(manifest["mask_token_id"]),
                pad_token_id=pad_token_id,
                block_length=int(manifest["block_length"]),
                noise=noise_of(manifest["noise"]) if "noise" in manifest else None,
            )
            num_masked += int(batch.masked.sum())
            yield batch, signals


def report_lines(report: Report) -> list[str]:
    """The fidelity table as text, one line per kind; errors in percent, by decile of entropy, lowest first."""
    deciles = " ".join(f"{e:6.2f}" for e in report.entropy_by_decile)
    lines = [
        f"{report.positions:,} positions; loss {report.loss_dense:.4f} with dense residuals, "
        f"{report.loss_without:.4f} without",
        f"{'k':>6} {'mass':>5} {'tail':>11} {'kept':>6} {'B/token':>8} {'error %':>8} {'loss %':>8}  error % by decile",
        f"{'mean entropy of the decile, nats':>59}{'':>3}{deciles}",
    ]
    for row in report.rows:
        kind = row.kind
        name, mass, tail = (
            (str(kind.k), f"{kind.mass or ''}", kind.treatment) if kind is not None else ("stored", "", "mean_tail")
        )
        errors = " ".join(f"{100 * e:6.2f}" for e in row.error_by_decile)
        lines.append(
            f"{name:>6} {mass:>5} {tail:>11} {row.kept:6.1f} {row.bytes_per_token:8.1f} "
            f"{100 * row.error:8.3f} {100 * row.loss_change:+8.3f}  {errors}"
        )
    return lines


def picture(histogram: Sequence[int], report: Report | None) -> bytes:
    """A PNG: the histogram of entropies and, with a report, the relative error of the input by decile of entropy."""
    figure = Figure(figsize=(11 if report else 5.5, 4), layout="constrained")
    axes = figure.subplots(1, 2 if report else 1, squeeze=False)[0]
    counts = np.asarray(histogram).reshape(-1, 16).sum(1)  # an eighth of a nat each
    edges = np.arange(len(counts) + 1) * (MAX_NATS * 16 / NUM_BINS)
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 1
    axes[0].stairs(counts[:last] / max(1, counts.sum()), edges[: last + 1], fill=True)
    axes[0].set(xlabel="entropy, nats", ylabel="share of masked positions", title="Entropy of the reference")
    if report:
        for row in report.rows:
            if row.kind is None:
                axes[1].plot(range(1, 11), row.error_by_decile, "k-", linewidth=2, label="as stored")
            else:
                style = {"mean_tail": "-", "drop": "--", "renormalise": ":"}[row.kind.treatment]
                label = f"k {row.kind.k}" if row.kind.treatment == "mean_tail" else None
                color = f"C{row.kind.k.bit_length() % 10}"
                axes[1].plot(range(1, 11), row.error_by_decile, style, color=color, label=label)
        axes[1].set(xlabel="decile of entropy", ylabel="relative error of the input", yscale="log")
        axes[1].set_title("Fidelity: tail on the mean (-), dropped (--), renormalised (:)")
        axes[1].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


@contextmanager
def _open_shard(path: str) -> Iterator[pq.ParquetFile]:
    """Raises UserError with the path if the file cannot be opened."""
    try:
        stream = storage.open_input(path)
        file = pq.ParquetFile(stream)
    except (OSError, ValueError) as error:
        raise UserError(
            f"signal shard {path} cannot be read ({error}); run pipelines/precompute.py --repair"
        ) from error
    with stream:
        yield file

"""`rcd export`: a model of a run as a checkpoint of its own, with the T_res that the run chose and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.calibration.job import store
from pipelines.cli.file_flags import ExportFlags
from pipelines.cli.terminal import absolute_path, writable_directory
from pipelines.report.model_card import model_card
from pipelines.run.directory import RunDirectory
from rcd_core.errors import UserError
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.io import checksums, storage
from rcd_core.io.node_copy import node_copy


def export(flags: ExportFlags) -> int:
    run, output = RunDirectory(absolute_path(flags.run)), absolute_path(flags.output)
    manifest = run.manifest(flags.stage)
    if manifest is None and not storage.exists(storage.join(run.path, "recipe.yaml")):
        raise UserError(f"RUN {flags.run} is no run: it has no recipe.yaml; `rcd runs` lists the runs of a storage")
    if manifest is None:
        raise UserError(f"--stage {flags.stage} is not done in {run.path}; `rcd runs` lists stages")
    model = storage.join(run.stage_directory(flags.stage), "adapter" if flags.adapter else "model")
    if flags.adapter and not storage.exists(storage.join(model, "adapter_config.json")):
        raise UserError(f"--adapter: stage {flags.stage} of {run.path} was trained without train.lora; leave it out")
    if not flags.adapter and not storage.exists(storage.join(model, "config.json")):
        raise UserError(f"--stage {flags.stage}: {run.path} has no model of it; the stages that train have one")
    if storage.list_files(output):
        raise UserError(f"--output {output} holds files; give a new directory")
    writable_directory("--output", output)
    calibration, chosen = run.manifest("calibrate"), None
    if calibration and flags.stage in calibration["summary"]["residual_temperatures"]:
        if calibration["material"]["inputs"].get(flags.stage) != manifest["fingerprint"]:
            raise UserError(
                f"{run.path}: stage calibrate has T_res of an earlier model of {flags.stage}; repeat it with "
                "--redo calibrate"
            )
        chosen = storage.read_json(storage.join(run.stage_directory("calibrate"), "calibration.json"))[flags.stage]
    source = Path(node_copy(model))
    weights = sorted(source.glob("*.safetensors"))
    if not flags.no_verify:
        checksums.verify(source, weights)
        _check_old(run, flags, manifest["summary"].get("weights_sha256"), weights)
    storage.upload_dir(source, output)
    storage.write_bytes(storage.join(output, checksums.FILE), checksums.listing(weights).encode())
    storage.remove(storage.join(output, CALIBRATION_FILE))  # older releases stored T_res in the run's model
    if chosen:
        store(output, chosen)
    card = _card(run, flags.stage, manifest, storage.basename(output.rstrip("/")))
    storage.write_bytes(storage.join(output, "README.md"), card.encode())
    print(f"{output}: " + (f"T_res {chosen['residual_temperature']:g}" if chosen else "no T_res, the run chose none"))
    return 0


def _check_old(run: RunDirectory, flags: ExportFlags, stored: str | None, weights: Sequence[Path]) -> None:
    """Older releases stored one digest of the weights in the manifest, and no SHA256SUMS next to them."""
    if stored is None or flags.adapter or (weights[0].parent / checksums.FILE).exists():
        return
    if checksums.joined([storage.sha256(str(file)) for file in weights]) != stored:
        raise UserError(
            f"{weights[0].parent}: the weights have changed since stage {flags.stage} of {run.path} wrote them (their "
            f"sha256 is not the manifest's, {stored[:12]}...); train it again with --redo {flags.stage}, or export "
            "them as they are with --no-verify"
        )


def _card(run: RunDirectory, stage: str, manifest: Mapping[str, Any], name: str) -> str:
    recipe: dict[str, Any] = {}
    if storage.exists(path := storage.join(run.path, "recipe.yaml")):
        recipe = yaml.safe_load(storage.read_bytes(path))
    results, evaluated = None, run.manifest("evaluate")
    if evaluated and evaluated["material"]["inputs"].get(stage) == manifest["fingerprint"]:
        results = storage.read_json(storage.join(run.stage_directory("evaluate"), "results.json"))
    return model_card(name, stage, recipe, manifest["summary"].get("rcd", {}), results)

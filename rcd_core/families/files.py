"""What a checkpoint's JSON files and its name define: special ids, block length, RCD settings, calibration.

Fields have the meaning of the authors' config classes. Defaults of missing fields belong to the family.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rcd_core.decode_settings import AlphaRule, Start
from rcd_core.errors import UserError

CALIBRATION_FILE = "rcd_calibration.json"  # next to a checkpoint's weights
CALIBRATION_SCHEMA = 1
_BLOCK_IN_NAME = re.compile(r"-b(4|8|16|32|64)(?![0-9A-Za-z])")  # SDAR-8B-Chat-b32, RCD-SDAR-8B-b64-Thinking


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint directory. name: the released model's name; generation: generation_config.json, {} if absent.

    Its methods raise UserError, which names file and field, for values of the wrong type or range.
    """

    directory: Path
    name: str
    config: dict[str, Any]
    generation: dict[str, Any]

    @classmethod
    def read(cls, directory: Path, path: str) -> CheckpointFiles:
        """path: the path, URI or hub id that the user gave for this directory."""
        generation = directory / "generation_config.json"
        return cls(
            directory,
            released_name(path),
            read_json(directory / "config.json"),
            read_json(generation) if generation.exists() else {},
        )

    def eos_token_ids(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """All ids that end a sequence: of generation_config.json, which may list several, else of config.json."""
        for file, content in (("generation_config.json", self.generation), ("config.json", self.config)):
            value = content.get("eos_token_id")
            if value is not None:
                ids = value if isinstance(value, list) else [value]
                return tuple(self._integer(file, "eos_token_id", i, least=0) for i in ids)
        return default

    def pad_token_id(self, default: int) -> int:
        for file, content in (("config.json", self.config), ("generation_config.json", self.generation)):
            if content.get("pad_token_id") is not None:
                return self._integer(file, "pad_token_id", content["pad_token_id"], least=0)
        return default

    def mask_token_id(self, default: int | None) -> int:
        """Of config.json, else the tokenizer's mask token, else the default (None: raises UserError)."""
        if self.config.get("mask_token_id") is not None:
            return self._integer("config.json", "mask_token_id", self.config["mask_token_id"], least=0)
        declared = self._tokenizer_mask()
        if declared is None and default is None:
            raise UserError(
                f"{self.directory}: neither config.json nor the tokenizer defines a mask token, and plain "
                f"{self.config.get('model_type')} has none; convert it with base.convert or `rcd convert`, or set "
                "mask_token_id in config.json to an unused id"
            )
        return declared if declared is not None else int(default)  # type: ignore[arg-type]

    def block_length(self, fields: tuple[str, ...], default: int) -> int:
        """The first of `fields` that is set, else rcd.block_length, else as in the name (-b32), else the default."""
        for field in fields:
            if self.config.get(field) is not None:
                return self._integer("config.json", field, self.config[field], least=1)
        stored = self._rcd_settings().get("block_length")
        if stored is not None:
            return int(stored)
        in_name = _BLOCK_IN_NAME.findall(self.name)
        return int(in_name[-1]) if in_name else default

    def rcd(self) -> dict[str, Any]:
        """RCD settings of the checkpoint, {} if none. Fields unknown to this release are kept.

        A calibrated checkpoint also has `calibration`, the content of its file, and the residual_temperature from it.
        """
        return self._rcd_settings() | self._calibration()

    def _rcd_settings(self) -> dict[str, Any]:
        rcd = self.config.get("rcd")
        if rcd is None:
            return {}
        if not isinstance(rcd, dict):
            raise UserError(f"{self.directory}: config.json's rcd is {rcd!r}; it must be an object")
        for field, allowed in (("start", get_args(Start)), ("alpha", get_args(AlphaRule))):
            if rcd.get(field) is not None and rcd[field] not in allowed:
                raise UserError(
                    f"{self.directory}: config.json's rcd.{field} is {rcd[field]!r}; allowed: {', '.join(allowed)}"
                )
        if rcd.get("block_length") is not None:
            self._integer("config.json", "rcd.block_length", rcd["block_length"], least=1)
        for field in ("residual_temperature", "alpha_scale"):
            self._number(rcd, field, lambda v: 0.0 < v < float("inf"), "a finite number above 0")
        self._number(rcd, "residual_dropout", lambda v: 0.0 <= v <= 1.0, "a number in [0, 1]")
        return rcd

    def _calibration(self) -> dict[str, Any]:
        path = self.directory / CALIBRATION_FILE
        if not path.exists():
            return {}
        content = read_json(path)
        version, value = content.get("schema_version"), content.get("residual_temperature")
        if version != CALIBRATION_SCHEMA:
            raise UserError(
                f"{path}: schema_version is {version!r}, supported is {CALIBRATION_SCHEMA}; run `rcd calibrate` again"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
            raise UserError(f"{path}: residual_temperature is {value!r}; it must be a finite number above 0")
        return {"residual_temperature": float(value), "calibration": content}

    def _tokenizer_mask(self) -> int | None:
        """Id of the mask token that tokenizer_config.json names; transformers 5 lists the ids in tokenizer.json."""
        path = self.directory / "tokenizer_config.json"
        declared = read_json(path) if path.exists() else {}
        text = _text(declared.get("mask_token"))
        if text is None:
            return None
        listed = [(_text(token), int(i)) for i, token in declared.get("added_tokens_decoder", {}).items()]
        path = self.directory / "tokenizer.json"
        if not listed and path.exists():
            listed = [(_text(token), int(token["id"])) for token in read_json(path).get("added_tokens", [])]
        return dict(listed).get(text)

    def _integer(self, file: str, field: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{self.directory}: {file}'s {field} is {value!r}; it must be an integer >= {least}")
        return value

    def _number(self, rcd: dict[str, Any], field: str, is_valid: Any, requirement: str) -> None:
        value = rcd.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not is_valid(value)):
            raise UserError(f"{self.directory}: config.json's rcd.{field} is {value!r}; it must be {requirement}")


def released_name(path: str) -> str:
    """The model's name in a path, URI, hub id or snapshot directory of the hub's cache."""
    text = path if "://" in path else os.path.abspath(path)
    parts = text.rstrip("/").split("/")
    if len(parts) > 2 and parts[-2] == "snapshots":  # models--OWNER--NAME/snapshots/COMMIT
        return parts[-3]
    return parts[-1] if os.path.exists(path) else parts[-1].partition("@")[0]  # of a hub id, the revision


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; is the download complete?") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def _text(token: Any) -> str | None:
    """Tokenizer files store a token as its text or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None

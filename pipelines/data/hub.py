"""Data sets on the Hugging Face hub: which files a split consists of, at one commit. Workers read the files there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.recipe.sources import HUB_DATA
from rcd_core.errors import UserError
from rcd_core.io.hub import cached_snapshot, remedy
from rcd_core.tasks.files import SUFFIXES

HUB = "hf://"
_NO_DATA = ("dataset_infos.json", "dataset_info.json")  # describe the data set
_TIMEOUT_S = 30.0  # of a connection or a read; without one, a network that drops packets stops a dry run for ever
# How file names call a split where the data set's card does not say which files it has: the hub's convention.
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def hub_files(name: str, split: str, key: str, revision: str | None = None) -> list[str]:
    """URIs of the files of hf://owner/name[@config][:split][?revision=REVISION] in order, at the revision's commit.

    Where the hub does not answer, paths in its client's cache. split, revision: used where the name gives none;
    revision None: the main branch. key: the recipe key, for errors.
    Raises UserError if the data set is in neither place, or has no such config, split or readable files.
    """
    match = HUB_DATA.fullmatch(name)
    if match is None:
        raise UserError(f"{key} is {name!r}; use the form hf://owner/name[@config][:split][?revision=REVISION]")
    root, paths, card = _listing(match["name"], match["revision"] or revision, f"{key}: {name}")
    split = match["split"] or split
    chosen = _of_split(paths, _config(card.get("configs") or (), match["config"], f"{key}: {name}"), split)
    files = [path for path in chosen if path.endswith(SUFFIXES) and not path.endswith(_NO_DATA)]
    if not files:
        found = ", ".join(chosen[:5]) if chosen else f"no file of split {split!r}"
        raise UserError(
            f"{key}: {name} has {found}; data files are {', '.join(SUFFIXES)}; correct the split, or download and "
            "convert it"
        )
    return [f"{root}/{path}" for path in files]


def _listing(name: str, revision: str | None, where: str) -> tuple[str, list[str], dict[str, Any]]:
    """(root, paths below it in order, metadata of the card) of a data set."""
    from huggingface_hub import DatasetCard, HfApi

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
    except Exception as error:  # the hub's client has no common base class for its errors
        snapshot = cached_snapshot(name, revision, "dataset")
        if snapshot is None:
            at = f" at {revision}" if revision else ""
            raise UserError(f"{where}{at} cannot be read from the hub: {error}; {remedy(error)}") from error
        readme = snapshot / "README.md"
        card = DatasetCard.load(readme).data.to_dict() if readme.exists() else {}
        files = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
        return str(snapshot), sorted(files), card
    paths = sorted(sibling.rfilename for sibling in info.siblings or ())
    return f"{HUB}datasets/{name}@{info.sha}", paths, info.card_data.to_dict() if info.card_data else {}


def _config(configs: Sequence[Mapping[str, Any]], name: str | None, where: str) -> Mapping[str, Any]:
    """The named config of a data set's card, else the default one; {} if the card lists none."""
    names = [str(config.get("config_name")) for config in configs]
    if name is None and len(configs) > 1:
        name = next((str(c.get("config_name")) for c in configs if c.get("default")), "default")
    if name is None or (name == "default" and not configs):
        return configs[0] if configs else {}
    if name not in names:
        raise UserError(f"{where} has no config {name!r}; it has {', '.join(names) or 'only the default one'}")
    return configs[names.index(name)]


def _of_split(paths: Sequence[str], config: Mapping[str, Any], split: str) -> list[str]:
    """The files of a split, in the card's order of patterns. Without patterns, file names tell."""
    root = str(config.get("data_dir") or "").strip("/")
    inside = [path for path in paths if not root or path.startswith(f"{root}/")]
    patterns: dict[str, list[str]] = {}
    for entry in _listed(config.get("data_files")):
        part = entry if isinstance(entry, Mapping) else {"split": "train", "path": entry}
        patterns.setdefault(str(part["split"]), []).extend(map(str, _listed(part["path"])))
    if patterns:
        full = [f"{root}/{pattern}" if root else pattern for pattern in patterns.get(split, ())]
        return list(dict.fromkeys(path for pattern in full for path in inside if _glob(pattern, path)))
    named = {path for words in _KEYWORDS.values() for path in inside if _has_word(path, words)}
    if split == "train" and not named:
        return [path for path in inside if path.endswith(SUFFIXES) and not path.endswith(_NO_DATA)]
    return [path for path in inside if _has_word(path, _KEYWORDS.get(split, (split,)))]


def _listed(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [{"split": split, "path": path} for split, path in value.items()]
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _has_word(path: str, words: Iterable[str]) -> bool:
    return bool(re.search(rf"(?<![a-z0-9])({'|'.join(map(re.escape, words))})(?![a-z0-9])", path.lower()))


def _glob(pattern: str, path: str) -> bool:
    """Whether a path matches; * stays within a directory, ** does not."""
    from fsspec.utils import glob_translate

    return bool(re.match(glob_translate(pattern), path))

"""GGUF files, llama.cpp's format: read once per node through transformers, into a safetensors checkpoint in the cache.

Quantised weights become fp32, which stores them exactly and takes four bytes per parameter.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rcd_core.errors import UserError
from rcd_core.io.node_copy import cache_directory, digest, locked

SUFFIX = ".gguf"
PACKAGE = "package://"  # package://NAME/FILE: a file inside an installed Python package
_PACKAGES = ("gguf", "accelerate")  # by which transformers reads the files
_KINDS = ("llama", "qwen2", "qwen3")  # whose weights transformers turns back, and our families load


def is_gguf(path: str) -> bool:
    return path.endswith(SUFFIX)


def package_file(text: str) -> str:
    """The path of package://NAME/FILE; other texts unchanged. The package is found, not imported. Raises UserError."""
    if not text.startswith(PACKAGE):
        return text
    name, _, file = text.removeprefix(PACKAGE).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    root = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if root is None:
        raise UserError(f"{text}: there is no Python package {name!r} here; install it, or give the file's path")
    return str(Path(root) / file)


def unpacked(file: Path) -> Path:
    """The directory with a GGUF file's checkpoint and tokenizer, made by the first process that needs it.

    Raises UserError if the file is missing, damaged or of another architecture, and if a package is not installed.
    """
    if not file.is_file():
        raise UserError(f"checkpoint {file} does not exist; correct the path")
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"{file}: reading GGUF files needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    facts = file.stat()
    root = cache_directory("gguf")
    name = digest(str(file.resolve()), facts.st_size, facts.st_mtime_ns)
    with locked(root / f"{name}.lock"):
        copy, partial = root / name, root / f"{name}.partial"
        if not copy.exists():
            shutil.rmtree(partial, ignore_errors=True)
            _write(file, partial / file.stem)
            os.replace(partial, copy)
    return copy / file.stem


def _write(file: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**place)
        if config.model_type not in _KINDS:
            raise UserError(f"{file}: its architecture is {config.model_type!r}; supported: {', '.join(_KINDS)}")
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:  # the readers have no common base class for their errors
        raise UserError(f"{file} cannot be read as GGUF ({error}); download it again, or give safetensors") from error
    model.hf_quantizer = None  # of the file; the weights are fp32 now
    del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

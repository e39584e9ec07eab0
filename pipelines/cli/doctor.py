"""`rcd doctor`: what this machine has, what is missing, and for which feature. Nothing is installed or changed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cli.flags import DoctorFlags
from pipelines.cli.terminal import absolute_path
from pipelines.ray_cluster.local import STATE, Head
from rcd_core.errors import UserError
from rcd_core.io import storage

State = Literal["ok", "absent", "fault"]  # absent: a feature is not available; fault: nothing works without it
_COLOURS = {"ok": "green", "absent": "yellow", "fault": "red"}
_REQUIRED = ("torch", "transformers", "ray", "pyarrow", "safetensors", "tokenizers")
_OPTIONAL = {  # package -> (feature, extra)
    "peft": ("train.lora", "lora"),
    "torchao": ("weights int8, int4, fp8", "quantise"),
    "gguf": ("GGUF files", "gguf"),
    "deepspeed": ("train.strategy deepspeed", "deepspeed"),
    "flash-attn": ("attention flash", "flash"),
    "lm_eval": ("the harness lm-eval", "lm-eval"),
    "wandb": ("trackers: [wandb]", "wandb"),
    "mlflow-skinny": ("trackers: [mlflow]", "mlflow"),
    "trackio": ("trackers: [trackio]", "trackio"),
}
_UNTESTED = ("Darwin", "Windows")  # systems
_PORTS = {6379: "rcd up (Ray)", 8265: "rcd up (dashboard)", 8000: "the HTTP endpoint"}
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    found: str
    remedy: str = ""


def doctor(flags: DoctorFlags) -> int:
    """Print the checks. Returns 1 if something is at fault, 0 if at most features are missing."""
    checks = [*_system(), *_packages(), *_devices(), *_attention(), *_ray(), *_places(flags.storage), *_hub(flags)]
    table = Table("check", "", "found", "what to do", title=None)
    for check in checks:
        style = _COLOURS[check.state]
        table.add_row(
            Text(check.name),
            Text(check.state, style=style),
            Text(check.found, overflow="fold"),
            Text(check.remedy, overflow="fold"),
        )
    console = Console(highlight=False)
    console.print(table)
    faults, absent = (sum(check.state == state for check in checks) for state in ("fault", "absent"))
    console.print(f"{faults} faults; {absent} features are not available here" if faults or absent else "all is there")
    return int(faults > 0)


def _system() -> Iterator[Check]:
    python = platform.python_version()
    supported = sys.version_info >= (3, 11)
    yield Check("Python", "ok" if supported else "fault", python, "" if supported else "install Python 3.11 or newer")
    system = f"{platform.system()} {platform.machine()}"
    tested = platform.system() not in _UNTESTED and platform.machine() == "x86_64"
    yield Check("system", "ok" if tested else "absent", system, "" if tested else "not tested there; Linux x86_64 is")
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free, {os.cpu_count()} cores"
    enough = memory.available > 4e9
    yield Check("memory", "ok" if enough else "absent", text, "" if enough else "the demo needs about 4 GB")
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    remedy = "" if compiler else "install gcc for train.compile and compiled layers on GPUs"
    yield Check("C compiler", "ok" if compiler else "absent", compiler or "none", remedy)


def _packages() -> Iterator[Check]:
    for package in _REQUIRED:
        version = _version(package)
        remedy = "" if version else "pip install -e . in the checkout of this project"
        yield Check(package, "ok" if version else "fault", version or "not installed", remedy)
    for package, (feature, extra) in _OPTIONAL.items():
        version = _version(package)
        remedy = "" if version else f"for {feature}: pip install 'rcd-ray[{extra}]'"
        yield Check(package, "ok" if version else "absent", version or "not installed", remedy)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Check]:
    import torch

    built = torch.version.cuda
    if not torch.cuda.is_available():
        why = f"torch is built for CUDA {built}, but finds no GPU" if built else "torch is built without CUDA"
        yield Check("GPU", "absent", why, "CPUs run all but flex and flash training, varlen and flash decoding, int4")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Check(f"GPU {number}", "ok", f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, CUDA {built}")


def _attention() -> Iterator[Check]:
    """Each backend runs once, on the device that models would use."""
    import torch

    from rcd_core.attention.backends import FUNCTIONS
    from rcd_core.attention.paged_backends import NAMES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, function in FUNCTIONS.items():
        query = torch.zeros(1, 2, 128, 64, dtype=dtype, device=device, requires_grad=True)
        yield _tried(f"training attention {name}", partial(_trains, function, query))
    for name in NAMES:
        if name != "auto":
            yield _tried(f"decoding attention {name}", partial(_decodes, name, dtype, device))


def _trains(function: Callable[..., Any], query: Any) -> None:
    function(query, query, query, None, 0.1).sum().backward()


def _decodes(name: str, dtype: Any, device: Any) -> None:
    import torch

    from rcd_core import Decoder, DecodeSettings
    from rcd_core.families.base import CheckpointInfo
    from rcd_core.families.config import ModelConfig
    from rcd_core.families.loading import new_model

    sizes = ModelConfig(
        family="sdar", hidden_size=128, intermediate_size=128, num_layers=1, num_heads=2, num_kv_heads=2
    )
    model = new_model(sizes, vocab_size=64, info=CheckpointInfo(63, (62,), 62, 4), seed=0).to(
        device=device, dtype=dtype
    )
    model.attention = name
    with torch.inference_mode():
        Decoder(model).generate([[1, 2, 3]], DecodeSettings(max_new_tokens=4))


def _tried(name: str, run: Callable[[], Any]) -> Check:
    import torch

    try:
        run()
    except torch.OutOfMemoryError:  # says nothing about the backend
        return Check(name, "absent", "not tried: the device is out of memory", "free its memory, and run this again")
    except (UserError, RuntimeError, ValueError, NotImplementedError, ImportError) as error:
        return Check(name, "absent", " ".join(str(error).split())[:160])
    return Check(name, "ok", "runs")


def _ray() -> Iterator[Check]:
    head = Head.load(STATE)
    text = f"local head at {head.gcs}" if head else "no local head was started"
    yield Check("Ray", "ok", text, "" if head else "rcd up starts one")
    for port, use in _PORTS.items():
        free = _is_free(port)
        ours = bool(head) and port != 8000
        remedy = "" if free or ours else f"for {use} give another port, or stop what listens there"
        yield Check(f"port {port}", "ok" if free or ours else "absent", "free" if free else "in use", remedy)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _places(where: str) -> Iterator[Check]:
    path = absolute_path(where)
    problem = _not_writable(path)
    remedy = "give --storage a directory or URI that can be written to" if problem else ""
    yield Check("storage", "fault" if problem else "ok", problem or f"{path} can be written to", remedy)
    for place in (path, "/dev/shm"):
        if not storage.is_uri(place) and os.path.isdir(place):
            usage = shutil.disk_usage(place)
            enough = usage.free > 2e9
            text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
            yield Check(f"space in {place}", "ok" if enough else "absent", text, "" if enough else "make room")


def _not_writable(path: str) -> str:
    """Why nothing can be written there, "" if something can. A bucket gets a small object, which is removed."""
    if not storage.is_uri(path):
        there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        return "" if writable else f"{path}: {there} cannot be written to"
    probe = storage.join(path, f".rcd-doctor-{os.getpid()}")
    try:
        storage.write_bytes(probe, b"x")
        storage.remove(probe)
    except Exception as error:
        return f"{path}: {error}"
    return ""


def _hub(flags: DoctorFlags) -> Iterator[Check]:
    from huggingface_hub import get_token

    token = "with a token" if get_token() else "without a token"
    if flags.offline or os.environ.get("HF_HUB_OFFLINE"):
        yield Check("model hub", "absent", f"not asked ({token})", "hub ids are looked for in the local cache only")
        return
    from huggingface_hub import HfApi

    try:
        HfApi().model_info("gpt2", timeout=_HUB_TIMEOUT_S)
        yield Check("model hub", "ok", f"answers ({token})")
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        yield Check("model hub", "absent", f"{text} ({token})", "use checkpoints and data on this machine, or a mirror")

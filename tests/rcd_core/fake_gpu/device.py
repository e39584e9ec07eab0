"""A GPU that computes nothing: fake tensors on "cuda", which have shapes, dtypes and a device but no content.

    with FakeGpu() as gpu:
        model = gpu.model(make_model(), torch.bfloat16)
        Engine(model, None, ...).step()
    assert gpu.syncs == ["numpy"]

Code takes the paths that it takes on a GPU, and fails on what fails there: mixed devices, mixed attention dtypes, and
inside a capture everything that waits for the device. Integers and booleans that the host wrote keep their values, so
that shapes that depend on them are known; other values that the host reads are made up.

What it cannot show: autograd's backward pass (PyTorch's engine asks for streams that a CPU build lacks), kernels and
what they require beyond dtypes, real captures, and time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
_CUDA, _META, _NUM_DEVICE_TYPES = 1, 14, 22  # of c10/core/DeviceType.h
VIEWS = """alias as_strided chunk detach device expand permute select slice split split_with_sizes squeeze t transpose
    unbind unflatten unsqueeze unsafe_split view view_as_real _reshape_alias _unsafe_view lift_fresh""".split()
_KERNELS = ("rms_norm",)  # made of other operations, except on CUDA
_ATTENTION = ("_varlen_attn", "_scaled_dot_product", "scaled_dot_product", "flex_attention")


class HostSync(RuntimeError):
    """The host waited for the device inside a capture."""


class FreedInput(RuntimeError):
    """A captured pass refers to memory that was freed."""


class FakeGraph:
    """A captured pass, which can be replayed as long as what it read is where it was."""

    def __init__(self) -> None:
        self.inputs: dict[int, StorageWeakRef] = {}

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        freed = sum(ref.expired() for ref in self.inputs.values())
        if freed:
            raise FreedInput(f"{freed} tensors that the captured pass read are gone")


class FakeGpu:
    """syncs: every time the host waited for the device, in order. calls: operations by name, views left out. captured:
    keys of the captured passes, in order. copied: bytes from the host to the device."""

    def __init__(self) -> None:
        self.syncs: list[str] = []
        self.calls: Counter[str] = Counter()
        self.captures = 0
        self.largest = 0  # elements of the largest tensor that an operation made
        self.copied = 0
        self._capturing: FakeGraph | None = None
        self._made: set[int] = set()  # storages that this capture allocated
        self._values = WeakTensorKeyDictionary()  # fake tensor -> its content, where the host wrote it
        self._random = np.random.default_rng(0)
        self._stack = contextlib.ExitStack()

    # -- entering and leaving
    def __enter__(self) -> FakeGpu:
        enter = self._stack.enter_context
        enter(_device_guard())
        common = torch.cuda.amp.common  # type: ignore[attr-defined]
        # Autocast switches itself off where no GPU is available.
        for target, name, value in (
            (common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (torch.cuda, "Stream", mock.MagicMock()),
            (torch.cuda, "stream", mock.MagicMock()),
            (torch.cuda, "current_stream", mock.MagicMock()),
            (torch.cuda, "CUDAGraph", FakeGraph),
            (torch.cuda, "graph", lambda graph, **_: self.capture(graph)),
            (torch.cuda, "get_device_name", lambda *_: "NVIDIA H100"),
            (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=80e9, major=9, minor=0)),
            (torch.cuda, "max_memory_allocated", lambda *_: 0),
            (torch.cuda, "synchronize", lambda *_: self._sync("synchronize")),
            (fake_tensor, "CONSTANT_NUMEL_LIMIT", -1),  # its own constants are real tensors that it would move to CUDA
            (FakeTensor, "numpy", lambda t: self._on_host(t, "numpy")),
            (FakeTensor, "tolist", lambda t: self._on_host(t, "tolist")),
        ):
            enter(mock.patch.object(target, name, value, create=True))
        enter(mock.patch.dict("os.environ", {"TORCHDYNAMO_DISABLE": "1"}))
        self.mode = enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(_Watch(self._run))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @contextlib.contextmanager
    def capture(self, graph: FakeGraph) -> Iterator[None]:
        """What runs inside must not wait for the device. The graph notes the memory that it reads."""
        self.captures += 1
        self._capturing, self._made = graph, set()
        try:
            yield
        finally:
            self._capturing = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Counts only what runs inside."""
        before, self.calls = self.calls, Counter()
        try:
            yield self.calls
        finally:
            self.calls = before

    # -- models and tensors
    def model(self, model: Any, dtype: torch.dtype) -> Any:
        """Gives a model fake parameters of this dtype on the device, in place."""
        made: dict[nn.Parameter | torch.Tensor, Any] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if tensor not in made:
                        is_parameter = isinstance(tensor, nn.Parameter)
                        empty = torch.empty(tensor.shape, dtype=dtype if is_parameter else tensor.dtype, device="cuda")
                        made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    tensors[name] = made[tensor]
        return model

    # -- operations
    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if getattr(kwargs.get("device"), "type", "") == "meta":  # the guard's answer to "cuda" without a number
            kwargs = {**kwargs, "device": torch.device("cuda", 0)}
        name = func.__name__.split(".")[0]
        if name == "_local_scalar_dense":
            return self._on_host(args[0], "item")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [self._value(t) for t in tensors]
        if any(part in name for part in _ATTENTION):
            _check_attention(name, tensors)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [part for index in args[1] for part in self._integers(index)], *args[2:])
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func is aten.nonzero.default:
            return self._fake(self._places(args[0], "nonzero"), args[0].device)
        on_gpu = any(t.device.type == "cuda" for t in tensors) or "cuda" in str(kwargs.get("device"))
        if on_gpu and name not in VIEWS:
            self.calls[name] += 1
        self._note_copies(name, args, kwargs, tensors)
        out = func(*args, **kwargs)
        if self._capturing is not None:
            read = {t.untyped_storage()._cdata: t for t in tensors if t.device.type == "cuda"}
            self._capturing.inputs.update(
                {key: StorageWeakRef(t.untyped_storage()) for key, t in read.items() if key not in self._made}
            )
            made = {t.untyped_storage()._cdata for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
            self._made |= made - set(read)
        if on_gpu and name not in VIEWS and not name.endswith("_") and name not in ("empty", "new_empty", "zeros"):
            self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        if known and all(v is not None for v in known) or not tensors and "random" not in name and "rand" not in name:
            self._propagate(func, args, kwargs, out)
        else:
            for t in tree_leaves(out):  # an in-place operation with unknown values
                if isinstance(t, FakeTensor) and t in self._values:
                    del self._values[t]
        return out

    def _propagate(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        results = [t for t in tree_leaves(out) if isinstance(t, FakeTensor)]
        if not results or any(t.is_floating_point() or t.numel() > 1 << 23 for t in results):
            return
        real = tree_map(lambda t: self._value(t) if isinstance(t, torch.Tensor) else t, (args, dict(kwargs)))
        if "device" in real[1]:
            real[1]["device"] = torch.device("cpu")
        if func.__name__.startswith("empty") or "new_empty" in func.__name__:
            return
        with _disable_current_modes():
            values = tree_leaves(func(*real[0], **real[1]))
        for tensor, value in zip(results, [v for v in values if isinstance(v, torch.Tensor)], strict=True):
            self._values[tensor] = value

    def _value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return self._values.get(tensor) if isinstance(tensor, FakeTensor) else tensor

    def _places(self, mask: torch.Tensor, name: str) -> torch.Tensor:
        """(n, d) where a tensor is not 0, on the host: how many they are is known only there."""
        value = self._read(mask, name)
        with _disable_current_modes():
            return value.nonzero()

    def _integers(self, index: Any) -> list[Any]:
        """A boolean index as the integers that it stands for."""
        if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
            return [index]
        places = self._places(index, "boolean index")
        with _disable_current_modes():
            columns = [column.contiguous() for column in places.unbind(1)]
        return [self._fake(column, index.device) for column in columns]

    def _fake(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        with self.mode:
            fake = torch.empty(value.shape, dtype=value.dtype, device=device)
        self._values[fake] = value
        return fake

    def _read(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """The content of a tensor, made up where it is not known."""
        if tensor.device.type == "cuda":
            self._sync(name)
        value = self._value(tensor)
        if value is not None:
            return value
        shape = tuple(tensor.shape)
        with _disable_current_modes():
            if tensor.dtype == torch.bool:
                return torch.ones(shape, dtype=torch.bool)
            if not tensor.is_floating_point():
                return torch.zeros(shape, dtype=tensor.dtype)
            return torch.from_numpy(self._random.random(shape)).to(tensor.dtype)

    def _on_host(self, tensor: torch.Tensor, name: str) -> Any:
        with _disable_current_modes():
            return getattr(self._read(tensor, name), name)()

    def _note_copies(self, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        devices = {t.device.type for t in tensors}
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if name == "copy_" and devices == {"cpu", "cuda"}:
            source, to = args[1], args[0].device.type
        elif name in ("_to_copy", "device_put") and devices and to not in (None, *devices):
            source = args[0]
        else:
            return
        if to == "cuda":
            self.copied += source.numel() * source.element_size()
        if to == "cpu" or self._capturing:
            self._sync(f"copy to {to}")

    def _sync(self, name: str) -> None:
        if self._capturing:
            raise HostSync(name)
        self.syncs.append(name)


class _Watch(TorchDispatchMode):
    """Hands every operation to `run`. In inference mode operations arrive whole that are made of others."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            whole = func.namespace != "aten" or func.__name__.split(".")[0] in _KERNELS
            if not whole and (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        return self._run(func, args, kwargs)


def _check_attention(name: str, tensors: list[torch.Tensor]) -> None:
    floats = [t for t in tensors if t.is_floating_point()]
    if len({t.dtype for t in floats[:3]}) > 1:
        raise RuntimeError(f"{name}: mixed dtypes {[t.dtype for t in floats[:3]]}")
    if name == "_varlen_attn":
        assert all(t.dtype in (torch.bfloat16, torch.float16) for t in floats), "the kernel is for half precision"
        assert all(t.dtype == torch.int32 for t in tensors if not t.is_floating_point()), "the kernel reads int32"
        assert all(t.stride(-1) == 1 for t in tensors), "the kernel reads contiguous rows"


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """A CPU build of PyTorch has no device guard for CUDA, so that even a slice of a fake tensor fails. It gets the
    guard of meta tensors meanwhile, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _NUM_DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    missing = guards[_CUDA] is None
    if missing:
        guards[_CUDA] = guards[_META]
    try:
        yield
    finally:
        if missing:
            guards[_CUDA] = None

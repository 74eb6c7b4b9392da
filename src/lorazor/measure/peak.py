"""The peak of memory: on CUDA by the count of its allocator, on the CPU, whose has none, by the tensors that live.

`peak` is coarser, and for free: of everything since `forget_peak`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorazor.errors import SettingsError


def check_has_peak(model: nn.Module) -> None:
    """Refuse a model whose peak of memory cannot be measured.

    Raises:
        SettingsError: it lies on several devices, or on one that is neither CUDA nor the CPU.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or devices[0].partition(":")[0] not in ("cpu", "cuda"):
        raise SettingsError(
            f"The peak of memory is measured on one CUDA device or the CPU, but the model is on {', '.join(devices)}. "
            "Pass --step-time, --keep or --params, or another --device-map."
        )


@contextmanager
def counting_peak(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the peak of memory inside the block.

    On CUDA it is that of the allocator (`torch.cuda.max_memory_allocated`), with all that lies there. On the CPU it is
    the parameters and buffers of the model, and of the tensors that operations make inside the block the most bytes
    that live at one time, each storage once: what kernels allocate within one operation is not seen.

    Args:
        model: on one device.
    Yields:
        The peak so far, in bytes.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        count_anew(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    held = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    with _LiveBytes(held) as live:
        yield lambda: live.n_held + live.peak


_earlier = {"peak": 0}
"""Bytes on CUDA that `peak` has to know of: its allocator has one counter, which trainings and probes begin anew."""


def count_anew(device: torch.device) -> None:
    """Have CUDA's allocator count its peak from here on; that until here stays a part of `peak`."""
    _earlier["peak"] = max(_earlier["peak"], torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)


def forget_peak() -> None:
    """Start to measure the peak of memory; without effect where neither CUDA nor Linux measures it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        _earlier["peak"] = 0
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int | None:
    """Bytes: on CUDA of its allocator, else of the whole process; None where they are not known."""
    if torch.cuda.is_available():
        return max(_earlier["peak"], torch.cuda.max_memory_allocated())
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return None


class _LiveBytes(TorchDispatchMode):
    """Follows the storages of what operations put out, from the first one to their end."""

    def __init__(self, held: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self._sizes = {one._cdata: one.nbytes() for one in held}
        self.n_held = sum(self._sizes.values())
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address)

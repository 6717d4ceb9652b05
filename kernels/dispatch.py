"""Which implementation of an operation runs: Triton on a GPU, plain torch everywhere else."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, and the CPU build of torch
    triton = None
    tl = None

# "torch" or "triton" overrides the rule of `use_triton`, for tests and comparisons.
FORCED = os.environ.get("CLOZE_KERNELS")


def check_kernel_choice(device: torch.device) -> None:
    """Raise ValueError if CLOZE_KERNELS asks for what is impossible on this machine and device."""
    if FORCED not in (None, "torch", "triton"):
        raise ValueError(f"CLOZE_KERNELS={FORCED}: it must be torch or triton")
    if FORCED == "triton" and triton is None:
        raise ValueError("CLOZE_KERNELS=triton: Triton is not installed; pip install triton")
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if FORCED == "triton" and device.type == "cpu" and not is_interpreted:
        raise ValueError("CLOZE_KERNELS=triton: on a CPU this needs TRITON_INTERPRET=1")


def use_triton(x: Tensor) -> bool:
    """Whether an operation on x runs as a Triton kernel; these have no float64."""
    is_chosen = FORCED == "triton" or (FORCED is None and triton is not None and x.is_cuda)
    return is_chosen and x.dtype != torch.float64


def low_precision(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies on the device of x; None without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def jit(kernel: Callable) -> Callable:
    """triton.jit where Triton is installed; elsewhere the kernel is never called."""
    return triton.jit(kernel) if triton else kernel

"""Which implementation of a kernel runs: Triton's on a GPU, plain torch everywhere else."""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, and the CPU build of torch
    triton = None
    tl = None

# "torch" or "triton" forces the one or the other; on a CPU "triton" wants TRITON_INTERPRET=1 at the import.
FORCED = os.environ.get("CLOZE_KERNELS")


def check_kernel_choice(device: torch.device) -> None:
    """Raises ValueError where CLOZE_KERNELS asks for what this machine cannot do on that device."""
    if FORCED not in (None, "torch", "triton"):
        raise ValueError(f"CLOZE_KERNELS={FORCED}: it must be torch or triton")
    if FORCED == "triton" and triton is None:
        raise ValueError("CLOZE_KERNELS=triton: Triton is not installed; on Linux, pip install triton")
    if FORCED == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("CLOZE_KERNELS=triton: on a CPU this takes the interpreter, TRITON_INTERPRET=1")


def use_triton(x: Tensor) -> bool:
    """The one rule of dispatch: Triton's kernels for a GPU's tensors, torch code for all others."""
    chosen = FORCED == "triton" or (FORCED is None and triton is not None and x.is_cuda)
    return chosen and x.dtype != torch.float64


def jit(kernel):
    return triton.jit(kernel) if triton else kernel

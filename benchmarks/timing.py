"""How bench.py measures time, memory, and the matrix multiplications of a step."""

import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.dispatch
from files.disk import UserError

Call = Callable[[], Any]
Seconds = dict[str, list[float]]  # of each implementation in each round


class Hardware(NamedTuple):
    """Where something is measured, and the precision of its matrix multiplications."""

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()}, {torch.get_num_threads()} threads, {capability}"

    def autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)


def seconds_of(call: Call) -> float:
    """The seconds until a call has returned and the GPU is idle."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(calls: dict[str, Call], rounds: int) -> Seconds:
    """Time calls that take turns, and so meet the same load, after two rounds of warm-up."""
    seconds: Seconds = {name: [] for name in calls}
    for _ in range(2 + rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    return {name: values[2:] for name, values in seconds.items()}


def summarize(values: list[float]) -> list[float]:
    """[minimum, median, maximum]."""
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def ratios(seconds: Seconds, ours: str = "ours") -> dict[str, list[float]]:
    """How many times as fast `ours` is as each other implementation."""
    return {
        name: summarize([a / b for a, b in zip(values, seconds[ours], strict=True)])
        for name, values in seconds.items()
        if not name.startswith("ours")
    }


def show(title: str, seconds: Seconds, n_items: int, unit: str) -> None:
    """Print medians: milliseconds of a call, and its speed, where a call processes `n_items`."""
    for name, values in seconds.items():
        median = statistics.median(values)
        speed = f"{1e3 * median:10.2f} ms {n_items / median:12,.0f} {unit}/s"
        print(f"{title:14}{name:36}{speed}", flush=True)


def peak_bytes(device: torch.device) -> int:
    """The most bytes that were in use so far, on the GPU or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("--parts memory: on a CPU this needs Linux, for /proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))[1])


def run_in_new_process(function: Callable, *args: Any) -> Any:
    """Call a function where no earlier work raised the memory or left room on the heap."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


class MatmulTimer(TorchDispatchMode):
    """Times the matrix multiplications of the code within it, each by itself.

    One is repeated when its shapes first occur; its fastest time counts whenever they occur.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.flops = 0
        self.cache: dict[tuple, float] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if operation.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            # the first tensor of addmm and baddbmm is a summand
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            key = (a.shape, a.stride(), b.shape, b.stride(), a.dtype)
            if key not in self.cache:
                self.cache[key] = self.fastest_seconds(a, b)
            self.seconds += self.cache[key]
            self.flops += 2 * a.numel() * b.shape[-1]
        return operation(*args, **(kwargs or {}))

    def fastest_seconds(self, a: Tensor, b: Tensor) -> float:
        n_calls = 50 if a.is_cuda else 1  # on a GPU enough to hide the launches

        def multiply() -> None:
            for _ in range(n_calls):
                torch.matmul(a, b)

        with torch.autocast(a.device.type, enabled=False):  # in the precision that they have
            return min(seconds_of(multiply) for _ in range(6)) / n_calls


def time_matmuls(step: Call) -> MatmulTimer:
    """The `seconds` and `flops` of the matrix multiplications of a step.

    Attention runs in torch here, because multiplications inside Triton's kernels are hidden.
    """
    with mock.patch.object(kernels.dispatch, "FORCED", "torch"), MatmulTimer() as timer:
        step()
    return timer

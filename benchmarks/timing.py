"""How bench.py measures time, memory, and the matrix multiplications of a step."""

import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.dispatch
from files.disk import UserError

Call = Callable[[], Any]


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


def compare(
    title: str, calls: dict[str, Call], rounds: int, n_items: int, unit: str
) -> dict[str, list[float]]:
    """Time calls that take turns, so that they meet the same clock rate and load of the machine.

    Args:
        title: of the lines that are printed.
        calls: what to time, by name.
        rounds: of all calls, after two that are not counted.
        n_items: how many of a `unit` such as "tokens" one call processes.

    Returns:
        The seconds of each call in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2 + rounds):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call))
    for name, values in seconds.items():
        del values[:2]
        median = statistics.median(values)
        speed = f"{1e3 * median:10.2f} ms {n_items / median:12,.0f} {unit}/s"
        print(f"{title:14}{name:36}{speed}", flush=True)
    return seconds


def summarize(values: list[float]) -> list[float]:
    """[minimum, median, maximum]."""
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def ratios(seconds: dict[str, list[float]], ours: str = "ours") -> dict[str, list[float]]:
    """How many times as fast `ours` is as each other implementation, over the rounds."""
    return {
        name: summarize([a / b for a, b in zip(values, seconds[ours], strict=True)])
        for name, values in seconds.items()
        if not name.startswith("ours")
    }


def peak_bytes(device: torch.device) -> int:
    """The most bytes that were in use so far, on the GPU or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("--parts memory: on a CPU only Linux says how much memory was in use")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def run_in_new_process(function: Callable, *args: Any) -> Any:
    """Call a function in a new process, and return its result.

    What this process did before would count as its memory, and would leave a heap with room for
    tensors that a new program has to get from the system.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


class MatmulTimer(TorchDispatchMode):
    """Times the matrix multiplications of the code that runs within it, by themselves.

    Each is repeated when its shapes first occur, and its fastest time counts at every occurrence.
    """

    NAMES = ("mm", "bmm", "addmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.seconds = 0.0
        self.flops = 0
        self.cache: dict[tuple, float] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in self.NAMES:
            # the first tensor of addmm and baddbmm is a summand
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            key = (a.shape, a.stride(), b.shape, b.stride(), a.dtype)
            if key not in self.cache:
                self.cache[key] = self.time(a, b)
            self.seconds += self.cache[key]
            self.flops += 2 * a.numel() * b.shape[-1]
        return operation(*args, **(kwargs or {}))

    def time(self, a: Tensor, b: Tensor, repeats: int = 6) -> float:
        n_calls = 50 if a.is_cuda else 1  # on a GPU enough to hide the launches

        def multiply() -> None:
            for _ in range(n_calls):
                torch.matmul(a, b)

        with torch.autocast(a.device.type, enabled=False):  # in the precision that they have
            return min(seconds_of(multiply) for _ in range(repeats)) / n_calls


def time_matmuls(step: Call) -> MatmulTimer:
    """The `seconds` and `flops` of a step's matrix multiplications.

    Attention runs in torch here, because the multiplications in Triton's kernels are hidden.
    """
    forced = kernels.dispatch.FORCED
    kernels.dispatch.FORCED = "torch"
    try:
        with MatmulTimer() as timer:
            step()
    finally:
        kernels.dispatch.FORCED = forced
    return timer

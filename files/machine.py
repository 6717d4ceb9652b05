"""What a run needs of its machine: processes, signals, a compiler, and how fast its CPU is."""

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from files.disk import first_line

# (precision, CPU feature, share of STEPS that takes as long as all of them do with AMX)
CPU_SHARES = (
    ("bfloat16", "amx_bf16", 1.0),
    ("bfloat16", "avx512_vp2intersect", 1.2),  # Zen 5
    ("bfloat16", "avx512_bf16", 0.6),  # Zen 4
    ("float32", "avx512_f", 0.28),
)
SLOWEST_SHARE = 0.14  # of all other CPUs


class Ranks(NamedTuple):
    """The processes of a run: one, or as many as torchrun started."""

    rank: int
    n: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def hide_bar(self) -> bool | None:
        """What tqdm's `disable` takes; None shows a bar on a terminal only."""
        return None if self.is_first else True

    def log(self, message: str) -> None:
        if self.is_first:
            print(message, flush=True)

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        values = [value]
        if self.n > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def sum(self, values: dict[str, Any], device: torch.device) -> dict[str, float]:
        """Each value summed over the ranks."""
        sums = torch.stack([torch.as_tensor(v, device=device).float() for v in values.values()])
        if self.n > 1:
            dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def wrap(self, model: nn.Module) -> nn.Module:
        """DistributedDataParallel on several ranks, the model itself on one."""
        return nn.parallel.DistributedDataParallel(model) if self.n > 1 else model

    def rehearse(self, parallel_model: nn.Module, batch) -> None:
        """One backward pass whose gradients are dropped, before a resumed run.

        After its first step DDP sums gradients in other groups, so that a resumed run would differ
        from an uninterrupted one in the last bits.
        """
        if self.n > 1:
            sum(total for total, _ in parallel_model(batch).values()).backward()
            parallel_model.zero_grad(set_to_none=True)

    def gradient_sync(self, parallel_model: nn.Module, is_last: bool):
        """A context: gradients are summed over the ranks in the last micro-batch of a step only."""
        if self.n == 1 or is_last:
            return contextlib.nullcontext()
        return parallel_model.no_sync()

    def leave(self) -> None:
        if self.n > 1:
            dist.destroy_process_group()


def join_ranks(device: torch.device) -> Ranks:
    """Under torchrun, connect the processes of the run."""
    if "RANK" not in os.environ:
        return Ranks(0, 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a run can end after the current step."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def cpu_share(dtype_name: str) -> tuple[float, str]:
    """How many steps this CPU does while one with AMX does one, and the feature that decides."""
    features = torch.cpu.get_capabilities()
    for precision, feature, share in CPU_SHARES:
        if precision == dtype_name and features.get(feature):
            return share, feature
    return SLOWEST_SHARE, "no AVX-512 or AMX for it"


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device, log) -> None:
    """Compile blocks in place, so that all names stay, where torch.compile works."""
    problem = compiler_problem(device)
    if problem:
        log(f"--compile: {problem}: going on without")
        return
    for block in blocks:
        block.compile()


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here; empty where it does."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "switched off by TORCH_COMPILE_DISABLE"
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # a C++ compiler, Python's headers or Triton is missing
        return first_line(error)
    return ""

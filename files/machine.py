"""What a run needs of its machine: processes, signals, a compiler, and how many steps to take."""

import argparse
import atexit
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from files.disk import UserError, first_line

# For tiny, steps that end within 10 minutes on 2 CPU cores; for the others, which need a GPU, a
# first guess.
STEPS = {"tiny": 1500, "small": 20_000, "base": 100_000}
MICRO_BATCH_TOKENS = 8192
FEW_STEPS = 500  # where the default is fewer, twice as many of half the tokens learn more
# (precision, CPU feature, share of STEPS that takes as long as all of them do with AMX)
CPU_SHARES = (
    ("bfloat16", "amx_bf16", 1.0),
    ("bfloat16", "avx512_vp2intersect", 1.2),  # Zen 5
    ("bfloat16", "avx512_bf16", 0.6),  # Zen 4
    ("float32", "avx512_fp16", 0.5),  # Sapphire Rapids without AMX
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

    def wrap(self, model: nn.Module, rehearsal) -> nn.Module:
        """DistributedDataParallel on several ranks, the model itself on one.

        After its first backward pass DDP sums gradients in other groups. That pass is made here,
        on a `rehearsal` batch, so that a resumed run sums as an uninterrupted one does.
        """
        if self.n == 1:
            return model
        parallel_model = nn.parallel.DistributedDataParallel(model)
        losses = parallel_model(rehearsal)
        sum(total for total, _ in losses.values()).backward()
        model.zero_grad(set_to_none=True)
        return parallel_model

    def gradient_sync(self, parallel_model: nn.Module, is_last: bool):
        """A context: gradients are summed over the ranks in the last micro-batch of a step only."""
        if self.n == 1 or is_last:
            return contextlib.nullcontext()
        return parallel_model.no_sync()


def join_ranks(device: torch.device) -> Ranks:
    """Under torchrun, connect the processes of the run."""
    if "RANK" not in os.environ:
        return Ranks(0, 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # at exit, once DDP is gone: with it the group's destructor would wait for the other ranks
    atexit.register(dist.destroy_process_group)
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


def set_steps(args: argparse.Namespace, device: torch.device) -> str:
    """Set --steps, and --micro-batch-tokens where it is not set; returns the reason in a line.

    The default is a number of steps and not of seconds, so that runs repeat.
    """
    if args.preset not in STEPS:
        raise UserError(f"--preset {args.preset} has no default number of steps: give --steps")
    args.steps = STEPS[args.preset]
    reason = f"the default of {args.preset}"
    if device.type == "cpu":
        share, feature = cpu_share(args.dtype)
        args.steps = round(args.steps * share)
        if share != 1:
            reason += f" x {share:g}, for a CPU that multiplies in {args.dtype} with {feature}"
    if args.steps < FEW_STEPS and args.micro_batch_tokens is None:
        args.steps *= 2
        args.micro_batch_tokens = MICRO_BATCH_TOKENS // 2
        reason += f"; few, so twice as many of {args.micro_batch_tokens:,} tokens"
    return f"{args.steps} steps: {reason}"


def cpu_share(dtype_name: str) -> tuple[float, str]:
    """The share of STEPS that this CPU takes, by its speed, and the feature that decides it."""
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

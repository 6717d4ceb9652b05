"""What a run needs of its machine: processes, signals, memory, a compiler, and how many steps."""

import argparse
import atexit
import contextlib
import datetime
import functools
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from files.cli import STOP_SIGNALS, TORCHRUN, under_torchrun
from files.disk import UserError, first_line
from model import Config

# What tiny does in 10 minutes on 2 fast CPU cores; for the others, which need a GPU, a first guess.
STEPS = {"tiny": 1500, "small": 20_000, "base": 100_000}
MICRO_BATCH_TOKENS = 8192
# What tiny does in 10 minutes on other CPUs: (precision, feature of the CPU, steps, tokens of a
# micro-batch). Where only few steps are possible, twice as many of half the tokens learn more.
TINY_ON_CPU = (
    ("bfloat16", "amx_bf16", 1500, 8192),
    ("bfloat16", "avx512_vp2intersect", 1800, 8192),  # Zen 5
    ("bfloat16", "avx512_bf16", 900, 8192),  # Zen 4
    ("float32", "avx512_fp16", 750, 8192),  # Sapphire Rapids without AMX
    ("float32", "avx512_f", 840, 4096),
)
TINY_ON_SLOW_CPU = (None, "neither AVX-512 nor AMX for it", 420, 4096)


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

    def from_first(self, compute: Callable[[], Any], of_machine: bool = False) -> Any:
        """What `compute` returns on the first rank, which alone calls it, on every rank.

        With `of_machine` the first rank of each machine calls it for the ranks there: what it
        writes need not be on a disk that all machines share.
        """
        if self.n == 1:
            return compute()
        local_rank = int(os.environ["LOCAL_RANK"])
        first = self.rank - local_rank if of_machine else 0
        values = [None] * self.n
        dist.all_gather_object(values, compute() if self.rank == first else None)
        return values[first]

    def sum(self, values: dict[str, float | Tensor], device: torch.device) -> dict[str, Tensor]:
        """Each value summed over the ranks, on the device, without waiting for it."""
        full = functools.partial(torch.full, (), dtype=torch.float32, device=device)
        sums = torch.stack([v if isinstance(v, Tensor) else full(v) for v in values.values()])
        self.sum_in_place(sums)
        return dict(zip(values, sums.unbind(), strict=True))

    def sum_in_place(self, values: Tensor) -> None:
        """The same of a tensor."""
        if self.n > 1:
            dist.all_reduce(values)

    def share_weights(self, model: nn.Module) -> None:
        """Give all ranks the weights of the first, whatever their machines computed."""
        for parameter in model.parameters() if self.n > 1 else ():
            dist.broadcast(parameter.data, 0)


def join_ranks(device: torch.device) -> Ranks:
    """Under torchrun, connect the processes of the run; UserError if its variables are wrong."""
    if not under_torchrun():
        if stray := [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]:
            print(f"one rank: {' and '.join(stray)} without the other variables of torchrun")
        return Ranks(0, 1)
    variables = " ".join(f"{name}={os.environ[name]}" for name in TORCHRUN)
    try:
        if not 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
            raise ValueError("no such rank")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # the others wait while the first one tokenizes a large corpus
        timeout = datetime.timedelta(days=1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{variables}: {first_line(error)}; torchrun sets them") from None
    atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size())


def start_reading(values: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
    """Copy values to the CPU; the function that is returned waits for this copy alone, and not for
    what the GPU is given to do afterwards."""
    copies = torch.stack(list(values.values()))
    copied = torch.cuda.Event() if copies.is_cuda else None
    copies = copies.to("cpu", non_blocking=copies.is_cuda)
    if copied:
        copied.record()

    def read() -> dict[str, float]:
        if copied:
            copied.synchronize()
        return dict(zip(values, copies.tolist(), strict=True))

    return read


def own_stream(device: torch.device) -> AbstractContextManager:
    """A context in which a GPU works on a stream of its own, because CUDA graphs are not recorded
    on the default one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect STOP_SIGNALS in a list, so that a run can end after the current step."""
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # the others get no signals
    handlers = {
        name: signal.signal(name, lambda signal_number, _: received.append(signal_number))
        for name in (STOP_SIGNALS if is_main else [])
    }
    try:
        yield received
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def exit_code(signals: list[int]) -> int:
    """128 + the signal of `collect_signals`, or SIGTERM if it has reached another rank only."""
    return 128 + (signals[0] if signals else STOP_SIGNALS[-1])


def cpu_name() -> str:
    """The model of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def set_steps(args: argparse.Namespace, device: torch.device) -> str:
    """Set --steps, and --micro-batch-tokens where it is not set; returns the reason in a line.

    The default is a number of steps and not of seconds, so that runs repeat.
    """
    preset = args.preset or "tiny"  # --model has no preset
    if preset not in STEPS:
        raise UserError(f"--preset {preset} has no default number of steps: give --steps")
    args.steps = STEPS[preset]
    n_tokens = MICRO_BATCH_TOKENS
    reason = f"the default of {preset}"
    if preset == "tiny" and device.type == "cpu":
        features = torch.cpu.get_capabilities()
        rows = [row for row in TINY_ON_CPU if row[0] == args.dtype and features.get(row[1])]
        _, feature, args.steps, n_tokens = rows[0] if rows else TINY_ON_SLOW_CPU
        reason += f", in {args.dtype} on a CPU with {feature}"
    args.micro_batch_tokens = args.micro_batch_tokens or n_tokens
    return f"{args.steps} steps of {args.micro_batch_tokens:,} tokens: {reason}"


def check_memory(config: Config, device: torch.device) -> None:
    """Raise UserError if weights, gradients and two optimizer states exceed the memory."""
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # Windows
        return
    in_block = 4 * config.d_model**2 + (3 if config.is_modern else 2) * config.d_model * config.d_ff
    n_bytes = 16 * (config.vocab_size * config.d_model + config.n_layers * in_block)
    if n_bytes > available:
        sizes = f"needs {n_bytes / 1e9:,.0f} GB of memory, and there are {available / 1e9:,.0f}"
        raise UserError(f"the model {sizes}: choose fewer --layers or a smaller --d-model")


def compile_blocks(blocks: Iterable[nn.Module], device: torch.device, log: Callable) -> None:
    """Compile blocks in place, so that all names stay, where torch.compile works."""
    problem = compiler_problem(device)
    if problem:
        log(f"torch.compile does not work here: {problem}: continuing without it")
        return
    # of all blocks together, which share their code: a few shapes each, in training and validation
    torch._dynamo.config.recompile_limit = 64
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

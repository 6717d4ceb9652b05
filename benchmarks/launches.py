"""Count what a training step launches on a GPU, and prove that it never waits for one.

The step runs on tensors that have shapes but no values (torch's FakeTensorMode): any code that asks
for a value raises. The Triton kernels are counted instead of run.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.attention
import kernels.cross_entropy
import kernels.dispatch
import kernels.geglu
import kernels.norm
import model
import train
from data import Batch
from files.machine import Ranks
from optim import flatten_gradients, make_optimizers, set_learning_rates, update_weights

MODULES = (kernels.attention, kernels.cross_entropy, kernels.geglu, kernels.norm)
# Names of operations that launch nothing.
NO_LAUNCH = ("empty", "view", "detach", "prim.", "promote_types", "profiler.")


class LaunchCounter(TorchDispatchMode):
    """Counts the operations of torch that are more than another view of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(operation)
        self.counts[name] += not (operation.is_view or any(part in name for part in NO_LAUNCH))
        return operation(*args, **(kwargs or {}))


class CountedKernel:
    """Takes the place of a Triton kernel."""

    def __init__(self, name: str, counts: Counter):
        self.name = name
        self.counts = counts

    def __getitem__(self, grid: Any) -> Callable:
        return lambda *arguments, **options: self.counts.update([self.name])


def count_launches(config: model.Config, batch: Batch) -> dict[str, Counter]:
    """{part of the step: {operation: number of its launches}} of a step in bfloat16."""
    parts = {"forward and backward": LaunchCounter(), "optimizers": LaunchCounter()}
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name, value in vars(module).items():
                if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                    kernel = CountedKernel(name, parts["forward and backward"].counts)
                    stack.enter_context(mock.patch.object(module, name, kernel))
        stack.enter_context(mock.patch.object(kernels.dispatch, "FORCED", "triton"))
        stack.enter_context(mock.patch.object(model, "draw_seed", lambda: 0))
        stack.enter_context(mock.patch.object(model, "init_weights", lambda *_: None))
        # the chunks of a GPU, which fake tensors of a CPU would not get
        gpu_chunk = kernels.cross_entropy.GPU_CHUNK_LOGITS
        stack.enter_context(mock.patch.object(kernels.cross_entropy, "CHUNK_LOGITS", gpu_chunk))
        # without its cache, which would give the tables of this step to real ones
        uncached = kernels.attention.rope_tables.__wrapped__
        stack.enter_context(mock.patch.object(model, "rope_tables", uncached))
        fake = stack.enter_context(FakeTensorMode())
        batch = Batch(*(fake.from_tensor(x) if torch.is_tensor(x) else x for x in batch))
        network = model.MaskedLM(config)
        optimizers = make_optimizers(network, 0.02, 1e-3, 1e-3, torch.bfloat16)
        gradients = flatten_gradients(network)
        autocast = torch.autocast("cpu", torch.bfloat16)
        scaler = torch.amp.GradScaler("cpu", enabled=False)

        for step in range(2):  # the first one also makes the state of the optimizers
            for part in parts.values():
                part.counts.clear()
            set_learning_rates(optimizers, step, 2, 0.1)
            counts = Ranks(0, 1).sum(train.total_counts([batch]), batch.ids.device)
            with parts["forward and backward"]:
                losses = train.add_gradients(network, autocast, scaler, batch, counts)
                loss = train.weighted_sum(losses)
            with parts["optimizers"]:
                update_weights(optimizers, scaler, gradients, 1.0, loss)
    return {name: +part.counts for name, part in parts.items()}

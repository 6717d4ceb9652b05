"""Calls of a function as CUDA graphs: recorded once for each shape of its inputs, then replayed.

A step of a small model is hundreds of kernels that a GPU runs faster than Python launches them. A
recording is launched at once.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kernels import dispatch
from kernels.attention import FLASH_HEAD_DIMS

WARM_UP = 3  # calls of a shape before its recording: Triton compiles, optimizers create their state
MAX_RECORDINGS = 64


def can_record(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether steps never wait for a GPU, as torch's attention and the scaler of float16 do."""
    is_triton = dispatch.triton is not None and dispatch.FORCED != "torch"
    has_kernel = is_triton and head_dim in FLASH_HEAD_DIMS
    return device.type == "cuda" and dtype != torch.float16 and has_kernel


def pad_sequences(cu_seqlens: Tensor) -> Tensor:
    """Add empty sequences up to a power of 2, so that batches have few shapes."""
    n_sequences = len(cu_seqlens) - 1
    n_padded = 2 ** max(6, (n_sequences - 1).bit_length())
    return torch.cat((cu_seqlens, cu_seqlens[-1:].expand(n_padded - n_sequences)))


class Recorded:
    """A function on a GPU whose calls are recorded and replayed; elsewhere the function itself.

    The function may read and change tensors that live as long as this object, but must not wait for
    the GPU. One that cannot be recorded is called as it is, after a line that says why; a call of a
    rare shape is not recorded either, without a line.

    Args:
        is_enabled: CLOZE_GRAPHS=0 overrides it.
        log: prints a line.
        function: takes tensors, numbers, and tuples of them with names. Plain tuples, such as the
            key of a batch from which random numbers are drawn, differ between the calls of one
            recording, and are None while it is made.
        arguments: the first ones of each call, which never change.
    """

    def __init__(
        self,
        is_enabled: bool,
        log: Callable[[str], None],
        function: Callable[..., Any],
        *arguments: Any,
    ):
        self.is_enabled = is_enabled and os.environ.get("CLOZE_GRAPHS") != "0"
        self.log = log
        self.function = functools.partial(function, *arguments)
        self.n_calls: Counter = Counter()
        self.recordings: dict[tuple, tuple] = {}  # (graph, its inputs, its outputs)
        self.pool = torch.cuda.graph_pool_handle() if self.is_enabled else None

    def __call__(self, *inputs: Any) -> Any:
        if not self.is_enabled:
            return self.function(*inputs)
        leaves, structure = tree_flatten(list(inputs), is_leaf=lambda x: type(x) is tuple)
        shape = tuple(_shape(leaf) for leaf in leaves)
        self.n_calls[shape] += 1
        if shape not in self.recordings:
            if self.n_calls[shape] <= WARM_UP or len(self.recordings) == MAX_RECORDINGS:
                return self.function(*inputs)
            if not self._record(shape, leaves, structure):
                return self.function(*inputs)

        graph, own_inputs, outputs = self.recordings[shape]
        for own_input, leaf in zip(own_inputs, leaves, strict=True):
            if isinstance(leaf, Tensor):
                own_input.copy_(leaf, non_blocking=True)
        graph.replay()
        # copies: the next replay overwrites them, of another recording too, which shares the pool
        return tree_map(torch.clone, outputs)

    def _record(self, shape: tuple, leaves: list, structure: Any) -> bool:
        """Record the function on copies of the inputs, without running it; whether it worked."""
        own_inputs = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        own_inputs = [None if type(x) is tuple else x for x in own_inputs]
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate memory meanwhile; the stream is that of the calls before, on
        # which autograd accumulates the gradients
        settings = {"stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, pool=self.pool, **settings):
                outputs = self.function(*tree_unflatten(own_inputs, structure))
        except Exception as error:  # of CUDA, of Triton, or of the function
            self.is_enabled = False
            self.recordings.clear()  # and their memory, which may have been what was missing
            cause = error.__context__ or error  # ending a recording that failed raises another
            reason = str(cause).partition("\n")[0]
            self.log(f"CUDA graphs are not used: {type(cause).__name__}: {reason}")
            return False
        self.recordings[shape] = (graph, own_inputs, outputs)
        return True


def _shape(leaf: Any) -> Any:
    """What all calls of one recording have in common."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return None if type(leaf) is tuple else leaf

"""The training steps that bench.py compares: ours, and those of the reference implementations."""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune
import labels
import train
from benchmarks import references
from benchmarks.timing import Call, Hardware
from data import Batch, Corpus
from files.machine import Ranks, compile_blocks
from files.threads import compute_ahead
from files.token_cache import prepare
from kernels.graphs import Recorded
from model import Classifier, Config, MaskedLM, preset
from optim import flatten_gradients, make_optimizers, set_learning_rates, update_weights

# The comparison is fixed, whatever the presets become.
VOCAB_SIZE = 8192
MASK_RATE = 0.22
MAX_LEN = 256
BATCH_TOKENS = 8192
BATCH_SIZE = 32  # examples of a fine-tuning step


def config_of(shape: str, vocab_size: int = VOCAB_SIZE, max_len: int = MAX_LEN) -> Config:
    """The config of a shape: layers x d_model."""
    n_layers, d_model = map(int, shape.split("x"))
    sizes = {"n_layers": n_layers, "d_model": d_model}
    return preset("tiny", vocab_size=vocab_size, max_len=max_len, **sizes)


def open_corpus(n_tokens: int = BATCH_TOKENS) -> Corpus:
    return Corpus(prepare([], VOCAB_SIZE), MAX_LEN, n_tokens, seed=0)


def pretraining_batches(hardware: Hardware, n_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Endless batches of the default corpus, made ahead as in train.py."""
    corpus = open_corpus(n_tokens)  # at once, and not with the first batch
    made = compute_ahead(lambda step: corpus.batch(step, 0, 1, MASK_RATE), itertools.count())
    return (batch.to(hardware.device) for _, batch in made)


def training_step(model: nn.Module, next_loss: Callable[[], Tensor], hardware: Hardware) -> Call:
    """The training step of the others, with AdamW; `next_loss` makes the batch too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with hardware.autocast():
            loss = next_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step(
    config: Config,
    hardware: Hardware,
    compiled: bool = False,
    batches: Iterator[Batch] | None = None,
    uses_graphs: bool = False,
) -> Call:
    """The pretraining step of train.py, Muon included, by default on the default corpus."""
    model = MaskedLM(config).to(hardware.device)
    if compiled:
        compile_blocks(model.model.layers, hardware.device, print)
    optimizers = make_optimizers(model, 1e-3, 1e-4, 1e-4, hardware.dtype)
    gradients = flatten_gradients(model)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=False)
    settings = (model, hardware.autocast(), scaler)
    forward_backward = Recorded(uses_graphs, print, train.add_gradients, *settings)
    update = Recorded(uses_graphs, print, update_weights, optimizers, scaler, gradients, 1.0)
    batches = batches or pretraining_batches(hardware)

    def step() -> Tensor:
        batch = next(batches)
        set_learning_rates(optimizers, step=1, n_steps=2, warmup=0.0)
        counts = Ranks(0, 1).sum(train.total_counts([batch]), hardware.device)
        loss = train.weighted_sum(forward_backward(batch, counts))
        update(loss)
        return loss

    return step


def reference_step(
    name: str,
    config: Config,
    attention: str,
    hardware: Hardware,
    compiled: bool = False,
    inputs: Iterator[dict[str, Tensor]] | None = None,
) -> Call:
    """The step of a reference implementation, by default on the same batches, padded."""
    model = references.build(name, config, attention).to(hardware.device)
    if compiled:
        model.compile(dynamic=True)
    inputs = inputs or map(references.padded_inputs, pretraining_batches(hardware))

    def next_loss() -> Tensor:
        return model(**next(inputs)).loss

    return training_step(model, next_loss, hardware)


def finetuning_step(
    model: nn.Module,
    rows: list[np.ndarray],
    targets: Tensor,
    hardware: Hardware,
    pad_to: int | None = None,
    uses_graphs: bool = False,
) -> Call:
    """A step of ours, or, with `pad_to`, of a model that takes batches of that length or more."""
    model.to(hardware.device)
    order = np.tile(np.arange(len(rows)), 1000)
    batches = labels.batches(rows, order, BATCH_SIZE, hardware.device)
    if pad_to is None:
        return _our_finetuning_step(model, batches, targets, hardware, uses_graphs)

    def next_loss() -> Tensor:
        indices, inputs = next(batches)
        ids = references.pad(*inputs[:2], at_least=pad_to)[:BATCH_SIZE]
        logits = model(input_ids=ids, attention_mask=ids != 0).logits
        return F.cross_entropy(logits, targets[indices].to(hardware.device))

    return training_step(model, next_loss, hardware)


def _our_finetuning_step(
    model: Classifier, batches: Iterator, targets: Tensor, hardware: Hardware, uses_graphs: bool
) -> Call:
    """The step of finetune.py."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)]
    gradients = flatten_gradients(model)
    scaler = torch.amp.GradScaler(hardware.device.type, enabled=False)
    settings = (model, hardware.autocast(), scaler, None)
    forward_backward = Recorded(uses_graphs, print, finetune.add_gradients, *settings)
    model.train()

    def step() -> None:
        set_learning_rates(optimizers, step=1, n_steps=2, warmup=0.0)
        indices, inputs = next(batches)
        n_targets = torch.tensor(len(indices), device=hardware.device)
        expected = targets[indices].to(hardware.device)
        loss = forward_backward(expected, n_targets, *inputs)
        float(update_weights(optimizers, scaler, gradients, 1.0, loss))

    return step


def model_flops(config: Config, batch: Batch) -> int:
    """FLOPs of the matrix multiplications of a forward and a backward pass, without any optimizer.

    The backward pass has twice those of the forward pass; what a kernel computes again does not
    count. The last layer multiplies masked tokens only after its attention.
    """
    d_model = config.d_model
    n_maps = 3 if config.is_modern else 2  # of the MLP
    pairs = int(batch.cu_seqlens.diff().long().square().sum())  # of tokens in a sequence
    n_tokens = len(batch.ids)
    n_masked = len(batch.masked)
    rows = n_tokens * (config.n_layers - 1) + n_masked  # after attention, in all layers
    qkv = config.n_layers * n_tokens * 3 * d_model**2
    attention = config.n_layers * pairs * 2 * d_model
    mlp = rows * (d_model**2 + n_maps * d_model * config.d_ff)
    head = n_masked * (d_model**2 + d_model * config.vocab_size)
    return 3 * 2 * (qkv + attention + mlp + head)

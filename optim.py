"""Muon for the matrices, AdamW for the rest, the learning-rate schedule, and steps not to be taken."""

import inspect
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# Fused matrices are several linear maps side by side; each is orthogonalised apart.
FUSED_BLOCKS = {"Wqkv": 3, "Wi": 2}
# Coefficients of the quintic Newton-Schulz iteration, chosen for slope at zero (Jordan et al. 2024, "Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
PATIENCE = 5  # bad steps in a row: a single bad batch passes, weights that are lost do not
RECENT = 100  # losses that a spike is measured against
LEAST_RECENT = 20


def orthogonalize(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Push the singular values of each of (n, rows, columns), rows <= columns, towards 1, in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x


class WithoutCompiler:
    """Methods of torch's optimizers without what is wrapped around them: it imports the compiler, seconds of
    every start, to tell it to leave them alone."""

    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.Optimizer, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    )


class AdamW(WithoutCompiler, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(WithoutCompiler, torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A block of (rows, columns) moves by lr * sqrt(max(1, rows / columns)) times an orthogonal matrix, so that
    the learning rate is the size of the step in spectral norm, whatever the width. Blocks of equal shape are
    orthogonalised together. `dtype` is that of the products: bfloat16 where the hardware multiplies it
    natively.
    """

    def __init__(self, groups: list[dict], lr: float, dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "n_blocks": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])
                blocks = (parameter.chunk(group["n_blocks"]), nesterov.chunk(group["n_blocks"]))
                for weight, update in zip(*blocks, strict=True):
                    rows, columns = weight.shape
                    scale = group["lr"] * max(1, rows / columns) ** 0.5
                    if rows > columns:
                        weight, update = weight.T, update.T
                    by_shape.setdefault(tuple(weight.shape), []).append((weight, update, scale))
        for members in by_shape.values():
            updates = orthogonalize(torch.stack([update for _, update, _ in members]), self.dtype)
            for (weight, _, scale), update in zip(members, updates, strict=True):
                weight.add_(update.to(weight.dtype), alpha=-scale)


def make_optimizers(
    model: nn.Module, rates: tuple[float, float, float], weight_decay: float, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and the head; AdamW for embedding, norms and biases, where a row or
    a number has a meaning of its own that orthogonalising would mix. `rates` are Muon's, of norms and biases,
    and the embedding's, which alone decays. Where Muon's is 0, AdamW takes the matrices too."""
    lr_muon, lr_adamw, lr_embedding = rates
    fused = FUSED_BLOCKS if model.config.is_modern else FUSED_BLOCKS | {"Wi": 1}  # BERT's has no gate
    matrices: dict[int, list[nn.Parameter]] = {}
    embeddings, vectors = [], []
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        if parameter.dim() == 1:
            vectors.append(parameter)
        elif "embeddings" in name:
            embeddings.append(parameter)
        else:
            matrices.setdefault(fused.get(name.split(".")[-2], 1), []).append(parameter)
    muon = [Muon([{"params": p, "n_blocks": n} for n, p in matrices.items()], lr_muon, dtype)]
    if not lr_muon:
        muon, vectors = [], vectors + [parameter for members in matrices.values() for parameter in members]
    groups = [
        {"params": embeddings, "lr": lr_embedding, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [*muon, AdamW(groups, lr=lr_adamw, betas=(0.9, 0.98), eps=1e-8, fused=True)]


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], step: int, n_steps: int, warmup: float
) -> float:
    """Linear warm-up over the first share of the steps, then linearly to zero (the linear end beats the
    cosine: Bergsma et al. 2025, arXiv 2502.15938). Returns the factor on each group's peak rate."""
    n_warmup = max(1, round(warmup * n_steps))
    factor = min((step + 1) / n_warmup, (n_steps - step) / max(1, n_steps - n_warmup), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor
    return factor


class ParameterGroups(NamedTuple):
    embeddings: list
    matrices: list
    no_decay: list


def parameter_groups(model):
    groups = ParameterGroups([], [], [])
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            groups.no_decay.append(parameter)
        elif "embeddings" in name:
            groups.embeddings.append(parameter)
        else:
            groups.matrices.append(parameter)
    return groups


class StepMonitor:
    def __init__(self, patience):
        self.health = new_health(False) | {"patience": patience}

    def check(self, loss, grad_norm):
        return judge(self.health, loss, grad_norm)

    @property
    def skip(self):
        return self.health["in_row"] > 0

    @property
    def gave_up(self):
        return self.health["in_row"] >= self.health["patience"]

    def state_dict(self):
        return self.health

    def load_state_dict(self, state):
        self.health = state


def new_health(has_scaler: bool) -> dict[str, Any]:
    """What `judge` remembers of a run; saved with it, so that a resumed one judges alike. Of float16 the
    scaler begins at 2**16, and halves that at each bad step until the gradients fit."""
    return {"losses": [], "spikes": 0, "skipped": 0, "in_row": 0, "patience": PATIENCE + 16 * has_scaler}


def judge(health: dict[str, Any], loss: float, grad_norm: float) -> str:
    """Count a step that must be skipped (health["in_row"] > 0 then), or a spike of the loss; returns what is
    to be said of it, which mostly is nothing.

    A spike is more than 6 standard deviations above the mean of the last losses, which the noise of batches
    does not reach in a million steps, and more than 0.1 nats, for losses that hardly vary.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        health["skipped"] += 1
        health["in_row"] += 1
        return f"loss {loss}, length of the gradient {grad_norm}: skipped"
    recent = health["losses"]
    limit = np.mean(recent) + max(6 * np.std(recent), 0.1) if len(recent) >= LEAST_RECENT else math.inf
    health["in_row"], health["losses"] = 0, [*recent[1 - RECENT :], loss]
    if loss <= limit:
        return ""
    health["spikes"] += 1
    return f"the loss leapt to {loss:.3f}, from {np.mean(recent):.3f} in the steps before"

"""Muon for matrices, AdamW for everything else, and the learning-rate schedule."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration, chosen for its slope at zero (Jordan et al.
# 2024, https://kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, n_iterations: int = 5) -> Tensor:
    """Move the singular values of each matrix towards 1 by Newton-Schulz iteration.

    Args:
        matrices: (n, rows, columns) with rows <= columns.
        dtype: of the matrix multiplications and of the result.
    """
    a, b, c = NEWTON_SCHULZ
    # normalized before the cast: small gradients would underflow in float16
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(dtype)
    for _ in range(n_iterations):
        gram = x @ x.transpose(-1, -2)  # (n, rows, rows)
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A matrix of (rows, columns) moves by lr * sqrt(max(1, rows / columns)) times an orthogonal
    matrix: this factor makes one learning rate fit matrices of all shapes. Matrices of equal shape
    are orthogonalized together.

    Args:
        groups: parameter groups; "n_maps" of a group says how many blocks of rows of each matrix
            are linear maps of their own (see model.FusedLinear).
        dtype: of the matrix multiplications; bfloat16 where the hardware supports it natively.
    """

    def __init__(self, groups: list[dict], lr: float, dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "n_maps": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        by_shape = defaultdict(list)  # of (weight, update, learning rate), with rows <= columns
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])

                weights = parameter.chunk(group["n_maps"])
                updates = nesterov.chunk(group["n_maps"])
                for weight, update in zip(weights, updates, strict=True):
                    rows, columns = weight.shape
                    lr = group["lr"] * max(1, rows / columns) ** 0.5
                    if rows > columns:
                        weight, update = weight.T, update.T
                    by_shape[weight.shape].append((weight, update, lr))

        for matrices in by_shape.values():
            updates = torch.stack([update for _, update, _ in matrices])
            updates = orthogonalize(updates, self.dtype)
            for (weight, _, lr), update in zip(matrices, updates, strict=True):
                weight.add_(update.to(weight.dtype), alpha=-lr)


def parameter_groups(model: nn.Module) -> tuple[list, list, list]:
    """The trainable parameters: (matrices, tables of nn.Embedding, norms and biases).

    Raises:
        ValueError: a parameter with more than two axes, for which there is no rule.
    """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, embeddings, no_decay = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() > 2:
            raise ValueError(f"{name}: parameter_groups has no rule for {parameter.dim()} axes")
        if parameter in tables:
            embeddings.append(parameter)
        else:
            (matrices if parameter.dim() == 2 else no_decay).append(parameter)
    return matrices, embeddings, no_decay


def make_optimizers(
    model: nn.Module, lr_muon: float, lr_adamw: float, lr_embedding: float, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Muon for matrices (AdamW if `lr_muon` is 0); AdamW for the rest, in which a row or a number
    has a meaning of its own that orthogonalization would mix with others.
    """
    matrices, embeddings, no_decay = parameter_groups(model)
    adamw_groups = [{"params": embeddings, "lr": lr_embedding}, {"params": no_decay}]
    optimizers = []
    if lr_muon:
        n_maps = {m.weight: m.n_maps for m in model.modules() if hasattr(m, "n_maps")}
        muon_groups = [{"params": [m], "n_maps": n_maps.get(m, 1)} for m in matrices]
        optimizers.append(Muon(muon_groups, lr_muon, dtype))
    else:
        adamw_groups.append({"params": matrices})
    adamw = torch.optim.AdamW(adamw_groups, lr_adamw, (0.9, 0.98), weight_decay=0.0, fused=True)
    return [*optimizers, adamw]


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients if their joint norm exceeds `max_norm`, and return the norm before.

    The squares are added exactly, so that parameters whose gradients are zero change no bit: torch
    rounds the sums of groups, and more parameters make other groups. A `max_norm` of 0 is no
    clipping.
    """
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    total = math.sqrt(math.fsum(norm * norm for norm in norms.tolist()))
    max_norm = max_norm or math.inf
    nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, torch.tensor(total))
    return total


def set_learning_rates(
    optimizers: list[torch.optim.Optimizer], step: int, n_steps: int, warmup: float
) -> float:
    """Linear warm-up over a share of the steps, then linear decay to zero, which beats a cosine
    (Bergsma et al. 2025, arXiv 2502.15938). The first "lr" of each group is its peak.

    Returns:
        The factor on the peak learning rates.
    """
    n_warmup = max(1, round(warmup * n_steps))
    rising = (step + 1) / n_warmup
    falling = (n_steps - step) / max(1, n_steps - n_warmup)
    factor = min(rising, falling, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            peak = group.setdefault("peak_lr", group["lr"])
            group["lr"] = peak * factor
    return factor

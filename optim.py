"""Muon for matrices, AdamW for everything else, clipping, and the learning-rate schedule.

What differs between steps is a tensor on the device, learning rates too, and nothing is read back:
on a GPU the whole step can be recorded (kernels/graphs.py), and never waits for Python.
"""

from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration, chosen for its slope at zero (Jordan et al.
# 2024, https://kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, dtype: torch.dtype, n_iterations: int = 5) -> Tensor:
    """Move the singular values of each matrix towards 1 by Newton-Schulz iteration.

    Args:
        matrices: (n, rows, columns).
        dtype: of the matrix multiplications and of the result.
    """
    a, b, c = NEWTON_SCHULZ
    # normalized before the cast: small gradients would underflow in float16
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    for _ in range(n_iterations):
        gram = x.mT @ x if is_tall else x @ x.mT  # (n, m, m), m the smaller of rows and columns
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factors = (x, polynomial) if is_tall else (polynomial, x)
        x = torch.baddbmm(x, *factors, beta=a)
    return x


def orthogonalize_on_ranks(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The same; each of several ranks computes its share, and all gather the results."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return orthogonalize(matrices, dtype)
    n_ranks = dist.get_world_size()
    n_padded = -(-len(matrices) // n_ranks) * n_ranks
    padded = F.pad(matrices, (0, 0, 0, 0, 0, n_padded - len(matrices)))
    share = orthogonalize(padded.chunk(n_ranks)[dist.get_rank()], dtype)
    result = share.new_empty(padded.shape)
    dist.all_gather_into_tensor(result, share)
    return result[: len(matrices)]


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    A matrix of (rows, columns) moves by lr * sqrt(max(1, rows / columns)) times an orthogonal
    matrix: this factor makes one learning rate fit matrices of all shapes. Matrices of equal shape
    are orthogonalized together.

    Args:
        matrices: the parameters.
        lr: the peak learning rate.
        dtype: of the matrix multiplications; bfloat16 where the hardware supports it natively.
        n_maps: how many blocks of rows of a matrix are linear maps of their own, by default 1 (see
            model.FusedLinear).
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        lr: float,
        dtype: torch.dtype,
        momentum: float = 0.95,
        n_maps: dict[nn.Parameter, int] | None = None,
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self.dtype = dtype
        self.n_maps = n_maps or {}
        self.found_inf = torch.zeros(())  # 1 in a step that must change no weight

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups  # one rate for all, as equal shapes are stacked
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices]
        momenta = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])

        by_shape = defaultdict(list)  # of (map, its update)
        for matrix, update in zip(matrices, nesterov, strict=True):
            n_maps = self.n_maps.get(matrix, 1)
            for pair in zip(matrix.chunk(n_maps), update.chunk(n_maps), strict=True):
                by_shape[pair[0].shape].append(pair)

        lr = group["lr"] * (1 - self.found_inf)
        for (rows, columns), pairs in by_shape.items():
            maps, updates = zip(*pairs, strict=True)
            updates = orthogonalize_on_ranks(torch.stack(updates), self.dtype)
            updates = updates.to(maps[0].dtype) * (lr * max(1, rows / columns) ** 0.5)
            torch._foreach_sub_(maps, updates.unbind())


def parameter_groups(model: nn.Module) -> tuple[list, list, list]:
    """The trainable parameters: (those of two axes, tables of nn.Embedding, norms and biases).

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
        optimizers.append(Muon(matrices, lr_muon, dtype, n_maps=n_maps))
    else:
        adamw_groups.append({"params": matrices})
    adamw = torch.optim.AdamW(adamw_groups, lr_adamw, (0.9, 0.98), weight_decay=0.0, fused=True)
    return [*optimizers, adamw]


def flatten_gradients(model: nn.Module) -> Tensor:
    """Make the gradients of a model the parts of one tensor, and return it, all zero.

    One operation on it clips, clears or sums over the ranks what would take one per parameter.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    flat = parameters[0].new_zeros(sum(sizes))
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def clip_gradients(gradients: Tensor, max_norm: float) -> Tensor:
    """Scale gradients whose norm exceeds `max_norm`, and return the norm before, in float32.

    Those whose norm is not finite become zero. A `max_norm` of 0 is no clipping. The squares are
    added in float64, so that parameters whose gradients are zero change no bit of the norm.
    """
    exact = torch.float32 if gradients.device.type == "mps" else torch.float64  # which MPS lacks
    norm = torch.linalg.vector_norm(gradients, dtype=exact).float()
    if max_norm:
        gradients *= (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients.masked_fill_(~norm.isfinite(), 0.0)
    return norm


def update_weights(
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    gradients: Tensor,
    max_norm: float,
    loss: Tensor,
) -> Tensor:
    """Clip the gradients, make a step of all optimizers, and clear the gradients.

    If the loss or the norm is not finite, no weight changes: Muon and optimizers with `fused=True`
    obey `found_inf`.

    Args:
        gradients: what `flatten_gradients` returned.
        max_norm: as of `clip_gradients`.
        loss: of the whole step, on all ranks alike.

    Returns:
        The norm of the gradients before they were clipped.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = clip_gradients(gradients, max_norm)
    found_inf = 1.0 - (loss + norm).isfinite().float()
    for optimizer in optimizers:
        optimizer.found_inf = found_inf  # as a GradScaler tells fused optimizers to skip a step
        # an enabled scaler judges each optimizer's gradients apart, and MPS ignores `found_inf`
        if not ((scaler.is_enabled() or loss.device.type == "mps") and found_inf):
            scaler.step(optimizer)
    scaler.update()
    gradients.zero_()
    return norm


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
    groups = [(group, optimizer) for optimizer in optimizers for group in optimizer.param_groups]
    for group, optimizer in groups:
        peak = group.setdefault("peak_lr", group["lr"])
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        if not isinstance(group["lr"], Tensor) or group["lr"].device != device:
            group["lr"] = torch.zeros((), device=device)  # a recorded step reads this tensor
            if "capturable" in group:  # of a checkpoint from another device
                group["capturable"] = group["lr"].is_cuda
                # torch would warn of the steps before one is recorded
                optimizer._warned_capturable_if_run_uncaptured = True
        group["lr"].fill_(peak * factor)
    return factor

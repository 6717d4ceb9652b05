"""Muon against singular value decompositions in float64, the parameter groups, the schedule."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Classifier, Config, MaskedLM
from optim import Muon, make_optimizers, orthogonalize, set_learning_rates

CONFIG = Config(vocab_size=60, d_model=16, n_layers=3, n_heads=2, d_ff=24, max_len=32)


def plain_orthogonalize(matrix):
    """The quintic polynomial, five times, on the singular values of the matrix divided by its norm."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((1, 1), (1, 50), (16, 16), (20, 60), (64, 64), (32, 512)))
def test_orthogonalize_brings_singular_values_near_1(dtype, shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(6, *shape, dtype=torch.float64), full_matrices=False)
    s = s.clamp(min=0.05 * s.amax())  # square ones have values near 0, which no iteration brings to 1
    found = orthogonalize(u * s[:, None] @ v * 1000, dtype)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.5 and values.max() < 1.5


def test_without_a_rate_of_muon_adamw_takes_every_weight():
    model = MaskedLM(CONFIG)
    (adamw,) = make_optimizers(model, (0.0, 1e-3, 1e-3), 0.1, torch.float32)
    taken = [p for group in adamw.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken)) and set(taken) == set(model.parameters())


def test_muon_updates_each_block_apart():
    """Two steps by hand: Nesterov's momentum, then Q, K and V, or the halves of Wi, each orthogonalised."""
    torch.manual_seed(0)
    shapes = {(24, 8): 3, (16, 8): 2, (8, 20): 1, (40, 10): 2, (8, 8): 1}  # blocks: square, wide, tall
    parameters = {
        n: [torch.nn.Parameter(torch.randn(s)) for s, m in shapes.items() if m == n] for n in (1, 2, 3)
    }
    muon = Muon([{"params": p, "n_blocks": n} for n, p in parameters.items()], lr=0.1, dtype=torch.float32)
    every = [(p, n) for n, group in parameters.items() for p in group]
    expected = [p.detach().double() for p, _ in every]
    momenta = [torch.zeros_like(x) for x in expected]
    for _ in range(2):
        for i, (parameter, n_blocks) in enumerate(every):
            parameter.grad = torch.randn_like(parameter)
            momenta[i] = 0.95 * momenta[i] + 0.05 * parameter.grad
            nesterov = 0.05 * parameter.grad + 0.95 * momenta[i]
            rows, columns = len(parameter) // n_blocks, parameter.shape[1]
            step = torch.cat([plain_orthogonalize(block) for block in nesterov.split(rows)])
            expected[i] = expected[i] - 0.1 * max(1, rows / columns) ** 0.5 * step
        muon.step()
    for (parameter, _), value in zip(every, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", (MaskedLM, lambda config: Classifier(config, 3)))
def test_groups_part_all_parameters(make):
    """Each parameter in exactly one group; Q, K and V are three blocks, Wi two; only the embedding decays."""
    model = make(CONFIG)
    muon, adamw = make_optimizers(model, (0.02, 3e-3, 1e-3), 0.1, torch.float32)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [
        (names[id(parameter)], optimizer, group)
        for optimizer in (muon, adamw)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _, _ in grouped) == sorted(names.values())
    for name, optimizer, group in grouped:
        is_matrix = name.endswith(
            ("Wqkv.weight", "Wi.weight", "Wo.weight", "dense.weight", "classifier.weight")
        )
        assert optimizer is (muon if is_matrix else adamw), name
        if is_matrix:
            assert group["lr"] == 0.02
            assert group["n_blocks"] == (3 if "Wqkv" in name else 2 if "Wi" in name else 1), name
        else:
            found = group["lr"], group["weight_decay"]
            assert found == ((1e-3, 0.1) if "tok_embeddings" in name else (3e-3, 0.0)), name


@settings(deadline=None)
@given(n_steps=st.integers(1, 400), warmup=st.floats(0, 0.9))
def test_schedule_rises_to_1_and_falls_near_0(n_steps, warmup):
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([parameters[0]], lr=2.0), torch.optim.SGD([parameters[1]], lr=0.5)]
    factors = []
    for step in range(n_steps):
        factors.append(set_learning_rates(optimizers, step, n_steps, warmup))
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates == [2.0 * factors[-1], 0.5 * factors[-1]]
    peak = factors.index(max(factors))
    assert factors[peak] == 1
    assert peak == max(1, round(warmup * n_steps)) - 1
    assert all(a < b for a, b in pairwise(factors[: peak + 1]))
    assert all(a > b > 0 for a, b in pairwise(factors[peak + 1 :]))
    if n_steps - peak > 20:
        assert factors[-1] < 0.06

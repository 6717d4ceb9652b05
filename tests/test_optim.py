"""Muon against singular value decompositions in float64, the parameter groups, the schedule."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Classifier, Config, MaskedLM, Tagger
from optim import (
    Muon,
    clip_gradients,
    flatten_gradients,
    make_optimizers,
    orthogonalize,
    parameter_groups,
    set_learning_rates,
    update_weights,
)

CONFIG = Config(vocab_size=60, d_model=16, n_layers=3, n_heads=2, d_ff=24, max_len=32)


def plain_orthogonalize(matrix):
    """The quintic polynomial, five times, on the normalized singular values of the matrix."""
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
    s = s.clamp(min=0.05 * s.amax())  # no iteration brings the values near 0 of square ones to 1
    result = orthogonalize(u * s[:, None] @ v * 1000, dtype)
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("size", (1e-9, 1.0, 1e4))
def test_muon_moves_by_the_learning_rate_whatever_the_size_of_the_gradients(dtype, size):
    """Gradients of 1e-9 are zero in float16, and their squares are zero in float32."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(16, 24))
    muon = Muon([parameter], lr=0.1, dtype=dtype)
    parameter.grad = size * torch.randn(16, 24)
    muon.step()
    assert torch.isfinite(parameter).all()
    largest = float(torch.linalg.svdvals(parameter.detach())[0])
    assert largest == pytest.approx(0.1, rel=0.3)


def test_with_a_learning_rate_of_zero_for_muon_adamw_gets_every_parameter():
    model = MaskedLM(CONFIG)
    (adamw,) = make_optimizers(model, 0.0, 1e-3, 1e-3, torch.float32)
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    assert len(parameters) == len(set(parameters)) and set(parameters) == set(model.parameters())


def test_muon_orthogonalizes_each_map_of_a_matrix_by_itself():
    """Two steps by hand: Nesterov's momentum, then Q, K and V, or both halves of Wi."""
    torch.manual_seed(0)
    n_maps = {(24, 8): 3, (16, 8): 2, (8, 20): 1, (40, 10): 2, (8, 8): 1}  # square, wide and tall
    parameters = {torch.nn.Parameter(torch.randn(shape)): n for shape, n in n_maps.items()}
    muon = Muon(list(parameters), lr=0.1, dtype=torch.float32, n_maps=parameters)
    expected = [parameter.detach().double() for parameter in parameters]
    momenta = [torch.zeros_like(x) for x in expected]
    for _ in range(2):
        for i, (parameter, n) in enumerate(parameters.items()):
            parameter.grad = torch.randn_like(parameter)
            momenta[i] = 0.95 * momenta[i] + 0.05 * parameter.grad
            nesterov = 0.05 * parameter.grad + 0.95 * momenta[i]
            rows, columns = len(parameter) // n, parameter.shape[1]
            step = torch.cat([plain_orthogonalize(block) for block in nesterov.split(rows)])
            expected[i] = expected[i] - 0.1 * max(1, rows / columns) ** 0.5 * step
        muon.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-4, atol=1e-4)


MODELS = {
    "masked_lm": MaskedLM,
    "classifier": lambda config: Classifier(config, 3),
    "tagger": lambda config: Tagger(config, 3),
}
MATRICES = ("Wqkv.weight", "Wi.weight", "Wo.weight", "dense.weight", "classifier.weight")


@pytest.mark.parametrize("family", ("modern", "bert"))
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_each_parameter_is_in_one_group(make, family):
    """Q, K and V are three maps, the two halves of a GeGLU's Wi are two."""
    model = make(dataclasses.replace(CONFIG, family=family))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    groups = parameter_groups(model)
    assert sorted(names[id(p)] for group in groups for p in group) == sorted(names.values())

    muon, adamw = make_optimizers(model, 0.02, 3e-3, 1e-3, torch.float32)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    grouped = [
        (names[id(parameter)], optimizer, group)
        for optimizer in (muon, adamw)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(name for name, _, _ in grouped) == sorted(names.values())
    n_maps = {"Wqkv": 3, "Wi": 2 if family == "modern" else 1}
    for name, optimizer, group in grouped:
        is_matrix = name.endswith(MATRICES)
        assert optimizer is (muon if is_matrix else adamw), name
        if is_matrix:
            assert group["lr"] == 0.02
            parameter = model.get_parameter(name)
            assert muon.n_maps.get(parameter, 1) == n_maps.get(name.split(".")[-2], 1), name
        else:
            assert group["lr"] == (1e-3 if "_embeddings" in name else 3e-3), name
            assert group["weight_decay"] == 0.0


def test_a_parameter_without_a_rule_is_refused():
    model = MaskedLM(CONFIG)
    model.convolution = torch.nn.Conv1d(2, 2, 3)
    with pytest.raises(ValueError, match=r"convolution\.weight: .* 3 axes"):
        parameter_groups(model)


@settings(deadline=None)
@given(n_steps=st.integers(1, 400), warmup=st.floats(0, 0.9))
def test_schedule_rises_to_1_and_falls_near_0(n_steps, warmup):
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizers = [
        torch.optim.SGD([parameters[0]], lr=2.0),
        torch.optim.SGD([parameters[1]], lr=0.5),
    ]
    factors = []
    for step in range(n_steps):
        factors.append(set_learning_rates(optimizers, step, n_steps, warmup))
        rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert rates == pytest.approx([2.0 * factors[-1], 0.5 * factors[-1]])
    peak = factors.index(max(factors))
    assert factors[peak] == 1
    assert peak == max(1, round(warmup * n_steps)) - 1
    assert all(a < b for a, b in pairwise(factors[: peak + 1]))
    assert all(a > b > 0 for a, b in pairwise(factors[peak + 1 :]))
    if n_steps - peak > 20:
        assert factors[-1] < 0.06


def test_clipping_by_the_joint_norm_equals_torch():
    for max_norm in (0.5, 1e9, 0):
        ours, theirs = (torch.nn.Linear(30, 20) for _ in range(2))
        torch.manual_seed(0)
        gradients = flatten_gradients(ours)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = torch.randn_like(b)
            a.grad.copy_(b.grad)
        norm = clip_gradients(gradients, max_norm)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_parameters_without_influence_do_not_change_the_joint_norm():
    for n in range(1, 60):  # torch's own norm differs for some of these
        torch.manual_seed(n)
        parts = [torch.randn(10 + i) for i in range(n)]
        norms = [clip_gradients(torch.cat([torch.zeros(7 * i), *parts]), 1.0) for i in range(9)]
        assert len(set(map(float, norms))) == 1


@pytest.mark.parametrize("bad", (math.nan, math.inf))
@pytest.mark.parametrize("lr_muon", (0.02, 0.0))
@pytest.mark.parametrize("is_scaled", (False, True))
def test_a_step_whose_loss_or_gradient_is_not_finite_changes_no_weight(bad, lr_muon, is_scaled):
    torch.manual_seed(0)
    model = MaskedLM(CONFIG)
    optimizers = make_optimizers(model, lr_muon, 3e-3, 1e-3, torch.float32)
    gradients = flatten_gradients(model)
    scaler = torch.amp.GradScaler("cpu", enabled=is_scaled)

    def step(loss: float, gradient: float, name: str = "head.dense.weight") -> bool:
        """Whether a step changes weights; `gradient` is one of the numbers of a parameter's."""
        gradients.normal_()
        model.get_parameter(name).grad[0, 0] = gradient
        gradients.copy_(scaler.scale(gradients))
        before = torch.nn.utils.parameters_to_vector(model.parameters())
        set_learning_rates(optimizers, 1, 10, 0.1)
        norm = update_weights(optimizers, scaler, gradients, 1.0, torch.tensor(loss))
        assert bool(norm.isfinite()) == math.isfinite(gradient) and not gradients.any()
        after = torch.nn.utils.parameters_to_vector(model.parameters())
        assert after.isfinite().all()
        return not torch.equal(before, after)

    assert step(1.0, 0.5) and not step(1.0, bad) and step(1.0, 0.5)
    assert not step(1.0, bad, "model.embeddings.tok_embeddings.weight")
    assert not step(bad, bad if is_scaled else 0.5)  # a scaled loss has gradients like itself
    assert scaler.get_scale() == (2.0**13 if is_scaled else 1)

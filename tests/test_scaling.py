"""What scaling.py derives, against a count of what torch does."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model
import scaling
from data import Batch
from model import Config, MaskedLM
from optim import make_optimizers

SIZES = {"n_layers": 3, "d_model": 128, "n_heads": 2, "d_ff": 192, "vocab_size": 500, "max_len": 64}


def test_costs_are_what_torch_counts(monkeypatch):
    monkeypatch.setitem(model.PRESETS, "tiny", SIZES)
    monkeypatch.setattr(scaling, "ROW_TOKENS", 1024)
    torch.manual_seed(0)
    network = MaskedLM(Config(**SIZES))
    muon, _ = make_optimizers(network, (0.02, 1e-3, 1e-3), 0.0, torch.float32)
    n_masked, starts = round(scaling.MASKED * 1024), torch.arange(0, 1025, 64, dtype=torch.int32)
    bags = (torch.zeros(16, dtype=torch.long), torch.ones(16), torch.arange(17))
    ids = torch.randint(500, (1024,))
    batch = Batch(ids, starts, 64, torch.arange(n_masked), ids[:n_masked], *bags)
    with FlopCounterMode(display=False) as counted:
        token_loss, bag_loss = network(batch)
        (token_loss + bag_loss).backward()
    with FlopCounterMode(display=False) as of_muon:
        muon.step()
    found = scaling.costs("tiny")
    # the pooled loss, one row a window, is left out of the formula
    assert found["flops"] == pytest.approx(counted.get_total_flops(), rel=0.03)
    assert found["muon_flops"] == of_muon.get_total_flops()
    assert found["weights"] == sum(p.numel() for p in network.parameters())


def test_the_sum_of_gradients_is_a_ring():
    tiny, wide = (row for row in scaling.derive() if row["preset"] == "tiny")
    assert tiny["megabytes"] == pytest.approx(2 * 7 / 8 * 4 * tiny["weights"] / 1e6)
    assert wide["megabytes"] / tiny["megabytes"] == pytest.approx((63 / 64) / (7 / 8))

"""A step as CUDA graphs, tested without a GPU: it never waits, its padding changes nothing, and its
recordings are replayed as they should be."""

import contextlib

import pytest
import torch

from benchmarks.launches import count_launches
from data import Batch
from kernels import dispatch
from kernels.graphs import WARM_UP, Recorded, pad_sequences
from model import Classifier, Config, MaskedLM

CONFIG = Config(vocab_size=60, d_model=64, n_layers=2, n_heads=1, d_ff=96, max_len=32)
LENGTHS = (9, 2, 14, 7)


def make_batch() -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (sum(LENGTHS),))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return Batch(ids, cu_seqlens, 32, torch.tensor([1, 3, 12, 20]), torch.tensor([7, 8, 9, 7]))


@pytest.mark.skipif(dispatch.triton is None, reason="Triton does not exist for this system")
def test_a_step_never_waits_for_the_gpu_and_launches_few_kernels():
    """Its tensors have no values: whoever asked for one would get an exception."""
    launches = count_launches(CONFIG, make_batch())
    kernels = {name: n for name, n in launches["forward and backward"].items() if name[0] == "_"}
    assert kernels["_flash_forward"] == kernels["_flash_d_q"] == kernels["_flash_d_kv"] == 2
    assert kernels["_add_norm"] == kernels["_add_norm_backward"] == 4  # all but the first norm
    updates = launches["optimizers"]
    assert updates["aten._fused_adamw_.tensor_lr"] == 2
    assert updates["aten.baddbmm.default"] == 30  # three shapes, five iterations, two products
    assert updates.total() < 110  # whatever the number of layers
    deeper = count_launches(Config(**{**vars(CONFIG), "n_layers": 6}), make_batch())
    assert deeper["optimizers"].total() == updates.total()


def test_a_batch_moves_to_any_device():
    batch = make_batch()
    moved = batch.to(torch.device("meta"))
    assert all(tensor.is_meta for tensor in moved if isinstance(tensor, torch.Tensor))
    assert len(moved.cu_seqlens) == len(batch.cu_seqlens)  # padded for CUDA graphs only


def test_sequences_are_padded_to_a_power_of_2():
    for n_sequences, n_padded in ((1, 64), (64, 64), (65, 128), (411, 512)):
        padded = pad_sequences(torch.arange(n_sequences + 1, dtype=torch.int32))
        assert len(padded) == n_padded + 1 and padded.dtype == torch.int32
        assert padded[: n_sequences + 1].tolist() == [*range(n_sequences + 1)]
        assert set(padded[n_sequences:].tolist()) == {n_sequences}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter divides by zero
@pytest.mark.parametrize("family", ("modern", "bert"))
@pytest.mark.parametrize("forced", ("torch", "triton"))
def test_empty_sequences_change_no_bit(monkeypatch, family, forced):
    if forced == "triton" and dispatch.triton is None:
        pytest.skip("Triton does not exist for this system")
    monkeypatch.setattr(dispatch, "FORCED", forced)
    device = "cuda" if forced == "triton" and torch.cuda.is_available() else "cpu"
    config = Config(**{**vars(CONFIG), "family": family})
    batch = make_batch()
    # of what `pad_sequences` adds, two: Triton's interpreter takes its time for each
    padded = batch._replace(cu_seqlens=pad_sequences(batch.cu_seqlens)[: len(LENGTHS) + 3])
    assert padded.cu_seqlens.diff().tolist() == [*LENGTHS, 0, 0]
    tensors = [[x.to(device) if torch.is_tensor(x) else x for x in one] for one in (batch, padded)]
    batches = [Batch(*one) for one in tensors]
    results = []
    for one in batches:
        torch.manual_seed(0)
        model = MaskedLM(config).to(device)
        loss, _ = model(one)["masked_lm"]
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss.detach(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    for pooling in config.poolings:
        torch.manual_seed(0)
        classifier = Classifier(config, 3, pooling).eval().to(device)
        logits = [classifier(one.ids, one.cu_seqlens, 32) for one in batches]
        # the linear layer multiplies another number of rows
        torch.testing.assert_close(logits[0], logits[1][: len(LENGTHS)], rtol=1e-5, atol=1e-6)


class FakeGraph:
    pass


@pytest.fixture
def fake_cuda(monkeypatch):
    """Recordings run the function once; the test says what a replay does."""
    recorded = []

    @contextlib.contextmanager
    def record(graph, pool, stream, capture_error_mode):
        recorded.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return recorded


def test_a_recording_is_made_for_each_shape_and_replayed_on_new_values(fake_cuda, monkeypatch):
    calls = []

    def double(offset, batch, scale):
        calls.append(batch.key)
        return {"doubled": 2 * batch.ids * scale + offset}

    function = Recorded(True, print, double, torch.tensor(1))
    replays = []

    def replay(graph):
        (_, inputs, outputs) = next(r for r in function.recordings.values() if r[0] is graph)
        ids, *_, scale = (x for x in inputs if isinstance(x, torch.Tensor))
        outputs["doubled"].copy_(2 * ids * scale + 1)
        replays.append(graph)

    monkeypatch.setattr(FakeGraph, "replay", replay, raising=False)
    batch = make_batch()._replace(key=(1, 2, 3))
    results = []
    for i in range(WARM_UP + 3):
        changed = batch._replace(ids=batch.ids + i, key=(1, 2, i))
        results.append(function(changed, torch.tensor(3))["doubled"])
    for i, result in enumerate(results):  # those of earlier calls are not overwritten
        assert torch.equal(result, 2 * (batch.ids + i) * 3 + 1)
    assert len(fake_cuda) == 1 and len(replays) == 3
    assert calls == [(1, 2, i) for i in range(WARM_UP)] + [None]  # no key in the recording

    shorter = batch._replace(ids=batch.ids[:5])
    for _ in range(WARM_UP + 1):
        assert len(function(shorter, torch.tensor(3))["doubled"]) == 5
    assert len(fake_cuda) == 2


def test_a_function_that_cannot_be_recorded_runs_as_it_is(fake_cuda):
    lines = []

    def needs_key(batch):
        return batch.generator().initial_seed()  # randomness that no recording can repeat

    function = Recorded(True, lines.append, needs_key)
    seeds = {function(make_batch()._replace(key=(1, 2, i))) for i in range(WARM_UP + 3)}
    assert len(seeds) == WARM_UP + 3
    (line,) = lines
    assert line.startswith("CUDA graphs are not used: TypeError")


def test_elsewhere_and_on_request_nothing_is_recorded(fake_cuda, monkeypatch):
    monkeypatch.setenv("CLOZE_GRAPHS", "0")
    for is_enabled in (True, False):
        function = Recorded(is_enabled, print, lambda x: x + 1)
        assert [int(function(torch.tensor(i))) for i in range(6)] == [1, 2, 3, 4, 5, 6]
        monkeypatch.delenv("CLOZE_GRAPHS", raising=False)
    assert not fake_cuda

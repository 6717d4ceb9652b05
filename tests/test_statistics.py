"""Intervals of made-up results whose truth is known."""

import csv
import json
import re
import shutil
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

import analyze
from analysis import statistics
from analysis.statistics import Blocks, Score
from files.disk import UserError

# The standard deviations of what makes an answer right or wrong: all but `noise` are shared.
FILMS = {"n_seeds": 1, "n_draws": 3, "film": 0.55, "seed": 0.0, "draw": 0.03, "noise": 0.6}
SEEDS = {"n_seeds": 5, "n_draws": 3, "film": 0.2, "seed": 0.12, "draw": 0.03, "noise": 0.6}
DRAWS = {"n_seeds": 1, "n_draws": 6, "film": 0.2, "seed": 0.0, "draw": 0.15, "noise": 0.6}
NOISE = {"n_seeds": 3, "n_draws": 4, "film": 0.0, "seed": 0.0, "draw": 0.0, "noise": 2.0}
TRUTH = 0.75
N_TEXTS = 1600
N_EXPERIMENTS = 400


def simulate(rng, n_seeds, n_draws, film, seed, draw, noise, n=N_TEXTS):
    """Whether each answer is right, (S, D, N) int8: the sum of an effect of the text, its film, the
    pretraining seed and the draw of the labels, and of noise, exceeds a threshold. Films have 8
    texts on average, and two classes follow each other."""
    films = np.cumsum(rng.random(n) < 1 / 8)
    effects = rng.standard_normal(n) + film * rng.standard_normal(n + 1)[films]
    effects = effects + seed * rng.standard_normal((n_seeds, 1, 1))
    effects = effects + draw * rng.standard_normal((1, n_draws, 1))
    effects += noise * rng.standard_normal((n_seeds, n_draws, n))
    spread = np.sqrt(1 + film**2 + seed**2 + draw**2 + noise**2)
    correct = effects < NormalDist(0, spread).inv_cdf(TRUTH)
    return correct.astype(np.int8), np.repeat([0, 1], n // 2)


def score_of(values, targets):
    return Score(values, statistics.choose_blocks([values.mean((0, 1))], targets))


def check_intervals(estimates, truth):
    """Assert that they contain the truth as often as they say, and are little wider than those of
    an oracle, which knows the variance of the mean."""
    mean, low, high = np.array(estimates).T
    coverage = np.mean((low <= truth) & (truth <= high))
    width = np.mean(high - low) / (2 * 1.96 * mean.std())
    assert 0.915 <= coverage <= 0.985, (coverage, width)
    assert width <= 1.4, (coverage, width)


@pytest.mark.parametrize("setting", [FILMS, SEEDS, DRAWS, NOISE])
def test_intervals_cover_the_truth_and_are_no_wider_than_needed(setting):
    rng = np.random.default_rng(0)
    experiments = [simulate(rng, **setting) for _ in range(N_EXPERIMENTS)]
    check_intervals([score_of(*experiment).estimate() for experiment in experiments], TRUTH)


@pytest.mark.parametrize(
    "setting", [FILMS | {"n_seeds": 2}, DRAWS | {"n_seeds": 4}, NOISE | {"n_seeds": 5}]
)
def test_intervals_of_differences_cover_zero(setting):
    """Two methods that are equally good, with the same effects of texts, films and draws. The
    second is a baseline without pretraining, and has one seed."""
    rng = np.random.default_rng(1)
    estimates = []
    for _ in range(N_EXPERIMENTS):
        values, targets = simulate(rng, **setting)
        score = score_of(values, targets)
        network, baseline = (Score(part, score.blocks) for part in (values[:-1], values[-1:]))
        estimates.append((network - baseline).estimate())
    check_intervals(estimates, 0.0)


def test_selected_comparisons_hold_at_once():
    """The best of eight equally good methods is better than the worst in 5% of all cases, not in
    each: so often one of their 28 intervals excludes 0."""
    rng = np.random.default_rng(2)
    n_wrong = {1: 0, 28: 0}
    for _ in range(300):
        values = [simulate(rng, **DRAWS | {"draw": 0.0}, n=400) for _ in range(8)]
        scores = sorted((score_of(*of_method) for of_method in values), key=lambda s: s.mean)
        difference = scores[-1] - scores[0]
        for n_intervals in n_wrong:
            n_wrong[n_intervals] += difference.estimate(n_intervals=n_intervals).low > 0
    assert n_wrong[1] > 100
    assert n_wrong[28] < 30


# ------------------------------------------------------------------------------------- one interval


def random_score(accuracy, n_draws=5, n=1000, spread=0.0, seed=0):
    """The score of a method that is right with this probability, which varies between draws."""
    rng = np.random.default_rng(seed)
    probabilities = accuracy + spread * rng.standard_normal((n_draws, 1))
    correct = (rng.random((1, n_draws, n)) < probabilities).astype(np.int8)
    return Score(correct, Blocks([np.arange(n)], 1))


def test_interval_of_one_draw_is_the_binomial_interval_of_the_examples():
    score = random_score(0.7, n_draws=1, n=2000)
    estimate = score.estimate()
    width = 1.96 * np.sqrt(0.7 * 0.3 / 2000)
    assert estimate.mean == score.values.mean()
    assert estimate.low == pytest.approx(estimate.mean - width, abs=0.001)
    assert estimate.high == pytest.approx(estimate.mean + width, abs=0.001)


def test_interval_of_draws_that_differ_much_is_student_s():
    score = random_score(0.6, n_draws=5, n=4000, spread=0.08, seed=3)
    estimate = score.estimate()
    width = stats.t.ppf(0.975, 4) * score.values.mean((0, 2)).std(ddof=1) / np.sqrt(5)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(width, rel=0.05)


def test_seeds_and_draws_are_exchangeable():
    score = random_score(0.6, n_draws=4, spread=0.05)
    as_seeds = Score(score.values.swapaxes(0, 1), score.blocks)
    assert as_seeds.estimate() == pytest.approx(score.estimate())


def test_interval_ends_at_the_maximum_of_the_metric():
    score = random_score(0.97, n_draws=2, spread=0.02, seed=1)
    assert score.estimate().high > 1
    assert score.estimate(maximum=1).high == 1


def test_results_that_never_vary_have_no_width():
    score = Score(np.ones((2, 3, 20), np.int8), Blocks([np.arange(20)], 4))
    assert score.estimate() == (1, 1, 1)
    assert (score - score).estimate() == (0, 0, 0)


def test_differences_are_paired():
    """Two methods that fail on the same texts, one of them on a few more: their intervals overlap,
    but that of the paired difference excludes 0."""
    rng = np.random.default_rng(0)
    one = (rng.random((1, 5, 1000)) < 0.7).astype(np.int8)
    other = one * (rng.random((1, 5, 1000)) < 0.97)
    a, b = (Score(values, Blocks([np.arange(1000)], 1)) for values in (one, other))
    assert a.estimate().low < b.estimate().high
    assert (a - b).estimate().low > 0


# ------------------------------------------------------------------------------------------- blocks


def test_variance_is_that_of_the_circular_block_bootstrap():
    """Resampling by hand: each class is replaced by random blocks of it."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(120).cumsum()
    members = [np.arange(0, 120, 2), np.arange(1, 120, 2)]  # the classes alternate in the file
    values[members[1]] -= values[members[1]].mean() - values[members[0]].mean()
    starts = rng.integers(60, size=(20_000, 2, 12))
    picked = (starts[..., None] + np.arange(5)) % 60
    means = (values[members[0]][picked[:, 0]] + values[members[1]][picked[:, 1]]).mean((1, 2)) / 2
    expected = means.var() * 60 / (60 - 5)
    assert Blocks(members, 5).variance_of_mean(values) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("length", [1, 4, 50])
def test_random_class_shares_are_part_of_the_variance(length):
    """A method that is right for one class only: the shares of the classes decide."""
    targets = np.random.default_rng(0).integers(2, size=400)
    blocks = Blocks([np.flatnonzero(targets == label) for label in (0, 1)], length)
    share = targets.mean()
    assert blocks.variance_of_mean(targets) == pytest.approx(share * (1 - share) / 400)


def test_blocks_grow_with_the_clusters():
    rng = np.random.default_rng(0)
    lengths = []
    for size in (1, 5, 25):
        values = np.repeat(rng.standard_normal(4000 // size), size) + rng.standard_normal(4000)
        lengths.append(statistics.choose_blocks([values], np.zeros(4000, int)).length)
    assert lengths[0] <= 12
    assert 12 <= lengths[1] <= 40
    assert 75 <= lengths[2] <= 200


def test_neighbours_are_those_of_the_same_class():
    """Clusters in one class, and independent errors in the other; the classes alternate."""
    rng = np.random.default_rng(0)
    values = np.empty(4000)
    values[::2] = np.repeat(rng.standard_normal(200), 10)
    values[1::2] = rng.standard_normal(2000)
    blocks = statistics.choose_blocks([values], np.tile([0, 1], 2000))
    assert blocks.length >= 24
    assert [members[:2].tolist() for members in blocks.classes] == [[0, 2], [1, 3]]
    one_class = statistics.choose_blocks([values], rng.standard_normal(4000))  # numbers
    assert len(one_class.classes) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_few_test_examples_have_finite_intervals(n):
    values = np.arange(2 * n).reshape(1, 2, n).astype(np.float32)
    for targets in (np.zeros(n, int), np.arange(n), np.arange(n) * 0.5):
        assert np.isfinite(score_of(values, targets).estimate()).all()


def test_memory_is_that_of_a_few_test_sets():
    values, targets = simulate(np.random.default_rng(0), **SEEDS, n=50_000)
    tracemalloc.start()
    score = score_of(values, targets)
    (score - score_of(values[:1, ::-1], targets)).estimate()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # bytes; one number per bootstrap sample and text would be 8e8


# ------------------------------------------------------------------------- pooled pretraining seeds


@pytest.fixture(scope="module")
def seeds(pretrained, tmp_path_factory):
    """Three models that differ as pretraining seeds do."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed in range(3):
        model = shutil.copytree(pretrained, folder / f"seed{seed}")
        path = model / "model.safetensors"
        content = bytearray(path.read_bytes())
        noise = np.random.default_rng(seed).integers(64, size=50_000, dtype=np.uint8)
        content[-200_000::4] = noise.tobytes()  # the last bits of the last weights
        path.write_bytes(content)
        change_flags(model, seed=seed, out=str(model))
    return [folder / f"seed{seed}" for seed in range(3)]


def change_flags(model, **flags):
    path = model / "flags.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | flags))


def pool(models, topics, out, *more):
    flags = ["--pool", "--train", str(topics[0]), "--test", str(topics[1]), "--dtype", "float32"]
    flags += ["--labels", "30", "--seeds", "2", "--methods", "frozen,ngrams", "--out", str(out)]
    return analyze.main(["--model", *map(str, models), *flags, *more])


def test_pooled_models_are_one_method(seeds, topics, tmp_path):
    scores = pool(seeds, topics, tmp_path)
    assert set(scores) == {"frozen", "ngrams"}
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    accuracies = [float(line["accuracy"]) for line in lines if line["method"] == "frozen"]
    assert len(accuracies) == 3 * 2  # seeds, draws
    assert scores["frozen"][30][0] == pytest.approx(np.mean(accuracies))
    assert [line["model"] for line in lines if line["method"] == "ngrams"] == ["seed0"] * 2
    report = (tmp_path / "report.md").read_text()
    assert "mean of up to 3 pretraining seeds and\n2 draws of the labels" in report
    [length, distance] = re.search(r"blocks of (\d+) neighbours: .*\n.* (\d+),", report).groups()
    assert int(length) == 4 * int(distance)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"steps": 7}, r"--pool: \S+seed0 and \S+other were trained with different --steps"),
        ({"lr_muon": 0.5}, r"--pool: \S+seed0 and \S+other .* different --lr-muon"),
        ({"seed": 9}, r"--pool: \S+seed1 and \S+other have the same weights"),
    ],
)
def test_models_that_are_not_seeds_of_one_recipe_are_not_pooled(
    seeds, topics, tmp_path, flags, problem
):
    other = shutil.copytree(seeds[1], tmp_path / "other")
    change_flags(other, **flags)
    models = [*seeds[:2], other] if "seed" in flags else [seeds[0], other]
    with pytest.raises(UserError, match=problem):
        pool(models, topics, tmp_path / "out")
    assert not (tmp_path / "out" / "results.csv").exists()


def test_one_model_cannot_be_pooled(topics, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        pool([tmp_path], topics, tmp_path)
    assert "--pool needs several folders after --model" in capsys.readouterr().err

"""The experiment: intervals and sentences on made-up results, and the whole command on a small set."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import sentences, write_csv
from scipy import stats
from sklearn.metrics import f1_score

import analyze
import finetune
from analysis import costs, statistics
from analysis.statistics import Score
from files.disk import UserError
from model import Classifier, Config

# --------------------------------------------------------------------------------------- intervals, sentences


def made_up(
    accuracy: float, n_draws: int = 5, n: int = 1000, spread: float = 0.0, seed: int = 0
) -> Score:
    """A row that is right with this probability, in draws that differ by `spread`."""
    rng = np.random.default_rng(seed)
    means = accuracy + spread * rng.standard_normal((n_draws, 1))
    return statistics.mean_score(
        (rng.random((n_draws, n)) < means).astype(float), statistics.resamples(n)
    )


def test_an_interval_of_one_draw_is_that_of_its_examples():
    score = made_up(0.7, n_draws=1, n=2000)
    found, width = score.estimate(), 1.96 * np.sqrt(0.7 * 0.3 / 2000)
    assert found.mean == score.by_draw[0]
    assert found.low == pytest.approx(found.mean - width, abs=0.003)
    assert found.high == pytest.approx(found.mean + width, abs=0.003)


def test_where_draws_differ_much_the_interval_is_student_s():
    score = made_up(0.6, n_draws=5, n=4000, spread=0.08, seed=3)
    found, by_draw = score.estimate(), score.by_draw
    width = stats.t.ppf(0.975, 4) * by_draw.std(ddof=1) / np.sqrt(5)
    assert (found.high - found.low) / 2 == pytest.approx(width, rel=0.15)


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = 0
    for seed in range(200):
        found = made_up(0.7, n_draws=5, n=300, spread=0.03, seed=seed).estimate()
        held += found.low <= 0.7 <= found.high
    assert 0.9 <= held / 200 <= 1


def test_differences_are_paired():
    """Two rows that fail on the same texts, one of them on a few more: apart they overlap, paired they do
    not."""
    rng = np.random.default_rng(0)
    one = (rng.random((5, 1000)) < 0.7).astype(float)
    other = one * (rng.random((5, 1000)) < 0.97)
    weights = statistics.resamples(1000)
    a, b = (statistics.mean_score(values, weights) for values in (one, other))
    assert a.estimate().low < b.estimate().high
    assert (a - b).estimate().low > 0


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (made_up(0.8), made_up(0.7, seed=1), r"ours is ahead of LSA: 0\.\d+ \[0\.\d+, 0\.\d+\]"),
        (made_up(0.6), made_up(0.7, seed=1), r"ours is behind LSA: -0\.\d+ \[-0\.\d+, -0\.\d+\]"),
        (
            made_up(0.7),
            made_up(0.7, seed=1),
            r"ours and LSA: no difference that 5 draws can show, -?0\.\d+ \[-.*",
        ),
        (
            made_up(0.7, 1),
            made_up(0.7, 1, seed=1),
            r"ours and LSA: no difference that 1 draw can show, .*",
        ),
    ],
)
def test_the_sentence_follows_the_interval(one, other, said):
    assert re.fullmatch(said, statistics.verdict("ours", "LSA", one - other))


def test_macro_f1_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    targets, predictions = (
        rng.integers(0, 4, 200),
        rng.integers(0, 3, (3, 200)),
    )  # class 3 is never predicted
    score = statistics.macro_f1(predictions, targets, 6, statistics.resamples(200))
    by_hand = [f1_score(targets, predicted, average="macro") for predicted in predictions]
    assert np.allclose(score.by_draw, by_hand)
    assert abs(score.by_sample.mean() - np.mean(by_hand)) < 0.02


def test_label_equivalents():
    budgets, means = [100, 1000, 10_000], [0.6, 0.7, 0.75]
    assert (
        statistics.label_equivalent(budgets, means, 0.65) == "about 320"
    )  # half-way, on a logarithmic scale
    assert statistics.label_equivalent(budgets, means, 0.7) == "about 1,000"
    assert statistics.label_equivalent(budgets, means, 0.58) == "at most 100"
    assert statistics.label_equivalent(budgets, means, 0.76) == "more than the 10,000 there are"
    assert statistics.label_equivalent([100, 1000], [0.7, 0.65], 0.68) == "at most 100"


def test_calibration_of_a_row_that_says_too_much():
    probabilities = np.tile([0.95, 0.05], (1, 100, 1))
    targets = np.array([0] * 70 + [1] * 30)
    error, bins = statistics.calibration(probabilities, targets)
    assert error == pytest.approx(0.25) and bins.shape == (1, 3)
    assert bins[0] == pytest.approx([0.95, 0.7, 1.0])


def test_advice_turns_with_the_table():
    """Ahead with few labels, behind with many; and where nothing is shown, the faster row."""
    milliseconds = {"ours": 2.0, "bag of words": 0.4}
    ahead, behind = made_up(0.8), made_up(0.7, seed=1)
    advice = statistics.advise(
        [100, 1000],
        {"ours": {100: ahead, 1000: ahead}, "bag of words": {100: behind, 1000: behind}},
        milliseconds,
    )
    assert advice[0] == "With 100 to 1,000 labels take ours: 2 ms a text."
    assert advice[1].startswith(
        "Where an answer must come within 2 ms, take bag of words (0.4 ms), which costs 0."
    )
    turned = statistics.advise(
        [100, 1000],
        {"ours": {100: ahead, 1000: behind}, "bag of words": {100: behind, 1000: ahead}},
        milliseconds,
    )
    assert turned == [
        "With 100 labels take ours: 2 ms a text.",
        "With 1,000 labels take bag of words: 0.4 ms a text.",
    ]
    alike = {"ours": {100: made_up(0.7)}, "bag of words": {100: made_up(0.7, seed=1)}}
    assert statistics.advise([100], alike, milliseconds) == [
        "With 100 labels take bag of words: 0.4 ms a text."
    ]


# ------------------------------------------------------------------------------------------------------ costs


@pytest.mark.parametrize(
    "shape", [{}, {"global_attn_every_n_layers": 2, "local_attention": 16}, {"family": "bert"}]
)
def test_operations_are_those_that_torch_counts(shape):
    from torch.utils.flop_counter import FlopCounterMode

    config = Config(vocab_size=50, d_model=32, n_layers=3, n_heads=4, d_ff=48, max_len=64, **shape)
    length, n = 48, 4
    ids, cu_seqlens = (
        torch.randint(5, 50, (n * length,)),
        torch.arange(n + 1, dtype=torch.int32) * length,
    )
    model = Classifier(config, 2).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(ids, cu_seqlens, length)
    counted, ours = counter.get_total_flops() / (n * length), costs.flops_per_token(config, length)
    if "local_attention" in shape:  # what the reference computes of a window, it computes in blocks
        assert (
            ours
            <= counted
            <= costs.flops_per_token(Config(**vars(config) | {"local_attention": 128}), length)
        )
    else:
        assert counted == ours


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module", autouse=True)
def hurried():
    """Times are measured, but not well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "ROUNDS", 1)
        patch.setattr(costs, "TIMED_TEXTS", 32)
        yield


def flags_of(topics, model, out, *more):
    train, test = map(str, topics)
    return [
        "--model",
        str(model),
        "--train",
        train,
        "--test",
        test,
        "--out",
        str(out),
        "--dtype",
        "float32",
        "--seeds",
        "2",
        "--rows",
        "pretrained,frozen,bag_of_words",
        *more,
    ]


@pytest.fixture(scope="module")
def analysis(topics, pretrained, tmp_path_factory):
    """A model with snapshots; the folder of its analysis, and what main returned."""
    folder = tmp_path_factory.mktemp("analysis")
    model = folder / "model"
    shutil.copytree(pretrained, model)
    for step in (10, 20):
        (model / "snapshots" / f"step-{step}").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(pretrained / name, model / "snapshots" / f"step-{step}" / name)
    out = folder / "out"
    return model, out, analyze.main(flags_of(topics, model, out, "--labels", "12,30"))


def test_the_whole_experiment(analysis, topics):
    model, out, found = analysis
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 + 2 * 2 * 2  # rows x budgets x draws, and the snapshots
    assert set(found) == {"pretrained", "frozen", "bag of words"}
    for row in ("pretrained", "bag_of_words"):
        means = [
            float(r["accuracy"])
            for r in rows
            if (r["row"], r["labels"], r["model"]) == (row, "30", "model")
        ]
        shown = found[row.replace("_", " ")][30]
        assert np.mean(means) == pytest.approx(shown[0]) and shown[1] <= shown[0] <= shown[2]
    for name in ("curves", "reliability", "time", "layers", "pareto"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "report.md").read_text()
    for title in (
        "Accuracy against labels",
        "Compared",
        "What it costs",
        "Over the time",
        "By layer",
        "Calibration",
        "The hardest texts",
    ):
        assert f"## {title}" in text
    bag = next(r for r in rows if (r["row"], r["labels"], r["seed"]) == ("bag_of_words", "30", "1"))
    flags = ["--train", str(topics[0]), "--test", str(topics[1]), "--rows", "bag_of_words"]
    flags += ["--labels", "30", "--seed", "1"]
    alone = finetune.main(
        ["--model", str(model), *flags, "--out", str(out / "alone"), "--dtype", "float32"]
    )
    assert alone["test"]["bag_of_words"]["accuracy"] == float(bag["accuracy"])


def test_what_is_there_is_not_run_again(analysis, topics, monkeypatch):
    model, out, found = analysis
    calls = []
    run = finetune.main
    monkeypatch.setattr(finetune, "main", lambda argv: (calls.append(argv), run(argv))[1])
    monkeypatch.setattr(costs, "peak_memory", lambda *_: 1.0)
    again = analyze.main(flags_of(topics, model, out, "--labels", "12,30"))
    assert not calls and again == found
    gone = next((out / "predictions").glob("*-model-frozen-30-1.npz"))
    gone.unlink()
    lines = (out / "results.csv").read_text().splitlines()
    (out / "results.csv").write_text(
        "\n".join(lines[:-1]) + "\n" + lines[-1][:30]
    )  # cut off in a line
    assert analyze.main(flags_of(topics, model, out, "--labels", "12,30")) == found
    assert [argv[argv.index("--rows") + 1] for argv in calls] == ["frozen", "frozen"]


def test_what_was_fitted_before_a_stop_is_not_fitted_again(analysis, topics, tmp_path, monkeypatch):
    model, _, _ = analysis
    fitted, fit = [], finetune.fit_network

    def stops(*given):
        if len(fitted) == 4:
            raise KeyboardInterrupt
        fitted.append(given)
        fit(*given)

    monkeypatch.setattr(finetune, "fit_network", stops)
    monkeypatch.setattr(costs, "peak_memory", lambda *_: 1.0)
    flags = [
        *flags_of(topics, model, tmp_path, "--labels", "12"),
        "--seeds",
        "1",
        "--rows",
        "pretrained",
    ]
    with pytest.raises(KeyboardInterrupt):
        analyze.main(flags)
    monkeypatch.setattr(finetune, "fit_network", lambda *given: (fitted.append(given), fit(*given)))
    analyze.main(flags)
    at_once = 3 * 2  # folds by rates, and the last fit if its rate is not 0
    with open(tmp_path / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)  # and nothing of the snapshots, which would be frozen
    assert len(fitted) == at_once + (row["choice"] != "0.0")
    assert not list((tmp_path / "work").iterdir())


def test_another_model_in_the_same_folder_is_another_result(
    analysis, topics, tmp_path, monkeypatch
):
    model, out, _ = analysis
    here, copy = tmp_path / "out", tmp_path / "model"
    shutil.copytree(out, here)
    shutil.copytree(model, copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    calls, run = [], finetune.main
    monkeypatch.setattr(finetune, "main", lambda argv: (calls.append(argv), run(argv))[1])
    monkeypatch.setattr(costs, "peak_memory", lambda *_: 1.0)
    analyze.main(flags_of(topics, copy, here, "--labels", "12", "--rows", "frozen,bag_of_words"))
    assert len(calls) == 2


def test_a_model_that_goes_half_way_leaves_what_was_computed(
    analysis, topics, tmp_path, monkeypatch
):
    model, _, _ = analysis
    run, out = finetune.main, tmp_path / "out"

    def gone(argv):
        if argv[argv.index("--seed") + 1] == "1":
            raise UserError("model: no checkpoint")
        return run(argv)

    monkeypatch.setattr(finetune, "main", gone)
    with pytest.raises(UserError, match="no checkpoint"):
        analyze.main(flags_of(topics, model, out, "--labels", "12"))
    assert "mean of 1 draws" in (out / "report.md").read_text()
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--labels", "12,121"], "--labels 121: there are only 120"),
        (["--labels", "4"], "--labels 4: 3 classes need at least 6"),
        (["--labels", "12", "--model", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    analysis, topics, tmp_path, flags, problem
):
    model, _, _ = analysis
    with pytest.raises(UserError, match=re.escape(problem)):
        analyze.main([*flags_of(topics, model, tmp_path / "out"), *flags])
    assert not (tmp_path / "out" / "results.csv").exists()


def test_a_table_of_something_else_is_refused(analysis, topics, tmp_path):
    model, _, _ = analysis
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"results\.csv:1: its columns are to be"):
        analyze.main(flags_of(topics, model, tmp_path, "--labels", "12"))
    (tmp_path / "results.csv").unlink()
    (tmp_path / "flags.json").write_text(json.dumps({"train": "other.csv"}))
    with pytest.raises(UserError, match=r"its results are of --train other\.csv"):
        analyze.main(flags_of(topics, model, tmp_path, "--labels", "12"))
    (tmp_path / "flags.json").write_text("[1")
    with pytest.raises(UserError, match=r"flags\.json: not as it was written"):
        analyze.main(flags_of(topics, model, tmp_path, "--labels", "12"))


def test_numbers_have_r_squared(pretrained, tmp_path):
    texts = [s for topic in (0, 1) for s in sentences(60, topic, topic)]
    order = np.random.default_rng(0).permutation(len(texts))
    path = write_csv(
        tmp_path / "numbers.csv", [(texts[i], f"{(i >= 60) + 0.01 * i:.3f}") for i in order]
    )
    flags = [
        "--model",
        str(pretrained),
        "--train",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "1",
    ]
    found = analyze.main(
        [*flags, "--rows", "frozen,bag_of_words", "--labels", "30,all", "--dtype", "float32"]
    )
    assert found["bag of words"][96][0] > 0
    assert "R squared" in (tmp_path / "out" / "report.md").read_text()


def test_models_called_alike_get_longer_names(tmp_path):
    folders = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert list(analyze.name_models(folders).values()) == folders
    with pytest.raises(UserError, match="the same folder twice"):
        analyze.name_models([folders[0], folders[0]])

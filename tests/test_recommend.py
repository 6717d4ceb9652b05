"""examples/recommend.py: the protocol, the baselines by hand, the batches, and use."""

import io
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples import recommend
from examples.recommend import MASK, PAD, UNK, Question
from files.disk import UserError

TINY = {"layers": 1, "d_model": 64, "max_len": 12, "micro_batch_tokens": 512}
TINY |= {"lr_embedding": 0.01}
N_ITEMS = 20


def cycles(path, n_users=40, length=10, skip=0):
    """Interactions of users who go round a circle of items, so that the next one is known."""
    rng = np.random.default_rng(1)
    lines = ["user,item,time"]
    for user, start in enumerate(rng.integers(N_ITEMS, size=n_users)):
        n = length if user != skip else 2
        lines += [f"u{user},film {(start + i) % N_ITEMS},{100 + i}" for i in range(n)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recommend")
    patch = pytest.MonkeyPatch()
    patch.setattr(recommend, "NETWORK", TINY)
    flags = ["--data", str(cycles(folder / "a.csv")), "--out", str(folder / "out")]
    metrics = recommend.main([*flags, "--seeds", "1", "--steps", "60"])
    patch.undo()
    return folder / "out", metrics


def test_the_network_learns_the_next_item(run):
    _, metrics = run
    assert metrics["network"]["NDCG@10"].low > 0.8
    assert metrics["Markov, last items"]["NDCG@10"].mean > 0.8
    assert metrics["most popular"]["NDCG@10"].mean < 0.6
    assert metrics["network"]["lead"].low > metrics["untrained network"]["lead"].high


def histories(out, users, last=1):
    out.mkdir(exist_ok=True)
    return recommend.Histories(users, SimpleNamespace(out=out, last=last, vocab_size=1000))


@pytest.mark.parametrize("last", [1, 2])
def test_what_is_asked_is_not_in_the_training_part(tmp_path, last):
    users = [(list("abcdef"), [1, 2, 3, 4, 5, 5]), (list("fa"), [1, 2]), (list("bcadbe"), [1] * 6)]
    corpus = histories(tmp_path, users, last)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line)["items"] for line in lines]
    assert rows == [list("abcdef")[: 5 - last], list("fa"), list("bcadbe")[: 5 - last]]
    vocab = corpus.tokenizer.get_vocab()

    def questions(expected):
        """The items of a history and the next one, and whether this is later."""
        tokens = [
            ([vocab.get(item, UNK) for item in items], is_later) for items, is_later in expected
        ]
        return [(history, target, is_later) for (*history, target), is_later in tokens]

    def asked(part):
        return [(q.history.tolist(), q.target, q.is_later) for q in part]

    validation = [("abcdef"[: 6 - last], True), ("bcadbe"[: 6 - last], False)]
    test = [("abcde", True)] * (last > 1) + [("abcdef", False)]
    test += [("bcadb", False)] * (last > 1) + [("bcadbe", False)]
    assert asked(corpus.validation) == questions(validation)
    assert asked(corpus.test) == questions(test)


def test_equal_times_are_ordered_by_a_draw_that_repeats(tmp_path):
    lines = ["user,item,time", *(f"u,{i},{i // 8}" for i in range(16))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    args = SimpleNamespace(data=tmp_path / "a.csv", text_column=None)
    [(items, times)] = recommend.read_users(args)
    assert recommend.read_users(args) == [(items, times)]
    assert times == [0] * 8 + [1] * 8
    assert sorted(items[:8], key=int) == [str(i) for i in range(8)] != items[:8]


def test_ranks_are_those_by_hand():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, size=(30, 25)).astype(float)
    values[0] = np.nan
    questions = []
    for _ in range(30):
        tokens = rng.permutation(np.arange(MASK + 1, 25))
        questions.append(Question(0, tokens[:6], int(tokens[6]), True))
    questions[1] = questions[1]._replace(target=UNK)  # not an item of the training part
    questions[2] = questions[2]._replace(target=questions[2].history[0])
    got = recommend.ranks(lambda histories: values[: len(histories)], questions)
    for row, question, rank in zip(values[3:], questions[3:], got[3:], strict=True):
        others = set(range(MASK + 1, 25)) - set(question.history.tolist()) - {question.target}
        behind = sum(row[item] < row[question.target] for item in others)
        assert rank == 1 + len(others) - behind
    assert np.isinf(got[:3]).all()  # they count as missed
    assert recommend.ndcg(np.array([1, 3, 11, np.inf])).tolist() == [1, 0.5, 0, 0]


def test_baselines_are_those_by_hand(tmp_path):
    rows = ["abc", "ba", "cbd", "abcd"]
    users = [([*row, "x", "y"], list(range(len(row) + 2))) for row in rows]
    corpus = histories(tmp_path, users)
    sequences = [[corpus.tokenizer.token_to_id(item) for item in row] for row in rows]
    n = corpus.vocab_size
    a, b, c, d = sequences[3]
    has = np.zeros((4, n))
    for user, tokens in enumerate(sequences):
        has[user, tokens] = 1
    counts = np.zeros((n, n))
    for row in sequences:
        for i, j in itertools.combinations(range(len(row)), 2):
            counts[row[i], row[j]] += 1 / (j - i)

    history = np.array([d, a, b])
    scores = {
        (name, choice): function([history])[0]
        for name, choice, function in recommend.baselines(corpus)
    }
    np.testing.assert_allclose(scores["most popular", "no choice"][[a, b, c, d]], [3, 4, 3, 2])
    weights = np.zeros((n, n))
    for item in (a, b, c, d):  # ridge regression on all other items
        others = [i for i in range(n) if i != item]
        x = has[:, others]
        weights[others, item] = np.linalg.solve(x.T @ x + 100 * np.eye(n - 1), x.T @ has[:, item])
    expected = weights[b] + 0.9 * weights[a] + 0.81 * weights[d]
    np.testing.assert_allclose(scores["EASE, recency-weighted", "100, 0.9"], expected, atol=1e-6)
    expected = counts[b] + counts[a] / 2 + counts[d] / 3
    np.testing.assert_allclose(scores["Markov, last items", "5, 1.0, 0.0, 0.0"], expected, 1e-6)
    np.testing.assert_allclose(scores["Markov, order 1", "1, 1.0, 0.0, 0.0"][c], 2, 1e-6)
    cosines = has.T @ has / np.sqrt(np.maximum(1, np.outer(has.sum(0), has.sum(0))))
    newest = scores["item-kNN, recency-weighted", "20, 0.0"]
    np.testing.assert_allclose(newest[[a, c, d]], cosines[b, [a, c, d]], 1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_batches_are_windows_of_one_user_with_the_last_item_masked(tmp_path, monkeypatch, share):
    monkeypatch.setattr(recommend, "LAST_ONLY", share)
    monkeypatch.setattr(recommend, "NETWORK", TINY)
    users = [[f"{user}-{i}" for i in range(user + 2)] for user in range(20)]
    corpus = histories(tmp_path, [(items, list(range(len(items)))) for items in users])
    corpus.seed = 3
    for step in range(3):
        batch = corpus.batch(step, 0, 1, 0.3)
        again = corpus.batch(step, 0, 1, 0.3)
        assert all(torch.equal(a, b) for a, b in zip(batch[:2], again[:2], strict=True))
        assert len(batch.ids) == 512 and batch.cu_seqlens[-1] == 512 and batch.max_seqlen <= 12
        assert (batch.ids[batch.masked] == MASK).all()
        ids = batch.ids.clone()
        ids[batch.masked] = batch.targets
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            if ids[start] == PAD:
                assert end == start + 1
                continue
            tokens = [corpus.tokenizer.id_to_token(i) for i in ids[start:end].tolist()]
            user, first = tokens[1].split("-")
            assert tokens[1:-1] == [f"{user}-{int(first) + i}" for i in range(len(tokens) - 2)]
            masked = batch.masked[(batch.masked >= start) & (batch.masked < end)] - start
            if share:
                assert masked.tolist() == [len(tokens) - 2]
            else:
                assert len(masked) == max(1, int(0.3 * (len(tokens) - 2)))


def test_recommending_to_a_new_user(run, capsys, monkeypatch):
    model = str(run[0] / "seed-0")
    history = [f"film {i}" for i in range(3, 9)]
    recommend.main(["--model", model, "--history", *history, "nope", "[CLS]", "--top", "99"])
    output = capsys.readouterr()
    answers = output.out.strip().split("\t")
    names = [answer.rpartition(" ")[0] for answer in answers]
    assert names[0] == "film 9"
    assert sorted(names) == sorted({f"film {i}" for i in range(N_ITEMS)} - set(history))
    assert sum(float(answer.rpartition(" ")[2]) for answer in answers) == pytest.approx(1, abs=0.01)
    assert "--history: unknown items are skipped: ['nope', '[CLS]']" in output.err

    lines = b'{"items": ["film 1", "film 2"]}\n{"items": []}\n{"items": ["nope"]}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(lines))))
    counts = recommend.main(["--model", model, "-", "--top", "1"])
    assert counts == {"answered": 2, "broken": 1}
    assert capsys.readouterr().out.splitlines()[0].startswith("film 3 ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("user,item,time\n1,2,3\n", "no user has more than 2 items"),
        ("user,item,time\n1,2,3\n1,3,x\n", "a.csv:3: the time 'x' is no number"),
        ("text\na b\n", "a.csv:2: neither interactions nor a list of items"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, content, problem):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=problem):
        recommend.main(["--data", f"{tmp_path}/a.csv", "--out", f"{tmp_path}/out"])


def test_a_model_of_text_cannot_recommend(pretrained):
    with pytest.raises(UserError, match="no model of sequences"):
        recommend.main(["--model", str(pretrained), "--history", "a"])


@pytest.mark.slow
def test_movielens_is_level_with_the_best_baseline(tmp_path):
    metrics = recommend.main(["--out", str(tmp_path / "out"), "--seeds", "1"])
    known = {"most popular": 0.040, "item-kNN": 0.058, "EASE": 0.079, "Markov, order 1": 0.064}
    known |= {"EASE, recency-weighted": 0.108, "Markov, last items": 0.108, "EASE + Markov": 0.119}
    for method, value in known.items():
        assert metrics[method]["NDCG@10"].mean == pytest.approx(value, abs=0.002)
    assert metrics["network"]["NDCG@10"].mean > 0.09

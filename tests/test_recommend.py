"""examples/recommend.py: the protocol, the baselines by hand, the batches, and use."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from examples import recommend
from examples.recommend import N_SPECIAL, Question
from files.disk import UserError
from files.token_cache import prepare

TINY = "--layers 1 --d-model 64 --max-len 12 --micro-batch-tokens 512 --lr-embedding 0.01"
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
    assert metrics["network"]["NDCG@10"] > 0.8
    assert metrics["Markov, last items"]["NDCG@10"] > 0.8
    assert metrics["most popular"]["NDCG@10"] < 0.6
    assert metrics["untrained network"]["NDCG@10"] < metrics["network"]["NDCG@10"]


def arguments(out, last=1, **flags):
    out.mkdir(exist_ok=True)
    return SimpleNamespace(**{"out": out, "last": last, "vocab_size": 1000, **flags})


@pytest.mark.parametrize("last", [1, 2])
def test_what_is_asked_is_not_in_the_training_part(tmp_path, last):
    users = [(list("abcdef"), [1, 2, 3, 4, 5, 5]), (list("fa"), [1, 2]), (list("bcadbe"), [1] * 6)]
    folder, validation, test = recommend.split(users, arguments(tmp_path, last))
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line)["items"] for line in lines]
    assert rows == [list("abcdef")[: 5 - last], list("fa"), list("bcadbe")[: 5 - last]]
    vocab = recommend.Tokenizer.from_file(f"{folder}/tokenizer.json").get_vocab()

    def tokens(items):
        return [vocab.get(item, 1) for item in items]

    asked = [(q.user, q.history.tolist(), q.target, q.is_later) for q in validation + test]
    expected = [(0, tokens("abcdef"[: 5 - last]), vocab.get("abcdef"[5 - last], 1), True)]
    if last == 1:  # b is repeated as the validation target
        expected += [(0, tokens("abcde"), vocab["f"], False), (2, tokens("bcadb"), 1, False)]
    else:
        expected += [(2, tokens("bca"), vocab.get("d", 1), False), (0, tokens("abcd"), 1, True)]
        expected += [(0, tokens("abcde"), vocab["f"], False), (2, tokens("bcadb"), 1, False)]
    assert asked == expected


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
        tokens = rng.permutation(np.arange(N_SPECIAL, 25))
        questions.append(Question(0, tokens[:6], int(tokens[6]), True))
    questions[1] = questions[1]._replace(target=1)  # not an item of the training part
    got = recommend.ranks(lambda histories: values[: len(histories)], questions)
    for row, question, rank in zip(values, questions, got, strict=True):
        others = set(range(N_SPECIAL, 25)) - set(question.history.tolist()) - {question.target}
        behind = sum(row[item] < row[question.target] for item in others)
        if question.target > 1:
            assert rank == 1 + len(others) - behind
    assert got[0] == 14 and got[1] > 25
    assert recommend.ndcg(np.array([1, 3, 11])).tolist() == [1, 0.5, 0]


def test_baselines_are_those_by_hand():
    sequences = [np.array([5, 6, 7]), np.array([6, 5]), np.array([7, 6, 8])]
    has = np.zeros((3, 9), dtype=np.float32)
    for user, tokens in enumerate(sequences):
        has[user, tokens] = 1
    together = has.T @ has
    weights = recommend.ease(sequences, together, 2.0)
    for item in range(5, 9):  # ridge regression on all other items
        others = [i for i in range(9) if i != item]
        x = has[:, others]
        expected = np.linalg.solve(x.T @ x + 2 * np.eye(8), x.T @ has[:, item])
        np.testing.assert_allclose(weights[others, item], expected, atol=1e-5)
    counts = recommend.transitions(sequences, together, (2, 1.0, 0.0, 0.0))
    expected = np.zeros((9, 9))
    for a, b, value in ((5, 6, 1), (6, 7, 1), (5, 7, 0.5), (6, 5, 1), (7, 6, 1), (6, 8, 1)):
        expected[a, b] += value
    expected[7, 8] = 0.5
    np.testing.assert_allclose(counts, expected)
    near = recommend.item_knn(sequences, together, 1)
    assert near[6, 5] == pytest.approx(2 / np.sqrt(2 * 3)) and near[7, 5] == 0
    scores = recommend.linear(counts, np.array([1, 0.5]))([np.array([8, 5, 6])])
    np.testing.assert_allclose(scores[0], counts[6] + 0.5 * counts[5])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_batches_are_windows_of_one_user_with_the_last_item_masked(tmp_path, monkeypatch, share):
    monkeypatch.setattr(recommend, "LAST_ONLY", share)
    users = [[f"{user}-{i}" for i in range(user + 2)] for user in range(20)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"items": items}) + "\n" for items in users))
    corpus = recommend.Histories(prepare([str(file)], 1000), [], 3, train.parse_args(TINY.split()))
    for step in range(3):
        batch = corpus.batch(step, 0, 1, 0.3)
        again = corpus.batch(step, 0, 1, 0.3)
        assert all(torch.equal(a, b) for a, b in zip(batch[:2], again[:2], strict=True))
        assert len(batch.ids) == 512 and batch.cu_seqlens[-1] == 512 and batch.max_seqlen <= 12
        assert (batch.ids[batch.masked] == corpus.special["mask"]).all()
        ids = batch.ids.clone()
        ids[batch.masked] = batch.targets
        for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            if ids[start] == corpus.special["pad"]:
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
    assert "2 unknown items are skipped: 'nope', '[CLS]'" in output.err

    lines = b'{"items": ["film 1", "film 2"]}\n{"items": []}\n{"items": ["nope"]}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(lines))))
    counts = recommend.main(["--model", model, "-", "--top", "1"])
    assert counts == {"answered": 2, "broken": 1}
    assert capsys.readouterr().out.splitlines()[0].startswith("film 3 ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("user,item,time\n1,2,3\n", "no user has more than 2 different items"),
        ("user,item,time\n1,2,3\n1,3,x\n", "a.csv:3: the time 'x' is no number"),
        ("text\na b\n", "a.csv:2: neither interactions nor a list of items"),
        ("user,item\n1,a\n1,a\n1,a\n1,a\n", "no user has more than 2 different items"),
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
    assert metrics["Markov, last items"]["NDCG@10"] == pytest.approx(0.108, abs=0.002)
    assert metrics["network"]["NDCG@10"] > 0.09

"""Parquet and .zst files, and datasets of the hub, from a local server that answers as it does."""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST, sentences
from scipy import stats
from sklearn import metrics as sklearn_metrics

import finetune
import predict
from analysis.evaluation import measure
from files import entities, hub_datasets, parquet, readers, token_cache
from files.disk import UserError
from files.readers import find_files, read_documents, read_table
from labels import load

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------------------- files


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(readers, "zstd", None)
    for name, start, advice in (
        ("a.parquet", parquet.PARQUET_START, "pip install pyarrow"),
        ("a.txt.zst", readers.ZSTD_START, "backports.zstd"),
    ):
        path = tmp_path / name
        path.write_bytes(start)
        with pytest.raises(UserError, match=f"^{path}: .*{advice}"):
            list(read_documents(path))


@pytest.mark.parametrize("name", ["a.txt.zst", "a.txt", "a.md.zst"])
def test_zst_is_recognized_by_its_content(tmp_path, name):
    zstd = readers.zstd or pytest.skip("backports.zstd is not installed")
    documents = sentences(500, 1)
    packed = zstd.compress("\n".join(documents).encode())
    path = tmp_path / name
    path.write_bytes(packed)
    assert [text.strip() for text in read_documents(path)] == documents
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(b'{"text": "a"}\n') * 2)  # two frames
    assert list(read_documents(tmp_path / "a.jsonl.zst")) == ["a", "a"]
    assert find_files([str(tmp_path)])[0] == tmp_path / "a.jsonl.zst"
    for damaged in (
        packed[:-9],
        packed[: len(packed) // 2] + b"x" + packed[len(packed) // 2 + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{path}: cannot be read"):
            list(read_documents(path))


def to_parquet(columns: dict, classes: dict[str, list[str]] | None = None, **options) -> bytes:
    """A parquet file as the hub writes it: the names of classes are in the schema's metadata."""
    pa = pytest.importorskip("pyarrow")
    features = {name: {"dtype": "string", "_type": "Value"} for name in columns}
    for name, names in (classes or {}).items():
        label = {"names": names, "_type": "ClassLabel"}
        is_list = isinstance(columns[name][0], list)
        features[name] = {"feature": label, "_type": "Sequence"} if is_list else label
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    from pyarrow import parquet as writer

    content = io.BytesIO()
    writer.write_table(pa.table(columns).replace_schema_metadata(metadata), content, **options)
    return content.getvalue()


def test_rows_of_a_parquet_file(tmp_path):
    texts = ["naïve", "two\nlines", "", "漢"]
    columns = {"text": texts, "label": [1, 0, -1, 7], "tags": [[0, 1], [], [1], [2]]}
    columns |= {"score": [0.5, 1.0, None, -1.0], "nested": [{"a": [1]}] * 4}
    path = tmp_path / "a.bin"  # recognized by its content
    path.write_bytes(to_parquet(columns, {"label": ["no", "yes"], "tags": ["O", "B-X"]}))
    rows = list(read_table(path))
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    assert [row["label"] for _, row in rows] == ["yes", "no", None, None]
    assert [row["tags"] for _, row in rows] == [["O", "B-X"], [], ["B-X"], [None]]
    assert [row["score"] for _, row in rows] == columns["score"]
    assert list(read_documents(path)) == texts
    with pytest.raises(UserError, match=f"^{path}:1: no text in field 'nested'"):
        list(read_documents(path, "nested"))
    path.write_bytes(to_parquet({"text": ["a", None, "b"]}))
    assert list(read_documents(path)) == ["a", "b"]


def test_a_damaged_parquet_file_is_refused_in_one_line(tmp_path):
    content = to_parquet({"text": sentences(2000, 3), "label": [0, 1] * 1000})
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    for i in range(60):
        cut = int(rng.integers(len(content)))
        damaged = content[:cut] if i % 2 else content[:cut] + rng.bytes(9) + content[cut + 9 :]
        path.write_bytes(damaged)
        try:
            assert len(list(read_table(path))) <= 2000 and not i % 2
        except UserError as error:
            assert str(error).startswith(f"{path}: cannot be read: ") and "\n" not in str(error)


@pytest.mark.parametrize("row_group_size", [500, 10_000])
def test_a_parquet_file_is_not_held_in_memory(tmp_path, row_group_size):
    pa = pytest.importorskip("pyarrow")
    letters = np.random.default_rng(0).integers(97, 123, (10_000, 1000), np.uint8)  # 10 MB
    path = tmp_path / "a.parquet"
    texts = [row.tobytes().decode() for row in letters]
    options = {"row_group_size": row_group_size, "use_dictionary": False}
    path.write_bytes(to_parquet({"text": texts}, **options))
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() for _ in read_documents(path)) - before
    assert 0 < most < path.stat().st_size / 3


# ------------------------------------------------------------------------------------- the server

COMMIT = "0123456789" * 4
GLUE = {  # columns of the texts, and names of the classes
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "stsb": (["sentence1", "sentence2"], None),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
}


def glue_split(task: str, seed: int, hidden: bool) -> bytes:
    """A split of a task, whose labels can be learned; `idx` is long and a number."""
    texts, names = GLUE[task]
    n = 60
    if names is None:
        labels = np.linspace(0, 5, n).astype(np.float32).tolist()
    else:
        labels = [i % len(names) for i in range(n)]
    topics = [sentences(n, seed + i, i) for i in range(6)]
    columns = {texts[0]: [topics[int(label)][i] for i, label in enumerate(labels)]}
    columns |= {name: sentences(n, seed) for name in texts[1:]}
    columns |= {"label": [-1] * n if hidden else labels}
    columns |= {"idx": [10**15 + i for i in range(n)]}
    return to_parquet(columns, {"label": names} if names else None)


@pytest.fixture(scope="module")
def glue() -> dict[str, bytes]:
    """The files of the hub's copy of GLUE, small."""
    files = {"README.md": b"of the branch"}
    for task in GLUE:
        kinds = ("_matched", "_mismatched") if task == "mnli" else ("",)
        splits = [("train", False)]
        splits += [
            (f"{name}{kind}", name == "test") for name in ("test", "validation") for kind in kinds
        ]
        for i, (split, hidden) in enumerate(splits):
            files[f"{task}/{split}/0000.parquet"] = glue_split(task, 100 * i, hidden)
    return files


class Hub:
    """A server, and what it serves."""

    def __init__(self):
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.token: str | None = None  # that a gated dataset needs
        self.downloads: list[str] = []
        self.cut = False  # whether downloads end early
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request) -> None:
        path = request.path.split("?")[0]
        repo, _, name = re.sub(r"^/(api/)?datasets/", "", path).partition("/re")
        files = self.datasets.get(repo)
        if files is None:
            return self.send(request, 401, error="RepoNotFound")
        if self.token and request.headers["Authorization"] != f"Bearer {self.token}":
            return self.send(request, 403, error="GatedRepo")
        if name == "vision/refs%2Fconvert%2Fparquet":
            if not files:
                return self.send(request, 404, error="RevisionNotFound")
            siblings = []
            for file, content in files.items():
                lfs = {"size": len(content), "pointerSize": 1}
                lfs["sha256"] = hashlib.sha256(content).hexdigest()
                siblings.append({"rfilename": file, "size": len(content), "lfs": lfs})
            about = {"id": repo, "sha": COMMIT, "siblings": siblings}
            return self.send(request, 200, json.dumps(about).encode())
        file = name.removeprefix(f"solve/{COMMIT}/")
        if request.command == "GET":
            self.downloads.append(file)
        return self.send(request, 200, files[file])

    def send(self, request, status: int, content: bytes = b"", error: str = "") -> None:
        request.send_response(status)
        for header, value in {
            "X-Error-Code": error,
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
        }.items():
            if value:
                request.send_header(header, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content[: len(content) // 2] if self.cut else content)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that huggingface_hub takes for the hub, with an empty cache."""
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_datasets, "CACHE", tmp_path / "cloze")
    forget()
    yield hub
    hub.stop()
    forget()


def forget() -> None:
    """Let the next call ask the hub, as another process does."""
    hub_datasets._list_files.cache_clear()
    hub_datasets._fetch.cache_clear()
    hub_datasets.print_once.cache_clear()


# ------------------------------------------------------------------------------------------- GLUE


@pytest.mark.parametrize("task", GLUE)
def test_every_task_of_glue_is_recognized(hub, glue, task, capsys):
    hub.datasets["nyu-mll/glue"] = glue
    train, test = load(None, Path(f"hf:nyu-mll/glue:{task}"))
    texts, names = GLUE[task]
    assert train.names == names
    assert (train.pairs is not None) == (len(texts) == 2)
    splits = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    assert (len(train), len(test)) == (60, 60 * len(splits))
    [line] = [line for line in capsys.readouterr().out.splitlines() if "test set" in line]
    assert line.endswith(", ".join(f"hf:nyu-mll/glue:{task}:{split}" for split in splits))
    if len(splits) > 1:
        assert test.parts.tolist() == [split for split in splits for _ in range(60)]


def test_both_sets_of_mnli_are_measured(hub, glue, pretrained, tmp_path, capsys):
    hub.datasets["nyu-mll/glue"] = glue
    flags = ["--model", str(pretrained), "--train", "hf:nyu-mll/glue:mnli", *FAST]
    flags += ["--methods", "ngrams,pretrained", "--out", str(tmp_path / "out")]
    metrics = finetune.main(flags)
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved == metrics and saved["n_test"] == 120
    with np.load(tmp_path / "out" / "predictions.npz") as arrays:
        targets, classes = arrays["targets"], arrays["pretrained"].argmax(1)
    measured = saved["test"]["pretrained"]
    for i, part in enumerate(("validation_matched", "validation_mismatched")):
        members = slice(60 * i, 60 * i + 60)
        assert measured[part]["accuracy"] == np.mean(targets[members] == classes[members])
    mean = (measured["validation_matched"]["accuracy"] + measured[part]["accuracy"]) / 2
    assert measured["accuracy"] == pytest.approx(mean)
    assert capsys.readouterr().out.count("  validation_mismatched: accuracy") == 2


def test_the_metrics_of_glue_equal_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 200)
    probabilities = rng.dirichlet([1, 1], 200)
    probabilities[:80, targets[0]] += 1
    classes = probabilities.argmax(1)
    metrics = measure(targets, probabilities)
    assert metrics["accuracy"] == sklearn_metrics.accuracy_score(targets, classes)
    assert metrics["f1"] == sklearn_metrics.f1_score(targets, classes)
    correlation = sklearn_metrics.matthews_corrcoef(targets, classes)
    assert metrics["matthews_correlation"] == correlation
    assert measure(targets, np.tile([1.0, 0.0], (200, 1)))["f1"] == 0
    assert measure(np.zeros(9, int), np.tile([1.0, 0.0], (9, 1)))["f1"] == 0  # without a warning
    assert "f1" not in measure(targets, rng.dirichlet([1, 1, 1], 200))
    numbers = rng.normal(size=200)
    guesses = numbers + rng.normal(size=200)
    metrics = measure(numbers, guesses)
    assert metrics["pearson"] == pytest.approx(stats.pearsonr(numbers, guesses)[0])
    assert metrics["spearmanr"] == pytest.approx(stats.spearmanr(numbers, guesses)[0])


def test_the_split_that_is_tested_on(hub, glue, tmp_path):
    hub.datasets["a/test"] = {
        "default/train/0000.parquet": glue["sst2/train/0000.parquet"],
        "default/train/0001.parquet": glue["sst2/test/0000.parquet"],  # without labels
        "default/test/0000.parquet": glue["sst2/validation/0000.parquet"],
    }
    train, test = load(None, Path("hf:a/test"))
    assert (len(train), len(test)) == (60, 60)
    assert test.texts != train.texts
    again = load(None, Path("hf:a/test:train"), Path("hf:a/test"))[1]
    assert again.texts == test.texts
    assert load(None, Path("hf:a/test"), Path("hf:a/test:train"))[1].texts == train.texts
    hub.datasets["a/train"] = {"default/train/0000.parquet": glue["sst2/train/0000.parquet"]}
    train, test = load(None, Path("hf:a/train"))
    assert (len(train), len(test)) == (48, 12)  # the last fifth
    with pytest.raises(UserError, match=r"^hf:a/train: no split to test on; its splits are train$"):
        load(None, Path("hf:a/test"), Path("hf:a/train"))
    hub.datasets["nyu-mll/glue"] = glue
    with pytest.raises(
        UserError, match=r"^hf:nyu-mll/glue:sst2:test:1: no label in field 'label'$"
    ):
        load(None, Path("hf:nyu-mll/glue:sst2"), Path("hf:nyu-mll/glue:sst2:test"))


def test_tagged_words_of_the_hub(hub):
    words = {"tokens": [["Ada", "sleeps"]] * 9, "ner_tags": [[1, 0]] * 9}
    content = to_parquet(words, {"ner_tags": ["O", "B-PER", "I-PER"]})
    hub.datasets["a/words"] = {f"x/{split}/0000.parquet": content for split in ("train", "test")}
    train, test = entities.load(Path("hf:a/words"), None)
    assert (len(train), len(test)) == (9, 9)
    assert train.names == ["O", "B-PER", "I-PER"] and test.targets[0] == ["B-PER", "O"]


# ----------------------------------------------------------------------------- corpora, the cache


def test_a_corpus_of_the_hub_is_downloaded_once_and_read_offline(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    texts = sentences(300, 5)
    shards = [to_parquet({"text": part}) for part in (texts[:200], texts[200:])]
    files = {f"default/partial-train/000{i}.parquet": shard for i, shard in enumerate(shards)}
    hub.datasets["a/corpus"] = files | {"other/train/0000.parquet": shards[0]}
    folder = token_cache.prepare(["hf:a/corpus"], 300)
    assert hub.downloads == list(files)
    paths = find_files(["hf:a/corpus:train"])
    assert [text for path in paths for text in read_documents(path)] == texts
    forget()
    assert token_cache.prepare(["hf:a/corpus:default:train"], 300) == folder
    assert hub.downloads == list(files)
    hub.stop()
    forget()
    assert find_files(["hf:a/corpus"]) == paths  # the server does not answer
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    assert find_files(["hf:a/corpus"]) == paths
    with pytest.raises(UserError, match=r"^hf:a/corpus: other/train/0000.parquet: cannot be"):
        find_files(["hf:a/corpus:other"])
    with pytest.raises(UserError, match=r"^hf:a/another: cannot be fetched from http.*offline"):
        find_files(["hf:a/another"])
    blob = paths[1].resolve()
    blob.write_bytes(blob.read_bytes()[:-9])
    forget()
    with pytest.raises(UserError, match=f"^{blob}: delete this damaged file"):
        find_files(["hf:a/corpus"])


def test_what_is_not_on_the_hub(hub, glue, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # between two attempts
    hub.datasets = {"nyu-mll/glue": glue, "a/raw": {}}
    messages = {
        "hf:a/missing": "hf:a/missing: no such dataset on the hub, or a private one",
        "hf:a/b/c": "hf:a/b/c: cannot be fetched from http",
        "hf:": "hf:: cannot be fetched from http",
        "hf:a/raw": "hf:a/raw: the hub has no parquet files of this dataset",
        "hf:nyu-mll/glue": "hf:nyu-mll/glue: add one of the configurations to hf:nyu-mll/glue: "
        "cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli",
        "hf:nyu-mll/glue:snli": "hf:nyu-mll/glue:snli: add one of the configurations",
        "hf:nyu-mll/glue:rte:dev": "hf:nyu-mll/glue:rte: no split 'dev'; add one of them: test, ",
        "hf:nyu-mll/glue:rte:test:3": "hf:nyu-mll/glue:rte:test:3: ",
    }
    for name, message in messages.items():
        with pytest.raises(UserError) as caught:
            find_files([name])
        assert str(caught.value).startswith(message), str(caught.value)
    hub.cut = True
    with pytest.raises(UserError, match=r"^hf:nyu-mll/glue: rte/train/0000.parquet: "):
        find_files(["hf:nyu-mll/glue:rte"])
    hub.token = "secret"
    forget()
    with pytest.raises(UserError, match=r"^hf:a/raw: gated: .*HF_TOKEN$"):
        find_files(["hf:a/raw"])
    hub.stop()
    forget()
    with pytest.raises(UserError, match=r"^hf:a/raw: cannot be fetched from http.*refused"):
        find_files(["hf:a/raw"])


def test_the_variables_of_the_hub_apply(hub, glue, tmp_path):
    hub.datasets["nyu-mll/glue"] = glue
    hub.token = "secret"
    code = "from files.readers import find_files; print(find_files(['hf:nyu-mll/glue:wnli'])[0])"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "CLOZE_CACHE": str(tmp_path / "cloze")}
    for offline in "01":
        environment["HF_HUB_OFFLINE"] = offline
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert process.stdout.startswith(str(tmp_path / "home")), process.stderr
    assert hub.downloads == ["wnli/train/0000.parquet"]


def test_predictions_for_a_dataset_of_the_hub(hub, glue, finetuned, capsys):
    hub.datasets["nyu-mll/glue"] = glue
    counts = predict.main(["--model", str(finetuned[0]), "--file", "hf:nyu-mll/glue:sst2:test"])
    assert counts == {"answered": 60, "broken": 0, "cut": 0}

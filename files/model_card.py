"""What a saved folder says of itself: a model card, and how sentence-transformers pools.

Both are written after the model, from what the run has left in its folder. So a card states no
figure that the run did not measure, and a run that was stopped leaves none.
"""

import json
from pathlib import Path
from typing import Any

from files.disk import to_json, write_file

CARD = "README.md"
MARK = "This card was written by cloze"  # no README.md without it is replaced or removed
PIPELINE_TAGS = {  # the hub's names of our tasks
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
}
# The built-in reviews on the hub.
REVIEWS = {"mr": "cornell-movie-review-data/rotten_tomatoes", "imdb": "stanfordnlp/imdb"}
SENTENCE_TRANSFORMERS = {"": "Transformer", "1_Pooling": "Pooling"}  # its modules, by folder
NO_METRICS = ("seconds", "threshold")  # of what metrics.json says of a method
LIMITS = """The figures are of one run with one seed, on the test examples or the held-out text of
these data. Nothing else was measured: no other domain or language, no bias, no harm."""


def describe(folder: Path, run: Path, built_in: list[str]) -> None:
    """Write the model card of a saved model, if there is one, and of an encoder how it is pooled.

    Args:
        folder: of the model.
        run: the folder that has flags.json and environment.json.
        built_in: keys of REVIEWS that the run has read.
    """
    config = read_json(folder / "config.json")
    if not config:
        return
    task = config["architectures"][0].partition("For")[2]
    if task == "MaskedLM":
        write_modules(folder, config["hidden_size"])
    if is_foreign(folder / CARD):
        print(f"{folder / CARD}: not written by an earlier run, so it stays; no model card")
    else:
        write_file(folder / CARD, make_card(folder, run, task, built_in).encode())


def is_foreign(card: Path) -> bool:
    """Whether this README.md is none of our cards."""
    return card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file, or nothing where there is none."""
    return json.loads(path.read_bytes()) if path.is_file() else {}


def write_modules(folder: Path, width: int) -> None:
    """Let sentence-transformers average the final states, as predict.py --embeddings does."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(SENTENCE_TRANSFORMERS.items())
    ]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_file(folder / "1_Pooling" / "config.json", to_json(pooling))
    write_file(folder / "modules.json", to_json(modules))


def make_card(folder: Path, run: Path, task: str, built_in: list[str]) -> str:
    """The header that the hub reads (its documentation calls it model card metadata), and text."""
    from huggingface_hub import EvalResult, ModelCardData  # which is slow to import

    flags = read_json(run / "flags.json")
    metrics = read_json(folder / "metrics.json")
    methods = metrics.get("test") or {"validation": {"loss": metrics.get("validation_loss")}}
    figures = methods.get("pretrained", methods.get("validation", {}))
    figures = {n: v for n, v in figures.items() if v is not None and n not in NO_METRICS}
    files = flags.get("corpus") or [flags.get("train")]
    on_hub = [f.removeprefix("hf:").split(":")[0] for f in files if f and f.startswith("hf:")]
    source = ", ".join(built_in + on_hub) or "its author's own"
    base = flags.get("model")
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[task],
        tags=["cloze"],
        language="en" if built_in else None,
        datasets=[REVIEWS[name] for name in built_in] + on_hub or None,
        metrics=list(figures) or None,
        base_model=base if base and not Path(base).exists() else None,  # a name on the hub
        model_name=folder.resolve().name if figures else None,
        eval_results=[
            EvalResult(PIPELINE_TAGS[task], "custom", f"held-out part of {source}", name, value)
            for name, value in figures.items()
        ]
        or None,
    )
    seconds = metrics.get("seconds", sum(m.get("seconds", 0) for m in methods.values()))
    facts = {"data": source, "minutes": round(seconds / 60, 1) or None}
    facts |= {name: metrics.get(name) for name in ("n_weights", "tokens", "n_train", "n_test")}
    facts |= read_json(run / "environment.json")
    lines = [f"| {name} | {value} |" for name, value in facts.items() if value is not None]
    for method, scores in methods.items():
        cells = [f"{n} {v:.3f}" for n, v in scores.items() if v is not None and n not in NO_METRICS]
        lines += [f"| {method} | {', '.join(cells)} |"] if cells else []
    return f"""---
{header.to_yaml().strip()}
---

# {folder.resolve().name}

{MARK} from what the run measured. `transformers` loads the folder.

| | |
|---|---|
{chr(10).join(lines)}

{LIMITS}

The flags of the run:

    {json.dumps(flags, ensure_ascii=False)}
"""

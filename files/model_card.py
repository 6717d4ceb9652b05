"""What a saved folder says of itself: a model card, and how sentence-transformers pools.

Both are written after the model, from what the run has left in its folder. So a card states no
figure that the run did not measure, and a run that was stopped leaves none.
"""

import json
from pathlib import Path

from files.disk import read_json, to_json, write_file

CARD = "README.md"
MARK = "This card was written by cloze"  # no README.md without it is replaced or removed
PIPELINE_TAGS = {  # the hub's names of our tasks
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
}
# The built-in reviews on the hub.
REVIEWS = {"mr": "cornell-movie-review-data/rotten_tomatoes", "imdb": "stanfordnlp/imdb"}
NO_METRICS = ("seconds", "threshold")  # in what metrics.json has of a method
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
POOLING = {"pooling_mode_mean_tokens": True}


def describe_folder(folder: Path, run: Path, built_in: list[str]) -> None:
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
    if task == "MaskedLM":  # as predict.py --embeddings does
        (folder / "1_Pooling").mkdir(exist_ok=True)
        pooling = {"word_embedding_dimension": config["hidden_size"]} | POOLING
        write_file(folder / "1_Pooling" / "config.json", to_json(pooling))
        write_file(folder / "modules.json", to_json(MODULES))
    if is_foreign(folder / CARD):
        print(f"{folder / CARD}: not written by an earlier run, so it stays; no model card")
    else:
        card = make_card(folder, run, PIPELINE_TAGS[task], built_in)
        write_file(folder / CARD, card.encode())


def is_foreign(card: Path) -> bool:
    """Whether this README.md is none of our cards."""
    return card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace")


def make_card(folder: Path, run: Path, tag: str, built_in: list[str]) -> str:
    """The header of model card metadata that the hub reads, and what the run was."""
    from huggingface_hub import EvalResult, ModelCardData  # which is slow to import

    name = folder.resolve().name
    flags = read_json(run / "flags.json")
    metrics = read_json(folder / "metrics.json")
    methods = metrics.get("test", {})
    if "validation_loss" in metrics:  # of a pretraining
        methods = {"pretrained": {n: metrics[n] for n in ("validation_loss", "seconds")}}
    scores = {
        method: {n: x for n, x in values.items() if isinstance(x, float) and n not in NO_METRICS}
        for method, values in methods.items()
    }
    figures = scores.get("pretrained", {})
    files = flags.get("corpus") or [flags.get("train") or ""]
    on_hub = [f.removeprefix("hf:").split(":")[0] for f in files if f.startswith("hf:")]
    source = ", ".join(built_in + on_hub) or "its author's own"
    base = flags.get("model")
    results = [EvalResult(tag, "custom", f"held-out part of {source}", *x) for x in figures.items()]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag=tag,
        tags=["cloze"],
        language="en" if built_in else None,
        datasets=[REVIEWS[n] for n in built_in] + on_hub or None,
        metrics=list(figures) or None,
        base_model=base if base and not Path(base).exists() else None,  # a name on the hub
        model_name=name if figures else None,
        eval_results=results or None,
    )
    seconds = sum(values.get("seconds", 0) for values in methods.values())
    facts = {"data": source, "minutes": round(seconds / 60, 1) or None}
    facts |= {n: metrics.get(n) for n in ("n_weights", "tokens", "n_train", "n_test")}
    facts |= read_json(run / "environment.json")
    for method, values in scores.items():
        facts[method] = ", ".join(f"{n} {value:.3f}" for n, value in values.items())
    table = "\n".join(f"| {n} | {value} |" for n, value in facts.items() if value is not None)
    return f"""---
{header.to_yaml().strip()}
---

# {name}

{MARK} from what the run measured. `transformers` loads the folder.

| | |
|---|---|
{table}

The figures are of one run with one seed, on the held-out part of these data. Nothing else was
measured: no other domain or language, no bias, no harm. The flags of the run:

    {json.dumps(flags, ensure_ascii=False)}
"""

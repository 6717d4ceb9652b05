"""What a prediction costs: milliseconds per single text."""

import functools
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

from analysis.baselines import linear_model
from analysis.evaluation import forward_all
from analysis.experiment import Setup, load_classifier
from analysis.results import Plan
from labels import LabeledDataset, encode

TIMED_TEXTS = 64
ROUNDS = 6


def measure(plan: Plan, setup: Setup) -> dict[str, float]:
    """{method: milliseconds per text}."""
    milliseconds = {}
    for name, cells in plan.items():
        run = next(iter(cells.values()))[0]
        if run.method in ("ngrams", "lsa", "spectral"):
            pipeline = baseline_pipeline(run.method, setup)
            milliseconds[name] = time_predictions(pipeline.predict, setup)
        else:
            milliseconds[name] = time_network(run.model, setup)
    return milliseconds


def baseline_pipeline(method: str, setup: Setup) -> Pipeline:
    """A baseline from text to prediction, as it would be used; `spectral` costs what `lsa` does."""
    texts = setup.train.joined_texts()
    n_grams = (1, 2 if method == "ngrams" else 1)
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=n_grams, token_pattern=r"\S+")
    steps = [words]
    if method != "ngrams":
        n_components = min(256, len(words.fit(texts).vocabulary_))
        steps += [TruncatedSVD(n_components, random_state=0), Normalizer()]
    linear = linear_model(setup.train.names is not None, c=1.0)
    return make_pipeline(*steps, linear).fit(texts, setup.train.targets)


@functools.cache  # methods share a network
def time_network(model: str, setup: Setup) -> float:
    network, tokenizer, max_len = load_classifier(model, setup)

    def predict(texts: list[str]) -> None:
        rows, _ = encode(LabeledDataset(texts, None, np.zeros(1), None), tokenizer, max_len)
        forward_all(network, rows, np.arange(1), setup.autocast, network)

    return time_predictions(predict, setup)


def time_predictions(predict: Callable[[list[str]], Any], setup: Setup) -> float:
    texts = setup.test.texts[:TIMED_TEXTS]

    def predict_each() -> None:
        for text in texts:
            predict([text])

    return 1000 * min(timeit.repeat(predict_each, number=1, repeat=ROUNDS)) / len(texts)

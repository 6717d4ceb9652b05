"""A behavioural test set after CheckList (Ribeiro et al. 2020): what does a sentiment classifier
understand that single words do not say? 300 sentences from templates, which nothing is trained on.

A template makes a positive sentence, and a negative one by exchanging opposites. Where both consist
of the same words, only their order tells them apart.
"""

import itertools
import random

import numpy as np

from labels import LabeledDataset, from_lists

N_PAIRS = 30  # of a positive and a negative sentence, in each category

NOUNS = ("story", "cast", "script", "ending", "dialogue", "acting", "music", "first half")
OPPOSITES = {
    "good": ("good", "funny", "moving", "clever", "charming", "brilliant"),
    "bad": ("bad", "boring", "dull", "silly", "predictable", "terrible"),
    "loved": ("loved", "enjoyed", "liked"),
    "hated": ("hated", "disliked", "detested"),
    # intensifiers that sound like the opposite of what they intensify
    "terribly": ("terribly", "painfully", "dreadfully", "ridiculously"),
    "perfectly": ("beautifully", "remarkably", "wonderfully", "perfectly"),
    "film": ("this film", "this movie", "this picture"),
    "book": ("the book", "the sequel", "the original", "the remake", "the play", "the series"),
}

TEMPLATES = {
    "plain": (
        "the {noun} is {good}.",
        "this is a {good} film.",
        "I {loved} the {noun}.",
        "it was {good} and I {loved} the {noun}.",
    ),
    "negation": (
        "the {noun} isn't {bad} at all.",
        "the {noun} is never {bad}.",
        "I don't think that the {noun} is {bad}.",
        "this is not a {bad} film.",
        "nobody could call the {noun} {bad}.",
    ),
    "but": (
        "the {noun} is {bad}, but the film is {good}.",
        "I expected a {bad} film, but it is {good}.",
        "although the {noun} is {bad}, I {loved} it.",
        "at first it is {bad}, but then it gets {good}.",
    ),
    "intensifiers": (
        "the {noun} is {terribly} {good}.",
        "it is {terribly} {good} throughout.",
        "I found the {noun} {terribly} {good}.",
    ),
    "who did what": (
        "{film} is better than {book}.",
        "{film} puts {book} to shame.",
        "{film} makes {book} look bad.",
        "the critics {hated} the {noun}; I {loved} it.",
        "others may find it {bad}; I find it {good}.",
    ),
}


def sentences() -> LabeledDataset:
    """N_PAIRS pairs of each category; the templates of a category take turns."""
    rng = random.Random(0)
    texts: dict[str, None] = {}  # in order
    for i, templates in enumerate(TEMPLATES.values(), 1):
        for template in itertools.cycle(templates):
            words = {name: rng.choice(choices) for name, choices in OPPOSITES.items()}
            names = list(words)
            opposites = {names[k]: words[names[k ^ 1]] for k in range(len(names))}  # neighbours
            noun = rng.choice(NOUNS)
            pair = [template.format(noun=noun, **side) for side in (words, opposites)]
            pair = [text[0].upper() + text[1:] for text in pair]
            if texts.keys().isdisjoint(pair):
                texts |= dict.fromkeys(pair)
            if len(texts) == 2 * N_PAIRS * i:
                break
    return from_lists(list(texts), ["positive", "negative"] * (len(texts) // 2))


def by_category(correct: np.ndarray) -> dict[str, float]:
    """The accuracy of each category, from whether each of the sentences is right, (sentences,)."""
    return dict(zip(TEMPLATES, correct.reshape(len(TEMPLATES), -1).mean(1).tolist(), strict=True))

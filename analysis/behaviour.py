"""A behavioural test set after CheckList (Ribeiro et al. 2020): what does a sentiment classifier
understand that single words do not say? 300 sentences from templates, which nothing is trained on.

Each template is a pair: its first sentence is positive, its second one negative. The words of both
are often the same, so that their order or a "not" decides.
"""

import itertools
import random

import numpy as np

from labels import LabeledDataset, from_lists

N_PAIRS = 30  # of each category

WORDS = {
    "noun": ("story", "cast", "script", "ending", "dialogue", "acting", "music", "first half"),
    "good": ("good", "funny", "moving", "clever", "charming", "brilliant"),
    "bad": ("bad", "boring", "dull", "silly", "predictable", "terrible"),
    "rival": ("the book", "the sequel", "the original", "the remake", "the play", "the series"),
    # intensifiers that sound like the opposite of what they intensify
    "harsh": ("terribly", "awfully", "insanely", "ridiculously"),
    "kind": ("amazingly", "remarkably", "wonderfully", "perfectly"),
}

TEMPLATES = {
    "plain": (
        ("the {noun} is {good}.", "the {noun} is {bad}."),
        ("this is a {good} film.", "this is a {bad} film."),
        ("I loved the {noun}.", "I hated the {noun}."),
        ("it was {good} and I enjoyed the {noun}.", "it was {bad} and I disliked the {noun}."),
    ),
    "negation": (
        ("the {noun} isn't {bad} at all.", "the {noun} isn't {good} at all."),
        ("the {noun} is never {bad}.", "the {noun} is never {good}."),
        ("I don't think that the {noun} is {bad}.", "I don't think that the {noun} is {good}."),
        ("this is not a {bad} film.", "this is not a {good} film."),
        ("nobody could call the {noun} {bad}.", "nobody could call the {noun} {good}."),
    ),
    "but": (
        (
            "the {noun} is {bad}, but the film is {good}.",
            "the {noun} is {good}, but the film is {bad}.",
        ),
        (
            "I expected a {bad} film, but it is {good}.",
            "I expected a {good} film, but it is {bad}.",
        ),
        (
            "although the {noun} is {bad}, I enjoyed it.",
            "although the {noun} is {good}, I disliked it.",
        ),
        ("it starts {bad}, but then it gets {good}.", "it starts {good}, but then it gets {bad}."),
    ),
    "intensifiers": (
        ("the {noun} is {harsh} {good}.", "the {noun} is {kind} {bad}."),
        ("it is {harsh} {good} throughout.", "it is {kind} {bad} throughout."),
        ("I was {harsh} impressed by the {noun}.", "I was {kind} disappointed by the {noun}."),
    ),
    "who did what": (
        ("this film is better than {rival}.", "{rival} is better than this film."),
        ("this film puts {rival} to shame.", "{rival} puts this film to shame."),
        ("this film makes {rival} look {bad}.", "{rival} makes this film look {bad}."),
        ("the critics hated the {noun}; I loved it.", "the critics loved the {noun}; I hated it."),
        (
            "others may find it {bad}; I find it {good}.",
            "others may find it {good}; I find it {bad}.",
        ),
    ),
}


def sentences() -> LabeledDataset:
    """N_PAIRS pairs of each category; the templates of a category take turns."""
    rng = random.Random(0)
    texts: list[str] = []
    for templates in TEMPLATES.values():
        pairs: list[list[str]] = []
        for pair in itertools.cycle(templates):
            if len(pairs) == N_PAIRS:
                break
            words = {name: rng.choice(choices) for name, choices in WORDS.items()}
            filled = [text.format_map(words) for text in pair]
            filled = [text[0].upper() + text[1:] for text in filled]
            if not set(filled) & {text for other in pairs for text in other}:
                pairs.append(filled)
        texts += itertools.chain(*pairs)
    return from_lists(texts, ["positive", "negative"] * (len(texts) // 2))


def by_category(correct: np.ndarray) -> dict[str, float]:
    """The accuracy of each category, from whether each of the sentences is right, (sentences,)."""
    return dict(zip(TEMPLATES, correct.reshape(len(TEMPLATES), -1).mean(1).tolist(), strict=True))

"""The streams of random numbers: np.random.default_rng([seed, STREAM, ...]) for each purpose.

No stream depends on how much is drawn from another one. The numbers are part of every result: what
a seed means changes with them, so a new purpose gets a new number.
"""

WINDOW_ORDER = 0  # of pretraining, with the epoch
TRAINING_MASKS = 1  # with the step and the micro-batch
VALIDATION_MASKS = 2  # with the batch; the seed is always 0
LABEL_SAMPLE = 3  # --labels
TEXT_SAMPLE = 4  # of the pretraining text, for the baselines
EXAMPLE_ORDER = 5  # of fine-tuning, with the epoch; dropout too
RATE_CHOICE = 6  # the examples on which analyze.py chooses a learning rate
WORD_REMOVAL = 7  # the random words of explain.py --check
CHECKED_TEXTS = 8  # the texts of explain.py --check
LOSS = 9  # `Batch.generator`, with the key of the batch

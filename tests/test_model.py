"""The model against `transformers`, in memory and through a folder; its loss against dense ones."""

import dataclasses
import json
import random
import unicodedata

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
)

import model as model_module
from data import Batch
from files import hub_names, model_folder
from files.tokenizer import train_tokenizer
from model import Classifier, Config, MaskedLM, init_weights, preset

SMALL = Config(vocab_size=97, d_model=32, n_layers=3, n_heads=2, d_ff=48, max_len=64)
# a window of 4 to each side; sizes, thetas and eps that are nobody's default
LOCAL = dataclasses.replace(
    SMALL,
    n_layers=4,
    local_attention=9,
    global_attn_every_n_layers=2,
    global_rope_theta=500.0,
    local_rope_theta=20.0,
    norm_eps=1e-3,
)
CONFIGS = {
    "no windows": SMALL,
    "every second layer global": LOCAL,
    "every third, one head": dataclasses.replace(LOCAL, n_heads=1, global_attn_every_n_layers=3),
    "default thetas": dataclasses.replace(SMALL, local_attention=10, global_attn_every_n_layers=2),
    "one wide layer": Config(vocab_size=31, d_model=48, n_layers=1, n_heads=4, d_ff=5, max_len=64),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def randomize(model, seed=0):
    """Weights so large that every part matters, norms and biases included."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def sequences(config, lengths=(1, 37, 64, 2, 1, 11, 10, 9), seed=0):
    """(ids (T,), cu_seqlens, max_seqlen); and padded with 0: (ids, mask), each (S, max_seqlen)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, config.vocab_size, (n,), generator=generator) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return (torch.cat(rows), cu_seqlens, max(lengths)), (padded, (padded > 0).long())


def theirs(kind, model, **extra):
    """The model of `transformers` with the weights of ours."""
    c = model.config
    config = ModernBertConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        intermediate_size=c.d_ff,
        max_position_embeddings=c.max_len,
        local_attention=c.local_attention,
        global_attn_every_n_layers=c.global_attn_every_n_layers,
        global_rope_theta=c.global_rope_theta,
        local_rope_theta=c.local_rope_theta,
        norm_eps=c.norm_eps,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        attn_implementation="eager",
        **extra,
    )
    other = kind(config).eval()
    other.load_state_dict(model.state_dict())
    return other


# ------------------------------------------------------------------------------- as in transformers


@each_config
def test_logits_and_gradients_are_those_of_padded_transformers(config):
    ours = randomize(MaskedLM(config))
    other = theirs(ModernBertForMaskedLM, ours)
    flat, (padded, mask) = sequences(config)
    logits = ours.logits(*flat)
    expected = other(padded, attention_mask=mask).logits[mask.bool()]
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    direction = (
        torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
        / logits.numel() ** 0.5
    )
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = dict(other.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = float(gradients[name].grad.abs().max())
        torch.testing.assert_close(
            parameter.grad, gradients[name].grad, rtol=1e-5, atol=1e-5 * max(1, scale)
        )
        assert scale > 1e-3


@pytest.mark.parametrize(
    "change",
    (
        {"global_rope_theta": 550.0},
        {"local_rope_theta": 22.0},
        {"global_rope_theta": 20.0, "local_rope_theta": 500.0},
    ),
    ids=("global", "local", "swapped"),
)
def test_each_theta_has_its_own_layers(change):
    """The equality above would notice a wrong theta: its tolerance is far smaller."""
    flat, (padded, mask) = sequences(LOCAL)
    model = randomize(MaskedLM(dataclasses.replace(LOCAL, **change)))
    logits = model.logits(*flat)
    expected = theirs(ModernBertForMaskedLM, model)(padded, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - randomize(MaskedLM(LOCAL)).logits(*flat)).abs().max() > 0.05


@each_config
@pytest.mark.parametrize("pooling", ("mean", "cls"))
def test_classifier_is_that_of_transformers(config, pooling):
    ours = randomize(Classifier(config, 3, pooling))
    kind = ModernBertForSequenceClassification
    other = theirs(kind, ours, num_labels=3, classifier_pooling=pooling)
    flat, (padded, mask) = sequences(config)
    logits = ours(*flat)
    assert logits.std() > 0.5
    torch.testing.assert_close(
        logits, other(padded, attention_mask=mask).logits, rtol=1e-5, atol=1e-5
    )


# ----------------------------------------------------------------------------- folder and tokenizer

# letters of each script, with combining marks where it has them
SCRIPTS = {
    "Latin": [*range(0x41, 0x5B), *range(0x61, 0x7B), *range(0xC0, 0x180), *range(0x300, 0x310)],
    "Cyrillic": [*range(0x400, 0x460), *range(0x48A, 0x530)],
    "Devanagari": [*range(0x900, 0x970)],
    "Arabic": [*range(0x620, 0x66A), 0x200C, 0x200D],
    "Chinese and Japanese": [
        *range(0x4E00, 0x4E80),
        *range(0x3041, 0x3097),
        *range(0x30A1, 0x30FB),
    ],
}
SPACES = (" ", " ", " ", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b")
PUNCTUATION = ".,;:!?'\"()-\u2013…«»।،؟。、/@#$%&*_[]{}<>|~`^+=\\"


def generated_lines(n, seed):
    """Lines of one script each: words, frequent and new ones, digits and punctuation."""
    rng, lines = random.Random(seed), []
    letters = [
        [chr(x) for x in points if unicodedata.category(chr(x)) != "Cn"]
        for points in SCRIPTS.values()
    ]

    def word(alphabet, rng):
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 8)))

    for i in range(n):
        alphabet = letters[i % len(letters)]
        stock, line = random.Random(i % len(letters)), rng.choice(("", "", " ", "\t"))
        words = [word(alphabet, stock) for _ in range(50)]
        for _ in range(rng.randint(0, 25)):
            kind = rng.random()
            line += rng.choice(words) if kind < 0.6 else word(alphabet, rng) if kind < 0.8 else (
                str(rng.randint(0, 99999)) if kind < 0.85 else rng.choice(PUNCTUATION))  # fmt: skip
            line += rng.choice(SPACES) if rng.random() < 0.8 else ""
        lines.append(line)
    return lines


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(generated_lines(400, seed=1), 2000)


def saved(folder, tokenizer, kind=MaskedLM, *args, extra=None, config=LOCAL):
    """A random model with the vocabulary of the tokenizer, written to a folder."""
    config = dataclasses.replace(config, vocab_size=tokenizer.get_vocab_size())
    model = randomize(kind(config, *args))
    model_folder.save_model(folder, model, tokenizer, extra)
    return model


def load_theirs(auto, folder):
    other, info = auto.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return other.eval()


def test_folder_is_read_by_transformers(tmp_path, tokenizer):
    model = saved(tmp_path, tokenizer)
    other = load_theirs(AutoModelForMaskedLM, tmp_path)
    assert other.config.pad_token_id == 0
    flat, (padded, mask) = sequences(model.config)
    expected = other(padded, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(model.logits(*flat), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ("mean", "cls"))
def test_classifier_folder_survives_a_round_trip(tmp_path, tokenizer, pooling):
    """Ours, read by transformers with the same pooling, written by it, and opened by us."""
    names = {0: "a", 1: "b", 2: "ç"}
    folder = tmp_path / "ours"
    model = saved(folder, tokenizer, Classifier, 3, pooling, extra={"id2label": names})
    other = load_theirs(AutoModelForSequenceClassification, folder)
    assert other.config.classifier_pooling == pooling
    assert other.config.id2label == names
    flat, (padded, mask) = sequences(model.config)
    logits = other(padded, attention_mask=mask).logits
    torch.testing.assert_close(model(*flat), logits, rtol=1e-5, atol=1e-5)

    other.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    again, _, read_names = model_folder.open_model(tmp_path / "theirs", torch.device("cpu"))
    assert again.pooling == pooling
    assert read_names == list(names.values())
    assert torch.equal(again(*flat), model(*flat))


def test_pooling_that_config_json_does_not_name_is_the_default_of_transformers(tmp_path, tokenizer):
    names = {0: "a", 1: "b", 2: "ç"}
    model = saved(tmp_path, tokenizer, Classifier, 3, "cls", extra={"id2label": names})
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["classifier_pooling"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    other = load_theirs(AutoModelForSequenceClassification, tmp_path)
    assert other.config.classifier_pooling == "cls"
    flat, _ = sequences(model.config)
    again, _, _ = model_folder.open_model(tmp_path, torch.device("cpu"))
    assert torch.equal(again(*flat), model(*flat))


@each_config
def test_folder_survives_a_round_trip(tmp_path, tokenizer, config):
    """Ours, read and written by transformers, read by us: everything is equal."""
    model = saved(tmp_path / "ours", tokenizer, config=config)
    load_theirs(AutoModelForMaskedLM, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    read_config, weights, read_tokenizer, _ = model_folder.load_model(tmp_path / "theirs")
    not_saved = (hub_names.TIED, *model.pretraining_only)
    mine = {k: v for k, v in model.state_dict().items() if k not in not_saved}
    assert weights.keys() == mine.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in mine.items())
    for line in generated_lines(20, seed=3):
        assert read_tokenizer.encode(line).ids == tokenizer.encode(line).ids
    assert read_config == model.config
    again = MaskedLM(read_config)
    model_folder.load_weights(again, weights, tmp_path)
    flat, _ = sequences(model.config)
    assert torch.equal(again.eval().logits(*flat), model.logits(*flat))


def test_tokenizer_is_read_by_transformers(tmp_path, tokenizer):
    saved(tmp_path, tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path)
    n_tokens, n_unknown = 0, 0
    for line in generated_lines(1000, seed=2):
        ids = tokenizer.encode(line).ids
        assert other(line)["input_ids"] == ids, line
        n_tokens, n_unknown = (
            n_tokens + len(ids),
            n_unknown + ids.count(tokenizer.token_to_id("[UNK]")),
        )
    assert 0 < n_unknown < 0.1 * n_tokens  # equal, and not because all tokens are [UNK]
    assert other.mask_token_id == tokenizer.token_to_id("[MASK]") and other.pad_token_id == 0
    assert other.model_max_length == LOCAL.max_len


# --------------------------------------------------------------------------- batches and the losses


@each_config
def test_neighbours_do_not_matter(config):
    """Other words in one document leave the logits of its neighbours equal to the bit."""
    model = randomize(MaskedLM(config))
    (ids, cu_seqlens, longest), _ = sequences(config)
    other = sequences(config, seed=1)[0][0]
    before = model.logits(ids, cu_seqlens, longest)
    for first, last in cu_seqlens.unfold(0, 2, 1).tolist():
        changed = torch.cat((ids[:first], other[first:last], ids[last:]))
        after = model.logits(changed, cu_seqlens, longest)
        assert torch.equal(after[:first], before[:first]) and torch.equal(
            after[last:], before[last:]
        )
        assert last - first < 9 or not torch.equal(after[first:last], before[first:last])


@pytest.mark.parametrize("family", ("modern", "bert"))
def test_the_loss_is_the_dense_one(family):
    """A sum over masked tokens, from all logits; with its gradients."""
    model = randomize(MaskedLM(dataclasses.replace(LOCAL, family=family))).double()
    (ids, cu_seqlens, longest), _ = sequences(LOCAL, (5, 30, 3))
    masked, targets = [36, 1, 20, 3], [9, 9, 0, 50]
    batch = Batch(ids, cu_seqlens, longest, torch.tensor(masked), torch.tensor(targets))

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    losses = model(batch)
    counts = {name: count for name, (_, count) in losses.items()}
    assert counts == MaskedLM.loss_counts(batch) == {"masked_lm": 4}
    loss, _ = losses["masked_lm"]
    log_p = model.logits(ids, cu_seqlens, longest).log_softmax(-1)
    dense = -sum(log_p[i, target] for i, target in zip(masked, targets, strict=True))
    torch.testing.assert_close(loss.double(), dense, rtol=1e-6, atol=1e-6)
    result, expected = gradients(loss), gradients(dense)
    assert result.keys() == expected.keys()
    for name in result:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------- sizes and the first weights


@pytest.mark.parametrize(
    "wrong",
    (
        {"vocab_size": 0},
        {"n_layers": -1},
        {"n_heads": 3},
        {"d_model": 30},
        {"d_ff": 0},
        {"max_len": 0},
        {"local_attention": 0},
        {"global_attn_every_n_layers": 0},
        {"local_rope_theta": 0.0},
        {"norm_eps": -1e-5},
    ),
    ids=str,
)
def test_config_refuses_what_does_not_fit(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).removeprefix("n_")):
        dataclasses.replace(SMALL, **wrong)


def test_a_preset_changes_what_depends_on_a_field_unless_it_is_named_too():
    assert preset("tiny", d_model=128) == preset("tiny", d_model=128, n_heads=2, d_ff=384)
    bert = preset("tiny", family="bert")
    assert (bert.d_ff, bert.norm_eps) == (1056, 1e-12)
    named = preset("tiny", d_model=128, family="bert", n_heads=4, d_ff=100, norm_eps=1e-3)
    assert (named.n_heads, named.d_ff, named.norm_eps) == (4, 100, 1e-3)


@pytest.mark.parametrize("make", (MaskedLM, lambda config: Classifier(config, 50)))
def test_first_weights(make):
    """Normal, cut at 2 standard deviations by kind of matrix; biases are 0 and norms 1."""
    config = Config(
        vocab_size=300, d_model=128, n_layers=8, n_heads=2, d_ff=160, max_len=64, init_std=0.05
    )
    first, again, other = [], [], []
    for weights, seed in ((first, 5), (again, 5), (other, 6)):
        torch.manual_seed(seed)
        weights += make(config).state_dict().items()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert not any(
        torch.equal(a, b) for (_, a), (_, b) in zip(first, other, strict=True) if a.dim() == 2
    )
    uncut = {"Wo": 0.05 / 4, "dense": 0.05 / 4, "Wqkv": 0.05, "Wi": 0.05, "tok_embeddings": 0.05}
    uncut["classifier"] = 128**-0.5
    cut = 0.8796  # the deviation of a standard normal that is cut at 2
    for name, weight in first:
        if weight.dim() == 1:
            assert (weight == (0.0 if name.endswith("bias") else 1.0)).all(), name
            continue
        std = uncut["tok_embeddings" if name == "decoder.weight" else name.split(".")[-2]]
        assert float(weight.std()) == pytest.approx(cut * std, rel=0.03), name
        assert 1.95 * std < float(weight.abs().max()) <= 2 * std * 1.000001, name


def test_a_module_that_only_pretraining_needs_changes_no_other_weight(monkeypatch):
    """Wherever it is created: it is initialized last, and constructors draw from elsewhere."""

    class WithExtra(MaskedLM):
        pretraining_only = ("extra", "table")

    def extended():
        model = WithExtra(SMALL)
        model.extra = torch.nn.Linear(32, 32)
        model._modules = {"extra": model.extra, **model._modules}  # as if it were created first
        model.table = torch.nn.Parameter(torch.empty(4, 32))  # comes before those of modules
        return model

    plain, other = MaskedLM(SMALL), extended()
    for model in (plain, other):
        init_weights(model, SMALL, seed=5)
    for name, weight in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name
    for weight in (other.extra.weight, other.table):
        assert 0 < weight.abs().max() <= 2 * SMALL.init_std
    monkeypatch.setattr(WithExtra, "pretraining_only", ())  # the order matters
    init_weights(other, SMALL, seed=5)
    assert not torch.equal(other.head.dense.weight, plain.head.dense.weight)


def test_constructors_that_draw_random_numbers_change_no_other_weight(monkeypatch):
    torch.manual_seed(0)
    plain = MaskedLM(SMALL)

    class Encoder(model_module.Encoder):
        def __init__(self, config):
            torch.randn(7)
            super().__init__(config)

    monkeypatch.setattr(model_module, "Encoder", Encoder)
    torch.manual_seed(0)
    for name, weight in MaskedLM(SMALL).state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name]), name


@pytest.mark.parametrize("family", ("modern", "bert"))
def test_dropout_is_on_while_training_only(family):
    config = dataclasses.replace(SMALL, family=family)
    torch.manual_seed(0)
    model = Classifier(config, 3)
    assert model.dropout is model.model.dropout and model.dropout.p == 0
    flat, _ = sequences(config)
    without = model(*flat)
    model.dropout.p = 0.3
    assert not torch.equal(model.train()(*flat), model(*flat))
    assert torch.equal(model.eval()(*flat), without)

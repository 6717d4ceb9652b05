"""The transformer: configuration, block, encoder, heads, and the loss of pretraining.

Axes: T tokens of a batch, S sequences, N masked tokens, H heads, D head size. A batch is one flat
row of T tokens, never a padded rectangle; `cu_seqlens` (S + 1,) int32 says where each sequence
starts. Attention, pooling and BERT's positions look at it.

Two families share one block; `Config.family` selects between them:

    modern         ModernBERT (Warner et al. 2024, arXiv 2412.13663): a norm before each half of a
                   block (pre-norm), no biases, rotary positions, GeGLU.
    bert, roberta  BERT (Devlin et al. 2018, arXiv 1810.04805): a norm after each half (post-norm),
                   biases, learned positions and token types, GELU. RoBERTa leaves the first rows
                   of its table of positions unused.

Modules are named as `transformers` names those of ModernBERT, so that a saved folder needs no
conversion; files/hub_names.py translates the names of BERT and RoBERTa.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Rope, attention, rope_tables
from kernels.cross_entropy import linear_cross_entropy
from kernels.geglu import geglu
from kernels.norm import add_norm

# d_ff is 8/3 of d_model, rounded to 64: with GeGLU's third matrix this gives as many weights as
# BERT's two matrices of 4 x d_model.
PRESETS = {
    "tiny": dict(n_layers=2, d_model=256, n_heads=4, d_ff=704, vocab_size=8192, max_len=256),
    "small": dict(n_layers=6, d_model=384, n_heads=6, d_ff=1024, vocab_size=16384, max_len=256),
    "base": dict(n_layers=12, d_model=768, n_heads=12, d_ff=2048, vocab_size=32768, max_len=512),
}

FAMILIES = ("modern", "bert", "roberta")


@dataclass(frozen=True)
class Config:
    """The shape of a model; ValueError if its sizes do not fit together.

    files/hub_names.py writes every field to config.json, and refuses one it has no name for.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_len: int  # tokens of the longest sequence, [CLS] and [SEP] included
    local_attention: int = 128  # a local layer sees |i - j| <= local_attention // 2
    global_attn_every_n_layers: int = 1  # layers 0, n, 2n, ... are global; 1: there is no window
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    family: str = "modern"
    n_types: int = 2  # token types of BERT: those of a first text and those of a second
    unused_positions: int = 0  # rows of RoBERTa's table before the first position

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is none of {', '.join(FAMILIES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is str or value == field.default:
                continue
            if type(value) not in (int, field.type) or not 0 < value < 2**31:
                kind = field.type.__name__
                raise ValueError(f"{field.name} must be a positive {kind}, got {value}")
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(f"d_model {self.d_model} is not {self.n_heads} heads of even size")

    @property
    def is_modern(self) -> bool:
        return self.family == "modern"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def poolings(self) -> tuple[str, ...]:
        """What a classifier can read, keys of POOLINGS; the first is the default."""
        return ("mean", "cls") if self.is_modern else ("pooler", "mean", "cls")

    def window(self, layer: int) -> int | None:
        """How far a token of this layer sees to each side; None is the whole sequence."""
        is_global = not self.is_modern or layer % self.global_attn_every_n_layers == 0
        return None if is_global else self.local_attention // 2


def preset(name: str, **changes: int | str | None) -> Config:
    """The Config of a named size.

    Args:
        name: a key of PRESETS.
        changes: other fields of Config; None changes nothing. `d_model`, a multiple of the head
            size 64, and `family` also change the fields that depend on them and are not named.
    """
    changes = {field: value for field, value in changes.items() if value is not None}
    fields = PRESETS[name] | changes
    if "d_model" in changes:
        fields["n_heads"] = fields["d_model"] // 64
        fields["d_ff"] = math.ceil(8 * fields["d_model"] / 3 / 64) * 64
    if fields.get("family", "modern") != "modern":  # BERT's MLP has two matrices, GeGLU three
        fields["d_ff"] = 3 * fields["d_ff"] // 2
        fields["norm_eps"] = 1e-12
    return Config(**(fields | changes))


# ------------------------------------------------------------------------------------------ block


class FusedLinear(nn.Linear):
    """Several linear maps of one input in one matrix; Muon orthogonalizes each by itself."""

    def __init__(self, d_in: int, d_out: int, n_maps: int, bias: bool):
        super().__init__(d_in, n_maps * d_out, bias=bias)
        self.n_maps = n_maps


class Norm(nn.LayerNorm):
    """LayerNorm; the modern family has no bias."""

    def __init__(self, config: Config):
        super().__init__(config.d_model, config.norm_eps, bias=not config.is_modern)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return (residual + x, the norm of that sum); one pass on a GPU, without a bias."""
        if self.bias is None:
            return add_norm(x, residual, self.weight, self.eps)
        total = residual + x
        return total, self(total)


class Embeddings(nn.Module):
    """Token ids to vectors: (T,) to (T, d_model)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        if not config.is_modern:
            n_positions = config.unused_positions + config.max_len
            self.position_embeddings = nn.Embedding(n_positions, config.d_model)
            self.token_type_embeddings = nn.Embedding(config.n_types, config.d_model)
        self.norm = Norm(config)

    def forward(self, ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None) -> Tensor:
        x = self.tok_embeddings(ids)
        if not self.config.is_modern:
            lengths = cu_seqlens.diff()
            starts = cu_seqlens[:-1].repeat_interleave(lengths, output_size=len(ids))  # (T,)
            positions = torch.arange(len(ids), device=ids.device) - starts
            if token_types is None:
                token_types = torch.zeros_like(ids)
            token_types = token_types.clamp(max=self.config.n_types - 1)  # RoBERTa has one type

            x = x + self.token_type_embeddings(token_types)
            x = x + self.position_embeddings(positions + self.config.unused_positions)
        return self.norm(x)


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of x; None means all."""
    return x if rows is None else x.index_select(0, rows)


class Attention(nn.Module):
    """Multi-head self-attention within each sequence."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        has_bias = not config.is_modern
        self.n_heads = config.n_heads
        self.window = config.window(layer)
        self.Wqkv = FusedLinear(config.d_model, config.d_model, n_maps=3, bias=has_bias)
        self.Wo = nn.Linear(config.d_model, config.d_model, bias=has_bias)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rope: Rope | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        qkv = self.Wqkv(x).unflatten(-1, (3, self.n_heads, -1))  # (T, 3, H, D)
        heads = attention(qkv, cu_seqlens, max_seqlen, rope, self.window)  # (T, H, D)
        return self.Wo(select(heads.flatten(1), rows))  # (N, d_model)


class MLP(nn.Module):
    """Two linear maps around GeGLU (modern) or GELU (BERT)."""

    def __init__(self, config: Config):
        super().__init__()
        has_bias = not config.is_modern
        n_maps = 2 if config.is_modern else 1  # GeGLU: the half for the GELU, then the gate
        self.activation = geglu if config.is_modern else F.gelu
        self.Wi = FusedLinear(config.d_model, config.d_ff, n_maps, bias=has_bias)
        self.Wo = nn.Linear(config.d_ff, config.d_model, bias=has_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.Wo(self.activation(self.Wi(x)))


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream.

    Pre-norm (modern) normalizes the input of each half; post-norm (BERT) normalizes the sum. Each
    norm is fused with the addition before it, so a pre-norm block returns its last sum unadded, as
    (x, residual), for the norm that follows.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.is_pre_norm = config.is_modern
        # what layer 0 reads has just left the norm of the embeddings
        is_normed = self.is_pre_norm and layer == 0
        self.attn_norm = nn.Identity() if is_normed else Norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rope: Rope | None,
        dropout: nn.Module,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Take (x, residual), (T, d_model) each, whose sum is the residual stream; a residual of
        None is zero (layer 0, post-norm). Return both for `rows`; all tokens are attended to.
        """
        if not self.is_pre_norm:
            attended = self.attn(x, cu_seqlens, max_seqlen, rope, rows)
            _, x = self.attn_norm.after_add(dropout(attended), select(x, rows))
            _, x = self.mlp_norm.after_add(dropout(self.mlp(x)), x)
            return x, None

        residual, normed = (x, x) if residual is None else self.attn_norm.after_add(x, residual)
        attended = self.attn(normed, cu_seqlens, max_seqlen, rope, rows)
        residual, normed = self.mlp_norm.after_add(dropout(attended), select(residual, rows))
        return dropout(self.mlp(normed)), residual


class Encoder(nn.Module):
    """Token ids to the states of the last layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = Norm(config) if config.is_modern else None
        self.dropout = nn.Dropout(0.0)  # on hidden states only; set by --dropout

    def ropes(self, max_seqlen: int, device: torch.device) -> dict[int | None, Rope | None]:
        """The rotary tables for each window size that the layers have; BERT has none."""
        config = self.config
        if not config.is_modern:
            return {None: None}
        # powers of 2, so few that the cache drops no table to which a CUDA graph points
        n_positions = 2 ** max(6, (max_seqlen - 1).bit_length())
        tables = {}
        for window in {layer.attn.window for layer in self.layers}:
            theta = config.global_rope_theta if window is None else config.local_rope_theta
            tables[window] = rope_tables(n_positions, config.head_dim, theta, device)
        return tables

    def forward(
        self,
        ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_types: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute the final states.

        Args:
            ids: (T,) int64, the sequences end to end.
            cu_seqlens: (S + 1,) int32, where each sequence starts; the last entry is T.
            max_seqlen: length of the longest sequence, or more.
            token_types: (T,) int64, 0 in the first text of a pair and 1 in the second; BERT only.
            rows: (N,) int64, the tokens whose states are needed; None means all T. The last layer
                attends to all, and computes what follows for these alone.

        Returns:
            (N, d_model).
        """
        ropes = self.ropes(max_seqlen, ids.device)
        x = self.dropout(self.embeddings(ids, cu_seqlens, token_types))
        residual = None
        for layer in self.layers:
            rope = ropes[layer.attn.window]
            needed = rows if layer is self.layers[-1] else None
            x, residual = layer(x, residual, cu_seqlens, max_seqlen, rope, self.dropout, needed)
        return x if residual is None else self.final_norm.after_add(x, residual)[1]


# ------------------------------------------------------------------------------------------ heads


class Head(nn.Module):
    """Dense, GELU, norm: read by masked tokens and, in the modern family, by pooled texts too."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model, bias=not config.is_modern)
        self.norm = Norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


class Pooler(nn.Module):
    """BERT's vector of a text: dense and tanh of the state of its [CLS]."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x))


def mean_pool(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean state of each sequence: (T, d_model) to (S, d_model), in float32 at least."""
    if states.device.type == "mps":  # which has no segment_reduce
        return mean_pool(states.cpu(), cu_seqlens.cpu()).to(states.device)
    lengths = cu_seqlens.diff()
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    sums = torch.segment_reduce(states, "sum", lengths=lengths.long(), unsafe=True)
    return sums / lengths.clamp(min=1)[:, None]


def first_token(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The state of each sequence's [CLS]: (T, d_model) to (S, d_model)."""
    starts = cu_seqlens[:-1].clamp(max=len(states) - 1)  # an empty sequence may start at the end
    return states.index_select(0, starts)


# From states to one vector per text; "mean" and "cls" as in ModernBERT's `classifier_pooling`.
POOLINGS = {"mean": mean_pool, "cls": first_token, "pooler": first_token}


class MaskedLM(nn.Module):
    """Encoder, head and a decoder tied to the embedding, with the loss of pretraining."""

    task = "MaskedLM"
    # Names of the modules and parameters that only pretraining needs. They are initialized after
    # all others, saved in checkpoints, restored by --resume, and never exported.
    pretraining_only: tuple[str, ...] = ()

    def __init__(self, config: Config):
        super().__init__()
        seed = draw_seed()
        self.config = config
        self.model = Encoder(config)
        self.head = Head(config)
        if not config.is_modern:
            self.pooler = Pooler(config).requires_grad_(False)  # masked tokens do not read it
        self.decoder = nn.Linear(config.d_model, config.vocab_size)
        self.decoder.weight = self.model.embeddings.tok_embeddings.weight
        init_weights(self, config, seed)

    def logits(self, *inputs: Any) -> Tensor:
        """The logits of every token, (T, vocab_size), of the inputs of `Encoder.forward`."""
        return self.decoder(self.head(self.model(*inputs)))

    @staticmethod
    def loss_counts(batch: Any) -> dict[str, int]:
        """How many elements each loss of `forward` sums over, known before the forward pass because
        training divides by the counts of all micro-batches and ranks.
        """
        return {"masked_lm": len(batch.targets)}

    def forward(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        """Compute the losses of a `data.Batch`.

        Returns:
            {name: (sum, count)}, with the counts of `loss_counts`. "masked_lm" is the cross-entropy
            of the masked tokens, in nats (Devlin et al. 2018, section 3.1).
        """
        states = self.model(batch.ids, batch.cu_seqlens, batch.max_seqlen, rows=batch.masked)
        counts = self.loss_counts(batch)
        return {"masked_lm": (self.masked_lm_loss(states, batch), counts["masked_lm"])}

    def masked_lm_loss(self, states: Tensor, batch: Any) -> Tensor:
        """The sum of the cross-entropy over the N masked tokens, of their states (N, d_model)."""
        hidden = self.head(states)
        return linear_cross_entropy(hidden, self.decoder.weight, self.decoder.bias, batch.targets)


class Classifier(nn.Module):
    """A linear layer on the pooled states of a text.

    Equal to ModernBertForSequenceClassification with `classifier_pooling` "mean" or "cls", and to
    that of BERT and RoBERTa with "pooler"; `transformers` refuses BERTs with "mean" or "cls".

    Args:
        n_labels: outputs; 1 for regression.
        pooling: one of `config.poolings`; None: the first.
    """

    task = "SequenceClassification"

    def __init__(self, config: Config, n_labels: int, pooling: str | None = None):
        super().__init__()
        seed = draw_seed()
        self.pooling = pooling or config.poolings[0]
        if self.pooling not in config.poolings:
            raise ValueError(f"pooling {pooling!r} is none of {', '.join(config.poolings)}")
        self.config = config
        self.model = Encoder(config)
        if config.is_modern:
            self.head = Head(config)
        else:
            self.pooler = Pooler(config) if self.pooling == "pooler" else nn.Identity()
        self.dropout = self.model.dropout
        self.classifier = nn.Linear(config.d_model, n_labels)
        self.ngrams = None  # a files.ngrams.NgramModel, whose logits are added
        self.threshold = None  # probability that gives a label; None: one class or a number
        init_weights(self, config, seed)

    def features(self, ids: Tensor, cu_seqlens: Tensor, *inputs: Any) -> Tensor:
        """The vector of each text that the linear layer reads, (S, d_model)."""
        pooled = POOLINGS[self.pooling](self.model(ids, cu_seqlens, *inputs), cu_seqlens)
        return self.head(pooled) if self.config.is_modern else self.pooler(pooled)

    def forward(self, *inputs: Any) -> Tensor:
        """The logits of each text, (S, n_labels), of the inputs of `Encoder.forward`."""
        logits = self.classifier(self.dropout(self.features(*inputs)))
        return logits + self.ngrams(*inputs[:2]) if self.ngrams else logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """(S, n_labels): of classes that exclude each other, or of labels that do not."""
        return logits.softmax(-1) if self.threshold is None else logits.sigmoid()


class Tagger(nn.Module):
    """A linear layer on the state of each token, after the head in the modern family.

    Equal to the `ForTokenClassification` of BERT, RoBERTa and ModernBERT.
    """

    task = "TokenClassification"

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        seed = draw_seed()
        self.config = config
        self.model = Encoder(config)
        self.head = Head(config) if config.is_modern else nn.Identity()
        self.dropout = self.model.dropout
        self.classifier = nn.Linear(config.d_model, n_labels)
        init_weights(self, config, seed)

    def forward(self, *inputs: Any) -> Tensor:
        """The logits of each token, (T, n_labels), of the inputs of `Encoder.forward`."""
        return self.classifier(self.dropout(self.head(self.model(*inputs))))


# ----------------------------------------------------------------------------------------- weights


def is_part_of(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a weight is one of these parameters or belongs to one of these modules."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def draw_seed() -> int:
    """A seed for `init_weights`. It is drawn before a model creates its modules: their constructors
    draw from the same generator, and one more of them must not change all other weights.
    """
    return int(torch.randint(2**62, ()))


def init_weights(model: nn.Module, config: Config, seed: int) -> None:
    """Initialize all weights as ModernBERT does (Warner et al. 2024, appendix A).

    Matrices are normal, cut at 2 standard deviations; those named `Wo` and `dense` are smaller by
    sqrt(2 n_layers), and that of a classifier has d_model^-0.5. Biases are zero. Other vectors,
    such as those of norms, keep what their constructor gave them.
    """
    generator = torch.Generator().manual_seed(seed)
    last = getattr(model, "pretraining_only", ())
    for name, parameter in sorted(model.named_parameters(), key=lambda p: is_part_of(p[0], last)):
        std = config.init_std
        if name.endswith(("Wo.weight", "dense.weight")):
            std /= math.sqrt(2 * config.n_layers)
        elif name == "classifier.weight":
            std = config.d_model**-0.5
        if parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, 0.0, std, -2 * std, 2 * std, generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)

"""The transformer: config, block, encoder, head, the two losses, one init function.

Axes: T tokens of a batch, S sequences, N masked tokens. A batch is a flat row of T tokens, never a padded
rectangle; `cu_seqlens` (S + 1,) int32 says where each sequence begins (DESIGN: "unpadded").

Two families share the block, chosen by `Config.family`:

    modern         ModernBERT (Warner et al. 2024, arXiv 2412.13663): embedding norm, pre-norm without biases,
                   RoPE, GeGLU, a final norm; a text's vector is head(mean of its states)
    bert, roberta  BERT (Devlin et al. 2018, arXiv 1810.04805): learned positions and token types, post-norm,
                   biases, GELU; a text's vector is pooler(state of [CLS]). RoBERTa leaves the first rows of
                   its table of positions unused

Both have a head of dense, GELU and norm, and a decoder tied to the embedding. Modules carry the names that
`transformers` gives ModernBERT's; `hub_names.py` knows BERT's.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels.attention import Rope, attention, rope_tables
from kernels.cross_entropy import linear_cross_entropy
from kernels.geglu import geglu
from kernels.norm import add_norm

# d_ff is 8/3 of d_model, rounded to 64: with GeGLU's third matrix, as many weights as BERT's 4 x d_model.
PRESETS = {
    "tiny": {"n_layers": 2, "d_model": 256, "n_heads": 4, "d_ff": 704, "vocab_size": 8192, "max_len": 256},
    "small": {"n_layers": 6, "d_model": 384, "n_heads": 6, "d_ff": 1024, "vocab_size": 16384, "max_len": 256},
    "base": {
        "n_layers": 12,
        "d_model": 768,
        "n_heads": 12,
        "d_ff": 2048,
        "vocab_size": 32768,
        "max_len": 512,
    },
}


FAMILIES = ("modern", "bert", "roberta")


def preset(
    name: str, family: str = "modern", n_layers: int | None = None, d_model: int | None = None
) -> dict[str, int | float | str]:
    """The fields of a Config, perhaps with another depth, or another width in heads of 64. BERT's have two
    matrices for GeGLU's three, with as many weights together."""
    row = PRESETS[name] | ({"n_layers": n_layers} if n_layers else {})
    if d_model:
        d_ff = -(-8 * d_model // 3 // 64) * 64
        row |= {"d_model": d_model, "n_heads": d_model // 64, "d_ff": d_ff}
    bert = {"family": family, "d_ff": 3 * row["d_ff"] // 2, "norm_eps": 1e-12}
    return row if family == "modern" else row | bert


@dataclass(frozen=True)
class Config:
    """The shape of a model. `max_len` counts [CLS] and [SEP]. Raises ValueError where the sizes do not
    fit."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_len: int
    local_attention: int = 128  # a local layer sees |i - j| <= local_attention // 2
    global_attn_every_n_layers: int = 1  # layers 0, n, 2n, ... are global; 1 means that there is no window
    global_rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    family: str = "modern"
    n_types: int = 2  # of tokens, in BERT: those of a first text and those of a second
    unused_positions: int = 0  # rows of RoBERTa's table before the first position

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is none of {', '.join(FAMILIES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "family":
                continue
            least = 0 if field.name == "unused_positions" else 1 if field.type is int else 1e-30
            if not least <= value < 2**31 or (field.type is int and not isinstance(value, int)):
                raise ValueError(f"{field.name} must be a positive {field.type.__name__}, got {value}")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model {self.d_model} does not part into {self.n_heads} heads of even size")

    @property
    def is_modern(self) -> bool:
        return self.family == "modern"

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def window(self, layer: int) -> int | None:
        """How far a token of this layer sees to each side; None is the whole sequence."""
        is_global = not self.is_modern or layer % self.global_attn_every_n_layers == 0
        return None if is_global else self.local_attention // 2


class Norm(nn.Module):
    """LayerNorm, in the modern family without bias."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = None if config.is_modern else nn.Parameter(torch.zeros(config.d_model))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual + x, the norm of that), in one pass."""
        total, normed = add_norm(x, residual, self.weight, self.eps)
        return total, normed if self.bias is None else normed + self.bias


class Embeddings(nn.Module):
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
        x = self.tok_embeddings(ids)  # (T,) to (T, d_model)
        if not self.config.is_modern:
            starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(ids))
            position = torch.arange(len(ids), device=ids.device) - starts
            types = torch.zeros_like(ids) if token_types is None else token_types
            x = x + self.token_type_embeddings(types.clamp(max=self.config.n_types - 1))
            x = x + self.position_embeddings(position + self.config.unused_positions)
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.heads = (3, config.n_heads, config.head_dim)
        self.window = config.window(layer)
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=not config.is_modern)
        self.Wo = nn.Linear(config.d_model, config.d_model, bias=not config.is_modern)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rope: Rope | None) -> Tensor:
        qkv = self.Wqkv(x).unflatten(-1, self.heads)  # (T, 3, n_heads, head_dim)
        return self.Wo(attention(qkv, cu_seqlens, max_seqlen, rope, self.window).flatten(1))  # (T, d_model)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.activation = geglu if config.is_modern else F.gelu
        n_inner = 2 * config.d_ff if config.is_modern else config.d_ff
        self.Wi = nn.Linear(config.d_model, n_inner, bias=not config.is_modern)
        self.Wo = nn.Linear(config.d_ff, config.d_model, bias=not config.is_modern)

    def forward(self, x: Tensor) -> Tensor:
        return self.Wo(self.activation(self.Wi(x)))


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU, where random numbers would take 8% of a step, one of 64 bits serves four."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not (self.training and self.p):
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        n_dropped = round(self.p * 2**16)  # of the values that 16 bits have
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= n_dropped - 2**15
        return x * kept.to(x.dtype).div_(1 - n_dropped / 2**16)


class Block(nn.Module):
    """Pre-norm (modern): each half adds to the stream what it computed from the normed stream. Post-norm
    (BERT): each half adds to the stream what it computed from it, and the sum is normed."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.is_pre_norm = config.is_modern
        # the embedding norm stands right before layer 0, which with pre-norm has none of its own
        self.attn_norm = nn.Identity() if self.is_pre_norm and layer == 0 else Norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rope: Rope | None, dropout: nn.Module
    ) -> Tensor:
        if self.is_pre_norm:
            attended = self.attn(self.attn_norm(x), cu_seqlens, max_seqlen, rope)
            x, normed = self.mlp_norm.after_add(dropout(attended), x)
            return x + dropout(self.mlp(normed))
        attended = self.attn(x, cu_seqlens, max_seqlen, rope)
        _, x = self.attn_norm.after_add(dropout(attended), x)
        _, x = self.mlp_norm.after_add(dropout(self.mlp(x)), x)
        return x


class Encoder(nn.Module):
    """ids (T,) and cu_seqlens (S + 1,) to the final states (T, d_model). `token_types` (T,) tell BERT the
    first text of a pair, 0, from the second, 1; the modern family has none."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = Norm(config) if config.is_modern else nn.Identity()
        self.dropout = Dropout(0.0)  # on hidden states only; fine-tuning may raise it

    def ropes(self, max_seqlen: int, device: torch.device) -> dict[int | None, Rope | None]:
        """The rotation of each window's layers; BERT's have none."""
        config = self.config
        if not config.is_modern:
            return {None: None}
        thetas = {None: config.global_rope_theta, config.local_attention // 2: config.local_rope_theta}
        windows = {layer.attn.window for layer in self.layers}
        return {w: rope_tables(max_seqlen, config.head_dim, thetas[w], device) for w in windows}

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_types: Tensor | None = None
    ) -> Tensor:
        rope = self.ropes(max_seqlen, ids.device)
        x = self.dropout(self.embeddings(ids, cu_seqlens, token_types))
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_seqlen, rope[layer.attn.window], self.dropout)
        return self.final_norm(x)


class Head(nn.Module):
    """The head that masked rows read, and in the modern family pooled windows and the classifier too."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model, bias=not config.is_modern)
        self.norm = Norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


def mean_pool(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The float32 mean of each sequence's states, [CLS] and [SEP] too: (T, d_model) to (S, d_model)."""
    lengths = cu_seqlens.diff()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.is_cuda:  # where index_add adds in no fixed order; elsewhere it is many times as fast
        sums = torch.segment_reduce(x, "sum", lengths=lengths.long(), unsafe=True)
    else:
        sequence = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths, output_size=len(x))
        sums = torch.zeros(len(lengths), x.shape[1], dtype=x.dtype, device=x.device).index_add(0, sequence, x)
    return sums / lengths.clamp(min=1)[:, None]


class Pooler(nn.Module):
    """BERT's vector of a text: dense and tanh of the state of its [CLS]."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)

    def forward(self, states: Tensor, cu_seqlens: Tensor) -> Tensor:
        return torch.tanh(self.dense(states.index_select(0, cu_seqlens[:-1])))  # (T, d_model) to (S, d_model)


def pooled(model: "MaskedLM | Classifier", states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The vector of each text that a family's classifier reads, (T, d_model) to (S, d_model)."""
    if model.config.is_modern:
        return model.head(mean_pool(states, cu_seqlens))
    return model.pooler(states, cu_seqlens)


class MaskedLM(nn.Module):
    """Encoder, head and tied decoder, with the two losses of pretraining."""

    task = "MaskedLM"

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Encoder(config)
        self.head = Head(config)
        if not config.is_modern:
            self.pooler = Pooler(config)
        self.decoder = nn.Linear(config.d_model, config.vocab_size)
        self.decoder.weight = self.model.embeddings.tok_embeddings.weight
        self.bag_bias = nn.Parameter(torch.zeros(config.vocab_size))  # of the pooled loss; not exported
        init_weights(self, config)

    def logits(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_types: Tensor | None = None
    ) -> Tensor:
        """The logits of every token, (T, vocab_size)."""
        return self.decoder(self.head(self.model(ids, cu_seqlens, max_seqlen, token_types)))

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """The two losses of a `data.Batch`, as sums: over its masked tokens, and over its bags.

        The first is masked-language modelling (Devlin et al. 2018, section 3.1). The second predicts from
        the pooled vector the words of the document (the bag-of-words objective of DupMAE, Xiao et al. 2022,
        arXiv 2211.08769, section 3.2); it is 0 where the batch has no bags.
        """
        states = self.model(batch.ids, batch.cu_seqlens, batch.max_seqlen)
        embedding = self.decoder.weight
        masked = self.head(states.index_select(0, batch.masked))  # (N, d_model)
        token_loss = linear_cross_entropy(masked, embedding, self.decoder.bias, batch.targets)
        if batch.cu_bags is None:
            return token_loss, torch.zeros_like(token_loss)
        vectors = pooled(self, states, batch.cu_seqlens)  # (S, d_model)
        bags = (batch.bag_ids, batch.bag_weights, batch.cu_bags)
        return token_loss, linear_cross_entropy(vectors, embedding, self.bag_bias, *bags)


class Classifier(nn.Module):
    """A linear layer on the pooled vector: BertForSequenceClassification, RobertaForSequenceClassification,
    or ModernBertForSequenceClassification with classifier_pooling "mean"."""

    task = "SequenceClassification"

    def __init__(self, config: Config, n_labels: int, pooling: str | None = None):
        super().__init__()
        self.config = config
        self.pooling = pooling or ("mean" if config.is_modern else "pooler")
        self.model = Encoder(config)
        if config.is_modern:
            self.head = Head(config)
        else:
            self.pooler = Pooler(config)
        self.dropout = self.model.dropout
        self.classifier = nn.Linear(config.d_model, n_labels)
        init_weights(self, config)

    def features(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_types: Tensor | None = None
    ) -> Tensor:
        """The pooled vector of each sequence, (S, d_model)."""
        return pooled(self, self.model(ids, cu_seqlens, max_seqlen, token_types), cu_seqlens)

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_types: Tensor | None = None
    ) -> Tensor:
        features = self.features(ids, cu_seqlens, max_seqlen, token_types)
        return self.classifier(self.dropout(features))  # (S, n_labels)


class Tagger(nn.Module):
    """A linear layer on the state of each token, in the modern family through the head:
    ModernBertForTokenClassification, BertForTokenClassification, RobertaForTokenClassification."""

    task = "TokenClassification"

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        self.config = config
        self.model = Encoder(config)
        self.head = Head(config) if config.is_modern else nn.Identity()
        self.dropout = self.model.dropout
        self.classifier = nn.Linear(config.d_model, n_labels)
        init_weights(self, config)

    def forward(
        self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_types: Tensor | None = None
    ) -> Tensor:
        states = self.head(self.model(ids, cu_seqlens, max_seqlen, token_types))
        return self.classifier(self.dropout(states))  # (T, n_labels)


class ShapesOnly(TorchFunctionMode):
    """Within it, on the meta device, a model is made without numbers: to draw them there, from nothing, would
    import the compiler, seconds of every start."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def init_weights(module: nn.Module, config: Config) -> None:
    """ModernBERT's: normal weights cut at 2 standard deviations, those that write to the stream smaller by
    sqrt(2 n_layers) (Warner et al. 2024, appendix A; Megatron's scheme), biases zero, norms one."""
    for name, parameter in module.named_parameters():
        std = config.init_std
        if name.endswith(("Wo.weight", "dense.weight")):
            std /= math.sqrt(2 * config.n_layers)
        elif name == "classifier.weight":
            std = config.d_model**-0.5
        if parameter.dim() == 2:
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)

"""The transformer: config, block, encoder, head, the two losses, one init function.

Axes: T tokens of a batch, S sequences, N masked tokens. A batch is a flat row of T tokens, never a padded
rectangle; `cu_seqlens` (S + 1,) int32 says where each sequence begins (DESIGN: "unpadded").

The arithmetic is ModernBERT's (Warner et al. 2024, arXiv 2412.13663): embedding norm, pre-norm without
biases, RoPE, GeGLU, a final norm, a head of dense, GELU and norm, a decoder tied to the embedding. Modules
carry the names that `transformers` gives them, so that a saved model is read there as it is.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import Rope, add_norm, attention, geglu, linear_cross_entropy, rope_tables

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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value <= 0 or (field.type is int and not isinstance(value, int)):
                raise ValueError(f"{field.name} must be a positive {field.type.__name__}, got {value}")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model {self.d_model} does not part into {self.n_heads} heads of even size")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    def window(self, layer: int) -> int | None:
        """How far a token of this layer sees to each side; None is the whole sequence."""
        return None if layer % self.global_attn_every_n_layers == 0 else self.local_attention // 2


class Norm(nn.Module):
    """LayerNorm without bias; with `x`, the residual addition before it belongs to the same pass."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, self.weight, self.eps)


class Embeddings(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.norm = Norm(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.tok_embeddings(ids))  # (T,) to (T, d_model)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.heads = (3, config.n_heads, config.head_dim)
        self.window = config.window(layer)
        self.Wqkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.Wo = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rope: Rope) -> Tensor:
        qkv = self.Wqkv(x).unflatten(-1, self.heads)  # (T, 3, n_heads, head_dim)
        return self.Wo(attention(qkv, cu_seqlens, max_seqlen, rope, self.window).flatten(1))  # (T, d_model)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.Wi = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.Wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.Wo(geglu(self.Wi(x)))


class Block(nn.Module):
    """Pre-norm: each half adds to the stream what it computed from the normed stream."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        # the embedding norm stands right before layer 0, which therefore has none of its own
        self.attn_norm = nn.Identity() if layer == 0 else Norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rope: Rope, dropout: nn.Module
    ) -> Tensor:
        attended = self.attn(self.attn_norm(x), cu_seqlens, max_seqlen, rope)
        x, normed = self.mlp_norm.after_add(dropout(attended), x)
        return x + dropout(self.mlp(normed))


class Encoder(nn.Module):
    """ids (T,) and cu_seqlens (S + 1,) to the final states (T, d_model)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = Norm(config)
        self.dropout = nn.Dropout(0.0)  # on hidden states only; fine-tuning may raise it

    def forward(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        config = self.config
        thetas = {None: config.global_rope_theta, config.local_attention // 2: config.local_rope_theta}
        windows = {layer.attn.window for layer in self.layers}
        rope = {w: rope_tables(max_seqlen, config.head_dim, thetas[w], ids.device) for w in windows}
        x = self.dropout(self.embeddings(ids))
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_seqlen, rope[layer.attn.window], self.dropout)
        return self.final_norm(x)


class Head(nn.Module):
    """The one head: masked rows, pooled windows and the classifier all read it."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model, bias=False)
        self.norm = Norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


def mean_pool(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each sequence's states, [CLS] and [SEP] included, in float32: (T, d_model) to (S,
    d_model)."""
    lengths = cu_seqlens.diff()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.device.type == "mps":  # has no segment_reduce
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
        sums = torch.zeros(len(lengths), x.shape[1], dtype=x.dtype, device=x.device).index_add(0, sequence, x)
    else:
        sums = torch.segment_reduce(x, "sum", lengths=lengths.long(), unsafe=True)
    return sums / lengths.clamp(min=1)[:, None]


class MaskedLM(nn.Module):
    """Encoder, head and tied decoder, with the two losses of pretraining."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Encoder(config)
        self.head = Head(config)
        self.decoder = nn.Linear(config.d_model, config.vocab_size)
        self.decoder.weight = self.model.embeddings.tok_embeddings.weight
        self.bag_bias = nn.Parameter(torch.zeros(config.vocab_size))  # of the pooled loss; not exported
        init_weights(self, config)

    def logits(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The logits of every token, (T, vocab_size)."""
        return self.decoder(self.head(self.model(ids, cu_seqlens, max_seqlen)))

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """The two losses of a `data.Batch`, as sums: over its masked tokens, and over its sequences.

        The first is masked-language modelling (Devlin et al. 2018, section 3.1). The second predicts from
        head(mean) the words of the document (the bag-of-words objective of DupMAE, Xiao et al. 2022, arXiv
        2211.08769, section 3.2).
        """
        states = self.model(batch.ids, batch.cu_seqlens, batch.max_seqlen)
        embedding = self.decoder.weight
        masked = self.head(states.index_select(0, batch.masked))  # (N, d_model)
        token_loss = linear_cross_entropy(masked, embedding, self.decoder.bias, batch.targets)
        pooled = self.head(mean_pool(states, batch.cu_seqlens))  # (S, d_model)
        bags = (batch.bag_ids, batch.bag_weights, batch.cu_bags)
        return token_loss, linear_cross_entropy(pooled, embedding, self.bag_bias, *bags)


class Classifier(nn.Module):
    """classifier(head(mean)): ModernBertForSequenceClassification with classifier_pooling "mean"."""

    def __init__(self, config: Config, n_labels: int):
        super().__init__()
        self.config = config
        self.model = Encoder(config)
        self.head = Head(config)
        self.dropout = self.model.dropout
        self.classifier = nn.Linear(config.d_model, n_labels)
        init_weights(self, config)

    def features(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """head(mean) of each sequence, (S, d_model)."""
        return self.head(mean_pool(self.model(ids, cu_seqlens, max_seqlen), cu_seqlens))

    def forward(self, ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return self.classifier(self.dropout(self.features(ids, cu_seqlens, max_seqlen)))  # (S, n_labels)


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

"""The reference implementations that bench.py compares ours with.

- BERT and ModernBERT of `transformers`, and torch's own nn.TransformerEncoder, on padded batches.
  ModernBERT computes logits for masked tokens only (its option `sparse_prediction`), and so does
  our wrapper of torch's encoder. BERT of `transformers` has no such option: it computes the logits
  of all tokens, padding included.
- Each fused operation of kernels/ in plain torch, eager and compiled.

Axes: T tokens, S sequences, L the longest of them, H heads, D head size, N masked tokens.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.timing import Call, Hardware
from data import Batch
from files.disk import UserError
from kernels.attention import Rope, attention, rope_tables, rotate
from kernels.cross_entropy import linear_cross_entropy
from kernels.dispatch import low_precision
from kernels.geglu import geglu
from kernels.norm import add_norm
from model import Config

IGNORED = -100  # the label of a token that is not predicted

# ------------------------------------------------------------------------------------ whole models


def pad(flat: Tensor, cu_seqlens: Tensor, value: int = 0, at_least: int = 0) -> Tensor:
    """Pad sequences that lie end to end, (T,), to the longest or to `at_least`: (S, L)."""
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    sequences = flat.split(lengths)
    padded = pad_sequence(sequences, batch_first=True, padding_value=value)
    return F.pad(padded, (0, max(0, at_least - padded.shape[1])), value=value)


def padded_inputs(batch: Batch) -> dict[str, Tensor]:
    """The arguments of a masked language model of `transformers`, each (S, L)."""
    labels = torch.full_like(batch.ids, IGNORED)
    labels[batch.masked] = batch.targets
    return {
        "input_ids": pad(batch.ids, batch.cu_seqlens),
        "attention_mask": pad(torch.ones_like(batch.ids), batch.cu_seqlens),
        "labels": pad(labels, batch.cu_seqlens, IGNORED),
    }


class TorchEncoder(nn.Module):
    """Masked-language modelling with nn.TransformerEncoder, called like `transformers`."""

    def __init__(self, config: Config):
        super().__init__()
        d_model = config.d_model
        self.words = nn.Embedding(config.vocab_size, d_model)
        self.positions = nn.Embedding(config.max_len, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, config.n_heads, 4 * d_model, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.n_layers, enable_nested_tensor=False)
        self.decoder = nn.Linear(d_model, config.vocab_size)
        self.decoder.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)  # (S, L, d_model)
        is_masked = labels != IGNORED
        logits = self.decoder(x[is_masked])  # (N, V)
        return SimpleNamespace(loss=F.cross_entropy(logits.float(), labels[is_masked]))


def build(name: str, config: Config, attention: str, n_labels: int = 0) -> nn.Module:
    """Build "bert", "modernbert" or "torch" with the shape of a config.

    `attention` is that of transformers, "eager" or "sdpa"; with `n_labels`, ModernBERT classifies.
    """
    if name == "torch":
        return TorchEncoder(config)
    try:
        import transformers
    except ImportError:
        problem = "transformers is not installed; pip install -r requirements-dev.txt"
        raise UserError(f"--against hf: {problem}") from None

    fields = {"vocab_size": config.vocab_size, "hidden_size": config.d_model, "pad_token_id": 0}
    fields |= {"num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads}
    fields |= {"attn_implementation": attention}
    if name == "bert":
        fields |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # as the others
        bert_config = transformers.BertConfig(**fields, intermediate_size=4 * config.d_model)
        return transformers.BertForMaskedLM(bert_config)

    fields |= dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1)
    fields |= {"intermediate_size": config.d_ff, "global_attn_every_n_layers": 1}
    if n_labels:
        fields |= {"num_labels": n_labels, "classifier_pooling": "mean"}
        model_class = transformers.ModernBertForSequenceClassification
    else:
        fields |= {"sparse_prediction": True}
        model_class = transformers.ModernBertForMaskedLM
    return model_class(transformers.ModernBertConfig(**fields))


# -------------------------------------------------------------------------------- single operations


def padded_attention(batch: Batch, rope: Rope) -> Callable[..., Tensor]:
    """Attention of qkv (T, 3, H, D) by padding and F.scaled_dot_product_attention."""
    lengths = batch.cu_seqlens.diff()
    starts = batch.cu_seqlens[:-1][lengths > 0]
    lengths = lengths[lengths > 0]
    position = torch.arange(len(rope[0]), device=lengths.device)
    is_token = position < lengths[:, None]  # (S, L)
    rows = is_token.flatten().nonzero()[:, 0]  # here, because it waits for a GPU
    index = (starts[:, None] + position).clamp(max=len(batch.ids) - 1)

    def attend(qkv: Tensor, *_: Any) -> Tensor:
        q, k, v = qkv[index].permute(2, 0, 3, 1, 4)  # (S, H, L, D) each
        q = rotate(q, rope)
        k = rotate(k, rope)
        heads = F.scaled_dot_product_attention(q, k, v, is_token[:, None, None])
        return heads.transpose(1, 2).flatten(0, 1).index_select(0, rows)  # (T, H, D)

    return attend


def library_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, rope: Rope, positions: Tensor
) -> Tensor:
    """The same by torch's attention of sequences that lie end to end, which needs a GPU."""
    cos, sin = (table[positions][:, None, None] for table in rope)  # (T, 1, 1, D / 2)
    a, b = qkv[:, :2].chunk(2, dim=-1)  # (T, 2, H, D / 2) each
    q, k = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).unbind(1)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return varlen_attn(q.to(qkv.dtype), k.to(qkv.dtype), qkv[:, 2], *lengths)


def low(x: Tensor) -> Tensor:
    """x in the precision of autocast, which leaves operations that it does not know alone."""
    return x.to(low_precision(x) or x.dtype)


def library_head(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Torch's own fusion, in chunks; without options it would be `plain_head`. In 16 bits it is
    less exact than the others, because it adds the losses of the chunks in that precision."""
    settings = {"linear_bias": low(bias), "reduction": "sum"}
    settings["options"] = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(low(hidden), low(weight), targets, **settings)


def plain_head(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()  # (N, V)
    return F.cross_entropy(logits, targets, reduction="sum")


def plain_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple:
    residual = x + residual
    return residual, low(F.layer_norm(residual, weight.shape, weight, eps=eps))


def plain_geglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return F.gelu(a) * b


def forward_backward(function: Callable, inputs: tuple, hardware: Hardware) -> tuple[Tensor, ...]:
    """The outputs of a function, and the gradients of its float inputs when they are their own."""
    inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    with hardware.autocast():
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [out.detach() for out in outputs])
    return *outputs, *(leaf.grad for leaf in leaves)


def operations(
    batch: Batch, config: Config, hardware: Hardware, compiles: bool
) -> dict[str, dict[str, Call]]:
    """{operation: {implementation: call}} at the sizes of a batch and a config.

    A call runs forward and backward, and returns the output and the gradients of the inputs.
    """
    torch.manual_seed(0)
    randn = functools.partial(torch.randn, device=hardware.device)  # float32, as weights are
    randn_low = functools.partial(randn, dtype=hardware.dtype)
    n_tokens = len(batch.ids)
    d_model = config.d_model
    longest = int(batch.cu_seqlens.diff().max())
    rope = rope_tables(longest, config.head_dim, 1e4, hardware.device)
    qkv = randn_low(n_tokens, 3, config.n_heads, config.head_dim)
    sequences = (qkv, batch.cu_seqlens, longest, rope)
    # small weights, as a model has: the exp of larger logits would underflow
    words = 0.1 * randn(config.vocab_size, d_model)
    head = (randn(len(batch.targets), d_model), words, randn(config.vocab_size), batch.targets)
    stream = (randn_low(n_tokens, d_model), randn(n_tokens, d_model), randn(d_model), 1e-5)
    table = {
        "attention": (attention, padded_attention(batch, rope), sequences),
        "head": (linear_cross_entropy, plain_head, head),
        "add_norm": (add_norm, plain_add_norm, stream),
        "geglu": (geglu, plain_geglu, (randn_low(n_tokens, 2 * config.d_ff),)),
    }
    libraries = {"head": library_head}
    if hardware.device.type == "cuda":
        starts = batch.cu_seqlens[:-1].repeat_interleave(batch.cu_seqlens.diff())
        positions = torch.arange(n_tokens, device=hardware.device) - starts  # (T,)
        libraries["attention"] = functools.partial(library_attention, positions=positions)

    calls: dict[str, dict[str, Call]] = {}
    for name, (ours, plain, inputs) in table.items():
        functions = {"ours": ours, "eager": plain}
        if name in libraries:
            functions["library"] = libraries[name]
        if compiles:
            functions["compiled"] = torch.compile(plain)
        calls[name] = {
            key: functools.partial(forward_backward, function, inputs, hardware)
            for key, function in functions.items()
        }
    return calls

"""What bench.py measures ours against: BERT and ModernBERT of `transformers` and nn.TransformerEncoder of
torch, on padded batches; its pipeline() for predictions; each fused operation of kernels.py in plain torch,
eager and compiled, and for attention on a GPU torch's own kernels for sequences of unequal length; and the
machine's limit, the matrix products of a step alone.

Axes: T tokens, S sequences, L the longest, H heads, D head size.
"""

import contextlib
import functools
import io
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.attention
import kernels.cross_entropy
import kernels.dispatch
import kernels.geglu
import kernels.norm
import predict
from data import Batch
from files import model_folder
from files.disk import UserError
from model import PRESETS, Classifier, Config


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels) of a batch, (S, longest): what peers are given."""
    lengths, targets = batch.cu_seqlens.diff().tolist(), torch.full_like(batch.ids, -100)
    targets[batch.masked] = batch.targets
    parts = ((batch.ids, 0), (torch.ones_like(batch.ids), 0), (targets, -100))
    return tuple(pad_sequence(x.split(lengths), batch_first=True, padding_value=value) for x, value in parts)


class TorchEncoder(nn.Module):
    """The same task with torch's own nn.TransformerEncoder."""

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
        logits = self.decoder(self.encoder(x, src_key_padding_mask=attention_mask == 0))
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()))


def build(name: str, config: Config, attention: str, n_labels: int = 0) -> nn.Module:
    """A peer of the same shape: BERT or ModernBERT of transformers (a classifier, where there are labels), or
    torch's own encoder."""
    if name == "torch":
        return TorchEncoder(config)
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--against hf: transformers is not installed; pip install -r requirements-dev.txt"
        ) from None
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.d_model, "attn_implementation": attention}
    sizes |= {"num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "pad_token_id": 0}
    if name == "bert":
        theirs = transformers.BertConfig(**sizes, intermediate_size=4 * config.d_model)
        return transformers.BertForMaskedLM(theirs)
    tokens = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1)
    if n_labels:
        sizes |= {"num_labels": n_labels, "classifier_pooling": "mean"}
    theirs = transformers.ModernBertConfig(
        **sizes, **tokens, intermediate_size=config.d_ff, global_attn_every_n_layers=1
    )
    kind = (
        transformers.ModernBertForSequenceClassification if n_labels else transformers.ModernBertForMaskedLM
    )
    return kind(theirs)


def predictions(
    folder: Path, texts: list[str], tokenizer: Tokenizer, place: SimpleNamespace
) -> dict[str, Callable[[], None]]:
    """{"ours", "pipeline", "pipeline, bfloat16": a call that classifies the texts} with one small classifier,
    left in `folder`; ours is the whole of predict.py, from loading the model to writing the answers. The
    pipeline by itself multiplies in float32, and in bfloat16 besides where we do."""
    import transformers

    model = Classifier(Config(**PRESETS["tiny"] | {"vocab_size": tokenizer.get_vocab_size()}), 2)
    model_folder.save_model(folder, model, tokenizer)
    (folder / "texts.txt").write_text("\n".join(texts), "utf-8")
    steps: dict[str, Callable[[], Any]] = {}
    for dtype in dict.fromkeys((torch.float32, place.dtype)):
        given = {"device": place.device, "dtype": dtype, "batch_size": 32}
        pipeline = transformers.pipeline("text-classification", str(folder), **given)
        name = f", {str(dtype).removeprefix('torch.')}" if dtype != torch.float32 else ""
        steps["pipeline" + name] = functools.partial(pipeline, texts)

    flags = ["--model", str(folder), "--file", str(folder / "texts.txt")]
    flags += ["--device", str(place.device), "--dtype", str(place.dtype).removeprefix("torch.")]

    def ours() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            predict.main(flags)

    return {"ours": ours} | steps


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in plain torch; the tables (..., D / 2) stand at the positions of x (..., D)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attention_of_gpus(
    batch: Batch, rope: kernels.attention.Rope, compiles: bool
) -> dict[str, Callable[[Tensor], Tensor]]:
    """torch's own: the varlen kernel and, which is one only when compiled, FlexAttention; each on qkv
    (T, 3, H, D)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest, n_tokens = batch.cu_seqlens, batch.max_seqlen, len(batch.ids)
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    position = torch.arange(n_tokens, device=lengths.device) - cu_seqlens[sequence]
    cos, sin = (table[position, None] for table in rope)  # (T, 1, D / 2)

    def turned(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unbind(1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def varlen(qkv: Tensor) -> Tensor:
        return varlen_attn(*turned(qkv), cu_seqlens, cu_seqlens, longest, longest)

    if not compiles:
        return {"varlen": varlen}
    is_seen = create_block_mask(
        lambda b, h, i, j: sequence[i] == sequence[j],
        None,
        None,
        n_tokens,
        n_tokens,
        lengths.device,
        _compile=True,  # else a mask of n_tokens squared would be written out first
    )
    compiled_flex = torch.compile(flex_attention)

    def flex(qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in turned(qkv))  # (1, H, T, D)
        return compiled_flex(q, k, v, block_mask=is_seen)[0].transpose(0, 1)

    return {"varlen": varlen, "flex": flex}


def operations(
    batch: Batch, config: Config, place: SimpleNamespace, compiles: bool
) -> dict[str, dict[str, Callable[[], tuple[Tensor, ...]]]]:
    """{operation: {"ours", "eager", "compiled": a call of it, forward and backward}} at these sizes; a call
    returns output and gradients."""
    torch.manual_seed(0)
    low, exact = {"dtype": place.dtype, "device": place.device}, {"device": place.device}
    n_tokens, d_model, vocab_size = len(batch.ids), config.d_model, config.vocab_size
    lengths = batch.cu_seqlens.diff()
    longest = int(lengths.max())
    rope = kernels.attention.rope_tables(longest, config.head_dim, 1e4, place.device)
    place_in = torch.arange(longest, **exact)
    is_token = place_in < lengths[:, None]  # (S, L)
    index = (batch.cu_seqlens[:-1, None] + place_in).clamp(max=n_tokens - 1)
    bias, weight = torch.zeros(vocab_size, **exact), torch.ones(d_model, **exact)
    words = 0.1 * torch.randn(vocab_size, d_model, **exact)  # exp of logits of noise would underflow

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = qkv[index].permute(2, 0, 3, 1, 4)
        q, k = rotate(q, *rope), rotate(k, *rope)  # (S, H, L, D)
        out = F.scaled_dot_product_attention(q, k, v, is_token[:, None, None])
        return out.transpose(1, 2)[is_token]

    def head(hidden: Tensor, embedding: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, embedding, bias).float(), batch.targets, reduction="sum")

    def add_norm(x: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight)

    def geglu(x: Tensor) -> Tensor:
        return F.gelu(x[:, : config.d_ff]) * x[:, config.d_ff :]

    def both_ways(function: Callable, inputs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in inputs]
            with torch.autocast(place.device.type, place.dtype, enabled=place.dtype != torch.float32):
                out = function(*leaves)
            out.backward(out.detach())
            return out, *(x.grad for x in leaves)

        return call

    table = {
        "attention": (
            lambda qkv: kernels.attention.attention(qkv, batch.cu_seqlens, longest, rope),
            attention,
            [torch.randn(n_tokens, 3, config.n_heads, config.head_dim, **low)],
        ),
        "head": (
            lambda hidden, embedding: kernels.cross_entropy.linear_cross_entropy(hidden, embedding, bias, batch.targets),
            head,
            [torch.randn(len(batch.targets), d_model, **exact), words],
        ),
        "add_norm": (
            lambda x, residual: kernels.norm.add_norm(x, residual, weight, 1e-5)[1],
            add_norm,
            [torch.randn(n_tokens, d_model, **low), torch.randn(n_tokens, d_model, **exact)],
        ),
        "geglu": (kernels.geglu.geglu, geglu, [torch.randn(n_tokens, 2 * config.d_ff, **low)]),
    }
    found = {}
    for name, (ours, plain, inputs) in table.items():
        functions = {"ours": ours, "eager": plain}
        if compiles:
            functions["compiled"] = torch.compile(plain)
        if name == "attention" and place.device.type == "cuda":
            functions |= attention_of_gpus(batch, rope, compiles)
        found[name] = {key: both_ways(function, inputs) for key, function in functions.items()}
    return found


# ------------------------------------------------------------------------------------ the machine's limit


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs under it, by the shapes and strides of their factors."""

    NAMES = ("mm", "bmm", "addmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket.__name__ in self.NAMES:
            factors = [x for x in args if isinstance(x, Tensor)][-2:]  # addmm and baddbmm add a tensor before
            self.found[tuple((x.shape, x.stride(), x.dtype, x.device) for x in factors)] += 1
        return operation(*args, **(kwargs or {}))


def like(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return torch.randn(size, dtype=dtype, device=device).as_strided(shape, stride)


def product_seconds(step: Callable[[], None], repeats: int = 5) -> tuple[float, int]:
    """Seconds that the matrix products of a step take by themselves, at its precision; and their FLOPs.

    Those of attention are counted as the torch code has them, since Triton's are inside its kernels. On a GPU
    each is launched many times before the clock is read, so that no launch is waited for.
    """
    chosen, kernels.dispatch.FORCED = kernels.dispatch.FORCED, "torch"
    with Products() as products:
        step()
    kernels.dispatch.FORCED = chosen
    seconds, flops = 0.0, 0
    for factors, count in products.found.items():
        a, b = (like(*factor) for factor in factors)
        launches = range(50 if a.is_cuda else 1)
        times = [seconds_of(lambda a=a, b=b, n=launches: [a @ b for _ in n]) for _ in range(1 + repeats)]
        seconds += count * min(times) / len(launches)
        flops += count * 2 * a.numel() * b.shape[-1]
    return seconds, flops

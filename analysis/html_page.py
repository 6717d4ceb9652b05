"""The HTML report of explain.py: words coloured by their attribution, and the attention maps.

Axes: L tokens of a text, H heads, D head size.
"""

import base64
import html
import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention
from model import Attention, Classifier

# Blue and orange, which people with any colour vision can tell apart (Okabe & Ito).
FOR = (0, 114, 178)
AGAINST = (213, 94, 0)

STYLE = """
:root { color-scheme: light dark; font: 16px/1.6 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
p.text { font-size: 1.2rem; white-space: pre-wrap }
figure { display: inline-block; margin: .5rem } figcaption { font-size: .8rem }
img { width: 11rem; height: 11rem; image-rendering: pixelated; border: 1px solid gray }
"""


@torch.no_grad()
def attention_maps(model: Classifier, row: np.ndarray) -> list[Tensor]:
    """Compute the attention probabilities of each layer.

    The kernel does not return them. But attention is linear in the values, so the columns of an
    identity matrix, given as values, come out as columns of the probabilities.

    Args:
        row: (L, 2), as `labels.encode` returns it.

    Returns:
        (H, L, L) of each layer: how much each token (row) attends to each token (column).
    """
    maps = []

    def record(layer: Attention, inputs: tuple, _: Tensor) -> None:
        x, cu_seqlens, max_seqlen, rope, _ = inputs
        q, k, _ = layer.Wqkv(x).unflatten(-1, (3, layer.n_heads, -1)).unbind(1)  # (L, H, D) each
        columns = []
        identity = F.pad(torch.eye(len(x), device=x.device), (0, -len(x) % q.shape[-1]))
        for unit_vectors in identity.split(q.shape[-1], dim=1):  # (L, D)
            qkv = torch.stack((q, k, unit_vectors[:, None].expand_as(q)), dim=1)  # (L, 3, H, D)
            columns.append(attention(qkv, cu_seqlens, max_seqlen, rope, layer.window))
        maps.append(torch.cat(columns, dim=-1)[..., : len(x)].transpose(0, 1).cpu())

    hooks = [layer.attn.register_forward_hook(record) for layer in model.model.layers]
    device = next(model.parameters()).device
    ids, types = torch.from_numpy(row).T.to(device)
    model(ids, torch.tensor([0, len(row)], dtype=torch.int32, device=device), len(row), types)
    for hook in hooks:
        hook.remove()
    return maps


def to_png(weights: Tensor) -> str:
    """An (L, L) map as a data: URL."""
    from matplotlib import image

    buffer = io.BytesIO()
    image.imsave(buffer, weights.numpy(), vmin=0, cmap="Blues", format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def split_into_pieces(explanation: Any) -> list[tuple[str, float]]:
    """The text of an `explain.Explanation` in pieces with their strengths: -1 to 1 of a word, 0
    between words."""
    text, attributions = explanation.text, explanation.attributions
    largest = max(1e-9, float(np.abs(attributions).max(initial=0)))
    parts = []
    end = 0
    for (start, stop), attribution in zip(explanation.spans, attributions, strict=True):
        parts.append((text[end:start], 0.0))
        parts.append((text[start:stop], float(attribution) / largest))
        end = stop
    return [*parts, (text[end:], 0.0)]


def section(
    title: str, pieces: list[tuple[str, float]], gap: float, tokens: list[str], maps: list[Tensor]
) -> str:
    """The HTML of one text: its pieces with strengths from -1 to 1, and its attention maps."""
    parts = [f"<h2>{html.escape(title)}</h2><p class=text>"]
    for text, strength in pieces:
        red, green, blue = FOR if strength > 0 else AGAINST
        colour = f"rgb({red} {green} {blue} / {0.7 * abs(strength):.2f})"
        parts.append(f'<span style="background:{colour}">{html.escape(text)}</span>')
    parts.append("</p><p>Blue words raise the score of this answer, orange words lower it. ")
    parts.append(f"The attributions miss their exact sum by {gap:.1%}.</p>")
    parts.append(f"<details><summary>Attention</summary><p>{html.escape(' '.join(tokens))}</p>")
    parts.append("<p>Each row is a token, and its columns the tokens that it attends to.</p>")
    for i, heads in enumerate(maps):
        for j, weights in enumerate(heads):
            caption = f"layer {i}, head {j}"
            image = f'<img src="{to_png(weights)}" alt="attention, {caption}">'
            parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return "".join([*parts, "</details>\n"])


def html_report(sections: list[str]) -> str:
    """One file without scripts and without links."""
    head = f"<meta charset=utf-8><title>cloze</title><style>{STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>\n{''.join(sections)}</body></html>\n"

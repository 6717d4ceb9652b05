"""What explain.py found, as one HTML file: words in the colour of what they added, and the attention of each
head.

Axes: L tokens of a text, H heads.
"""

import base64
import functools
import html
import io
import itertools

import numpy as np
import torch
from torch import Tensor

from kernels.attention import rotate
from model import Attention, Classifier

FOR, AGAINST = (0, 114, 178), (213, 94, 0)  # blue and orange, which the colour-blind tell apart (Okabe & Ito)


@torch.no_grad()
def attention_maps(model: Classifier, row: np.ndarray) -> list[Tensor]:
    """The probabilities of each layer's attention, (H, L, L): which token (row) looks at which (column)."""
    device, maps, handles = next(model.parameters()).device, [], []
    ropes = model.model.ropes(len(row), device)

    def keep(attn: Attention, _, __, projected: Tensor) -> None:
        q, k, _ = projected.unflatten(-1, attn.heads).permute(1, 2, 0, 3)  # (H, L, D) each
        q, k = (rotate(x, ropes[attn.window]) for x in (q, k))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        position = torch.arange(len(row), device=q.device)
        if attn.window is not None:
            scores.masked_fill_((position[:, None] - position).abs() > attn.window, -torch.inf)
        maps.append(scores.softmax(-1).cpu())

    for layer in model.model.layers:
        handles.append(layer.attn.Wqkv.register_forward_hook(functools.partial(keep, layer.attn)))
    ids, types = torch.from_numpy(row).T.to(device)
    model(ids, torch.tensor([0, len(row)], dtype=torch.int32, device=device), len(row), types)
    for handle in handles:
        handle.remove()
    return maps


def as_png(weights: Tensor) -> str:
    """A map as a picture in a data: address; strength is opacity, so that it reads on light and on dark."""
    from matplotlib import image

    alpha = (weights / weights.max()).numpy()[..., None]
    painted = np.concatenate((np.broadcast_to(np.array(FOR) / 255, (*weights.shape, 3)), alpha), axis=2)
    image.imsave(buffer := io.BytesIO(), painted, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


STYLE = """
:root { color-scheme: light dark; font: 16px/1.6 system-ui, sans-serif }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
p.text { font-size: 1.2rem; white-space: pre-wrap } p.text span { border-radius: .2em; padding: .1em 0 }
figure { display: inline-block; margin: .5rem } figcaption { font-size: .8rem }
img { width: 11rem; height: 11rem; image-rendering: pixelated; border: 1px solid gray }
summary { cursor: pointer }
"""


def section(
    title: str, pieces: list[tuple[str, float]], gap: float, tokens: list[str], maps: list[Tensor]
) -> str:
    """One text: its pieces with their strengths, from -1 to 1, and the maps of each layer, (H, L, L)."""
    out = [f"<h2>{html.escape(title)}</h2><p class=text>"]
    for text, strength in pieces:
        red, green, blue = FOR if strength > 0 else AGAINST
        colour, escaped = f"rgb({red} {green} {blue} / {0.7 * abs(strength):.2f})", html.escape(text)
        out.append(f'<span style="background:{colour}">{escaped}</span>' if strength else escaped)
    out.append(f"</p><p>Blue spoke for it, orange against it; the sum is off by {gap:.1%}.</p>")
    out.append(f"<details><summary>Attention of each head</summary><p>{html.escape(' '.join(tokens))}</p>")
    out.append("<p>A row of a picture is a token that looks, a column one that is looked at.</p>")
    for (i, heads), j in itertools.product(enumerate(maps), range(len(maps[0]))):
        name = f"layer {i}, head {j}"
        drawn = f'<img src="{as_png(heads[j])}" alt="attention, {name}">'
        out.append(f"<figure>{drawn}<figcaption>{name}</figcaption></figure>")
    return "".join([*out, "</details>\n"])


def page(sections: list[str]) -> str:
    """One file that needs no other: no script, every text escaped."""
    head = f"<meta charset=utf-8><title>cloze</title><style>{STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>\n{''.join(sections)}</body></html>\n"

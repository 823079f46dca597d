"""MLA in its plain form: keys and values built for every head and position, one loop per axis, float64."""

import torch
from torch import Tensor


def attend_plain(q_nope: Tensor, q_pe: Tensor, c: Tensor, k_pe: Tensor, kv_b: Tensor, scale: float) -> Tensor:
    """The last T of S positions attend causally.

    Args:
        q_nope: [T, H, N]. q_pe: [T, H, R], rotated.
        c: [S, C], normalised latents. k_pe: [S, R], rotated.
        kv_b: [H * (N + V), C], rows as stored: key of head 0, value of head 0, key of head 1, ...
        scale: On the scores.

    Returns:
        [T, H, V] float64.
    """
    tokens, heads, nope = q_nope.shape
    cached, rows = c.shape[0], kv_b.shape[0] // heads
    out = torch.zeros(tokens, heads, rows - nope, dtype=torch.float64)
    for h in range(heads):
        key_rows = kv_b[h * rows : h * rows + nope].double()
        value_rows = kv_b[h * rows + nope : (h + 1) * rows].double()
        keys = [torch.cat((key_rows @ one.double(), pe.double())) for one, pe in zip(c, k_pe, strict=True)]
        values = [value_rows @ one.double() for one in c]
        for t in range(tokens):
            query = torch.cat((q_nope[t, h], q_pe[t, h])).double()
            seen = cached - tokens + t + 1
            weight = torch.softmax(torch.stack([query @ keys[s] for s in range(seen)]) * scale, dim=0)
            for s in range(seen):
                out[t, h] += weight[s] * values[s]
    return out

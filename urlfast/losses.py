"""Losses as pure functions, one equation each. B batch, M views. Everything here is float32 whatever the networks compute in."""

import torch
import torch.nn.functional as F
from torch import Tensor


def huber(error: Tensor, delta: float = 1.0) -> Tensor:
    """Elementwise: error²/2 where |error| <= delta, delta (|error| - delta/2) beyond it."""
    size = error.abs()
    bounded = size.clamp(max=delta)
    return bounded * (size - 0.5 * bounded)


def nt_xent(u: Tensor, v: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normalised temperature-scaled cross entropy (SimCLR): each of the 2B projections has to find the other view of its own image.

        L = -1/2B sum_i log [ exp(cos(p_i, p_i') / T) / sum_{j != i} exp(cos(p_i, p_j) / T) ],   p = [u; v], i' the other view of i

    u, v: (B, P), row i of both from the same image. Returns the loss and the share of projections whose positive is nearest, both scalars.
    """
    projections = F.normalize(torch.cat([u, v]).float(), dim=-1)
    with torch.autocast(u.device.type, enabled=False):  # at T = 0.07 a bfloat16 cosine would be off by 0.06 in the exponent
        logits = projections @ projections.T / temperature
    rows = torch.arange(len(logits), device=u.device)
    logits = logits.masked_fill(rows[:, None] == rows, -torch.inf)  # an anchor is not its own negative
    positive = (rows + len(u)) % len(logits)
    accuracy = (logits.detach().argmax(-1) == positive).float().mean()
    return F.cross_entropy(logits, positive), accuracy

"""Losses and returns as pure functions, one equation each. B batch, M views, T steps. Everything here is float32 whatever the networks
compute in.
"""

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


# Returns of sequences ------------------------------------------------------------------------------------------------
#
# observation   o0   o1   o2  ..  oT       reward_t is paid on leaving o_t; discount_t = gamma * (1 - terminated_t)
# transition       0    1   ..  T-1        mask_t: transition t exists. Where t + 1 does not, its return ends in V_{t+1}: an episode that
# next_value       V1   V2  ..  VT         a time limit has ended, padding behind a short one, and the sequence's own end are one case
#
# Everything is (B, T), float32 and of the rewards' scale: what a network gives in h's must come back by `rescale_inverse` before. Where
# mask is False the results mean nothing.

RESCALE_EPS = 1e-3  # of h: keeps it invertible, and its slope above 0


def rescale(x: Tensor) -> Tensor:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + eps x, elementwise: returns of any size, in a network's range (Pohlen et al. 2018)."""
    size = x.abs()
    return x.sign() * (size / ((size + 1).sqrt() + 1)) + RESCALE_EPS * x  # |x| / (sqrt + 1) = sqrt - 1 without its cancellation


def rescale_inverse(y: Tensor) -> Tensor:
    """h^-1(y), elementwise.

        S = sqrt(1 + 4 eps (|y| + 1 + eps)),   v = 2 |y| / (S + 1 + 2 eps),   h^-1(y) = sign(y) v (v + 2)

    The usual form, ((S - 1) / 2 eps)^2 - 1, is the same function but loses 6 % at 1e-4 in float32; this one 1e-6.
    """
    size = y.abs()
    root = (1 + 4 * RESCALE_EPS * (size + 1 + RESCALE_EPS)).sqrt()
    v = 2 * size / (root + 1 + 2 * RESCALE_EPS)
    return y.sign() * v * (v + 2)


def n_step_return(reward: Tensor, discount: Tensor, next_value: Tensor, mask: Tensor, n: int) -> Tensor:
    """G_t = sum_{i<m} (prod_{j<i} discount_{t+j}) reward_{t+i} + (prod_{j<m} discount_{t+j}) V_{t+m},   m = min(n, transitions left).

    reward, discount, next_value, mask: (B, T). Returns (B, T).
    """
    returns = one_step = reward + discount * next_value
    for _ in range(min(n, reward.shape[1]) - 1):  # after k rounds: the (k + 1)-step return
        longer = reward[:, :-1] + discount[:, :-1] * returns[:, 1:]
        returns = torch.cat([torch.where(mask[:, 1:], longer, one_step[:, :-1]), one_step[:, -1:]], 1)
    return returns


def retrace(
    reward: Tensor, discount: Tensor, next_value: Tensor, q: Tensor, pi: Tensor, mu: Tensor, mask: Tensor, trace_lambda: float
) -> Tensor:
    """Retrace(lambda) (Munos et al. 2016).

        G_t = reward_t + discount_t [ V_{t+1} + c_{t+1} (G_{t+1} - q_{t+1}) ],   c_t = lambda min(1, pi_t / mu_t),   c_T = 0

    reward, discount, next_value, mask: (B, T), V_t = sum_a pi(a|o_t) Q(o_t, a). q, pi, mu: (B, T), of the action taken: its value, its
    probability under the policy that is evaluated and under the one that acted; those of o_0 are not used. Returns (B, T).
    """
    c = trace_lambda * (pi / mu.clamp(min=torch.finfo(mu.dtype).tiny)).clamp(max=1) * mask
    c, q = (torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1) for x in (c, q))  # of o_{t+1}
    return _accumulated(reward + discount * (next_value - c * q), discount * c)


def peng_q_lambda(reward: Tensor, discount: Tensor, next_value: Tensor, mask: Tensor, trace_lambda: float) -> Tensor:
    """Peng's Q(lambda) (Peng, Williams 1994; Kozuno et al. 2021): a lambda-return that no action cuts, whoever chose it.

        G_t = reward_t + discount_t [ (1 - lambda) V_{t+1} + lambda G_{t+1} ],   at the end lambda = 0

    reward, discount, next_value, mask: (B, T). Returns (B, T).
    """
    trace = trace_lambda * torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1).to(reward.dtype)
    return _accumulated(reward + discount * (1 - trace) * next_value, discount * trace)


def _accumulated(x: Tensor, decay: Tensor) -> Tensor:
    """G_t = x_t + decay_t G_{t+1}, G_T = 0, both (B, T): log2 T rounds, each of which doubles the terms that every sum holds."""
    span, T = 1, x.shape[1]
    while span < T:
        x = torch.cat([x[:, :-span] + decay[:, :-span] * x[:, span:], x[:, -span:]], 1)
        decay = torch.cat([decay[:, :-span] * decay[:, span:], decay[:, -span:]], 1)
        span *= 2
    return x

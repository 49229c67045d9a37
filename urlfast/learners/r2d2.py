"""R2D2: Q-learning with an LSTM on replayed sequences, whose recurrent state is stored and refreshed.

Kapturowski, Ostrovski, Quan, Munos, Dabney, "Recurrent Experience Replay in Distributed Reinforcement Learning" (2019). Where the paper
prints no value, that of seed_rl's or acme's re-implementation. With `target="retrace"` it is the learner of NGU (Badia et al. 2020), with
`target="peng"` that of CPT's transfer.
B batch, L rows of a sequence: `burn_in` whose only use is the state after them, T that are learned from, and one to bootstrap from.
F features, A actions, H width of the LSTM. The caller encodes: `online` and `target` are the features of the L observations under the
encoder and under its target copy, (B, L, F) each, the burnt-in rows of `online` without gradient.

    row       0 .. burn_in-1 | burn_in ..  L-2 | L-1
    LSTM      no gradient    | gradient        | no loss
    Q(o, a)                    q_0 ..  q_{T-1}           y_t = h(G_t), G of n-step, Retrace(lambda) or Peng's Q(lambda)
    V(o)                           V_1 ..       V_T      V_t = h^-1 Q'(o_t, argmax_a Q(o_t, a))     double Q
    loss       1/B sum_b sum_t (q_t - y_t)^2 / 2
"""

import copy
import dataclasses
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from urlfast.device import Arithmetic, adam
from urlfast.limits import check_limits
from urlfast.losses import n_step_return, peng_q_lambda, rescale, rescale_inverse, retrace
from urlfast.nets.encoders import copy_buffers
from urlfast.nets.heads import DuelingQ
from urlfast.nets.lstm import LSTM


@dataclasses.dataclass(frozen=True)
class R2D2Config:
    """The learner of Q: a recurrent network with dueling heads."""

    torso: int = 512  # width of the linear layer between features and LSTM; 0: the LSTM reads the features [R2D2]
    lstm: int = 512  # width of the LSTM [R2D2]
    hidden: int = 512  # width of the hidden layer of each dueling stream [R2D2]
    lr: float = 1e-4  # learning rate of Adam [R2D2]
    adam_eps: float = 1e-3  # added to Adam's denominator [R2D2; CPT 1e-4]
    grad_clip: float = 40.0  # limit of the gradient's norm, encoder included [seed_rl]
    target: Literal["n-step", "retrace", "peng"] = "n-step"  # what Q learns [R2D2; CPT: retrace before transfer, peng after]
    n_step: int = 5  # rewards that an n-step target sums before Q takes over [R2D2]
    trace_lambda: float = 0.95  # lambda of Retrace [NGU] and of Peng's Q [CPT prints none; 0.7 in "Revisiting Peng's Q(lambda)"]
    gamma: float = 0.997  # discount of the reward of each later step [R2D2]
    burn_in: int = 40  # rows before those that are learned from, which refresh the stored state [R2D2; CPT 0]
    target_period: int = 2500  # updates between two copies into the target network [R2D2; CPT 1500]
    epsilon: float = 0.4  # of the first of N environments, whose i-th acts at random with probability epsilon^(1 + 7 i / (N - 1)) [R2D2]
    epsilon_single: float = 0.05  # of one environment alone [ours]

    def __post_init__(self):
        check_limits(
            self,
            torso=">= 0",
            lstm=">= 1",
            hidden=">= 1",
            lr="> 0",
            adam_eps="> 0",
            grad_clip="> 0",
            n_step=">= 1",
            trace_lambda="0..1",
            gamma="0..1",
            burn_in=">= 0",
            target_period=">= 1",
            epsilon="0..1",
            epsilon_single="0..1",
        )
        if self.target not in ("n-step", "retrace", "peng"):
            raise ValueError(f"target: must be n-step, retrace or peng, got {self.target!r}")


class RecurrentQ(nn.Module):
    """Q(o_t, .) of all that was seen up to o_t: torso, LSTM, dueling heads.

    num_actions: width of the one-hot action before o_t. num_outputs: of Q; more than num_actions where an agent can choose what is no
    primitive action, as CPT's to follow its pre-trained policy.
    """

    def __init__(self, config: R2D2Config, num_features: int, num_actions: int, num_outputs: int | None = None):
        super().__init__()
        self.num_actions, self.num_outputs, self.width = num_actions, num_outputs or num_actions, config.lstm
        self.torso = nn.Linear(num_features, config.torso) if config.torso else None
        self.lstm = LSTM((config.torso or num_features) + 1 + num_actions, config.lstm)
        self.head = DuelingQ(config.lstm, self.num_outputs, config.hidden)
        if self.torso is not None:
            nn.init.orthogonal_(self.torso.weight, gain=2**0.5)
            nn.init.zeros_(self.torso.bias)

    def start(self, n: int, device: torch.device) -> Tensor:
        """The state of n episodes that begin: (n, 2, H), h and c."""
        return torch.zeros(n, 2, self.width, device=device)

    def inputs(self, features: Tensor, previous_action: Tensor, previous_reward: Tensor) -> Tensor:
        """What the LSTM reads: (B, L, F), (B, L) int64 with -1 for none, (B, L) -> (B, L, torso + 1 + A).

        Rewards come in as h(r): raw scores would saturate the gates [ours; seed_rl feeds them raw, acme their tanh].
        """
        if self.torso is not None:
            features = F.relu(self.torso(features))
        action = previous_action[..., None] == torch.arange(self.num_actions, device=previous_action.device)
        return torch.cat([features, rescale(previous_reward)[..., None].to(features.dtype), action.to(features.dtype)], -1)

    def unroll(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, .) from `state` (B, 2, H) on: the LSTM's outputs (B, L, H), and the state after the last."""
        h, c = (part[None].contiguous() for part in state.unbind(1))
        outputs, (h, c) = self.lstm(inputs, (h, c))
        return outputs, torch.stack([h[0].float(), c[0].float()], 1)

    def forward(self, features: Tensor, previous_action: Tensor, previous_reward: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Q of every row, (B, L, num_outputs) float32, and the state after the last."""
        outputs, state = self.unroll(self.inputs(features, previous_action, previous_reward), state)
        return self.head(outputs), state


class Batch(Protocol):
    """Sequences of L rows. The row before the first is known by what it left: a state, an action, a reward."""

    action: Tensor  # (B, L) int64, primitive, taken in o_t
    terminated: Tensor  # (B, L) bool
    mask: Tensor  # (B, L - 1) bool: transitions that exist
    state: Tensor  # (B, 2, H) float32, of the LSTM before it read the first row
    previous_action: Tensor  # (B,) int64, -1 where an episode begins
    previous_reward: Tensor  # (B,) float32
    mu: Tensor  # (B, L) float32, probability of what was chosen; read by Retrace alone
    choice: Tensor | None  # (B, L) int64 in 0..num_outputs-1, what was chosen; None: the action
    weight: Tensor | None  # (B,) float32, importance of each sequence; None: 1 [R2D2]


class Acted(NamedTuple):
    choice: np.ndarray  # int64 (N,), in 0..num_outputs-1
    state: Tensor  # (N, 2, H), after the observation
    mu: np.ndarray  # float32 (N,), the probability of the choice
    at_random: np.ndarray  # bool (N,), where it was not sought but drawn
    q: Tensor  # (N, num_outputs)


def epsilons(config: R2D2Config, n: int) -> np.ndarray:
    """eps_i = epsilon^(1 + 7 i / (n - 1)) of n environments, (n,) float32."""
    if n == 1:
        return np.array([config.epsilon_single], np.float32)
    return (config.epsilon ** (1 + 7 * np.arange(n) / (n - 1))).astype(np.float32)


def before(first: Tensor, rows: Tensor) -> Tensor:
    """What each row's predecessor had: (B,) of the row before the first, (B, L) of the rows -> (B, L)."""
    return torch.cat([first[:, None], rows[:, :-1]], 1)


class R2D2:
    """The learner. `encoder` is the network of the features, which it trains with Q and copies with it; `q` is a RecurrentQ."""

    def __init__(self, config: R2D2Config, encoder: nn.Module, q: RecurrentQ, arithmetic: Arithmetic, generator: torch.Generator):
        """generator: on the CPU, draws the random actions."""
        self.config, self.arithmetic, self.generator = config, arithmetic, generator
        self.encoder, self.q = encoder, q.to(arithmetic.device)
        self.encoder_target, self.q_target = (copy.deepcopy(net).requires_grad_(False) for net in (self.encoder, self.q))
        self.q_target.lstm.flatten_parameters()  # cuDNN wants them in one piece, and a copy has lost that
        self.parameters = [*self.encoder.parameters(), *self.q.parameters()]
        self.target_parameters = [*self.encoder_target.parameters(), *self.q_target.parameters()]
        self.optim = adam(self.parameters, config.lr, config.adam_eps, arithmetic.device)
        self.updates = 0

    @torch.no_grad()
    def act(
        self, features: Tensor, previous_action: Tensor, previous_reward: Tensor, state: Tensor, explore: np.ndarray | float = 0.0
    ) -> Acted:
        """For N environments: features (N, F), previous_action (N,) int64, previous_reward (N,), state (N, 2, H).

        Greedy, ties broken at random; uniform over the choices with probability `explore`, a number or one for each environment.
        """
        q, state = self.q(features[:, None], previous_action[:, None], previous_reward[:, None], state)
        q = q[:, 0].cpu()
        n, num_outputs = q.shape
        greedy = torch.multinomial((q == q.amax(-1, keepdim=True)).float(), 1, generator=self.generator)[:, 0]
        epsilon = torch.as_tensor(explore, dtype=torch.float32).expand(n)
        at_random = torch.rand(n, generator=self.generator) < epsilon
        choice = torch.where(at_random, torch.randint(num_outputs, (n,), generator=self.generator), greedy)
        mu = epsilon / num_outputs + (1 - epsilon) * (choice == greedy)  # also where the greedy one was drawn at random
        return Acted(choice.numpy(), state, mu.numpy(), at_random.numpy(), q)

    def update(self, batch: Batch, reward: Tensor, online: Tensor, target: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One gradient step on `reward` (B, L), of Q and of the encoder that made `online`. The priorities are errors, (B, T)."""
        error, y = self.errors(batch, reward, online, target)
        loss = 0.5 * error.square().sum((0, 2))  # over the two choices an action may stand for, and over time
        loss = (loss if batch.weight is None else batch.weight * loss).mean()
        self.optim.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optim.step()
        mask = batch.mask[:, self.config.burn_in :]
        metrics = {"q_loss": loss.detach(), "q_target": (y * mask).sum() / mask.sum(), "grad_norm": grad_norm}
        return metrics, error.detach().abs().amax(0)

    def errors(self, batch: Batch, reward: Tensor, online: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """q_t - y_t of what was chosen, and of the primitive action where that is another, 0 where there is none: (2, B, T); y (B, T).

        Without `batch.choice` the second is absent: (1, B, T).
        """
        b = self.config.burn_in
        inputs = before(batch.previous_action, batch.action), before(batch.previous_reward, reward)
        with torch.no_grad(), self.arithmetic.autocast():
            values = self.unrolled(self.q_target, target, inputs, batch.state)  # (B, T + 1, A)
        with self.arithmetic.autocast():
            q = self.unrolled(self.q, online, inputs, batch.state)

        mask, choice = batch.mask[:, b:], batch.action[:, b:] if batch.choice is None else batch.choice[:, b:]
        y = self.returns(q.detach(), values, choice, reward[:, b:], batch.terminated[:, b:], batch.mu[:, b:], mask)

        def error(choice, counts):
            return torch.where(counts, q[:, :-1].gather(-1, choice[:, :-1, None]).squeeze(-1) - y, 0.0)

        if batch.choice is None:
            return error(choice, mask)[None], y
        action = batch.action[:, b:]
        return torch.stack([error(choice, mask), error(action, mask & (action != choice)[:, :-1])]), y

    def unrolled(self, q: RecurrentQ, features: Tensor, inputs: tuple[Tensor, Tensor], state: Tensor) -> Tensor:
        """Q of the rows after the burn-in, (B, T + 1, A); no gradient reaches the rows before, nor the state they left."""
        b, (action, reward) = self.config.burn_in, inputs
        if b:
            with torch.no_grad():
                _, state = q.unroll(q.inputs(features[:, :b], action[:, :b], reward[:, :b]), state)
        return q(features[:, b:], action[:, b:], reward[:, b:], state)[0]

    @torch.no_grad()
    def returns(self, q: Tensor, values: Tensor, choice: Tensor, reward: Tensor, terminated: Tensor, mu: Tensor, mask: Tensor) -> Tensor:
        """y, (B, T). q, values: (B, T + 1, A) of the online and the target network; choice .. mu: (B, T + 1); mask (B, T)."""
        c = self.config
        best, values = q.argmax(-1, keepdim=True), rescale_inverse(values)
        reward, discount = reward[:, :-1], c.gamma * (~terminated[:, :-1]).float()
        next_value = values.gather(-1, best).squeeze(-1)[:, 1:]
        if c.target == "n-step":
            G = n_step_return(reward, discount, next_value, mask, c.n_step)
        elif c.target == "retrace":
            taken = choice[:, :-1, None]
            pi = (taken == best[:, :-1]).squeeze(-1).float()
            G = retrace(reward, discount, next_value, values[:, :-1].gather(-1, taken).squeeze(-1), pi, mu[:, :-1], mask, c.trace_lambda)
        else:
            G = peng_q_lambda(reward, discount, next_value, mask, c.trace_lambda)
        return rescale(G)

    @torch.no_grad()
    def follow(self) -> None:
        """After each update, outside of what a CUDA graph holds: the target network becomes the online one, every `target_period`."""
        self.updates += 1
        if self.updates % self.config.target_period == 0:
            torch._foreach_copy_(self.target_parameters, self.parameters)
            copy_buffers(self.encoder_target, self.encoder)

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "encoder": self.encoder,
            "encoder_target": self.encoder_target,
            "q": self.q,
            "q_target": self.q_target,
            "q_optimizer": self.optim,  # of the encoder too
        }

    def state_dict(self) -> dict[str, dict]:
        """`updates` and the generator are their owner's to save."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """The parts that `state` names."""
        parts = self.parts()
        for name, values in state.items():
            parts[name].load_state_dict(values)

"""What a user would run instead, where it is not a package: written here from its published description, in our own words.

`MiniAPT` is an equivalent of the update of forhaoliu/mini_apt, the Atari agent that APT's authors released: its network, losses, gradients
and optimisers in plain float32 PyTorch, and what it does more than once or for nobody:

    representation   two views of o_t        encoder with gradient, NT-Xent, clip, Adam; then the encoder's EMA copy moves
    reward           two views of o_{t+1}    encoder, and encoder again for the pool [repeated]; kNN by the (2B, 2B, d) array of differences
    Q target         the same views          encoder a third time [repeated], EMA encoder; double Q, the mean over both views
    Q                two views of o_t        encoder with gradient; the loss goes back through it and nobody uses that [unused]

So six encoder passes and two backward, where three and one do. Left as it was: frames kept in float32, one random crop for a whole batch,
boolean masks around the contrastive logits. Otherwise than released: any action may be drawn, Q's target moves at every update instead of
every 8,000th, the reward looks one step ahead, and the variance is the population's, all four as in our preset of that name.

`URLBAPT` is an equivalent of the update of rll-research/url_benchmark's ICM-APT on DDPG, from states or pixels, in float32:

    views            o_t, o_{t+3}   pixels: to float32, padded, shifted by grid_sample; the encoder, with gradient and without
    ICM              both           the trunk for each; forward and inverse model; two Adams, of ICM and encoder
    reward           o_t            the trunk; kNN by the (B, B, 512) array of differences
    critic           both           actor and target critic at o_{t+3}, both critics at o_t; Adam
    actor            o_t            actor and critics; the loss goes on into the critic's weights and nobody uses that [unused]; Adam
    target           -              one tensor after the other

It repeats nothing else. Left out: what it only logs. `of_next` rewards o_{t+3} instead, as our preset does.

`ZooR2D2` is an equivalent of the R2D2 learner of michaelnny/deep_rl_zoo, with the network of our preset, in float32 and time-major:

    batch            sequences of whole stacks, one array for each, put together in NumPy; all to float32, and over 255 in each network
    burn-in          both networks on the rows before, without gradient
    loss             the online network with gradient, the target network without, on the other rows; n-step double Q under h
    after            clip, Adam; priorities to the replay

It repeats nothing. Its release has no linear layer between convolutions and LSTM, which would make it slower, and weighs by importance.
python_tests/test_peers.py holds the values of all three against our own update's.
"""

import collections
import copy
import itertools
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from urlfast.losses import rescale
from urlfast.methods.apt import APT
from urlfast.methods.recurrent import RecurrentTask

CONV = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride


class MiniEncoder(nn.Module):
    def __init__(self, conv: tuple[tuple[int, int, int], ...], channels: int, side: int, projection: int):
        super().__init__()
        layers: list[nn.Module] = []
        for outputs, kernel, stride in conv:
            layers += [nn.Conv2d(channels, outputs, kernel, stride), nn.ReLU()]
            channels, side = outputs, (side - kernel) // stride + 1
        self.conv = nn.Sequential(*layers, nn.Flatten())
        self.width = channels * side * side
        self.head = nn.Linear(self.width, projection)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)

    def project(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images))


class MiniCritic(nn.Module):
    def __init__(self, width: int, num_actions: int, hidden: int):
        super().__init__()
        self.value = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.advantage = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, num_actions))

    def forward(self, features: Tensor) -> Tensor:
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(1, keepdim=True)


class RunningVariance:
    """mini_apt's statistic of distances: its batches' variances and means, merged; it divides by the variance."""

    def __init__(self):
        self.mean, self.variance, self.count = torch.zeros(1), torch.ones(1), 1e-4

    def __call__(self, x: Tensor) -> Tensor:
        n, total = len(x), len(x) + self.count
        delta = x.mean(0) - self.mean
        self.mean = self.mean + delta * n / total
        self.variance = (self.variance * self.count + x.var(0, correction=0) * n + delta**2 * self.count * n / total) / total
        self.count = total
        return self.variance


def frozen(network: nn.Module) -> nn.Module:
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    for t, s in zip(target.parameters(), source.parameters(), strict=True):
        t.copy_(t * (1 - tau) + s * tau)


class MiniAPT:
    """See above. Its README's values: k 16, the k-th neighbour alone, batches of 64 in 2 views, Adam at 1e-4, gradients clipped at 10."""

    def __init__(self, num_actions: int, *, channels=4, side=84, conv=CONV, projection=256, hidden=512, k=16, lr=1e-4):
        self.num_actions, self.k = num_actions, k
        self.gamma, self.tau, self.temperature, self.norm_clip, self.knn_clip = 0.99, 0.01, 0.07, 10.0, 5e-4
        self.encoder = MiniEncoder(conv, channels, side, projection)
        self.encoder_target = frozen(self.encoder)
        self.critic = MiniCritic(self.encoder.width, num_actions, hidden)
        self.critic_target = frozen(self.critic)
        self.repr_optimizer = torch.optim.Adam(self.encoder.parameters(), lr=lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=lr)
        self.statistic = RunningVariance()

    @torch.no_grad()
    def take_weights(self, ours: APT) -> None:
        """Those of our method, whose network is the same: from here both compute the same on the same views."""
        convolutions = [layer for layer in self.encoder.conv if isinstance(layer, nn.Conv2d)]
        layers = [*ours.agent.encoder.conv, *ours.representation.projection]
        for theirs, mine in zip([*convolutions, self.encoder.head], layers, strict=True):
            theirs.load_state_dict(mine.state_dict())
        q, streams = ours.agent.learner.q, (self.critic.value, self.critic.advantage)
        for name, hidden in q.hidden.named_parameters():  # ours holds both streams' hidden layers as one
            for stream, half in zip(streams, hidden.chunk(2), strict=True):
                getattr(stream[0], name).copy_(half)
        for stream, mine in zip(streams, (q.value, q.advantage), strict=True):
            stream[2].load_state_dict(mine.state_dict())
        self.encoder_target.load_state_dict(self.encoder.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())

    @torch.no_grad()
    def act(self, state: Tensor, epsilon: float) -> int:
        """For one stack (C, H, W) of float32 frames."""
        if random.random() < epsilon:
            return random.randrange(self.num_actions)
        return int(self.critic(self.encoder(state[None])).argmax())

    def update(self, state: Tensor, action: Tensor, next_state: Tensor, not_done: Tensor) -> dict[str, Tensor]:
        """state, next_state: (2B, C, H, W) float32, both views of a batch; action, not_done: (2B, 1)."""
        representation_loss = self.update_representation(state)
        soft_update(self.encoder_target, self.encoder, self.tau)
        reward = self.reward(next_state)
        with torch.no_grad():
            best = self.critic(self.encoder(next_state)).argmax(-1, keepdim=True)
            value = self.critic_target(self.encoder_target(next_state)).gather(-1, best)
            y = (reward + not_done * self.gamma * value).view(2, -1).mean(0)
        first, second = self.critic(self.encoder(state)).gather(-1, action).view(2, -1)
        critic_loss = F.mse_loss(first, y) + F.mse_loss(second, y)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        clip_grad_norm_(self.critic.parameters(), self.norm_clip)
        self.critic_optimizer.step()
        soft_update(self.critic_target, self.critic, self.tau)
        return {"contrastive_loss": representation_loss, "intrinsic_reward": reward.mean(), "critic_loss": critic_loss.detach()}

    def update_representation(self, state: Tensor) -> Tensor:
        features = F.normalize(self.encoder.project(state), dim=1)
        n = len(features)
        similarity = features @ features.T
        image = torch.arange(n // 2).repeat(2)
        others = ~torch.eye(n, dtype=torch.bool)
        same = (image[:, None] == image)[others].view(n, -1)
        similarity = similarity[others].view(n, -1)
        logits = torch.cat([similarity[same].view(n, -1), similarity[~same].view(n, -1)], dim=1) / self.temperature
        loss = F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))
        self.repr_optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.encoder.parameters(), self.norm_clip)
        self.repr_optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def reward(self, next_state: Tensor) -> Tensor:
        """(2B, 1): log(1 + the k-th distance over its running variance, less the clip)."""
        source, target = self.encoder(next_state), self.encoder(next_state)
        distance = torch.norm(source[:, None] - target[None], dim=-1)
        kth = distance.topk(self.k, largest=False).values[:, -1:]
        return torch.log((kth / self.statistic(kth) - self.knn_clip).clamp(min=0) + 1)


class MiniReplay:
    """A deque of float32 stacks, as mini_apt keeps them; a sample comes twice, each copy under a crop of its own batch-wide offset."""

    def __init__(self, capacity: int, pad: int = 4):
        self.memory: collections.deque = collections.deque(maxlen=capacity)
        self.pad = pad

    def add(self, state: Tensor, action: int, next_state: Tensor, not_done: float) -> None:
        self.memory.append((state, [action], next_state, [not_done]))

    def sample(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state, action, next_state, not_done = zip(*random.sample(self.memory, batch_size), strict=True)
        images = [self.crop(torch.FloatTensor(np.tile(np.stack(stacks), (2, 1, 1, 1)))) for stacks in (state, next_state)]
        return images[0], torch.LongTensor(np.tile(action, (2, 1))), images[1], torch.FloatTensor(np.tile(not_done, (2, 1)))

    def crop(self, images: Tensor) -> Tensor:
        padded, side = F.pad(images, (self.pad,) * 4, mode="replicate"), images.shape[-1]
        y, x = random.randrange(2 * self.pad + 1), random.randrange(2 * self.pad + 1)
        return padded[..., y : y + side, x : x + side]


class URLBEncoder(nn.Module):
    def __init__(self, conv: tuple[tuple[int, int, int], ...], channels: int, side: int):
        super().__init__()
        layers: list[nn.Module] = []
        for outputs, kernel, stride in conv:
            layers += [nn.Conv2d(channels, outputs, kernel, stride), nn.ReLU()]
            channels, side = outputs, (side - kernel) // stride + 1
        self.conv = nn.Sequential(*layers)
        self.width = channels * side * side

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images / 255.0 - 0.5).flatten(1)


def dense(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def squashed(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, after), nn.LayerNorm(after), nn.Tanh())


class URLBICM(nn.Module):
    def __init__(self, width: int, action_dim: int, features: int, hidden: int):
        super().__init__()
        self.trunk = squashed(width, features)
        self.forward_model = dense(features + action_dim, hidden, features)
        self.inverse_model = dense(2 * features, hidden, action_dim)

    def forward(self, observation: Tensor, action: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        here, there = self.trunk(observation), self.trunk(following)
        predicted = self.forward_model(torch.cat([here, action], -1))
        read_off = torch.tanh(self.inverse_model(torch.cat([here, there], -1)))
        return torch.norm(there - predicted, dim=-1).mean(), torch.norm(action - read_off, dim=-1).mean()


class URLBActor(nn.Module):
    def __init__(self, width: int, action_dim: int, trunk: int, hidden: list[int]):
        super().__init__()
        self.trunk, self.policy = squashed(width, trunk), dense(trunk, *hidden, action_dim)

    def forward(self, features: Tensor) -> Tensor:
        return torch.tanh(self.policy(self.trunk(features)))


class URLBCritic(nn.Module):
    """Twin critics on one trunk, which reads a state and the action; of pixels the action joins behind it."""

    def __init__(self, width: int, action_dim: int, trunk: int, hidden: list[int], pixels: bool):
        super().__init__()
        self.pixels = pixels
        self.trunk = squashed(width if pixels else width + action_dim, trunk)
        inputs = trunk + action_dim if pixels else trunk
        self.first, self.second = dense(inputs, *hidden, 1), dense(inputs, *hidden, 1)

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        if self.pixels:
            h = torch.cat([self.trunk(features), action], -1)
        else:
            h = self.trunk(torch.cat([features, action], -1))
        return self.first(h), self.second(h)


class URLBAPT:
    """See above. Its values: k 12, ICM of 512 features, hidden layers of 1024, a trunk of 50 behind convolutions, Adam at 1e-4."""

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        action_dim: int,
        *,
        conv=((32, 3, 2), (32, 3, 1), (32, 3, 1), (32, 3, 1)),
        features=512,
        hidden=1024,
        trunk=50,
        k=12,
        lr=1e-4,
        pad=4,
        sigma=0.2,
    ):
        self.pixels, self.k, self.pad, self.sigma, self.sigma_clip, self.tau = len(observation_shape) == 3, k, pad, sigma, 0.3, 0.01
        self.of_next = False  # the release rewards the observation that the action leaves
        self.encoder = URLBEncoder(conv, *observation_shape[:2]) if self.pixels else nn.Identity()
        width = self.encoder.width if self.pixels else observation_shape[0]
        trunk, layers = (trunk, [hidden] * 2) if self.pixels else (hidden, [hidden])
        self.icm = URLBICM(width, action_dim, features, hidden)
        self.actor = URLBActor(width, action_dim, trunk, layers)
        self.critic = URLBCritic(width, action_dim, trunk, layers, self.pixels)
        self.critic_target = frozen(self.critic)
        self.encoder_optimizer = torch.optim.Adam(self.encoder.parameters(), lr=lr) if self.pixels else None
        self.icm_optimizer, self.actor_optimizer, self.critic_optimizer = (
            torch.optim.Adam(network.parameters(), lr=lr) for network in (self.icm, self.actor, self.critic)
        )

    @torch.no_grad()
    def take_weights(self, ours: APT) -> None:
        """Those of our method, whose networks are the same: from here both compute the same on the same views."""
        agent, learner = ours.agent, ours.agent.learner
        pairs = [(self.encoder, agent.encoder), (self.icm, ours.representation), (self.actor, learner.actor)]
        pairs += [(self.critic, learner.critic), (self.critic_target, learner.critic_target)]
        for theirs, mine in pairs:
            for to, weights in zip(theirs.parameters(), mine.parameters(), strict=True):
                assert to.shape == weights.shape, (to.shape, weights.shape)
                to.copy_(weights)

    @torch.no_grad()
    def act(self, observation: Tensor) -> Tensor:
        """For one observation: float32 (A,)."""
        mean = self.actor(self.encoder(observation[None].float()))[0]
        return (mean + self.sigma * torch.randn_like(mean)).clamp(-1 + 1e-6, 1 - 1e-6)

    def update(self, observation: Tensor, action: Tensor, following: Tensor, discount: Tensor) -> dict[str, Tensor]:
        """observation, following: (B, F) float32 or (B, C, H, W) uint8; action: (B, A); discount: (B, 1)."""
        observation = self.encode(observation)
        with torch.no_grad():
            following = self.encode(following)

        forward_error, inverse_error = self.icm(observation, action, following)
        self.icm_optimizer.zero_grad()
        if self.encoder_optimizer:
            self.encoder_optimizer.zero_grad()
        (forward_error + inverse_error).backward()
        self.icm_optimizer.step()
        if self.encoder_optimizer:
            self.encoder_optimizer.step()

        observation = observation.detach()
        reward = self.reward(following if self.of_next else observation)
        critic_loss, target = self.update_critic(observation, action, reward, discount, following)
        actor_loss = self.update_actor(observation)
        soft_update(self.critic_target, self.critic, self.tau)
        return {
            "forward_error": forward_error.detach(),
            "inverse_error": inverse_error.detach(),
            "intrinsic_reward": reward.mean(),
            "critic_loss": critic_loss,
            "q_target": target,
            "actor_loss": actor_loss,
        }

    def encode(self, observation: Tensor) -> Tensor:
        return self.encoder(grid_shift(observation, self.pad)) if self.pixels else observation

    @torch.no_grad()
    def reward(self, features: Tensor) -> Tensor:
        """(B, 1): log(1 + mean distance to the k nearest, the row itself among them)."""
        z = self.icm.trunk(features)
        distance = torch.norm(z[:, None] - z[None], dim=-1, p=2)
        return torch.log(distance.topk(self.k, dim=1, largest=False).values.mean(1, keepdim=True) + 1.0)

    def noisy(self, mean: Tensor) -> Tensor:
        action = mean + (self.sigma * torch.randn_like(mean)).clamp(-self.sigma_clip, self.sigma_clip)
        return action - action.detach() + action.detach().clamp(-1 + 1e-6, 1 - 1e-6)

    def update_critic(self, features, action, reward, discount, following) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = reward + discount * torch.min(*self.critic_target(following, self.noisy(self.actor(following))))
        first, second = self.critic(features, action)
        loss = F.mse_loss(first, target) + F.mse_loss(second, target)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return loss.detach(), target.mean()

    def update_actor(self, features: Tensor) -> Tensor:
        loss = -torch.min(*self.critic(features, self.noisy(self.actor(features)))).mean()
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()
        return loss.detach()


def grid_shift(images: Tensor, pad: int) -> Tensor:
    """(B, C, S, S) -> float32, each moved by its own -pad..pad pixels on both axes: sampled bilinearly, though at the pixels' centres."""
    B, _, S, _ = images.shape
    wide = F.pad(images.float(), (pad,) * 4, mode="replicate")
    side = S + 2 * pad
    centre = (2 * torch.arange(S) + 1) / side - 1  # grid_sample's coordinates run from -1 to 1
    grid = torch.stack([centre.expand(S, S), centre[:, None].expand(S, S)], -1).repeat(B, 1, 1, 1)
    return F.grid_sample(wide, grid + torch.randint(0, 2 * pad + 1, (B, 1, 1, 2)) * 2 / side, padding_mode="zeros", align_corners=False)


class URLBReplay:
    """Transitions in arrays, drawn by NumPy's indexing: faster than the release, whose four workers read episodes from files one by one."""

    def __init__(self, capacity: int):
        self.capacity, self.added, self.random = capacity, 0, np.random.default_rng(0)
        self.columns: list[np.ndarray] = []

    def add(self, *transition: np.ndarray) -> None:
        """observation, action, the observation n steps later, discount (1,)."""
        if not self.columns:
            self.columns = [np.empty((self.capacity, *np.shape(value)), value.dtype) for value in transition]
        for column, value in zip(self.columns, transition, strict=True):
            column[self.added % self.capacity] = value
        self.added += 1

    def sample(self, batch_size: int) -> list[Tensor]:
        rows = self.random.integers(min(self.added, self.capacity), size=batch_size)
        return [torch.from_numpy(column[rows]) for column in self.columns]


class ZooNet(nn.Module):
    def __init__(self, num_actions: int, channels: int, side: int, conv, torso: int, lstm: int, hidden: int):
        super().__init__()
        self.num_actions = num_actions
        self.body = MiniEncoder(conv, channels, side, torso)
        self.lstm = nn.LSTM(torso + 1 + num_actions, lstm)
        self.advantage = nn.Sequential(nn.Linear(lstm, hidden), nn.ReLU(), nn.Linear(hidden, num_actions))
        self.value = nn.Sequential(nn.Linear(lstm, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, images: Tensor, last_action: Tensor, reward: Tensor, state) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """images (T, B, C, H, W) float32; last_action, reward (T, B) -> Q (T, B, A), state."""
        T, B = reward.shape
        h = F.relu(self.body.project(images.flatten(0, 1) / 255.0))
        seen = [h, rescale(reward).view(T * B, 1), F.one_hot(last_action.view(-1) + 1, self.num_actions + 1)[:, 1:].float()]
        h, state = self.lstm(torch.cat(seen, -1).view(T, B, -1), state)
        advantage = self.advantage(h)
        return self.value(h) + advantage - advantage.mean(-1, keepdim=True), state


class ZooR2D2:
    """See above. Arrays are time-major; reward_t and done_t belong to the step that led to row t, as there."""

    def __init__(self, num_actions: int, *, channels=4, side=84, conv=CONV, torso=512, lstm=512, hidden=512, lr=1e-4, eps=1e-3):
        self.online = ZooNet(num_actions, channels, side, conv, torso, lstm, hidden)
        self.target = frozen(self.online)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=lr, eps=eps)
        self.gamma, self.n_step, self.burn_in, self.max_grad_norm = 0.997, 5, 40, 40.0

    @torch.no_grad()
    def take_weights(self, ours: RecurrentTask) -> None:
        learner = ours.agent.learner
        for net, encoder, q in ((self.online, learner.encoder, learner.q), (self.target, learner.encoder_target, learner.q_target)):
            convolutions = [layer for layer in net.body.conv if isinstance(layer, nn.Conv2d)]
            for theirs, mine in zip([*convolutions, net.body.head], [*encoder.conv, q.torso], strict=True):
                theirs.load_state_dict(mine.state_dict())
            net.lstm.load_state_dict(q.lstm.state_dict())
            for name, both in q.head.hidden.named_parameters():  # ours holds both streams' hidden layers as one
                for stream, half in zip((net.value, net.advantage), both.chunk(2), strict=True):
                    getattr(stream[0], name).copy_(half)
            net.value[2].load_state_dict(q.head.value.state_dict())
            net.advantage[2].load_state_dict(q.head.advantage.state_dict())

    def update(self, batch: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], np.ndarray]:
        """Metrics, and priorities (B,)."""
        rows = {name: torch.from_numpy(array) for name, array in batch.items()}
        states = rows["h"][:1], rows["c"][:1]
        online_state, target_state = states, states
        b = self.burn_in
        if b:
            images = rows["observation"][:b].to(torch.float32)
            with torch.no_grad():
                online_state = self.online(images, rows["last_action"][:b], rows["reward"][:b], states)[1]
                target_state = self.target(images, rows["last_action"][:b], rows["reward"][:b], states)[1]
        images, last_action, reward = rows["observation"][b:].to(torch.float32), rows["last_action"][b:], rows["reward"][b:]
        self.optimizer.zero_grad()
        q, _ = self.online(images, last_action, reward, online_state)
        with torch.no_grad():
            best = q.argmax(-1)
            q_target, _ = self.target(images, last_action, reward, target_state)
            y = self.targets(q_target.gather(-1, best[..., None]).squeeze(-1), reward, rows["done"][b:])
        error = y - q[:-1].gather(-1, rows["action"][b:-1, :, None]).squeeze(-1)
        loss = (0.5 * error.square().sum(0)).mean()
        loss.backward()
        clip_grad_norm_(self.online.parameters(), self.max_grad_norm)
        self.optimizer.step()
        size = error.detach().abs()
        return {"q_loss": loss.detach(), "q_target": y.mean()}, (0.9 * size.amax(0) + 0.1 * size.mean(0)).numpy()

    def targets(self, value: Tensor, reward: Tensor, done: Tensor, eps: float = 1e-3) -> Tensor:
        """(T, B): n-step returns under h, of values (T + 1, B) that come in its scale."""
        value = value.sign() * ((((1 + 4 * eps * (value.abs() + 1 + eps)).sqrt() - 1) / (2 * eps)).square() - 1)
        T, n = len(value) - 1, self.n_step
        going_on = self.gamma * (~done).float()
        target = torch.cat([value[n:], value[-1:].expand(n - 1, -1)]) if T >= n else value[-1:].expand(T, -1)
        for i in reversed(range(n)):  # the step that leads to row t + i + 1, where there is one
            within = torch.arange(T)[:, None] + i < T
            step = (torch.arange(T) + i + 1).clamp(max=T)
            target = torch.where(within, reward[step] + going_on[step] * target, target)
        return target.sign() * ((target.abs() + 1).sqrt() - 1) + eps * target


class ZooReplay:
    """Sequences as dicts of time-major arrays, drawn by priority; a batch is stacked anew."""

    def __init__(self, exponent: float):
        self.exponent, self.random = exponent, np.random.default_rng(0)
        self.sequences: list[dict[str, np.ndarray]] = []
        self.priorities: list[float] = []

    def add(self, sequence: dict[str, np.ndarray]) -> None:
        self.sequences.append(sequence)
        self.priorities.append(1.0)

    def sample(self, batch_size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        p = np.array(self.priorities) ** self.exponent
        indices = self.random.choice(len(p), batch_size, p=p / p.sum())
        drawn = [self.sequences[i] for i in indices]
        return indices, {name: np.stack([sequence[name] for sequence in drawn], axis=1) for name in drawn[0]}

    def update_priorities(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        for i, priority in zip(indices, priorities, strict=True):
            self.priorities[i] = float(priority)

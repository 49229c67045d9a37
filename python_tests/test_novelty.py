"""NGU's reward: the pseudo-count, RND's modulator and what is learned for them, against plain float64 loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from urlfast.device import Arithmetic
from urlfast.intrinsic import Moments, NoveltyConfig, NoveltyReward, kernel_pseudo_count, modulated
from urlfast.nets.encoders import EncoderConfig

CPU = Arithmetic.choose("cpu", "fp32")
FEW = NoveltyConfig(embedding=3, k=2, hidden=8, rnd_features=4)


def novelty(config=FEW, shape=(3,), actions=4, seed=0) -> NoveltyReward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NoveltyReward(config, EncoderConfig(conv=((4, 3, 2),)), shape, actions, CPU)


class Reference:
    """The reward as one would write it down first: lists of embeddings, sums over everything seen, float64."""

    def __init__(self, config):
        self.c, self.memories, self.distances, self.errors = config, {}, [], []

    def step(self, embeddings, errors, firsts):
        c, nearest = self.c, []
        for i, (z, first) in enumerate(zip(np.float64(embeddings), firsts, strict=True)):
            memory = self.memories[i] = [] if first else self.memories[i]
            squared = sorted(((z - m) ** 2).sum() for m in memory)[: c.k]
            nearest.append(squared if len(squared) == c.k else None)
            memory.append(z)
            del memory[: -c.capacity]
        self.distances += [d for squared in nearest if squared for d in squared]
        self.errors += list(np.float64(errors))
        rewards = []
        for squared, error in zip(nearest, np.float64(errors), strict=True):
            episodic = 0.0
            if squared:
                mean = sum(self.distances) / len(self.distances)
                q = [max(d / (mean + 1e-8) - c.cluster_distance, 0) for d in squared]
                s = math.sqrt(sum(c.kernel_epsilon / (x + c.kernel_epsilon) for x in q)) + c.pseudo_count
                episodic = 0.0 if s > c.max_similarity else 1 / s
            alpha = 1 + (error - np.mean(self.errors)) / (np.std(self.errors) + 1e-8)
            rewards.append(episodic * min(max(alpha, 1), c.max_modulator))
        return rewards


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    envs=st.integers(1, 3),
    k=st.integers(1, 4),
    capacity=st.integers(4, 12),
    similarity=st.sampled_from([0.9, 8.0]),  # the lower one is crossed by the first return
)
def test_rewards_are_those_of_a_plain_loop(seed, envs, k, capacity, similarity):
    """Several environments, returns to earlier states, resets at different times, memories that wrap; d_m^2 and RND outlast them all."""
    config = NoveltyConfig(embedding=3, k=k, capacity=capacity, hidden=8, rnd_features=4, max_similarity=similarity)
    mine, reference, random = novelty(config), Reference(config), np.random.default_rng(seed)
    states = random.normal(0, 1, (6, 3)).astype(np.float32)
    for t in range(25):
        o = torch.from_numpy(states[random.integers(0, 6, envs)] + np.float32(0.01) * random.normal(size=(envs, 3)).astype(np.float32))
        first = np.full(envs, True) if t == 0 else random.random(envs) < 0.1
        got = mine(o, torch.from_numpy(first))
        with torch.no_grad():
            expected = reference.step(mine.embed(o).numpy(), mine.rnd_error(o).numpy(), first)
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-6, err_msg=f"step {t}")


def test_the_pseudo_count_falls_with_the_root_of_the_visits():
    """Of k = 10: j exact copies of a state, and the others far away, pay 1 / sqrt(j); a new one about 30."""
    config = NoveltyConfig()
    for j in range(1, 11):
        squared = torch.tensor([[0.0] * j + [50.0] * (10 - j)], dtype=torch.float64)
        assert kernel_pseudo_count(squared, 1.0, config).item() == pytest.approx(1 / math.sqrt(j), rel=2e-3)
    new = kernel_pseudo_count(torch.full((1, 10), 1.008, dtype=torch.float64), 1.0, config)
    assert new.item() == pytest.approx(30.7, abs=0.1)


def test_edges_of_the_pseudo_count():
    config = NoveltyConfig()
    nothing = torch.zeros(1, 10, dtype=torch.float64)
    assert kernel_pseudo_count(nothing, 0.0, config).item() == pytest.approx(1 / (math.sqrt(10) + 1e-3))  # one state alone was ever seen
    few = nothing.clone()
    few[:, -1] = torch.inf
    assert kernel_pseudo_count(few, 1.0, config).item() == 0.0  # fewer than k in memory
    close = torch.full((1, 10), 0.008, dtype=torch.float64)
    assert torch.equal(kernel_pseudo_count(close, 1.0, config), kernel_pseudo_count(nothing, 1.0, config))  # xi: one cluster
    # The cut at s_m = 8 needs more than 64 neighbours.
    many = NoveltyConfig(k=70)
    assert kernel_pseudo_count(torch.zeros(1, 63, dtype=torch.float64), 1.0, many).item() == pytest.approx(1 / (math.sqrt(63) + 1e-3))
    assert kernel_pseudo_count(torch.zeros(1, 70, dtype=torch.float64), 1.0, many).item() == 0.0


def test_lifelong_novelty_multiplies_by_one_to_five():
    episodic, alpha = torch.full((5,), 2.0), torch.tensor([-3.0, 0.5, 1.0, 2.5, 9.0])
    assert modulated(episodic, alpha, NoveltyConfig()).tolist() == [2.0, 2.0, 2.0, 5.0, 10.0]


@settings(deadline=None)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_moments_are_those_of_all_values(data, seed):
    random = np.random.default_rng(seed)
    moments, seen = Moments((2,), torch.device("cpu")), []
    for _ in range(data.draw(st.integers(1, 6))):
        values = random.normal(1e3, 1, (data.draw(st.integers(1, 5)), 2)).astype(np.float32)
        counted = random.random(len(values)) < 0.7
        moments.update(torch.from_numpy(values), torch.from_numpy(counted))
        seen.append(values[counted])
    seen = np.float64(np.concatenate(seen))
    if len(seen):
        np.testing.assert_allclose(moments.mean, seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.std, seen.std(0), rtol=1e-6, atol=1e-6)
    assert moments.count == len(seen) and moments.mean.isfinite().all()


def test_moments_of_pixels_are_exact_to_float32():
    random = np.random.default_rng(0)
    moments, seen = Moments((3, 5), torch.device("cpu")), random.integers(0, 256, (40, 16, 3, 5), np.uint8)
    seen[..., 0] = 200  # a pixel that never changes
    for batch in seen:
        moments.update(torch.from_numpy(batch))
    flat = np.float64(seen.reshape(-1, 3, 5))
    np.testing.assert_allclose(moments.mean, flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.std, flat.std(0), rtol=1e-5, atol=1e-2)


def test_an_episode_ends_its_memory_and_not_the_mean_distance():
    n = novelty()
    first, then = torch.tensor([True]), torch.tensor([False])
    walk = torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(0))
    paid = [n(o, first if t == 0 else then).item() for t, o in enumerate(walk)]
    assert paid[:2] == [0, 0] and all(p > 0 for p in paid[2:])  # k = 2 in memory
    before = n.moments["distance"].mean.clone()
    assert n(walk[0], first).item() == 0 and n.memory.lengths() == [1]
    assert torch.equal(n.moments["distance"].mean, before) and n.moments["distance"].count == 2 * 4


def test_a_return_pays_less_than_something_new():
    n, first, then = novelty(NoveltyConfig(hidden=16)), torch.tensor([True]), torch.tensor([False])
    walk = torch.randn(40, 1, 3, generator=torch.Generator().manual_seed(1)) * 10
    new = [n(o, first if t == 0 else then).item() for t, o in enumerate(walk)][20:]
    again = [n(o, then).item() for o in walk[20:]]
    assert np.median(new) > 5 * np.median(again)


def test_other_environments_begin_with_empty_memories():
    n = novelty()
    for t in range(4):
        n(torch.randn(2, 3), torch.tensor([t == 0] * 2))
    n(torch.randn(5, 3), torch.zeros(5, dtype=torch.bool))
    assert n.memory.lengths() == [1] * 5


def test_frozen_it_keeps_rnds_statistics_and_goes_on_with_the_mean_distance():
    n, random = novelty(), torch.Generator().manual_seed(0)

    def play(learning):
        for t in range(5):
            n(torch.randn(2, 3, generator=random), torch.tensor([t == 0] * 2), learning=learning)

    play(True)
    state = {name: {k: v.clone() for k, v in moments.state_dict().items()} for name, moments in n.moments.items()}
    play(False)
    for name in ("input", "error"):
        assert all(torch.equal(value, state[name][k]) for k, value in n.moments[name].state_dict().items())
    assert n.moments["distance"].count == 2 * state["distance"]["count"] and n.moments["distance"].mean != state["distance"]["mean"]


def test_rnd_reads_normalised_and_clipped_observations():
    n = novelty()
    seen = []
    n.rnd["target"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    data = torch.randn(50, 2, 3) * torch.tensor([1.0, 10.0, 0.0]) + torch.tensor([0.0, 100.0, 7.0])
    for t, o in enumerate(data):
        n(o, torch.tensor([t == 0] * 2))
    seen.clear()
    n(torch.tensor([[1.0, 120.0, 7.0], [50.0, 100.0, 7.5]]), torch.tensor([False, False]), learning=False)
    mean, std = data.flatten(0, 1).mean(0), data.flatten(0, 1).std(0, correction=0)
    expected = [[(1 - mean[0]) / std[0], (120 - mean[1]) / std[1], 0], [5, (100 - mean[1]) / std[1], 5]]
    torch.testing.assert_close(seen[0], torch.tensor(expected), rtol=1e-3, atol=1e-3)


# What is learned -----------------------------------------------------------------------------------------------------


def sequences(n=3, length=9, shape=(3,), seed=0):
    random = torch.Generator().manual_seed(seed)
    o = torch.randn(n, length, *shape, generator=random)
    return o, torch.randint(0, 4, (n, length - 1), generator=random)


def test_only_the_last_frames_of_a_sequence_are_learned_from():
    """With n transitions: pairs from o_{n-5} on, RND from o_{n-4} on; a sequence of two gives two, an empty one none."""
    o, a = sequences()
    counts = torch.tensor([8, 6, 2])
    mask = torch.arange(8) < counts[:, None]

    def losses(observation, action):
        n = novelty()
        n.moments["input"].update(o.flatten(0, 1))  # else every input is clipped to the same
        return n.learn(observation, action, mask)

    before = losses(o, a)

    def changed(row, t=None, action=None):
        observation, actions = o.clone(), a.clone()
        if t is not None:
            observation[row, t] += 1.0
        if action is not None:
            actions[row, action] = (actions[row, action] + 1) % 4
        after = losses(observation, actions)
        return [bool(after[name] != before[name]) for name in ("inverse_loss", "rnd_loss")]

    for row, n in enumerate(counts.tolist()):
        for t in range(9):
            assert changed(row, t) == [n - 5 <= t <= n, max(n - 4, 1) <= t <= n], (row, t)
        for t in range(8):
            assert changed(row, action=t) == [n - 5 <= t < n, False], (row, t)
    nothing = novelty().learn(o, a, torch.zeros_like(mask))
    assert nothing["inverse_loss"] == 0 and nothing["rnd_loss"] == 0


def test_losses_are_plain_means_over_the_pairs():
    o, a = sequences()
    mask = torch.arange(8) < torch.tensor([8, 6, 2])[:, None]
    n, m = novelty(), novelty()
    ce, wrong = [], []
    with torch.no_grad():
        for row, length in enumerate((8, 6, 2)):
            for t in range(max(length - 5, 0), length):
                logits = m.embedding["inverse"](torch.cat([m.embed(o[row, t][None]), m.embed(o[row, t + 1][None])], -1))
                ce.append(-logits.log_softmax(-1)[0, a[row, t]].item())
                wrong.append(m.rnd_error(o[row, t + 1][None]).item())
    metrics = n.learn(o, a, mask)
    assert metrics["inverse_loss"].item() == pytest.approx(np.mean(ce), rel=1e-5)
    assert metrics["rnd_loss"].item() == pytest.approx(np.mean(wrong), rel=1e-5)


def test_each_loss_trains_its_own_network_and_none_the_random_one():
    n = novelty()
    before = {name: value.clone() for part in ("embedding", "rnd") for name, value in getattr(n, part).state_dict(prefix=part).items()}
    n.learn(*sequences(), torch.ones(3, 8, dtype=torch.bool))
    for part in ("embedding", "rnd"):
        for name, value in getattr(n, part).state_dict(prefix=part).items():
            assert torch.equal(value, before[name]) == ("target" in name), name


def test_the_embedding_learns_what_the_action_moves():
    """Two of four numbers are moved by the action, the others are noise: the embedding follows the former. RND's error falls."""
    config = NoveltyConfig(embedding=8, k=2, hidden=32, rnd_features=8)
    n, random = novelty(config, shape=(4,)), torch.Generator().manual_seed(0)
    moves = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    mask = torch.ones(32, 5, dtype=torch.bool)
    history = []
    for _ in range(600):
        a = torch.randint(0, 4, (32, 5), generator=random)
        at = torch.cat([torch.randn(32, 1, 2, generator=random), moves[a]], 1).cumsum(1)
        o = torch.cat([at, torch.randn(32, 6, 2, generator=random)], -1)
        n.moments["input"].update(o.flatten(0, 1))
        history.append(n.learn(o, a, mask))
    assert history[-1]["inverse_accuracy"] > 0.9 and history[0]["inverse_accuracy"] < 0.5
    assert history[-1]["rnd_loss"] < 0.3 * history[0]["rnd_loss"]
    with torch.no_grad():
        base = torch.randn(256, 4, generator=random)
        shift = [(n.embed(base + torch.eye(4)[i]) - n.embed(base)).norm(dim=-1).mean().item() for i in range(4)]
    assert min(shift[:2]) > 2 * max(shift[2:]), shift


def test_saved_and_loaded_it_pays_and_learns_alike():
    one, other = novelty(seed=0), novelty(seed=1)
    o, a = sequences()
    mask = torch.ones(3, 8, dtype=torch.bool)
    for t in range(9):
        one(o[:, t], torch.tensor([t == 0] * 3))
    one.learn(o, a, mask)
    for part, state in one.state_dict().items():
        other.load_part(part, state)
    assert tuple(one.state_dict()) == NoveltyReward.PARTS
    for t in range(9):
        first = torch.tensor([t == 0] * 3)
        assert torch.equal(one(o[:, t], first), other(o[:, t], first))
    assert all(torch.equal(x, y) for x, y in zip(one.learn(o, a, mask).values(), other.learn(o, a, mask).values(), strict=True))
    with pytest.raises(ValueError, match=r"mean must have shape \(3,\), got \(2,\)"):
        bad = one.state_dict()["moments"]
        bad["input"]["mean"] = torch.zeros(2)
        novelty().load_part("moments", bad)


def test_images_are_embedded_in_float32_and_a_constant_reward_learns_nothing():
    n = novelty(shape=(2, 12, 12))
    o = torch.randint(0, 256, (3, 2, 12, 12), dtype=torch.uint8)
    for t in range(4):
        paid = n(o, torch.tensor([t == 0] * 3))
    assert n.embed(o).dtype == torch.float32 and paid.dtype == torch.float32
    assert (paid > 0).all()
    constant = novelty(NoveltyConfig(reward="constant"))
    assert constant(torch.randn(2, 3), torch.tensor([True, False])).tolist() == [0, 1]
    assert constant.learn(*sequences(), torch.ones(3, 8, dtype=torch.bool)) == {}


def test_bad_values_are_named():
    for name, value, says in (
        ("k", 0, "k: must be at least 1"),
        ("embedding", 0, "embedding"),
        ("max_modulator", 0.5, "max_modulator: must be at least 1"),
        ("kernel_epsilon", 0.0, "kernel_epsilon: must be positive"),
        ("capacity", 9, "capacity: must be at least 10"),
        ("lr", float("nan"), "lr: must be positive"),
    ):
        with pytest.raises(ValueError, match=says):
            NoveltyConfig(**{name: value})
    with pytest.raises(ValueError, match=r"actions: .* vectors"):
        novelty(actions=(2,))

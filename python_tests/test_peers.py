"""bench/peers.py does what it claims: on the same batch and weights its losses, gradients and rewards are our own update's."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from urlfast.learners.ddpg import DDPGConfig
from urlfast.learners.drq import DrQConfig
from urlfast.learners.r2d2 import R2D2Config
from urlfast.methods.apt import APT, APTConfig, ContrastiveConfig, ICMConfig
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask
from urlfast.nets.encoders import EncoderConfig

sys.path.append(str(Path(__file__).parents[1]))
from bench.peers import URLBAPT, MiniAPT, MiniReplay, URLBReplay, ZooR2D2, ZooReplay, grid_shift

CONV, B, ACTIONS, K = ((8, 8, 4), (8, 4, 2)), 8, 3, 5


def pair(lr):
    """Ours and the peer with the same weights, and one batch as each of them takes it. No shift: both views are the image itself."""
    mini = APTConfig.mini_apt()
    config = replace(
        mini,
        encoder=EncoderConfig(conv=CONV),
        representation=ContrastiveConfig((6,)),
        reward=replace(mini.reward, k=K),
        learner=DrQConfig(hidden=12, tau=0.01, adam_eps=1e-8, lr=lr, grad_clip=1e9),
        lr=lr,
        batch_size=B,
        augment=replace(mini.augment, shift=0),
        precision="fp32",
    )
    ours = APT(config, (4, 36, 36), ACTIONS, seed=0)
    peer = MiniAPT(ACTIONS, side=36, conv=CONV, projection=6, hidden=12, k=K, lr=lr)
    peer.norm_clip = 1e9  # no clip on either side: a loss four times as large would meet it earlier
    with torch.no_grad():
        # Distances large beside their variance would give rewards near 4 and errors above 1, where Huber's loss is not the square.
        ours.agent.encoder.conv[-1].weight.mul_(100)
        ours.agent.learner.q.hidden.weight.div_(1000)
        for target, source in ((ours.agent.encoder_target, ours.agent.encoder), (ours.agent.learner.q_target, ours.agent.learner.q)):
            target.load_state_dict(source.state_dict())
    peer.take_weights(ours)
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (B, 4, 36, 36), np.uint8)) for _ in range(2)]
    action = torch.from_numpy(rng.integers(0, ACTIONS, B))
    not_done = torch.from_numpy(rng.integers(0, 2, B).astype(np.float32))
    for_ours = dict(observation=images[0], next_observation=images[1], action=action, discount=0.99 * not_done)
    state, next_state = (i.repeat(2, 1, 1, 1).float() / 255 for i in images)
    return ours, peer, for_ours, (state, action.repeat(2)[:, None], next_state, not_done.repeat(2)[:, None])


def test_mini_apt_has_our_losses_rewards_and_gradients():
    """With a step that moves nothing, so that our features, taken before the contrastive step, are the peer's, taken after it."""
    ours, peer, for_ours, for_peer = pair(lr=1e-12)
    mine, theirs = ours.gradient_step(**for_ours), peer.update(*for_peer)
    assert mine["q_loss"] > 1e-4 and mine["intrinsic_reward"] > 0.01
    for name in ("contrastive_loss", "intrinsic_reward"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
    # Its loss is the square summed over two views, ours Huber's mean: e²/2 below 1, so a quarter.
    torch.testing.assert_close(mine["q_loss"], theirs["critic_loss"] / 4, rtol=1e-4, atol=1e-6)
    q, critic = ours.agent.learner.q, peer.critic
    hidden = torch.cat([critic.value[0].weight.grad, critic.advantage[0].weight.grad])
    for got, expected in ((q.hidden.weight.grad, hidden), (q.advantage.weight.grad, critic.advantage[2].weight.grad)):
        torch.testing.assert_close(got, expected / 4, rtol=1e-3, atol=1e-6)


def test_mini_apt_takes_our_contrastive_step():
    ours, peer, for_ours, for_peer = pair(lr=1e-3)
    peer.update_representation(for_peer[0])
    gradient = peer.encoder.conv[0].weight.grad.clone()
    ours, peer, for_ours, for_peer = pair(lr=1e-3)
    ours.gradient_step(**for_ours)
    peer.update(*for_peer)
    torch.testing.assert_close(ours.agent.encoder.conv[0].weight.grad.contiguous(), gradient, rtol=1e-3, atol=1e-5)
    assert not torch.equal(peer.encoder.conv[0].weight.grad, gradient)  # what the critic's loss sends back, and nobody uses
    for mine, theirs in ((ours.agent.encoder, peer.encoder), (ours.agent.encoder_target, peer.encoder_target)):
        for a, b in zip(mine.conv, (theirs.conv[0], theirs.conv[2]), strict=True):
            torch.testing.assert_close(a.weight.contiguous(), b.weight, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(ours.representation.projection[0].weight, peer.encoder.head.weight, rtol=1e-3, atol=2e-5)


def test_mini_replay_hands_out_both_views_of_each_transition():
    replay = MiniReplay(10, pad=2)
    for i in range(12):
        replay.add(torch.full((4, 6, 6), float(i)), i, torch.full((4, 6, 6), i + 1.0), 1.0)
    state, action, next_state, not_done = replay.sample(5)
    assert state.shape == next_state.shape == (10, 4, 6, 6) and action.shape == not_done.shape == (10, 1)
    assert torch.equal(state[:5], state[5:]) and torch.equal(next_state, state + 1)
    assert torch.equal(state[:, 0, 0, 0].long(), action[:, 0]) and action.min() >= 2  # the first two have left


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_mini_apt_acts(epsilon):
    _, peer, _, (state, *_) = pair(lr=1e-3)
    assert peer.act(state[0], epsilon) in range(ACTIONS)


def urlb_pair(pixels, lr):
    """Ours and URLB's peer with the same weights, one batch as both take it; no shift and no noise, and the peer rewards as ours does."""
    urlb, shape, A = APTConfig.urlb(), (6, 36, 36) if pixels else (10,), 3
    config = replace(
        urlb,
        encoder=replace(urlb.encoder, conv=CONV),
        representation=ICMConfig(features=16, hidden=24),
        reward=replace(urlb.reward, k=K),
        learner=DDPGConfig(hidden=24, feature_dim=7, lr=lr, sigma=0.0, sigma_final=0.0),
        lr=lr,
        batch_size=B,
        augment=replace(urlb.augment, shift=0),
        precision="fp32",
    )
    ours = APT(config, shape, (A,), seed=0, frame_stack=2)
    peer = URLBAPT(shape, A, conv=CONV, features=16, hidden=24, trunk=7, k=K, lr=lr, pad=0, sigma=0.0)
    peer.of_next = True
    peer.take_weights(ours)
    rng = np.random.default_rng(0)
    draw = (lambda: rng.integers(0, 256, (B, *shape), np.uint8)) if pixels else (lambda: rng.normal(size=(B, *shape)).astype(np.float32))
    observation, following = torch.from_numpy(draw()), torch.from_numpy(draw())
    action, discount = (torch.from_numpy(rng.uniform(low, 1, size).astype(np.float32)) for low, size in ((-1, (B, A)), (0, B)))
    for_ours = dict(observation=observation, next_observation=following, action=action, discount=discount)
    return ours, peer, for_ours, (observation, action, following, discount[:, None])


@pytest.mark.parametrize("pixels", [False, True])
def test_urlb_has_our_losses_rewards_and_gradients(pixels):
    ours, peer, for_ours, for_peer = urlb_pair(pixels, lr=1e-3)
    mine, theirs = ours.gradient_step(**for_ours), peer.update(*for_peer)
    for name, value in theirs.items():
        assert value.abs() > 1e-3, name
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)
    learner = ours.agent.learner
    pairs = [(ours.agent.encoder, peer.encoder), (ours.representation, peer.icm), (learner.actor, peer.actor)]
    for a, b in pairs:
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p.grad.contiguous(), q.grad, rtol=1e-3, atol=1e-6)
    for p, q in zip(learner.critic_target.parameters(), peer.critic_target.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    # The actor's loss went on into the critic's weights, which nobody uses: the peer's gradient is no longer that of the critic's loss.
    assert not torch.allclose(learner.critic.trunk.linear.weight.grad, peer.critic.trunk[0].weight.grad)


def test_urlb_rewards_the_observation_that_was_left():
    _, peer, _, (observation, action, following, discount) = urlb_pair(False, lr=1e-3)
    _, other, _, _ = urlb_pair(False, lr=1e-3)
    other.of_next = False
    torch.testing.assert_close(
        peer.update(following, action, following, discount)["intrinsic_reward"],
        other.update(following, action, following, discount)["intrinsic_reward"],
    )
    rewards = [p.update(observation, action, following, discount)["intrinsic_reward"] for p in (peer, other)]
    assert abs(rewards[0] - rewards[1]) > 1e-3


def test_urlb_shift_moves_whole_pixels():
    images, pad = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), 2
    crops = torch.nn.functional.pad(images.float(), (pad,) * 4, mode="replicate").unfold(2, 8, 1).unfold(3, 8, 1)
    shifted = grid_shift(images, pad)
    off = (crops - shifted[:, :, None, None]).abs().amax((1, 4, 5)).flatten(1)  # (6, 25)
    assert (off.amin(1) < 0.01).all() and len(set(off.argmin(1).tolist())) > 1


def test_urlb_acts_and_replays():
    _, peer, _, (observation, *_) = urlb_pair(True, lr=1e-3)
    assert peer.act(observation[0]).shape == (3,)
    replay = URLBReplay(10)
    for i in range(12):
        replay.add(np.full(4, i, np.float32), np.full(2, i, np.float32), np.full(4, i + 3, np.float32), np.ones(1, np.float32))
    observation, action, following, discount = replay.sample(5)
    assert observation.shape == (5, 4) and action.shape == (5, 2) and discount.shape == (5, 1)
    assert torch.equal(following, observation + 3) and observation.min() >= 2  # the first two have left


@pytest.mark.parametrize("burn_in", [0, 3])
def test_zoo_has_our_loss_gradients_and_priorities(burn_in):
    T, side, width = 9, 36, 12
    learner = R2D2Config(torso=width, lstm=width, hidden=width, burn_in=burn_in)
    config = RecurrentConfig(EncoderConfig(conv=CONV), learner, trace_length=T, period=T, batch_size=B, precision="fp32")
    ours = RecurrentTask(config, (4, side, side), ACTIONS, seed=0, frame_stack=4)
    for parameter in ours.agent.learner.target_parameters:
        parameter.mul_(1.1)
    peer = ZooR2D2(ACTIONS, side=side, conv=CONV, torso=width, lstm=width, hidden=width)
    peer.burn_in = burn_in
    peer.take_weights(ours)
    rng, L = np.random.default_rng(0), burn_in + T + 1
    frames = rng.integers(0, 256, (B, L + 3, 1, side, side), np.uint8)
    done = np.zeros((B, L), bool)
    done[::2, -2] = True  # the last transition is terminal
    rows = {"action": rng.integers(0, ACTIONS, (B, L)), "reward": rng.normal(size=(B, L)).astype(np.float32), "terminated": done}
    before = {"previous_action": rng.integers(-1, ACTIONS, B), "previous_reward": rng.normal(size=B).astype(np.float32)}
    state = rng.normal(size=(B, 2, width)).astype(np.float32)
    arrays = {"frames": frames, **rows, **before, "state": state, "mask": np.ones((B, L - 1), bool), "mu": np.ones((B, L), np.float32)}
    mine = ours.gradient_step(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def led_to(first, column):  # of the step that led to a row
        return np.ascontiguousarray(np.concatenate([first[:, None], column[:, :-1]], 1).T)

    theirs, priorities = peer.update({
        "observation": np.stack([frames[:, t : t + 4, 0] for t in range(L)]),
        "action": rows["action"].T,
        "last_action": led_to(before["previous_action"], rows["action"]),
        "reward": led_to(before["previous_reward"], rows["reward"]),
        "done": led_to(np.zeros(B, bool), done),
        "h": np.repeat(state[None, :, 0], L, 0),
        "c": np.repeat(state[None, :, 1], L, 0),
    })  # fmt: skip
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4)  # the peer's inverse of h is the one that cancels
    td = mine["priorities"].numpy()
    np.testing.assert_allclose(priorities, 0.9 * td.max(1) + 0.1 * td.mean(1), rtol=1e-3, atol=1e-4)
    q = ours.agent.learner.q
    gradients = [*(layer.weight.grad for layer in ours.agent.learner.encoder.conv), q.torso.weight.grad, q.lstm.weight_hh_l0.grad]
    convolutions = [layer for layer in peer.online.body.conv if isinstance(layer, torch.nn.Conv2d)]
    expected = [*(layer.weight.grad for layer in convolutions), peer.online.body.head.weight.grad, peer.online.lstm.weight_hh_l0.grad]
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.contiguous(), b, rtol=1e-2, atol=1e-4)


def test_zoo_replays_by_priority():
    replay = ZooReplay(1.0)
    for i in range(3):
        replay.add({"x": np.full(4, i)})
    replay.update_priorities(np.array([0, 1]), np.array([0.0, 3.0]))
    indices, drawn = replay.sample(400)
    assert drawn["x"].shape == (4, 400) and (drawn["x"] == indices).all()
    assert not (indices == 0).any() and abs((indices == 1).mean() - 0.75) < 0.1

"""R2D2: its learner against a slow reference, and what a replay gives it against what an actor saw."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference_returns
import torch
from torch.nn.functional import relu
from toys import Catch, TMaze

from urlfast.device import Arithmetic, has_bf16
from urlfast.learners.r2d2 import R2D2, R2D2Config, RecurrentQ, before, epsilons
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask, stacked
from urlfast.nets.encoders import Encoder, EncoderConfig, blocks
from urlfast.nets.lstm import LSTM

B, L, F, A = 3, 9, 5, 4
SMALL = dict(torso=7, lstm=6, hidden=8, lr=1e-2)


def learner(num_outputs=None, seed=0, precision="fp32", **config):
    torch.manual_seed(seed)
    config = R2D2Config(**{**SMALL, "burn_in": 2, **config})
    encoder, q = torch.nn.Linear(F, F, bias=False), RecurrentQ(config, F, A, num_outputs)
    made = R2D2(config, encoder, q, Arithmetic.choose("cpu", precision), torch.Generator().manual_seed(seed))
    with torch.no_grad():  # a target network of its own
        for parameter in made.target_parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def batch(seed=0, choices=A, full=False):
    rng = np.random.default_rng(seed)
    rows = np.full(B, L - 1) if full else rng.integers(4, L, B)  # transitions of each sequence
    exists = np.arange(L - 1) < rows[:, None]
    arrays = dict(
        action=rng.integers(0, A, (B, L)),
        terminated=np.pad(exists & (np.arange(L - 1) == rows[:, None] - 1), ((0, 0), (0, 1))) & (np.arange(B) % 2 == 0)[:, None],
        mask=exists,
        state=rng.normal(size=(B, 2, SMALL["lstm"])).astype(np.float32),
        previous_action=rng.integers(-1, A, B),
        previous_reward=rng.normal(size=B).astype(np.float32),
        mu=rng.uniform(0.1, 1, (B, L)).astype(np.float32),
    )
    made = SimpleNamespace(**{name: torch.from_numpy(array) for name, array in arrays.items()}, choice=None, weight=None)
    if choices > A:
        made.choice = torch.where(torch.from_numpy(rng.random((B, L)) < 0.5), A, made.action)
    return (
        made,
        torch.from_numpy(rng.normal(0, 3, (B, L)).astype(np.float32)),
        torch.from_numpy(rng.normal(size=(B, L, F)).astype(np.float32)),
    )


def reference_q(q, features, action, reward, state, burn_in):
    """Q of the rows after the burn-in, (B, T + 1, A), a step at a time in float64. q: {name: weights}."""
    h, c = state.double().unbind(1)
    values = []
    for t in range(features.shape[1]):
        one_hot = torch.zeros(B, A, dtype=torch.float64)
        for b in range(B):
            if action[b, t] >= 0:
                one_hot[b, action[b, t]] = 1
        seen = relu(features[:, t] @ q["torso.weight"].T + q["torso.bias"])
        scaled = torch.from_numpy(reference_returns.rescale(reward[:, t].numpy()))
        x = torch.cat([seen, scaled[:, None], one_hot], -1)
        z = x @ q["lstm.weight_ih_l0"].T + q["lstm.bias_ih_l0"] + h @ q["lstm.weight_hh_l0"].T + q["lstm.bias_hh_l0"]
        i, f, g, o = z.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if t < burn_in:
            h, c = h.detach(), c.detach()
            continue
        hidden = relu(h @ q["head.hidden.weight"].T + q["head.hidden.bias"])
        value, advantage = (
            part @ q[f"head.{name}.weight"].T + q[f"head.{name}.bias"]
            for name, part in zip(("value", "advantage"), hidden.chunk(2, -1), strict=True)
        )
        values.append(value + advantage - advantage.mean(-1, keepdim=True))
    return torch.stack(values, 1)


@pytest.mark.parametrize("target", ["n-step", "retrace", "peng"])
@pytest.mark.parametrize("burn_in, num_outputs, weighted", [(0, A, False), (2, A, True), (2, A + 1, False)])
def test_update_matches_the_reference(target, burn_in, num_outputs, weighted):
    got = learner(num_outputs, target=target, burn_in=burn_in, n_step=3, grad_clip=1e9)
    b, reward, images = batch(choices=num_outputs)
    if weighted:
        b.weight = torch.tensor([0.2, 1.0, 0.7])
    online, weights = ({name: p.detach().double().requires_grad_() for name, p in net.named_parameters()} for net in (got.q, got.encoder))
    frozen = {name: p.detach().double() for name, p in got.q_target.named_parameters()}
    features = images.double() @ weights["weight"].T
    inputs = before(b.previous_action, b.action), before(b.previous_reward, reward)
    q = reference_q(online, features, *inputs, b.state, burn_in)
    q_target = reference_q(frozen, images.double() @ got.encoder_target.weight.double().T, *inputs, b.state, burn_in)
    values = reference_returns.rescale_inverse(q_target.detach().numpy())
    best, choice = q.argmax(-1).numpy(), (b.action if b.choice is None else b.choice)[:, burn_in:].numpy()
    T = L - 1 - burn_in
    mask, paid = b.mask[:, burn_in:].numpy(), reward[:, burn_in:-1].double().numpy()
    discount = got.config.gamma * (1.0 - b.terminated[:, burn_in:-1].double().numpy())
    next_value = np.take_along_axis(values, best[..., None], -1)[:, 1:, 0]
    if target == "n-step":
        G = reference_returns.n_step_return(paid, discount, next_value, mask, 3)
    elif target == "retrace":
        taken = np.take_along_axis(values, choice[..., None], -1)[:, :-1, 0]
        pi, mu = (choice == best)[:, :-1].astype(float), b.mu[:, burn_in:-1].double().numpy()
        G = reference_returns.retrace(paid, discount, next_value, taken, pi, mu, mask, got.config.trace_lambda)
    else:
        G = reference_returns.peng_q_lambda(paid, discount, next_value, mask, got.config.trace_lambda)
    y = torch.from_numpy(reference_returns.rescale(G))
    loss, priorities = 0, np.zeros((B, T))
    for i, t in zip(*np.nonzero(mask), strict=True):
        both = {int(choice[i, t]), int(b.action[i, burn_in + t])}
        for a in both:
            error = q[i, t, a] - y[i, t]
            loss = loss + (b.weight[i] if weighted else 1) * 0.5 * error**2 / B
            priorities[i, t] = max(priorities[i, t], abs(error.item()))
    expected = torch.autograd.grad(loss, [*weights.values(), *online.values()])

    with torch.no_grad():
        target_features = got.encoder_target(images)
        burnt_in = got.encoder(images[:, :burn_in])
    metrics, td = got.update(b, reward, torch.cat([burnt_in, got.encoder(images[:, burn_in:])], 1), target_features)
    np.testing.assert_allclose(metrics["q_loss"], loss.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["q_target"], y.numpy()[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(td.numpy(), priorities, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(got.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-3, atol=1e-5)
    if num_outputs > A:
        assert (np.bincount(choice[:, :-1][mask], minlength=A + 1) > 0)[A]  # the case that has two terms was there


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this processor has no bfloat16 products")
@pytest.mark.parametrize("burn_in", [0, 2])
def test_bfloat16_updates_as_float32_does(burn_in):
    """Gradients agree to 3 %, where rounding carries no hidden unit over its ReLU's edge, as with this seed."""
    found = []
    for precision in ("fp32", "bf16"):
        got = learner(burn_in=burn_in, precision=precision, seed=3)
        b, reward, images = batch(3)
        metrics, td = got.update(b, reward, got.encoder(images), got.encoder_target(images).detach())
        found.append([metrics["q_loss"], td, *(p.grad for p in got.parameters)])
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32 and (rounded - exact).norm() < 0.03 * exact.norm()


def test_rows_that_do_not_exist_change_nothing():
    for target in ("n-step", "retrace", "peng"):
        results = []
        for noise in (0.0, 100.0):
            got = learner(target=target)
            b, reward, images = batch()
            beyond = torch.cat([torch.ones(B, 1, dtype=torch.bool), b.mask], 1).logical_not()  # behind the last observation
            assert beyond.any()
            images[beyond] += noise
            reward[:, :-1][~b.mask] += noise
            b.action[:, :-1][~b.mask] = 1 if noise else 0
            b.terminated[:, :-1][~b.mask] = bool(noise)
            metrics, td = got.update(b, reward, got.encoder(images), got.encoder_target(images).detach())
            assert not td[~b.mask[:, 2:]].any()
            results.append([metrics["q_loss"], metrics["q_target"], td, *got.parameters])
        for a, c in zip(*results, strict=True):
            torch.testing.assert_close(a, c)


def test_a_time_limit_bootstraps_and_a_terminal_does_not():
    """Two equal sequences of one transition: what the target network says of the last observation counts in one of them."""
    got = learner(burn_in=0)
    b, reward, images = batch()
    b.mask[:], b.terminated[:] = False, False
    b.mask[:, 0], b.terminated[0, 0] = True, True
    _, y = got.errors(b, reward, got.encoder(images), got.encoder_target(images))
    np.testing.assert_allclose(y[0, 0], reference_returns.rescale(reward[0, 0]), rtol=1e-5)
    assert abs(y[1, 0] - reference_returns.rescale(reward[1, 0])) > 1e-3


def test_gradient_norm_is_limited_over_all_parameters():
    got = learner(grad_clip=1e-3)
    b, reward, images = batch()
    metrics, _ = got.update(b, reward, got.encoder(images), got.encoder_target(images).detach())
    assert torch.stack([p.grad.norm() for p in got.parameters]).norm() == pytest.approx(1e-3, rel=1e-3) and metrics["grad_norm"] > 1e-2


def test_the_target_network_is_copied_every_so_many_updates():
    got = learner(target_period=3)
    assert not any(p.requires_grad for p in got.target_parameters)
    for update in range(1, 8):
        b, reward, images = batch(update)
        old = [p.clone() for p in got.target_parameters]
        got.update(b, reward, got.encoder(images), got.encoder_target(images).detach())
        got.follow()
        pairs = zip(got.target_parameters, got.parameters if update % 3 == 0 else old, strict=True)
        assert all(torch.equal(p, q) for p, q in pairs), update


def test_saved_and_loaded_it_goes_on_bit_equal():
    first, second = learner(), learner(seed=5)
    for i in range(6):
        if i == 3:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for made in (first, second) if i >= 3 else (first,):
            b, reward, images = batch(i)
            last = made.update(b, reward, made.encoder(images), made.encoder_target(images).detach())
        if i >= 3:
            assert all(torch.equal(p, q) for p, q in zip(first.parameters, second.parameters, strict=True))
    assert last[1].any()


def test_exploration_is_a_ladder():
    np.testing.assert_allclose(epsilons(R2D2Config(), 256)[[0, 255]], [0.4, 0.4**8], rtol=1e-5)
    np.testing.assert_allclose(epsilons(R2D2Config(), 3), [0.4, 0.4**4.5, 0.4**8], rtol=1e-5)
    np.testing.assert_allclose(epsilons(R2D2Config(), 1), [0.05])


def act(made, n, explore=0.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    previous = torch.randint(-1, A, (n,), generator=rng), torch.randn(n, generator=rng)
    return made.act(torch.randn(n, F, generator=rng), *previous, made.q.start(n, torch.device("cpu")), explore)


def test_acting_is_greedy_or_uniform_over_all_choices_each_environment_by_itself():
    made, n = learner(num_outputs=A + 1), 6000
    greedy = act(made, n)
    np.testing.assert_array_equal(greedy.choice, greedy.q.argmax(-1))
    assert greedy.choice.dtype == np.int64 and greedy.q.shape == (n, A + 1) and (greedy.mu == 1).all()
    epsilon = np.repeat(np.array([0.0, 0.3, 1.0], np.float32), n // 3)
    acted = act(made, n, epsilon)
    for part, e in zip(np.split(np.arange(n), 3), (0, 0.3, 1), strict=True):
        other = acted.choice[part] != greedy.choice[part]
        assert abs(other.mean() - e * A / (A + 1)) < 0.04
        np.testing.assert_allclose(acted.mu[part], np.where(other, e / (A + 1), 1 - e + e / (A + 1)), rtol=1e-5)
    assert (np.bincount(acted.choice[2 * n // 3 :], minlength=A + 1) > n / 3 / (A + 1) - 100).all()  # the last choice too


def test_ties_are_broken_at_random():
    made = learner()
    for parameter in made.q.head.parameters():
        torch.nn.init.zeros_(parameter)
    counts = np.bincount(act(made, 4000).choice, minlength=A)
    assert (abs(counts - 1000) < 150).all()


# The replay's sequences against the actor ----------------------------------------------------------------------------


def played(env, steps, config, broken=None, **agent):
    """A method whose weights stay as they are, its replay, and the actor's Q of every row of each stream."""
    method = RecurrentTask(config, env.observation_shape, env.num_actions, frame_stack=env.frame_stack, **agent)
    replay, step, seen = method.make_replay(env.num_envs, steps * env.num_envs), env.reset(), []
    random = np.random.default_rng(0)
    for _ in range(steps):
        acted = method.agent.act(step)
        action = random.integers(0, env.num_actions, env.num_envs)  # not what was chosen: the memory must hold what was done
        method.took(action)
        after = env.step(action)
        rows = {"observation": step.observation[:, -env.frame_shape[0] :], "action": action, "reward": after.reward}
        rows |= {"terminated": after.terminated, "is_first": step.is_first, "is_last": step.is_last}
        method.observe(rows)
        if broken:
            broken(rows)
        replay.add(rows)
        seen.append(acted.q.numpy())
        step = after
    return method, replay, np.stack(seen)


def replayed_error(method, replay, seen):
    """The largest difference between the actor's Q and the learner's, over the rows after the burn-in that were stored."""
    agent, worst = method.agent, 0.0
    indices, arrays = agent.sample(replay)
    b = SimpleNamespace(**{name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    inputs = before(b.previous_action, b.action), before(b.previous_reward, b.reward)
    burn_in = method.config.learner.burn_in
    with torch.no_grad():
        for features in agent.features(b.frames):  # the target network is the online one still
            q = agent.learner.unrolled(agent.learner.q, features, inputs, b.state).numpy()
            for i, index in enumerate(indices.tolist()):
                t, stream = divmod(index, replay.num_streams)
                rows = int(b.mask[i].sum()) + 1
                assert rows > burn_in + 1
                worst = max(worst, np.abs(q[i, : rows - burn_in] - seen[t + burn_in : t + rows, stream]).max())
    return worst


def recurrent(burn_in, **encoder):
    learner = R2D2Config(**{**SMALL, "lstm": 24}, burn_in=burn_in)
    return RecurrentConfig(EncoderConfig(**encoder), learner, trace_length=6, period=3, batch_size=40, learning_start=0,
                           replay_capacity=4000, precision="fp32")  # fmt: skip


@pytest.mark.parametrize("burn_in", [0, 2])
@pytest.mark.parametrize("make, encoder", [
    (lambda: TMaze(3), {}),
    (lambda: Catch(3, frame_stack=1), {"conv": ((8, 4, 2), (8, 4, 2))}),
    (lambda: Catch(3, frame_stack=4), {"conv": ((8, 8, 4), (8, 4, 2))}),  # in blocks
    (lambda: Catch(3, frame_stack=4), {"conv": ((8, 8, 4), (8, 4, 2)), "mean": 0.5}),
])  # fmt: skip
def test_stored_state_and_burn_in_give_the_actors_q(burn_in, make, encoder):
    """Sequences from the middle of an episode too, short ones, and those behind a reset."""
    method, replay, seen = played(make(), 150, recurrent(burn_in, **encoder))
    assert np.abs(seen).max() > 1e-2
    assert replayed_error(method, replay, seen) < 1e-5


def late(name):
    """The column as of the row before."""
    last = {}

    def broken(rows):
        rows[name], last[name] = last.get(name, rows[name]), rows[name]

    return broken


@pytest.mark.parametrize("broken", [
    late("state"), late("previous_action"), late("previous_reward"), late("action"), late("reward"),
    lambda rows: rows.update(state=np.zeros_like(rows["state"])),
])  # fmt: skip
def test_and_not_with_a_column_of_the_row_before_or_a_state_that_is_lost(broken):
    """What the test above is there to catch."""
    method, replay, seen = played(TMaze(3), 150, recurrent(0), broken)
    assert replayed_error(method, replay, seen) > 1e-4


def test_priorities_come_back_to_the_sequences_they_are_of():
    method, replay, _ = played(TMaze(3), 150, replace(recurrent(0), priority_exponent=1.0))
    method.update(replay)
    sampled = replay.sample(4000)
    of = dict(zip(sampled.indices.tolist(), sampled.probability.tolist(), strict=True))
    assert len(set(np.round(list(of.values()), 7))) > 5
    indices, arrays = method.agent.sample(replay)
    b = SimpleNamespace(**{name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, choice=None, weight=None)
    td = method.agent.update(b, b.reward)["priorities"].numpy()
    replay.update_priorities(indices, td)
    sampled = replay.sample(4000)
    p = dict(zip(sampled.indices.tolist(), sampled.probability.tolist(), strict=True))
    first, errors = indices[0], td[0][arrays["mask"][0]]
    assert (errors > 0).all() and not td[0][~arrays["mask"][0]].any()
    for i in range(1, 10):  # the ratio of two priorities, without what the others sum to
        other = td[i][arrays["mask"][i]]
        expected = (0.9 * other.max() + 0.1 * other.mean()) / (0.9 * errors.max() + 0.1 * errors.mean())
        if indices[i] in p and first in p:
            assert p[indices[i]] / p[first] == pytest.approx(expected, rel=1e-3)


def test_an_update_follows_and_a_frozen_encoder_stays():
    conv = {"conv": ((8, 8, 4), (8, 4, 2))}
    config = replace(recurrent(1, **conv), learner=replace(recurrent(1).learner, target_period=2))
    method, replay, _ = played(Catch(3), 100, config)
    learner = method.agent.learner
    begin = copy.deepcopy(learner.encoder.state_dict())
    method.update(replay)
    assert learner.updates == 1 and not any(torch.equal(begin[name], p) for name, p in learner.encoder.named_parameters())
    method.update(replay)
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters, learner.target_parameters, strict=True))
    method.freeze("encoder")
    kept, q = copy.deepcopy(learner.encoder.state_dict()), copy.deepcopy(learner.q.state_dict())
    method.update(replay)
    assert all(torch.equal(kept[name], p) for name, p in learner.encoder.named_parameters())
    assert not torch.equal(q["lstm.weight_hh_l0"], learner.q.lstm.weight_hh_l0)
    other = RecurrentTask(config, (4, 44, 44), 3, frame_stack=4, seed=3)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    other.update(replay)
    assert all(torch.equal(kept[name], p) for name, p in other.agent.learner.encoder.named_parameters())


def test_a_saved_method_goes_on_bit_equal():
    config = recurrent(1)
    first, replay, _ = played(TMaze(3), 100, config)
    first.update(replay)
    second = RecurrentTask(config, (4,), 3, frame_stack=1, seed=9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    env, other = TMaze(3, seed=4), TMaze(3, seed=4)
    steps = env.reset(), other.reset()
    for _ in range(30):
        actions = [method.act(step) for method, step in zip((first, second), steps, strict=True)]
        np.testing.assert_array_equal(*actions)
        steps = env.step(actions[0]), other.step(actions[1])
    assert second.agent.steps == first.agent.steps and second.agent.learner.updates == 1


# Networks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_inputs, width, B, L", [(7, 12, 3, 1), (33, 24, 5, 17)])
def test_the_lstm_in_bfloat16_is_the_one_in_float32(num_inputs, width, B, L):
    """And so is its gradient, but for the state that it begins with."""
    torch.manual_seed(0)
    lstm, x, w = LSTM(num_inputs, width), torch.randn(B, L, num_inputs), torch.randn(B, L, width)
    h, c = 0.5 * torch.randn(2, 1, B, width)
    found = []
    for half in (False, True):
        inputs = x.clone().requires_grad_()
        lstm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs, (h_last, c_last) = lstm(inputs, (h, c))
        ((outputs.float() * w).sum() + (c_last.float() * 3).sum()).backward()
        found.append([outputs.float(), h_last.float(), c_last.float(), inputs.grad, *(p.grad.clone() for p in lstm.parameters())])
    for exact, got in zip(*found, strict=True):
        assert got.shape == exact.shape and (got - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("channels, depth, size, conv", [
    (1, 4, (84, 84), ((32, 8, 4), (8, 4, 2))),
    (3, 2, (44, 40), ((8, 8, 4), (8, 4, 2))),
    (1, 1, (24, 36), ((8, 4, 8),)),
])  # fmt: skip
def test_blocks_are_another_layout_of_the_same_stacks(channels, depth, size, conv):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(conv=conv), (depth * channels, *size))
    frames = torch.randint(0, 256, (2, 5 + depth - 1, channels, *size), dtype=torch.uint8)
    assert encoder.takes_blocks(*size)
    images = stacked(frames, depth).flatten(0, 1) / 255
    got = encoder.of_blocks(blocks(frames, depth).flatten(0, 1).float())
    expected = encoder(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    w = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad((features * w).sum(), list(encoder.parameters())) for features in (got, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config, size", [
    (EncoderConfig(conv=((8, 3, 2),)), (84, 84)), (EncoderConfig(mean=0.5), (84, 84)), (EncoderConfig(), (84, 82)),
    (EncoderConfig(conv=((8, 6, 4),)), (84, 84)), (EncoderConfig(conv=((8, 8, 2),)), (84, 84)),
])  # fmt: skip
def test_what_does_not_come_in_blocks_of_four_is_not_taken_so(config, size):
    assert not Encoder(config, (4, *size)).takes_blocks(*size)


# What is refused -----------------------------------------------------------------------------------------------------


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match=r"period: must divide trace_length \(80\), .* got 30"):
        RecurrentConfig(period=30)
    with pytest.raises(ValueError, match="target: must be n-step, retrace or peng, got 'sarsa'"):
        R2D2Config(target="sarsa")
    with pytest.raises(ValueError, match=r"trace_lambda: must lie in 0\.\.1, got 1\.5"):
        R2D2Config(trace_lambda=1.5)
    with pytest.raises(ValueError, match="R2D2 takes numbered actions"):
        RecurrentTask(recurrent(0), (4,), (2,), frame_stack=1)
    with pytest.raises(ValueError, match=r"observation_shape: must be \(4 stacked frames"):
        RecurrentTask(recurrent(0), (3, 84, 84), 4, frame_stack=4)


def test_episodes_that_are_shorter_than_the_burn_in_are_said():
    env, config = TMaze(2), recurrent(25)  # an episode has 20 steps at most
    with pytest.raises(ValueError, match="burn_in: no episode has had a step to learn from after 25 rows yet"):
        method, replay, _ = played(env, 100, config)
        method.update(replay)


def test_updates_owed_follow_from_the_replay_ratio():
    config = RecurrentConfig()
    assert config.updates_per_step * config.batch_size * config.trace_length == pytest.approx(1.5)
    assert config.sequence_length == 121

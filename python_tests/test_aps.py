"""APS: what a skill is, what trains phi, vector TD, GPI, and the regression that reads a task off rewards."""

import itertools
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_apt import ACTIONS, CONV, DDPG, PIXELS, SHAPE, SMALL, STATES, VECTOR, Batches, equal, parameters, step, through_a_file

from urlfast.intrinsic import ParticleConfig
from urlfast.learners.drq import DrQConfig
from urlfast.methods import transfer
from urlfast.methods.aps import APS, APSConfig, APSTask, APSTaskConfig, Regression, Skills, random_skills
from urlfast.methods.task import TaskConfig
from urlfast.nets.encoders import EncoderConfig

D = 4
SMALLER = dict(skill_dim=D, phi_hidden=6, reward=ParticleConfig(k=4, scale="none"), batch_size=8, precision="fp32")


def atari(seed=0, **changes):
    config = replace(APSConfig(), encoder=SMALL, learner=DrQConfig(hidden=12, tau=0.05, lr=1e-3), **{**SMALLER, **changes})
    return APS(config, SHAPE, ACTIONS, seed=seed)


def control(seed=0, shape=STATES, **changes):
    config = replace(APSConfig.urlb(), encoder=EncoderConfig(conv=CONV, mean=0.5), learner=DDPG, **{**SMALLER, **changes})
    return APS(config, shape, VECTOR, seed=seed, frame_stack=3 if len(shape) == 3 else 1)


def task(seed=0, shape=STATES, **changes):
    config = APSTaskConfig.on(replace(TaskConfig.ddpg(), encoder=EncoderConfig(conv=CONV, mean=0.5), learner=DDPG))
    config = replace(config, skill_dim=D, phi_hidden=6, phi_layers=2, batch_size=8, precision="fp32", **changes)
    return APSTask(config, shape, VECTOR, seed=seed, frame_stack=3 if len(shape) == 3 else 1)


MAKERS = {
    "atari": atari,
    "atari, two views": lambda seed: atari(seed, target_views=2),
    "states": control,
    "pixels": lambda seed: control(seed, PIXELS),
    "task, states": task,
    "task, pixels": lambda seed: task(seed, PIXELS),
}


class Skilled(Batches):
    def sample(self, n):
        b = super().sample(n)
        b.skill = F.normalize(torch.from_numpy(self.rng.standard_normal((n, D), np.float32)), dim=-1).numpy()
        return b


def batches(method, seed=0):
    plain = Batches.of(method, seed)
    return Skilled(seed, plain.shape, plain.actions)


# skills


def test_skills_are_uniform_on_the_sphere():
    w = random_skills(20_000, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(w.norm(dim=-1), torch.ones(20_000))
    assert w.mean(0).abs().max() < 0.02 and (w.T @ w / 20_000 - torch.eye(3) / 3).abs().max() < 0.02


@pytest.mark.parametrize("hold", [0, 3])
def test_a_skill_is_held_for_an_episode_or_some_steps(hold):
    skills, first, seen = Skills(D, hold, seed=0), np.array([True, True]), []
    for t in range(7):
        seen.append(skills.begin(first, np.array([t, t % 4])).clone())
        first = np.array([False, t == 3])  # the second's next episode begins at t = 4
    changed = [[not torch.equal(a[i], b[i]) for i in range(2)] for a, b in itertools.pairwise(seen)]
    if hold:
        assert changed == [[t % 3 == 0, t % 4 in (0, 3)] for t in range(1, 7)]
    else:
        assert changed == [[False, t == 4] for t in range(1, 7)]


def test_a_fixed_skill_has_length_1_and_wrong_ones_are_named():
    skills = Skills(D, 0, seed=0)
    skills.fix([3, 0, 4, 0])
    torch.testing.assert_close(skills.begin(np.ones(2, bool), np.zeros(2)), torch.tensor([[0.6, 0, 0.8, 0]] * 2))
    for wrong in ([1, 2], [0] * D, [1, 2, 3, float("nan")]):
        with pytest.raises(ValueError, match="skill: must be 4 finite numbers, not all of them 0"):
            skills.fix(wrong)


def test_what_is_stored_is_the_skill_that_acted():
    method = control()
    shown, rows = step(batches(method).observations(3)), {"is_first": np.zeros(3, bool)}
    method.act(shown)
    method.observe(rows)
    np.testing.assert_array_equal(rows["skill"], method.skills.now)
    assert rows["skill"].dtype == np.float32 and method.make_replay(3, 10).layout(2)["skill"] == ((2, D), "float32")


# what trains what, and on which reward


@pytest.mark.parametrize("make", [atari, lambda: control(shape=PIXELS)], ids=["atari", "pixels"])
def test_phi_alone_trains_the_encoder_with_its_exact_gradient(make):
    method = make()
    b, agent = batches(method).sample(8), method.agent
    grads, update = [], agent.learner.update

    def watched(batch, reward, online, target):
        grads.append([None if p.grad is None else p.grad.clone() for p in agent.encoder.parameters()])
        return update(batch, reward, online, target)

    agent.learner.update = watched
    views = []
    agent.views = lambda x, copies, of=agent.views: views.append(of(x, copies)) or views[-1]
    reference = make()
    before = parameters(method.phi)
    method.gradient_step(**{name: torch.from_numpy(value) for name, value in vars(b).items() if name != "reward"})
    reference.agent.encoder.train()
    phi = F.normalize(reference.phi(reference.agent.encoder(views[0])), dim=-1)
    (-(phi * torch.from_numpy(b.skill)).sum(-1).mean()).backward()
    for mine, p in zip(grads[0], reference.agent.encoder.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(a, p.grad) for a, p in zip(grads[0], agent.encoder.parameters(), strict=True))  # Q adds nothing
    assert not equal(before, method.phi)


@pytest.mark.parametrize("entropy_weight, skill_weight", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.5, 2.0)])
def test_the_reward_is_the_entropy_of_phi_and_its_share_along_the_skill(entropy_weight, skill_weight):
    weights = dict(entropy_weight=entropy_weight, skill_weight=skill_weight)
    method, given = control(**weights), []
    update = method.agent.learner.update
    method.agent.learner.update = lambda b, r, online, target: given.append((r, online, target)) or update(b, r, online, target)
    b = batches(method).sample(8)
    method.update(types.SimpleNamespace(sample=lambda n: b))
    with torch.no_grad():  # phi after its step
        phi = method.phi(torch.from_numpy(b.next_observation)).double()
    distance = (phi[:, None] - phi[None]).square().sum(-1).sqrt().sort(1).values[:, :4].mean(1)
    w = torch.from_numpy(b.skill).double()
    expected = entropy_weight * torch.log(1 + distance) + skill_weight * (phi / phi.norm(dim=-1, keepdim=True) * w).sum(-1)
    reward, online, target = given[0]
    torch.testing.assert_close(reward.double(), expected, rtol=1e-4, atol=1e-5)
    for features, seen in ((online[0], b.observation), (target[0][0], b.next_observation)):
        np.testing.assert_allclose(features, np.concatenate([seen, b.skill], 1), rtol=1e-6)


def test_vector_td_read_by_the_skill_is_the_scalar_one():
    """w^T of the vector target is r + gamma * w^T psi', because |w| = 1."""
    method = atari()
    b, learner, given = batches(method).sample(8), method.agent.learner, []
    error = learner.error
    learner.error = lambda *arguments: given.append((arguments, error(*arguments))) or given[-1][1]
    method.update(types.SimpleNamespace(sample=lambda n: b))
    (batch, reward, online, target), (found, y) = given[0]
    w = torch.from_numpy(b.skill)
    assert reward.shape == y.shape == (8, D) and found.shape == (1, 8, D)
    q, q_target = atari().agent.learner.q, atari().agent.learner.q_target  # as they were
    with torch.no_grad():
        best = q(target[0][0]).argmax(-1)
        value = q_target(target[0][1])[torch.arange(8), best]
        torch.testing.assert_close((y * w).sum(-1), (reward * w).sum(-1) + batch.discount * value, rtol=1e-4, atol=1e-5)
        mine = q(online[0])[torch.arange(8), batch.action]
    torch.testing.assert_close((found[0] * w).sum(-1).detach(), mine - (y * w).sum(-1), rtol=1e-4, atol=1e-5)


def test_gpi_follows_whichever_skill_promises_most_for_the_own():
    method = atari(gpi=50)
    learner = method.agent.learner
    features = torch.randn(30, learner.q.net[0].in_features)
    w = F.normalize(features[:, -D:], dim=-1)
    features[:, -D:] = w
    generator = torch.Generator()
    generator.set_state(learner.generator.get_state())
    others = random_skills(50, D, generator)
    with torch.no_grad():
        values = [learner.q(features)]
        for z in others:
            psi = learner.q.psi(torch.cat([features[:, :-D], z.expand(30, -1)], -1))
            values.append(torch.einsum("bad,bd->ba", psi, w))  # dotted with the own skill, as VISR
    np.testing.assert_array_equal(learner.act(features)[0], torch.stack(values).amax(0).argmax(-1))
    assert (learner.act(features)[0] != learner.q(features).argmax(-1).numpy()).any()


# saving, and transfer


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_saved_and_loaded_it_goes_on_bit_equal(make, tmp_path):
    first = make(0)
    source, images = batches(first), Batches.of(first, 1).observations(5)
    shown = step(images)

    def turn(method, from_):
        action = method.act(shown)
        rows = {"is_first": shown.is_first, "is_last": shown.is_last, "reward": np.arange(5, dtype=np.float32)}
        method.observe(rows)
        return action, rows["skill"], method.update(from_)

    for _ in range(3):
        turn(first, source)
    saved = through_a_file(first.state_dict(), tmp_path)
    second, again = make(7), batches(first)
    for _ in range(3):
        again.sample(8)
    second.load_state_dict(saved)
    shown.is_first[:] = True  # episodes begin anew after a resume
    if isinstance(first, APSTask):
        first.pending = None
    for _ in range(3):
        (a, w, x), (b, v, y) = turn(first, source), turn(second, again)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(w, v)
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_transfer_gives_the_task_phi_and_psi():
    """URLB's release leaves a random phi, on which nothing can be regressed."""
    source, method = control(3), task(4)
    transfer(method, source.state_dict(), APS.TRANSFER["whole"])
    assert equal(parameters(source.phi), method.phi)
    assert equal(parameters(source.agent.learner.critic), method.agent.learner.critic)
    assert equal(parameters(source.agent.learner.actor), method.agent.learner.actor)
    phi = parameters(method.phi)
    for _ in range(3):
        method.update(batches(method))
    assert equal(phi, method.phi)
    assert all(table.keys() >= source.state_dict().keys() for table in APS.TRANSFER.values())


def test_phi_reads_the_encoder_that_it_was_trained_on_while_q_trains_its_own(tmp_path):
    """Before and after updates, and in a run that goes on, the same observations and rewards add the same to the regression."""
    source, method = control(3, PIXELS), task(4, PIXELS)
    transfer(method, source.state_dict(), APS.TRANSFER["whole"])
    shown, reward = step(batches(method).observations(4)), np.arange(1, 5, dtype=np.float32)

    def added(method) -> torch.Tensor:
        before = method.regression.gram.clone()
        method.pending = reward, ~shown.is_last
        method.learn_task(shown)
        return method.regression.gram - before

    expected = source.intrinsic_reward(torch.from_numpy(shown.observation))[1]  # phi, not normalised
    phi = F.normalize(expected, dim=-1).double()
    torch.testing.assert_close(added(method), phi.T @ phi)
    encoder, from_ = parameters(method.agent.encoder), batches(method)
    for _ in range(20):
        method.update(from_)
    assert not equal(encoder, method.agent.encoder)
    torch.testing.assert_close(added(method), phi.T @ phi)
    again = task(7, PIXELS)
    again.load_state_dict(through_a_file(method.state_dict(), tmp_path))
    assert not equal(encoder, again.agent.encoder)
    torch.testing.assert_close(added(again), phi.T @ phi)


# the regression


def test_the_regression_finds_a_planted_task_and_urlbs_call_does_not():
    """4,096 samples of an anisotropic phi, and noise on the rewards."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        mixing = np.linalg.qr(rng.normal(size=(10, 10)))[0] * np.geomspace(3, 0.2, 10)
        phi = rng.normal(size=(4096, 10)) @ mixing.T
        phi /= np.linalg.norm(phi, axis=1, keepdims=True)
        w = rng.normal(size=10)
        w /= np.linalg.norm(w)
        reward = phi @ w + 0.05 * rng.normal(size=4096)
        regression = Regression(10)
        for part in np.array_split(np.arange(4096), 7):
            regression.add(torch.from_numpy(phi[part]), torch.from_numpy(reward[part]))
        direct = np.linalg.lstsq(phi, reward, rcond=None)[0]
        np.testing.assert_allclose(regression.solve(ridge=1e-12), direct / np.linalg.norm(direct), atol=1e-4)
        assert regression.solve().numpy() @ w > 0.99 and regression.release().numpy() @ w < 0.9
        backwards = np.linalg.lstsq(reward[:, None], phi, rcond=None)[0][0]  # URLB's call
        np.testing.assert_allclose(regression.release(), backwards / np.linalg.norm(backwards), rtol=1e-4)
    assert Regression(3).solve() is None


def test_a_task_is_inferred_from_one_step_rewards_of_the_observation_that_was_reached():
    method = task(infer_at=12, infer_every=8)
    rng, w = np.random.default_rng(0), F.normalize(torch.tensor([1.0, -2.0, 0.5, 1.0]), dim=0)

    def phi(observation):
        with torch.no_grad():
            return F.normalize(method.phi(torch.from_numpy(observation)), dim=-1)

    shown = step(rng.standard_normal((4, *STATES), np.float32))
    shown.is_first[:] = True
    seen, rewards = [], []
    for t in range(6):
        method.act(shown)
        assert (method.skills.fixed is None) == (t < 4), t  # before the act of t = 3 it has taken 12 steps, of which 9 are paid
        following = step(rng.standard_normal((4, *STATES), np.float32))
        following.is_first[:] = shown.is_last
        reward = (phi(following.observation) @ w).numpy().astype(np.float32)
        following.is_last[1] = t == 1
        method.observe({"is_first": shown.is_first, "is_last": shown.is_last, "reward": reward})
        counts = ~shown.is_last
        seen.append(phi(following.observation)[counts]), rewards.append(reward[counts])
        shown = following
    method.act(shown)
    phis, r = torch.cat(seen).double(), torch.from_numpy(np.concatenate(rewards)).double()
    assert method.regression.count == len(r) == 23
    torch.testing.assert_close(method.regression.gram, phis.T @ phis)
    torch.testing.assert_close(method.regression.moment, phis.T @ r)
    assert method.skills.fixed @ w > 0.99


def test_without_any_reward_it_goes_on_with_random_skills_and_says_so(capsys):
    method = task(infer_at=4, infer_every=4)
    shown = step(batches(method).observations(4))
    for _ in range(5):
        method.act(shown)
        method.observe({"is_first": shown.is_first, "is_last": shown.is_last, "reward": np.zeros(4, np.float32)})
    assert method.skills.fixed is None and method.due == 20
    assert capsys.readouterr().out.splitlines()[-1] == "step 16: no reward was seen yet: random skills go on, until step 20 at least"

"""APT and the task method that follows it: what each loss may touch, what a reward is, what is saved and transferred."""

import copy
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from urlfast import knn_reward
from urlfast.envs import Step
from urlfast.intrinsic import ParticleConfig, ParticleReward
from urlfast.learners.drq import DrQConfig
from urlfast.methods import FREEZE, LOAD, RESET, transfer
from urlfast.methods.apt import APT, APTConfig
from urlfast.methods.task import Task, TaskConfig
from urlfast.nets.encoders import EncoderConfig

SHAPE, ACTIONS = (4, 36, 36), 3
SMALL = EncoderConfig(conv=((8, 8, 4), (8, 4, 2)), activation="elu", features=5, spectral_norm=True)
CPU = torch.device("cpu")


def apt(seed=0, **changes):
    defaults = dict(encoder=SMALL, projection=(6,), batch_size=8, learner=DrQConfig(hidden=12, tau=0.05), precision="fp32")
    config = replace(APTConfig(), **{**defaults, "reward": ParticleConfig(k=4), **changes})
    return APT(config, SHAPE, ACTIONS, seed=seed)


def mini_apt(seed=0):
    mini = APTConfig.mini_apt()
    config = replace(mini, encoder=replace(SMALL, features=0, spectral_norm=False), batch_size=8, learner=DrQConfig(hidden=12, tau=0.05))
    return APT(replace(config, reward=replace(mini.reward, k=4), precision="fp32"), SHAPE, ACTIONS, seed=seed)


def task(seed=0, **changes):
    defaults = dict(encoder=SMALL, batch_size=8, learner=DrQConfig(hidden=12, tau=0.05), precision="fp32")
    return Task(replace(TaskConfig(), **{**defaults, **changes}), SHAPE, ACTIONS, seed=seed)


class Batches:
    """Stands for a replay: batch i is the same for whoever asks i-th."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def sample(self, n):
        rng = self.rng
        return types.SimpleNamespace(
            observation=rng.integers(0, 256, (n, *SHAPE), np.uint8),
            next_observation=rng.integers(0, 256, (n, *SHAPE), np.uint8),
            action=rng.integers(0, ACTIONS, n),
            reward=rng.normal(size=n).astype(np.float32),
            discount=(0.99 * rng.integers(0, 2, n)).astype(np.float32),
        )


def step(observation):
    n = len(observation)
    return Step(observation, *(np.zeros(n, t) for t in (np.float32, bool, bool, bool, np.float64, np.int64)))


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(before, module):
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


# what trains what


def test_only_the_contrastive_loss_trains_the_encoder(monkeypatch):
    """With the contrastive loss worth nothing, updates leave the encoder as it is, and Q learns on."""
    monkeypatch.setattr("urlfast.methods.apt.nt_xent", lambda u, v, t: ((u.sum() + v.sum()) * 0, torch.tensor(0.0)))
    method = apt()
    encoder, q, target = parameters(method.agent.encoder), parameters(method.agent.learner.q), parameters(method.agent.encoder_target)
    for batches in [Batches()] * 3:
        method.update(batches)
    assert equal(encoder, method.agent.encoder) and equal(target, method.agent.encoder_target)
    assert not equal(q, method.agent.learner.q)


def test_the_contrastive_loss_trains_encoder_and_projection_and_the_target_follows():
    method = apt()
    encoder, projection, target = (parameters(m) for m in (method.agent.encoder, method.projection, method.agent.encoder_target))
    method.update(Batches())
    assert not equal(encoder, method.agent.encoder) and not equal(projection, method.projection)
    for old, ema, new in zip(target, method.agent.encoder_target.parameters(), method.agent.encoder.parameters(), strict=True):
        torch.testing.assert_close(ema, 0.95 * old + 0.05 * new.detach())
        assert not ema.requires_grad
    u = [value for name, value in method.agent.encoder.named_buffers() if name.endswith(".u")]
    assert u and all(torch.equal(a, dict(method.agent.encoder_target.named_buffers())[n]) for n, a in method.agent.encoder.named_buffers())


@pytest.mark.parametrize("views", [1, 2])
def test_the_drq_loss_trains_the_tasks_encoder_with_its_exact_gradient(views):
    """One pass, one backward, through detached features: the gradient is that of the plain loss through the whole network."""
    method, b = task(online_views=views, target_views=views, learner=DrQConfig(hidden=12, tau=0.05, grad_clip=1e9)), Batches().sample(8)
    agent = method.agent
    q, q_target, f, f_target = (copy.deepcopy(m) for m in (agent.learner.q, agent.learner.q_target, agent.encoder, agent.encoder_target))
    seen, views_of = [], agent.views
    agent.views = lambda images, copies: seen.append(views_of(images, copies)) or seen[-1]
    tensors = {name: torch.from_numpy(value) for name, value in vars(b).items()}
    method.gradient_step(**tensors)

    v_next, v = (x.chunk(views) for x in seen)
    y = 0
    for x in v_next:
        best = q(f(x)).argmax(-1)
        y = y + (tensors["reward"] + tensors["discount"] * q_target(f_target(x))[torch.arange(8), best]).detach() / views
    f.train()
    features = f(torch.cat(v)).chunk(views)
    loss = sum(torch.nn.functional.huber_loss(q(z)[torch.arange(8), tensors["action"]], y) for z in features) / views
    for got, expected in zip(agent.encoder.parameters(), torch.autograd.grad(loss, list(f.parameters())), strict=True):
        torch.testing.assert_close(got.grad, expected, rtol=1e-3, atol=1e-6)


def test_a_frozen_encoder_stays_and_q_learns():
    method = task()
    method.freeze("encoder")
    before = [copy.deepcopy(m.state_dict()) for m in (method.agent.encoder, method.agent.encoder_target)]
    q = parameters(method.agent.learner.q)
    for batches in [Batches()] * 3:
        method.update(batches)
    for old, m in zip(before, (method.agent.encoder, method.agent.encoder_target), strict=True):
        assert all(torch.equal(old[name], value) for name, value in m.state_dict().items())
    assert not equal(q, method.agent.learner.q)
    with pytest.raises(ValueError, match="only the encoder"):
        method.freeze("q")


# the reward


def test_reward_is_the_entropy_of_the_next_observations_under_the_new_encoder():
    """Switched off the shift, so that the particles are known: those of o_{t+1}, not of o_t, after the contrastive step."""
    method = apt(reward=ParticleConfig(k=4, scale="none"), augment=replace(APTConfig().augment, shift=0, intensity=0.0))
    b = Batches().sample(8)
    rewards, update = [], method.agent.learner.update
    method.agent.learner.update = lambda batch, reward, *rest: rewards.append(reward) or update(batch, reward, *rest)
    metrics = method.update(types.SimpleNamespace(sample=lambda n: b))
    with torch.no_grad():
        z = method.agent.encoder(torch.from_numpy(b.next_observation).float() / 255)
    distance = (z.double()[:, None] - z.double()[None]).square().sum(-1).sqrt().sort(1).values[:, :4]
    expected = torch.log(1 + distance.mean(1)).float()
    torch.testing.assert_close(rewards[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["intrinsic_reward"], expected.mean(), rtol=1e-4, atol=1e-5)
    again, features = method.intrinsic_reward(torch.from_numpy(b.next_observation))
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)
    assert features.shape == (8, 5)


def test_rewards_follow_the_encoder():
    method, observations = apt(), torch.from_numpy(Batches().sample(8).observation)
    before = method.intrinsic_reward(observations)[0]
    torch.testing.assert_close(method.intrinsic_reward(observations)[0], before)  # asking changes nothing
    method.update(Batches())
    assert not torch.allclose(method.intrinsic_reward(observations)[0], before)


def test_scale_of_distances_and_of_rewards():
    z = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(z, z).topk(4, largest=False).values
    raw = ParticleReward(ParticleConfig(k=4, scale="none"), CPU)
    torch.testing.assert_close(raw(z), (torch.as_tensor(knn_reward(z, 4)), nearest.mean(-1)))
    # a first batch is divided by its own mean, whatever its unit
    by_distance = [ParticleReward(ParticleConfig(k=4), CPU)(z * unit)[0] for unit in (1, 1000)]
    torch.testing.assert_close(*by_distance, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(by_distance[0].exp().mean() - 1, torch.tensor(1.0), rtol=1e-3, atol=1e-3)
    by_reward = ParticleReward(ParticleConfig(k=4, scale="reward-mean"), CPU)
    torch.testing.assert_close(by_reward(z)[0], raw(z)[0] / raw(z)[0].mean(), rtol=1e-3, atol=1e-4)
    frozen, _ = by_reward(5 * z, update=False)
    torch.testing.assert_close(frozen, raw(5 * z)[0] / raw(z)[0].mean(), rtol=1e-3, atol=1e-4)  # still the first batch's mean
    clipped, _ = ParticleReward(ParticleConfig(k=4, clip=0.9), CPU)(z)
    expected = (1 + (nearest / nearest.mean() - 0.9).clamp(min=0).mean(-1)).log()
    torch.testing.assert_close(clipped, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="clip: is taken from scaled distances"):
        ParticleConfig(clip=0.1, scale="none")


def test_pool_of_views_averages_over_the_views():
    method, seen = mini_apt(), []
    update = method.agent.learner.update

    class Watched(ParticleReward):
        def __call__(self, z):
            reward, distance = super().__call__(z)
            seen.append((z, reward))
            return reward, distance

    method.reward = Watched(method.config.reward, CPU)
    method.agent.learner.update = lambda batch, r, online, target: seen.append((r, online, target)) or update(batch, r, online, target)
    method.update(Batches())
    (z, particles), (r, online, target) = seen
    assert z.shape == (16, method.agent.encoder.num_features) and len(online) == len(target) == 2
    torch.testing.assert_close(r, (particles[:8] + particles[8:]) / 2)
    assert torch.equal(torch.cat([a for a, _ in target]), z)


# metrics, state, transfer


KEYS = {"q_loss", "q_target", "grad_norm", "epsilon"}


@pytest.mark.parametrize("make", [apt, mini_apt])
def test_metrics_of_apt(make):
    metrics = make().update(Batches())
    assert metrics.keys() == KEYS | {
        "contrastive_loss",
        "contrastive_accuracy",
        "intrinsic_reward",
        "intrinsic_reward_quantiles",
        "knn_distance",
    }
    assert all(isinstance(value, torch.Tensor) and value.isfinite().all() and not value.requires_grad for value in metrics.values())
    quantiles = metrics["intrinsic_reward_quantiles"].tolist()
    assert len(quantiles) == 5 and quantiles == sorted(quantiles) and quantiles[0] <= metrics["intrinsic_reward"] <= quantiles[4]


def test_metrics_of_a_task():
    metrics = task().update(Batches())
    assert metrics.keys() == KEYS | {"encoder_grad_norm"} and all(value.isfinite() for value in metrics.values())


def through_a_file(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("make", [apt, mini_apt, task])
def test_saved_and_loaded_it_goes_on_bit_equal(make, tmp_path):
    first, batches = make(seed=0), Batches()
    images = np.random.default_rng(1).integers(0, 256, (5, *SHAPE), np.uint8)
    for _ in range(3):
        first.act(step(images))
        first.update(batches)
    second, same_batches = make(seed=7), copy.deepcopy(batches)
    second.load_state_dict(through_a_file(first.state_dict(), tmp_path))
    for _ in range(3):
        np.testing.assert_array_equal(first.act(step(images)), second.act(step(images)))
        a, b = first.update(batches), second.update(same_batches)
        assert all(torch.equal(a[name], b[name]) for name in a)
    x, y = first.state_dict(), second.state_dict()
    assert x["progress"]["steps"] == y["progress"]["steps"] == 30
    for part in ("encoder", "encoder_target", "q", "q_target"):
        assert all(torch.equal(value, y[part][name]) for name, value in x[part].items())


def test_a_state_with_other_parts_is_refused():
    state = apt().state_dict()
    with pytest.raises(ValueError, match="state: must have the parts"):
        apt().load_state_dict({part: values for part, values in state.items() if part != "q"})
    with pytest.raises(ValueError, match="state: must have the parts"):
        task().load_state_dict(state)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    a = apt(seed=3)
    random = torch.rand(1)
    torch.manual_seed(1)
    assert random == torch.rand(1)  # making a method draws nothing from the global generator
    b, c = apt(seed=3), apt(seed=4)
    assert equal(parameters(a.agent.encoder), b.agent.encoder) and equal(parameters(a.agent.learner.q), b.agent.learner.q)
    assert not equal(parameters(a.agent.encoder), c.agent.encoder)


@pytest.mark.parametrize("method", [APT, Task])
def test_transfer_tables_name_every_part_that_is_saved(method):
    saved = (apt() if method is APT else task()).state_dict()
    assert set(method.TRANSFER) == {"whole", "random-head", "frozen-encoder"}
    for table in method.TRANSFER.values():
        assert table.keys() == saved.keys() and set(table.values()) <= {LOAD, FREEZE, RESET}


@pytest.mark.parametrize("rule", ["whole", "random-head", "frozen-encoder"])
def test_transfer(rule):
    source = apt()
    for batches in [Batches()] * 2:
        source.update(batches)
    state = copy.deepcopy(source.state_dict())
    fresh, tuned = task(seed=1), task(seed=1)
    transfer(tuned, state, APT.TRANSFER[rule])
    for name, module in (("encoder", tuned.agent.encoder), ("encoder_target", tuned.agent.encoder_target)):
        assert all(torch.equal(state[name][key], value) for key, value in module.state_dict().items())
    head = state["q"] if rule != "random-head" else fresh.agent.learner.q.state_dict()
    assert all(torch.equal(head[key], value) for key, value in tuned.agent.learner.q.state_dict().items())
    assert tuned.frozen == (rule == "frozen-encoder") and tuned.agent.steps == 0
    encoder = parameters(tuned.agent.encoder)
    tuned.update(Batches())
    assert equal(encoder, tuned.agent.encoder) == (rule == "frozen-encoder")
    assert all(torch.equal(state[part][key], source.state_dict()[part][key]) for part in ("encoder", "q") for key in state[part])


def test_a_frozen_task_stays_frozen_when_it_is_resumed(tmp_path):
    first = task()
    first.freeze("encoder")
    second = task(seed=1)
    second.load_state_dict(through_a_file(first.state_dict(), tmp_path))
    assert second.frozen


def test_a_state_of_another_kind_of_device_is_taken():
    state = task().state_dict()
    state["progress"]["augment"] = torch.zeros(16, dtype=torch.uint8)  # a GPU's generator
    for part in ("encoder_optimizer", "q_optimizer"):
        state[part]["param_groups"][0]["capturable"] = True
    method = task()
    method.load_state_dict(state)
    assert not method.optim.param_groups[0]["capturable"] and not method.agent.learner.optim.param_groups[0]["capturable"]
    method.update(Batches())


def test_transfer_refuses_what_it_does_not_know():
    state = apt().state_dict()
    with pytest.raises(ValueError, match="says nothing of skill"):
        transfer(task(), state | {"skill": {}}, APT.TRANSFER["whole"])
    with pytest.raises(ValueError, match="encoder does not fit"):
        transfer(task(encoder=replace(SMALL, features=7)), state, APT.TRANSFER["whole"])


def test_a_tasks_config_follows_the_pretrained_one():
    config = TaskConfig(n_step=3).after(APTConfig())
    assert config.encoder == APTConfig().encoder and config.learner.tau == 0.01 and config.n_step == 3
    assert config.learner.adam_eps == TaskConfig().learner.adam_eps


# acting


def test_acting_warms_up_uniformly_and_then_follows_q():
    method, images = apt(learning_start=20, epsilon=0.0), np.random.default_rng(0).integers(0, 256, (10, *SHAPE), np.uint8)
    shown = step(images)
    shown.is_last[0] = True  # nothing leaves it: it does not count
    warm_up = np.concatenate([method.act(shown) for _ in range(3)])
    assert warm_up.dtype == np.int64 and set(warm_up) == {0, 1, 2} and method.agent.steps == 27
    with torch.no_grad():
        greedy = method.agent.learner.q(method.agent.encoder(torch.from_numpy(images) / 255)).argmax(-1).numpy()
    np.testing.assert_array_equal(method.act(shown), greedy)
    np.testing.assert_array_equal(method.act(shown, explore=False), greedy)
    assert method.agent.steps == 36


def test_acting_reads_images_as_training_does():
    """Both divide by 255: the encoder sees the same numbers when it acts and when it learns."""
    method = apt(augment=replace(APTConfig().augment, shift=0, intensity=0.0))
    images = torch.from_numpy(Batches().sample(4).observation)
    torch.testing.assert_close(method.agent.views(images, 1), method.agent.plain(images))


def test_a_short_run_has_the_replay_of_a_long_one():
    method = apt(replay_capacity=10**8)  # more than any machine's memory: a run that is made longer later still has room
    assert method.make_replay(2, 1000).capacity == 10**8


def test_wrong_shapes_and_values_are_named():
    with pytest.raises(ValueError, match="observation_shape"):
        APT(APTConfig(), (17,), 3)
    with pytest.raises(ValueError, match="observation_shape"):
        APT(APTConfig(), (3, 84, 84), 3)
    with pytest.raises(ValueError, match="online_views"):
        APTConfig(online_views=3)
    with pytest.raises(ValueError, match=r"reward\.k: must lie in 1\.\.32"):
        APTConfig(reward=ParticleConfig(k=33))
    with pytest.raises(ValueError, match="precision"):
        APT(replace(APTConfig(), precision="fp16"), (4, 84, 84), 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [APT, Task])
def test_captured_updates_equal_eager_ones(make):
    """Past the warm-up a GPU replays a graph: parameters, generators and metrics move as without it."""
    config = replace(APTConfig() if make is APT else TaskConfig(), encoder=SMALL, precision="fp32", learner=DrQConfig(hidden=12, tau=0.05))
    captured, eager = (make(config, SHAPE, ACTIONS, device="cuda", seed=0) for _ in range(2))
    eager.captured.WARM_UP = 100
    a, b = Batches(), Batches()
    for _ in range(8):
        x, y = captured.update(a), eager.update(b)
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-4)
    assert captured.captured.graph is not None and eager.captured.graph is None

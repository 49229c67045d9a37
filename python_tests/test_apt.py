"""APT and the task method that follows it: what each loss may touch, what a reward is, what is saved and transferred."""

import copy
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from urlfast import knn_reward
from urlfast.device import has_bf16
from urlfast.envs import Step
from urlfast.intrinsic import ParticleConfig, ParticleReward
from urlfast.learners.ddpg import DDPGConfig
from urlfast.learners.drq import DrQConfig
from urlfast.learners.drq_sac import DrQSACConfig
from urlfast.methods import FREEZE, LOAD, RESET, transfer
from urlfast.methods.apt import APT, ICM, APTConfig, ContrastiveConfig, ICMConfig
from urlfast.methods.task import Task, TaskConfig
from urlfast.nets.encoders import EncoderConfig

SHAPE, ACTIONS = (4, 36, 36), 3
SMALL = EncoderConfig(conv=((8, 8, 4), (8, 4, 2)), activation="elu", features=5, spectral_norm=True)
CPU = torch.device("cpu")


def apt(seed=0, **changes):
    defaults = dict(encoder=SMALL, representation=ContrastiveConfig((6,)), batch_size=8, precision="fp32")
    defaults["learner"] = DrQConfig(hidden=12, tau=0.05)
    config = replace(APTConfig(), **{**defaults, "reward": ParticleConfig(k=4), **changes})
    return APT(config, SHAPE, ACTIONS, seed=seed)


def mini_apt(seed=0):
    mini = APTConfig.mini_apt()
    config = replace(mini, encoder=replace(SMALL, features=0, spectral_norm=False), batch_size=8, learner=DrQConfig(hidden=12, tau=0.05))
    return APT(replace(config, reward=replace(mini.reward, k=4), precision="fp32"), SHAPE, ACTIONS, seed=seed)


def task(seed=0, **changes):
    defaults = dict(encoder=SMALL, batch_size=8, learner=DrQConfig(hidden=12, tau=0.05), precision="fp32")
    return Task(replace(TaskConfig(), **{**defaults, **changes}), SHAPE, ACTIONS, seed=seed)


PIXELS, STATES, VECTOR = (9, 20, 20), (7,), (2,)  # of three RGB images; of states; of actions
CONV = ((4, 3, 2), (4, 3, 1))
DDPG, SAC = DDPGConfig(hidden=12, feature_dim=5, lr=1e-3), DrQSACConfig(hidden=12, feature_dim=5)


def urlb(seed=0, shape=STATES, actions=VECTOR, **changes):
    """URLB's APT on states or pixels, with DDPG, or with DrQ where actions are numbers."""
    learner = DrQConfig(hidden=12, tau=0.05) if isinstance(actions, int) else DDPG
    small = dict(encoder=EncoderConfig(conv=CONV, mean=0.5), representation=ICMConfig(6, 12), reward=ParticleConfig(k=4, scale="none"))
    config = replace(APTConfig.urlb(), **{**small, "learner": learner, "batch_size": 8, "precision": "fp32", **changes})
    return APT(config, shape, actions, seed=seed, frame_stack=3 if len(shape) == 3 else 1)


def paper_dmc(seed=0, **changes):
    encoder = EncoderConfig(conv=CONV, activation="elu", features=5, spectral_norm=True)
    small = dict(encoder=encoder, representation=ContrastiveConfig((6,)), reward=ParticleConfig(k=4), learner=SAC, batch_size=8)
    return APT(replace(APTConfig.dmc(), **{**small, "precision": "fp32", **changes}), PIXELS, VECTOR, seed=seed, frame_stack=3)


def control(seed=0, shape=STATES, learner=DDPG, **changes):
    config = replace(TaskConfig.ddpg() if learner is DDPG else TaskConfig.sac(), encoder=EncoderConfig(conv=CONV), learner=learner)
    config = replace(config, **{"batch_size": 8, "precision": "fp32", **changes})
    return Task(config, shape, VECTOR, seed=seed, frame_stack=3 if len(shape) == 3 else 1)


MAKERS = {
    "apt": apt,
    "apt, random neighbours": lambda seed: apt(seed, reward=ParticleConfig(k=4, neighbours="random")),
    "mini_apt": mini_apt,
    "task": task,
    "task, tau 1": lambda seed: task(seed, learner=DrQConfig(hidden=12)),
    "urlb, states": urlb,
    "urlb, pixels": lambda seed: urlb(seed, PIXELS),
    "urlb, states and numbers": lambda seed: urlb(seed, actions=ACTIONS),
    "paper, dmc": paper_dmc,
    "ddpg, states": control,
    "ddpg, pixels": lambda seed: control(seed, PIXELS),
    "sac, states": lambda seed: control(seed, STATES, SAC),
    "sac, pixels": lambda seed: control(seed, PIXELS, SAC),
}


class Batches:
    """Stands for a replay: batch i is the same for whoever asks i-th."""

    def __init__(self, seed=0, shape=SHAPE, actions=ACTIONS):
        self.rng, self.shape, self.actions = np.random.default_rng(seed), shape, actions

    @staticmethod
    def of(method, seed=0):
        agent = method.agent
        return Batches(seed, (agent.frame_shape[0] * agent.frame_stack, *agent.frame_shape[1:]), agent.actions)

    def observations(self, n):
        if len(self.shape) == 3:
            return self.rng.integers(0, 256, (n, *self.shape), np.uint8)
        return self.rng.standard_normal((n, *self.shape), np.float32)

    def sample(self, n):
        rng = self.rng
        numbered = isinstance(self.actions, int)
        return types.SimpleNamespace(
            observation=self.observations(n),
            next_observation=self.observations(n),
            action=rng.integers(0, ACTIONS, n) if numbered else rng.uniform(-1, 1, (n, *self.actions)).astype(np.float32),
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
    encoder, projection, target = (parameters(m) for m in (method.agent.encoder, method.representation, method.agent.encoder_target))
    method.update(Batches())
    assert not equal(encoder, method.agent.encoder) and not equal(projection, method.representation)
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


KEYS = {"q_loss", "q_target", "grad_norm", "exploration"}


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


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_saved_and_loaded_it_goes_on_bit_equal(make, tmp_path):
    first = make(0)
    batches = Batches.of(first)
    images = Batches.of(first, 1).observations(5)
    for _ in range(3):
        first.act(step(images))
        first.update(batches)
    second, same_batches = make(7), copy.deepcopy(batches)
    second.load_state_dict(through_a_file(first.state_dict(), tmp_path))
    for _ in range(3):
        np.testing.assert_array_equal(first.act(step(images)), second.act(step(images)))
        a, b = first.update(batches), second.update(same_batches)
        assert all(torch.equal(a[name], b[name]) for name in a)
    x, y = first.state_dict(), second.state_dict()
    assert x["progress"]["steps"] == y["progress"]["steps"] == 30
    for part in {"encoder", "encoder_target", "representation", "q", "q_target", "actor", "critic", "critic_target"} & x.keys():
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


def test_transfer_tables_name_every_part_that_is_saved():
    for make in MAKERS.values():
        saved = (method := make(0)).state_dict()
        assert set(method.TRANSFER) == {"whole", "random-head", "frozen-encoder"}
        for table in method.TRANSFER.values():
            assert table.keys() >= saved.keys() and set(table.values()) <= {LOAD, FREEZE, RESET}


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
    method = apt(learning_start=20, learner=DrQConfig(hidden=12, tau=0.05, epsilon=0.0, epsilon_decay=0))
    images = np.random.default_rng(0).integers(0, 256, (10, *SHAPE), np.uint8)
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
    eager.captured[True].WARM_UP = 100
    a, b = Batches(), Batches()
    for _ in range(8):
        x, y = captured.update(a), eager.update(b)
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-3, atol=1e-4)
    assert captured.captured[True].graph is not None and eager.captured[True].graph is None


# continuous control


def test_icm_is_two_norms_on_one_trunk():
    """Slow and in float64: what predicts o_{t+m} from (o_t, a), and a from both; the norm of each error, averaged over the batch."""
    method = urlb()
    icm, b = copy.deepcopy(method.representation).double(), Batches.of(method).sample(8)
    obs, action, following = (torch.from_numpy(x).double() for x in (b.observation, b.action, b.next_observation))

    def dense(layer, x):
        return x @ layer.weight.T + layer.bias

    def trunk(x):
        x = dense(icm.trunk.linear, x)
        return torch.tanh((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())

    def mlp(layers, x):
        return dense(layers[2], dense(layers[0], x).clamp(min=0))

    h, h_next = trunk(obs), trunk(following)
    forward = (h_next - mlp(icm.forward_model, torch.cat([h, action], 1))).square().sum(1).sqrt().mean()
    inverse = (action - torch.tanh(mlp(icm.inverse_model, torch.cat([h, h_next], 1)))).square().sum(1).sqrt().mean()
    metrics = method.update(types.SimpleNamespace(sample=lambda n: b))
    torch.testing.assert_close(metrics["forward_error"].double(), forward, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["inverse_error"].double(), inverse, rtol=1e-4, atol=1e-5)
    particles = method.representation.particles(torch.from_numpy(b.next_observation)).detach().double()  # of the next, after the step
    distance = (particles[:, None] - particles[None]).square().sum(-1).sqrt().sort(1).values[:, :4].mean(1)
    torch.testing.assert_close(metrics["intrinsic_reward"].double(), torch.log(1 + distance).mean(), rtol=1e-4, atol=1e-5)


def test_numbered_actions_are_read_off_by_cross_entropy():
    icm = ICM(ICMConfig(6, 12), 7, 3)
    features, following, action = torch.randn(8, 7), torch.randn(8, 7), torch.randint(3, (8,))
    _, metrics = icm(features, action, [following])
    h, h_next = icm.trunk(features), icm.trunk(following)
    log_p = torch.log_softmax(icm.inverse_model(torch.cat([h, h_next], -1)), -1)
    torch.testing.assert_close(metrics["inverse_error"], -log_p[torch.arange(8), action].mean().detach())
    predicted = icm.forward_model(torch.cat([h, torch.eye(3)[action]], -1))
    torch.testing.assert_close(metrics["forward_error"], (h_next - predicted).norm(dim=-1).mean().detach())


@pytest.mark.parametrize("make", [lambda **c: urlb(shape=PIXELS, **c), paper_dmc, lambda **c: apt(**c)], ids=["urlb", "paper, dmc", "apt"])
def test_who_trains_the_encoder(make, monkeypatch):
    """The representation's loss alone, or in the paper's ablations that of Q alone, or nothing."""
    for encoder_learns, representation_moves in [("representation", True), ("q", False), ("never", False)]:
        method = make(encoder_learns=encoder_learns)
        encoder, representation = parameters(method.agent.encoder), parameters(method.representation)
        seen, update = [], method.agent.learner.update
        monkeypatch.setattr(method.agent.learner, "update", lambda *given, seen=seen, update=update: seen.append(given) or update(*given))
        method.update(Batches.of(method))
        assert equal(representation, method.representation) != representation_moves
        assert equal(encoder, method.agent.encoder) == (encoder_learns == "never")
        online = seen[0][2]
        assert all((view.grad is not None) == (encoder_learns == "q") for view in online)


def test_without_its_own_loss_the_encoder_gets_the_gradient_of_q_alone():
    still = dict(augment=replace(APTConfig.urlb().augment, shift=0), learner=replace(DDPG, sigma=0.0, sigma_final=0.0))
    method = urlb(shape=PIXELS, encoder_learns="q", **still)
    agent, b = method.agent, Batches.of(method).sample(8)
    encoder, critic, errors = copy.deepcopy(agent.encoder), copy.deepcopy(agent.learner.critic), []
    update = agent.learner.update
    agent.learner.update = lambda b, r, online, target: errors.append((b, r, target)) or update(b, r, online, target)
    method.update(types.SimpleNamespace(sample=lambda n: b))
    mine = [p.grad for p in agent.encoder.parameters()]
    (batch, reward, target), learner = errors[0], urlb(shape=PIXELS).agent.learner  # as it was: same seed
    with torch.no_grad():
        y = reward + batch.discount * learner.critic_target(target[0][1], torch.tanh(learner.actor(target[0][0]))).amin(0)
    (critic(encoder(torch.from_numpy(b.observation) / 255), batch.action) - y).square().mean(1).sum().backward()
    for gradient, p in zip(mine, encoder.parameters(), strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=2e-3, atol=1e-6)


def test_ablations_of_the_reward():
    z = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    reward, distance = ParticleReward(ParticleConfig(k=12, neighbours="random", scale="none"), CPU)(z)
    mean = torch.cdist(z, z).mean(1)  # what a random neighbour is away, on average
    assert abs((distance - mean).mean()) < 0.02 and (distance - mean).std() > 0.1
    torch.testing.assert_close(reward, torch.log(1 + distance))
    reward, distance = ParticleReward(ParticleConfig(neighbours="none"), CPU)(z)
    assert reward.tolist() == [1] * 400 and distance.shape == (400,)


def test_what_a_method_cannot_do_is_said_at_the_start():
    with pytest.raises(ValueError, match="the contrastive loss compares views of images"):
        urlb(representation=ContrastiveConfig())
    with pytest.raises(ValueError, match="encoder_learns: vectors have no encoder"):
        urlb(encoder_learns="q")
    with pytest.raises(ValueError, match="DrQConfig takes numbered actions, and this environment's actions are vectors"):
        APT(APTConfig(), SHAPE, (2,))
    with pytest.raises(ValueError, match="DDPGConfig takes vectors, and this environment's actions are numbers"):
        APT(APTConfig.urlb(), (7,), 3, frame_stack=1)


@pytest.mark.parametrize("make", [urlb, paper_dmc, control], ids=["urlb", "paper", "task"])
def test_continuous_actions_are_uniform_at_first_and_then_the_policys(make):
    method = make(learning_start=20)
    shown = step(Batches.of(method).observations(10))
    warm_up = np.concatenate([method.act(shown) for _ in range(2)])
    assert warm_up.dtype == np.float32 and warm_up.shape == (20, 2) and np.abs(warm_up).max() <= 1 and warm_up.std() > 0.4
    mean = method.act(shown, explore=False)
    np.testing.assert_array_equal(mean, method.act(shown, explore=False))
    assert 0 < np.abs(method.act(shown) - mean).mean() < 1.5 and method.agent.steps == 30


def test_skills_are_appended_to_the_features():
    method = control()
    seen, act = [], method.agent.learner.act
    method.agent.learner.act = lambda features, *rest: seen.append(features) or act(features[:, :7], *rest)
    observations, skill = Batches.of(method).observations(4), np.ones((4, 3), np.float32)
    method.agent.act(step(observations), explore=False, skill=torch.from_numpy(skill))
    torch.testing.assert_close(seen[0], torch.from_numpy(np.concatenate([observations, skill], 1)))


def test_exploration_counts_from_the_end_of_the_warm_up():
    method = apt(learning_start=20, learner=DrQConfig(hidden=12, tau=0.05, epsilon=0.2, epsilon_decay=100))
    for steps, probability in ((0, 1.0), (20, 1.0), (70, 0.6), (120, 0.2), (10**6, 0.2)):
        method.agent.steps = steps
        assert method.agent.exploration == pytest.approx(probability)


@pytest.mark.skipif(not has_bf16(CPU), reason="bf16 is emulated here")
@pytest.mark.parametrize("make", [apt, task])
def test_under_bfloat16_all_but_the_layers_is_float32(make):
    """Every other test computes in fp32."""
    exact, method = make(), make(precision="bf16")
    batches = Batches()
    same = copy.deepcopy(batches)
    metrics, wanted = method.update(batches), exact.update(same)
    assert all(value.dtype == torch.float32 for value in metrics.values())
    tensors = [value for part in method.state_dict().values() for value in torch.utils._pytree.tree_leaves(part)]
    assert not any(value.dtype in (torch.bfloat16, torch.float16) for value in tensors if isinstance(value, torch.Tensor))
    for name in ("q_loss", "q_target"):
        assert 0 < abs(metrics[name] - wanted[name]) < 0.05 * abs(wanted[name]) + 0.01


def test_the_encoders_gradient_is_limited():
    """Of the task's encoder, on its own; the head has its own limit."""
    method = task(learner=DrQConfig(hidden=12, tau=0.05, grad_clip=1e-3))
    metrics = method.update(Batches())
    norm = torch.stack([p.grad.norm() for p in method.agent.encoder.parameters()]).norm()
    assert metrics["encoder_grad_norm"] > 2e-3 and norm == pytest.approx(1e-3, rel=1e-2)

"""CPT's transfer: flights, the extended action set and its relabelling, whom it follows, and the rules of `urlfast transfer`."""

import copy
import itertools
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_grid import Grid

from urlfast import evaluate, report, train, transfer
from urlfast.checkpoint import read, read_latest
from urlfast.device import Arithmetic
from urlfast.learners.r2d2 import R2D2, R2D2Config
from urlfast.losses import rescale
from urlfast.methods.cpt import VARIANTS, CPTTask, CPTTaskConfig, FlightConfig, Flights
from urlfast.methods.ngu import NGU, NGUConfig
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask
from urlfast.nets.encoders import States
from urlfast.run import Run, UsageError, UserError

# Flights --------------------------------------------------------------------------------------------------------------


def reference(config, is_first, uniform, begins):
    """Algorithm 1 of one environment, a step at a time: (flying, begun) of each. uniform: (T, 3)."""
    weight = [n**-config.mu for n in range(1, config.longest + 1)]
    n, out = 0, []
    for t, (of_episode, of_step, of_length) in enumerate(uniform):
        if is_first[t] or t == 0:
            n, epsilon = 0, config.epsilon[0] * (config.epsilon[1] / config.epsilon[0]) ** of_episode
        begun = n == 0 and (of_step < epsilon if begins is None else begins[t])
        if begun:
            below = 0.0
            while below <= of_length and n < config.longest:
                below += weight[n] / sum(weight)
                n += 1
        out.append((n > 0, begun))
        n -= n > 0
    return np.array(out)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 4), mu=st.sampled_from([0.3, 1.0, 2.0]), longest=st.integers(1, 20), told=st.booleans())
def test_flights_are_those_of_a_plain_loop(seed, n, mu, longest, told):
    config, T = FlightConfig("policy", mu, longest, (0.05, 0.9)), 60
    random, same = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    is_first, begins = random.random((T, n)) < 0.1, random.random((T, n)) < 0.3
    uniform = np.stack([torch.rand(3, n, generator=same, dtype=torch.float64).numpy() for _ in range(T)])
    flights = Flights(config, torch.Generator().manual_seed(seed))
    got = np.stack([np.stack(flights(first, begin if told else None)) for first, begin in zip(is_first, begins, strict=True)])
    for i in range(n):
        want = reference(config, is_first[:, i], uniform[:, :, i], begins[:, i] if told else None)
        np.testing.assert_array_equal(got[:, :, i], want)


def flown(config, n, T, first_every=None):
    """(flying, begun, epsilon), (T, n) each."""
    flights, out = Flights(config, torch.Generator().manual_seed(0)), []
    for t in range(T):
        out.append((*flights(np.full(n, t % first_every == 0 if first_every else t == 0)), flights.epsilon))
    return (np.stack(part) for part in zip(*out, strict=True))


def test_lengths_of_flights_fall_with_the_square_and_their_share_is_what_follows():
    """Chi-square of 1..20 and the rest against n^-2: 31.4 is its 95 % point with 20 degrees of freedom, 52.4 the 99.99 % one.

    The share: 3.1 % at eps_levy 0.01, with 0.05 % of standard error.
    """
    longest, T = 100, 600
    flying, _, _ = flown(FlightConfig("policy", 2.0, longest, (0.01, 0.01)), 4000, 700)
    assert abs(flying[longest:].mean() - 0.031) < 0.0015
    flying, begun, _ = flown(FlightConfig("policy", 2.0, longest, (0.5, 0.5)), 1000, T)
    ends = ~flying[1:] | begun[1:]  # the step after belongs to no flight, or to another
    at, who = np.nonzero(begun[: T - longest])
    lengths = np.array([1 + ends[t:, i].argmax() for t, i in zip(at[:100_000], who[:100_000], strict=True)])
    assert len(lengths) == 100_000 and lengths.max() <= longest
    expected = np.arange(1, longest + 1.0) ** -2
    expected = np.append(expected[:20], expected[20:].sum()) / expected.sum() * len(lengths)
    observed = np.bincount(np.minimum(lengths, 21), minlength=22)[1:]
    assert ((observed - expected) ** 2 / expected).sum() < 52.4


def test_no_flight_crosses_an_episode_and_each_episode_has_one_epsilon():
    low, high, every = 1e-3, 0.4, 25
    flying, begun, epsilon = flown(FlightConfig("policy", 0.5, 1000, (low, high)), 2000, 500, every)
    assert flying[every - 1 :: every].mean() > 0.3  # episodes that end within a flight
    np.testing.assert_array_equal(flying[::every], begun[::every])
    episodes = epsilon.reshape(-1, every, 2000)
    assert (episodes == episodes[:, :1]).all()
    draws = np.log(episodes[:, 0] / low).ravel() / np.log(high / low)
    assert len(np.unique(draws)) == len(draws) and np.abs(np.quantile(draws, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.01


@pytest.mark.parametrize("options, says", [
    ({"mu": 0.0}, "mu: must be positive, got 0"),
    ({"longest": 0}, r"longest: must lie in 1\.\.1000000, got 0"),
    ({"epsilon": (0.0, 0.1)}, r"epsilon: must be two numbers above 0, the smaller one first, got 0\.0 0\.1"),
    ({"epsilon": (0.2, 0.1)}, "epsilon: must be two numbers above 0"),
    ({"epsilon": (0.2, 1.1)}, r"epsilon: must lie in 0\.\.1, got 1\.1"),
])  # fmt: skip
def test_flights_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        FlightConfig(**options)


def test_a_config_that_cannot_be():
    with pytest.raises(ValueError, match="extended: goes with flights of the pre-trained policy"):
        CPTTaskConfig(extended=True, flight=FlightConfig(by="action"))
    with pytest.raises(ValueError, match=r"period: must divide trace_length \(160\)"):
        CPTTaskConfig(period=70)


# Relabelling ----------------------------------------------------------------------------------------------------------


class TableQ(nn.Module):
    """Q of one-hot states, with the face of a RecurrentQ that remembers nothing."""

    def __init__(self, states, num_outputs):
        super().__init__()
        self.table = nn.Parameter(torch.randn(states, num_outputs, generator=torch.Generator().manual_seed(0)))
        self.lstm = SimpleNamespace(flatten_parameters=lambda: None)

    def inputs(self, features, action, reward):
        return features

    def unroll(self, inputs, state):
        return inputs @ self.table, state

    def forward(self, features, action, reward, state):
        return self.unroll(features, state)


GAMMA = 0.9


def two_states(choice, lr=0.5):
    """After 100 updates on o_0 -> o_1 -> end with action 1, which pays 1 and then 2: Q (2, 3) before and after, and the last errors."""
    q = TableQ(2, 3)
    before = q.table.detach().clone()
    config = R2D2Config(target="peng", trace_lambda=0.7, gamma=GAMMA, burn_in=0, target_period=1)
    learner = R2D2(config, States(2), q, Arithmetic.choose("cpu", "fp32"), torch.Generator())
    learner.optim = torch.optim.SGD(learner.parameters, lr)
    batch = SimpleNamespace(
        action=torch.tensor([[1, 1, 0]]),
        terminated=torch.tensor([[False, True, False]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        state=torch.zeros(1, 2, 1),
        previous_action=torch.tensor([-1]),
        previous_reward=torch.zeros(1),
        mu=torch.ones(1, 3),
        choice=choice,
        weight=None,
    )
    features, reward = torch.eye(2)[torch.tensor([[0, 1, 1]])], torch.tensor([[1.0, 2.0, 0.0]])
    for _ in range(100):
        learner.update(batch, reward, features, features)
        learner.follow()
    return before, q.table.detach(), learner.errors(batch, reward, features, features)[0].detach()


def test_what_followed_the_policy_teaches_both_its_names_and_no_other():
    before, after, error = two_states(torch.tensor([[2, 2, 0]]))
    torch.testing.assert_close(after[:, 2], after[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(after[:, 0], before[:, 0], atol=0, rtol=0)
    torch.testing.assert_close(after[1, 1], rescale(torch.tensor(2.0)), atol=1e-5, rtol=0)
    assert after[0, 1] > rescale(torch.tensor(1.0)) and error.shape == (2, 1, 2)


def test_and_a_primitive_action_none_but_itself():
    before, after, error = two_states(torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]], atol=0, rtol=0)
    assert (after[:, 1] - before[:, 1]).abs().min() > 0.01 and not error[1].any()


def test_the_loss_of_a_followed_step_is_that_of_both_its_names():
    learner = R2D2(R2D2Config(burn_in=1, target="peng"), States(2), TableQ(2, 4), Arithmetic.choose("cpu", "fp32"), torch.Generator())
    random = torch.Generator().manual_seed(1)
    B, L = 5, 7
    action = torch.randint(3, (B, L), generator=random)
    follows = torch.rand(B, L, generator=random) < 0.5
    batch = SimpleNamespace(
        action=action,
        terminated=torch.rand(B, L, generator=random) < 0.2,
        mask=torch.rand(B, L - 1, generator=random) < 0.8,
        state=torch.zeros(B, 2, 1),
        previous_action=torch.full((B,), -1),
        previous_reward=torch.zeros(B),
        mu=torch.ones(B, L),
        weight=None,
    )
    features, reward = torch.eye(2)[torch.randint(2, (B, L), generator=random)], torch.rand(B, L, generator=random)

    def errors(choice):
        batch.choice = choice
        return learner.errors(batch, reward, features, features)[0]

    named = errors(torch.where(follows, 3, action))
    always, primitive = errors(torch.full_like(action, 3))[0], errors(None)[0]
    mask, follows = batch.mask[:, 1:], follows[:, 1:-1]
    torch.testing.assert_close(named[0], torch.where(follows, always, primitive))
    torch.testing.assert_close(named[1], torch.where(follows & mask, primitive, 0.0))


# Acting ---------------------------------------------------------------------------------------------------------------

TOY = replace(CPTTaskConfig.toy(), learning_start=0)
TOY = replace(TOY, learner=replace(TOY.learner, torso=0, lstm=16, hidden=16, epsilon=0.5), trace_length=8, period=4, batch_size=4)


def small(config):
    return replace(config, learner=replace(config.learner, torso=0, lstm=16, hidden=16), trace_length=8, period=4, batch_size=4)


def pretrained(make, seed=3):
    """A recurrent policy that moves: weights as they begin, but larger."""
    method = make(small({RecurrentTask: RecurrentConfig, NGU: NGUConfig}[make].toy()), (81,), 4, seed=seed, frame_stack=1)
    with torch.no_grad():
        for parameter in method.agent.learner.q.parameters():
            parameter.mul_(4)
    return method


def follower(variant, policy=None, seed=0, epsilon=0.2, flight_epsilon=(0.1, 0.5)):
    flight = FlightConfig(by=VARIANTS[variant].flights, epsilon=flight_epsilon, longest=10)
    learner = replace(TOY.learner, epsilon_single=epsilon)
    config = replace(TOY, learner=learner, flight=flight, extended=VARIANTS[variant].extended)
    task = CPTTask(config, (81,), 4, seed=seed, frame_stack=1, make_policy=lambda run: pretrained(run["of"], seed=7))
    if policy is not None:
        task.load_part("pretrained", {"run": {"of": type(policy)}, "parts": policy.state_dict()})
    return task


def played(task, env, steps, explore=True):
    """[(step, action, rows)]"""
    step, out = env.reset(), []
    for _ in range(steps):
        action = task.act(step, explore)
        rows = {name: getattr(step, name) for name in ("observation", "reward", "terminated", "is_first", "is_last")} | {"action": action}
        task.observe(rows)
        out.append((step, action, rows))
        step = env.step(action)
    return out


@pytest.mark.parametrize("make", [RecurrentTask, NGU])
@pytest.mark.parametrize("variant", ["cpt", "exploitation", "exploration"])
def test_the_policy_sees_every_step_and_acts_on_its_own(make, variant):
    """Another copy of it is shown every step and every executed action: what it would do is what was done wherever it was followed."""
    policy = pretrained(make)
    task, alone = follower(variant, policy), pretrained(make)
    flights, flying = task.flights, []

    def noted(*arguments):
        flying.append(flights(*arguments)[0])
        return flying[-1], np.zeros_like(flying[-1])

    task.flights = noted
    steps = played(task, Grid(num_envs=6, limit=15), 100)
    led = []
    for t, (step, action, rows) in enumerate(steps):
        would = alone.act(step, explore=False)
        alone.took(action)
        follows = rows["choice"] == 4 if "choice" in rows else flying[t]
        np.testing.assert_array_equal(action[follows], would[follows])
        led.append(follows)
        if "choice" in rows:
            np.testing.assert_array_equal(rows["choice"][~follows], action[~follows])
            if flying:
                assert follows[flying[t]].all()  # flights are stored as a'
    led = np.stack(led)
    assert 0.05 < led.mean() < 0.95
    assert ("choice" in steps[0][2]) == VARIANTS[variant].extended


def test_the_memory_of_q_reads_what_was_executed():
    task = follower("cpt", pretrained(RecurrentTask))
    steps = played(task, Grid(num_envs=6, limit=15), 40)
    for (_, action, _), (after, _, rows) in itertools.pairwise(steps):
        np.testing.assert_array_equal(rows["previous_action"], np.where(after.is_first, -1, action))


def test_an_evaluator_neither_flies_nor_explores():
    task = follower("cpt", pretrained(RecurrentTask), epsilon=1.0, flight_epsilon=(1.0, 1.0))
    env = Grid(num_envs=1, limit=15)
    assert all((rows["choice"] == 4).all() for _, _, rows in played(task, env, 20))
    choices = []
    act = task.agent.act
    task.agent.act = lambda *arguments: choices.append(act(*arguments)) or choices[-1]
    for (_, _, rows), acted in zip(played(task, env, 20, explore=False), choices, strict=True):
        assert rows["choice"] == acted.choice == acted.q.argmax() and not acted.at_random


def test_eps_z_greedy_repeats_what_it_drew():
    task = follower("eps-z-greedy", epsilon=0.15)
    flights, log = task.flights, []
    task.flights = lambda first, begins: log.append((begins, *flights(first, begins))) or log[-1][1:]
    steps = played(task, Grid(num_envs=1, limit=30), 600)
    held, repeated = None, 0
    for (_, action, rows), (at_random, flying, begun) in zip(steps, log, strict=True):
        assert "choice" not in rows and (begun <= at_random).all() and (flying >= begun).all()
        if begun[0]:
            held = action[0]
        elif flying[0]:
            assert action[0] == held
            repeated += 1
    assert repeated > 20


def test_a_policy_is_needed_before_anything_is_stored():
    for variant in ("cpt", "exploitation", "exploration"):
        with pytest.raises(
            ValueError, match="flight: there is no pre-trained policy to follow; begin with `urlfast transfer RUN --rule cpt`"
        ):
            follower(variant).make_replay(2, 100)
    follower("eps-z-greedy").make_replay(2, 100)


@pytest.mark.parametrize("make", [RecurrentTask, NGU])
def test_saved_and_loaded_it_goes_on_bit_equal_and_the_policy_is_not_trained(make):
    policy = pretrained(make)
    task, env = follower("cpt", policy), Grid(num_envs=4, limit=12, pays=1.0)
    replay = task.make_replay(4, 1000)
    for _, _, rows in played(task, env, 60):
        replay.add(rows)
    for _ in range(5):
        metrics = task.update(replay)
    assert metrics["q_loss"] > 0
    saved = copy.deepcopy(task.state_dict())
    assert set(saved) == set(CPTTask.parts)
    for part in ("encoder", "q"):
        theirs = policy.state_dict()[part]
        assert all(torch.equal(saved["pretrained"]["parts"][part][name], theirs[name]) for name in theirs)
    assert not any("optimizer" in part or part == "q_target" for part in saved["pretrained"]["parts"])
    other = follower("cpt")
    other.load_state_dict(saved)
    one, two = (played(agent, Grid(num_envs=3, limit=12, seed=5), 30) for agent in (task, other))
    for (_, a, rows), (_, b, others) in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(rows["choice"], others["choice"])
    with pytest.raises(ValueError, match="state: must have the parts"):
        other.load_state_dict({name: state for name, state in saved.items() if name != "pretrained"})
    del saved["pretrained"]["parts"]["q"]
    with pytest.raises(ValueError, match="state: must have the parts"):
        other.load_state_dict(saved)


# The command ----------------------------------------------------------------------------------------------------------

SEQUENCES = ["--learner.burn-in", "0", "--trace-length", "4", "--period", "2", "--batch-size", "2", "--learning-start", "24"]
SMALL = ["--steps", "60", "--env.num-envs", "2", "--replay-capacity", "500", "--log-every", "20", *SEQUENCES]
NETS = ["--learner.lstm", "8", "--learner.hidden", "8", "--learner.torso", "8", "--env.frame-size", "44"]


@pytest.fixture(scope="module")
def pong(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    novelty = ["--novelty.hidden", "8"]
    assert train.run_train(["cpt", "atari", "--preset", "small", "--env.game", "pong", "--runs", str(runs), *SMALL, *NETS, *novelty]) == 0
    return Run(next(runs.iterdir()))


def learned(run, tmp_path, rule, *options):
    assert transfer.run_transfer([str(run.folder), "--rule", rule, "--runs", str(tmp_path), *SMALL, *options]) == 0
    return Run(max(tmp_path.iterdir()))


def same(mine: dict, theirs: dict) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("rule", VARIANTS)
def test_rules(pong, tmp_path, capsys, rule):
    variant, run = VARIANTS[rule], learned(pong, tmp_path, rule)
    follows = variant.extended or variant.flights == "policy"
    out = capsys.readouterr().out
    source = read_latest(pong.folder).state["method"]
    first = read(run.folder / "checkpoints" / "step-000000000").state["method"]
    last = read_latest(run.folder).state["method"]
    assert run.config["method"] == "cpt-task" and run.config["transfer"]["rule"] == rule
    for part, of, does in (("encoder", "encoder", variant.torso), ("encoder_target", "encoder", variant.torso), ("q", "q", variant.q)):
        assert same(first[part], source[of]) == (does != "reset"), part
        assert same(last[part], source[of]) == (does == "freeze" or (does, part) == ("load", "encoder_target")), part  # it follows later
        said = {"load": "loaded", "freeze": "loaded and frozen", "reset": "begins anew"}[does]
        assert any(line.split() == [part, *said.split()] for line in out.splitlines()), out
    assert ("pretrained" in last) == follows == (["pretrained", "loaded", "and", "frozen"] in map(str.split, out.splitlines()))
    assert any(line.split() == ["rnd", "not", "used"] for line in out.splitlines()), out
    if follows:
        for part in ("encoder", "q", "embedding", "rnd"):
            assert same(last["pretrained"]["parts"][part], source[part]), part
    outputs = last["q"]["head.advantage.weight"].shape[0]
    assert outputs == 18 + variant.extended


def test_a_run_goes_on_and_is_evaluated_and_reported_where_the_pretrained_one_is_gone(tmp_path):
    world = ["--env.id", "CartPole-v1", "--runs", str(tmp_path / "source")]
    assert train.run_train(["ngu", "gym", *world, *SMALL, *NETS[:6], "--novelty.hidden", "8"]) == 0
    source = Run(next((tmp_path / "source").iterdir()))
    parts = read_latest(source.folder).state["method"]
    run = learned(source, tmp_path / "runs", "cpt")
    assert run.config["transfer"] == {"run": str(source.folder), "method": "ngu", "step": 60, "rule": "cpt"}
    shutil.rmtree(source.folder)
    twin = Run(shutil.copytree(run.folder, tmp_path / "twin"))
    for folder in (run.folder, twin.folder):
        assert train.run_train(["--resume", str(folder), "--steps", "120"]) == 0
    mine, other = (read_latest(folder).state["method"] for folder in (run.folder, twin.folder))
    assert same(mine["q"], other["q"]) and torch.equal(mine["progress"]["actions"], other["progress"]["actions"])
    for part in ("q", "embedding", "rnd"):
        assert same(mine["pretrained"]["parts"][part], parts[part])
    evaluate.run_evaluate([str(run.folder), "--episodes", "2", "--no-video"])
    assert "transfer after NGU on Cartpole" in report.report([run.folder]).read_text()


def test_other_actions_or_observations_are_refused(pong, tmp_path, capsys):
    def refused(rule, *options):
        with pytest.raises(UserError) as error:
            learned(pong, tmp_path, rule, *options)
        assert not capsys.readouterr().out and not list(tmp_path.iterdir())
        return str(error.value)

    says = "breakout has 4 actions, the run's pong 18: use --rule frozen-torso, or pre-train with --env.full-action-set"
    for rule in ("cpt", "exploration", "exploitation", "fine-tuning"):
        assert refused(rule, "--task", "breakout", "--env.no-full-action-set") == says
    says = "pong shows observations of shape (4, 60, 60), and the run knows pong's (4, 44, 44)"
    assert refused("cpt", "--env.frame-size", "60") == says
    assert refused("cpt", "--trace-length", "5").startswith("--period: must divide trace_length (5)")
    assert refused("ctp").startswith("--rule: unknown 'ctp', did you mean 'cpt'? (known: cpt, cpt-shared-torso, exploitation")
    run = learned(pong, tmp_path, "frozen-torso", "--task", "breakout", "--env.no-full-action-set")
    assert run.config["config"]["env"]["game"] == "breakout"


def test_from_scratch_there_is_nobody_to_follow(tmp_path):
    with pytest.raises(UserError, match="there is no pre-trained policy to follow"):
        train.run_train(["cpt-task", "atari", "--flight.by", "policy", "--runs", str(tmp_path), *SMALL, *NETS])
    with pytest.raises(UsageError, match="--preset: unknown 'tiny'"):
        train.run_train(["cpt-task", "atari", "--preset", "tiny"])


@pytest.mark.parametrize("method, options", [("apt", ["--encoder.features", "5"]), ("drq", []), ("aps", [])])
def test_any_pretrained_method_can_be_followed(tmp_path, capsys, method, options):
    runs, game = tmp_path / "before", ["--env.game", "pong", "--env.frame-size", "44"]
    small = ["--steps", "40", "--learning-start", "22", "--env.num-envs", "2", "--learner.hidden", "8", "--replay-capacity", "500"]
    assert train.run_train([method, "atari", *game, "--runs", str(runs), *small, *options]) == 0
    source = Run(next(runs.iterdir()))
    run = learned(source, tmp_path / "after", "cpt-shared-torso", *NETS[:6])
    before, after = read_latest(source.folder).state["method"], read_latest(run.folder).state["method"]
    for mine in (after["encoder"], after["encoder_target"], after["pretrained"]["parts"]["encoder"]):  # a spectral norm's vectors, too
        assert same(mine, before["encoder"])
    assert same(after["pretrained"]["parts"]["q"], before["q"])
    assert ["pretrained", "loaded", "and", "frozen"] in list(map(str.split, capsys.readouterr().out.splitlines()))
    assert train.run_train(["--resume", str(run.folder), "--steps", "80"]) == 0
    if method == "drq":
        says = "--rule: 'fine-tuning' is not for this run of drq on atari, but for those of ngu, cpt, r2d2, cpt-task with numbered actions"
        with pytest.raises(UsageError, match=says):
            learned(source, tmp_path / "after", "fine-tuning")

"""NGU as a method: where its reward comes from and where it goes, what it never sees, what it saves; that it learns to cover."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from toy_grid import Grid
from toy_training import train
from toys import Catch

from urlfast.checkpoint import read_latest
from urlfast.evaluate import EvaluateConfig, evaluate, greedy
from urlfast.intrinsic import NoveltyConfig
from urlfast.learners.r2d2 import R2D2Config
from urlfast.methods import LOAD, RESET
from urlfast.methods.ngu import NGU, NGUConfig
from urlfast.nets.encoders import EncoderConfig
from urlfast.report import report
from urlfast.run import Run, UserError
from urlfast.train import run_train

LEARNER = R2D2Config(torso=0, lstm=16, hidden=16, lr=2e-3, burn_in=2, target="retrace", gamma=0.95, target_period=50)
TINY = NGUConfig(
    learner=LEARNER,
    novelty=NoveltyConfig(embedding=8, k=3, hidden=16, rnd_features=8),
    encoder=EncoderConfig(conv=((4, 8, 4), (4, 3, 2))),
    trace_length=8,
    period=4,
    batch_size=4,
    replay_ratio=1.0,
    learning_start=100,
    replay_capacity=4_000,
    precision="fp32",
)


def ngu(env, config=TINY, seed=0, **changes) -> NGU:
    config = dataclasses.replace(config, **changes)
    return NGU(config, env.observation_shape, env.num_actions, seed=seed, frame_stack=env.frame_stack)


def played(method, env, steps, seed=0):
    """Steps of `method` in `env` as the loop makes them: its Steps, its rows, its actions."""
    step, history = env.reset(seed), []
    replay = method.make_replay(env.num_envs, steps)
    for _ in range(steps):
        action = method.act(step)
        after = env.step(action)
        rows = {"observation": step.observation[:, -env.frame_shape[0] :], "action": action, "reward": after.reward}
        rows |= {"terminated": after.terminated, "is_first": step.is_first, "is_last": step.is_last}
        method.observe(rows)
        replay.add(rows)
        history.append((step, dict(rows)))
        step = after
    return history, replay


def tensors(state, prefix=""):
    if isinstance(state, torch.Tensor):
        yield prefix, state
    elif isinstance(state, dict):
        for name, value in state.items():
            yield from tensors(value, f"{prefix}/{name}")


def same(one: dict, other: dict) -> list[str]:
    """Names of the tensors that differ."""
    return [name for (name, x), (_, y) in zip(tensors(one), tensors(other), strict=True) if not torch.equal(x, y)]


# The reward ----------------------------------------------------------------------------------------------------------


def test_the_novelty_of_an_observation_is_stored_beside_it_and_pays_the_action_before():
    env = Grid(num_envs=2, side=4, limit=12)
    method = ngu(env)
    history, replay = played(method, env, 60)
    paid = np.stack([rows["novelty"] for _, rows in history])  # (steps, N)
    first = np.stack([step.is_first for step, _ in history])
    last = np.stack([step.is_last for step, _ in history])
    assert (paid[first] == 0).all() and (paid[last] > 0).all()  # the last observation's pays the last action
    # A second reward, asked in the same order, is the same: one question a step, with the step's own is_first.
    again = ngu(env).novelty
    for (step, _), row in zip(history, paid, strict=True):
        got = again(torch.from_numpy(step.observation), torch.from_numpy(step.is_first))
        np.testing.assert_array_equal(got, row)
    # What the learner is given: r_t = n_{t+1}, and n_t as an input, in sequences that begin anywhere.
    seen = []
    method.agent.update = lambda batch, reward: seen.append((batch, reward)) or {"priorities": torch.zeros(4, 8)}
    method.agent.after_update = lambda *args: None
    cells = np.stack([step.observation for step, _ in history])  # (steps, N, 16)
    for _ in range(20):
        method.update(replay)
        batch, reward = seen.pop()
        for b in range(4):
            n = int(batch.mask[b].sum())
            # Where in the run the sequence lies: cells alone are ambiguous, with their novelty they are not.
            places = [
                (t, i)
                for i in range(2)
                for t in range(60 - n)
                if np.array_equal(batch.frames[b, : n + 1], cells[t : t + n + 1, i])
                and np.array_equal(reward[b, :n], paid[t + 1 : t + n + 1, i])
            ]
            assert places, "the run has no such observations and rewards"
            assert batch.previous_reward[b].item() in [paid[place] for place in places]


def test_what_act_read_is_what_the_learner_unrolls():
    """Stored state, previous action and novelty give the actor's Q anew: none of them is off by one (cpt.md 9.9)."""
    env = Grid(num_envs=3, side=4, limit=15)
    method = ngu(env)
    acted = []
    inner = method.agent.learner.act
    method.agent.learner.act = lambda *args: acted.append(inner(*args)) or acted[-1]
    history, replay = played(method, env, 50)
    q = {}
    for (step, _), out in zip(history, acted, strict=True):
        for i in range(3):
            q.setdefault(step.observation[i].argmax().item(), []).append(out.q[i])
    compared = []

    def update(batch, reward):
        online, _ = method.agent.features(batch.frames)
        inputs = (
            torch.cat([batch.previous_action[:, None], batch.action[:, :-1]], 1),
            torch.cat([batch.previous_reward[:, None], reward[:, :-1]], 1),
        )
        values, _ = method.agent.learner.q(online, *inputs, batch.state)
        for b in range(len(values)):
            for t in range(int(batch.mask[b].sum())):
                cell = batch.frames[b, t].argmax().item()
                compared.append(min((values[b, t] - other).abs().max().item() for other in q[cell]))
        return {"priorities": torch.zeros(4, 8)}

    method.agent.update, method.agent.after_update = update, lambda *args: None
    with torch.no_grad():
        spread = torch.stack([x for of in q.values() for x in of]).std(0).max().item()
    method.update(replay)
    assert len(compared) > 20 and max(compared) < 1e-5 < 1e-2 * spread


def test_what_the_environment_pays_changes_nothing():
    """NaN as well as 0: not an action, not a weight, not a statistic."""
    runs = []
    for pays in (0.0, np.nan, 7.0):
        env = Grid(num_envs=2, side=4, limit=12, pays=pays)
        method = ngu(env)
        metrics = train(method, env, 400)
        runs.append((method.state_dict(), metrics))
    for state, metrics in runs[1:]:
        assert same(runs[0][0], state) == []
        assert all(torch.equal(value, metrics[name]) for name, value in runs[0][1].items())


def test_what_the_environment_pays_counts_by_its_weight():
    env = Grid(num_envs=2, side=4, limit=12, pays=3.0)
    method = ngu(env, extrinsic_weight=0.5)
    inputs = []
    inner = method.agent.act
    method.agent.act = lambda *arguments: inputs.append(arguments[-1]) or inner(*arguments)
    history, replay = played(method, env, 40)
    for (step, rows), reward in zip(history, inputs, strict=True):
        np.testing.assert_allclose(reward, rows["novelty"] + 1.5 * ~step.is_first, rtol=1e-6)
        np.testing.assert_array_equal(rows["reward"][~step.is_last], 3.0)
    seen = []
    method.agent.update = lambda batch, reward: seen.append((batch, reward)) or {"priorities": torch.zeros(4, 8)}
    method.agent.after_update = lambda *args: None
    method.update(replay)
    batch, reward = seen[0]
    expected = batch.novelty[:, 1:] + 1.5
    assert torch.allclose(reward[:, :-1][batch.mask], expected[batch.mask])


def test_a_constant_reward_pays_every_step():
    env = Grid(num_envs=2, side=4, limit=12)
    method = ngu(env, novelty=NoveltyConfig(reward="constant"))
    history, replay = played(method, env, 60)
    for step, rows in history:
        np.testing.assert_array_equal(rows["novelty"], (~step.is_first).astype(np.float32))
    metrics = method.update(replay)
    assert metrics["intrinsic_reward"] == 1 and "rnd_loss" not in metrics


# As a policy beside others -------------------------------------------------------------------------------------------


def test_played_greedily_it_learns_nothing_and_its_memory_is_the_episodes():
    env = Grid(num_envs=2, side=4, limit=12)
    method = ngu(env)
    train(method, env, 300)
    before = {name: value.clone() for name, value in tensors(method.state_dict())}
    step = env.reset(3)
    for _ in range(30):
        action = method.act(step, explore=False)
        assert method.novelty.memory.lengths() == (step.length + 1).tolist()
        step = env.step(action)
    after = dict(tensors(method.state_dict()))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert {name.rsplit("/", 1)[0] for name in changed} <= {"/moments/distance", "/progress"}, changed
    assert "/moments/distance/count" in changed  # d_m^2 goes on


def test_an_action_that_another_chose_is_what_it_remembers():
    env = Grid(num_envs=2, side=4, limit=12)
    method = ngu(env)
    step = env.reset(0)
    method.act(step, explore=False)
    chosen = np.array([3, 1])
    method.took(chosen)
    seen = []
    inner = method.agent.learner.act
    method.agent.learner.act = lambda *args: seen.append(args) or inner(*args)
    step = env.step(chosen)
    method.act(step, explore=False)
    assert seen[0][1].tolist() == [3, 1]
    policy = greedy(method, 1.0, 4, np.random.default_rng(0))  # an evaluation's random actions are among them
    taken = policy(env.step(np.array([0, 0])))
    assert method.agent.previous_action.tolist() == taken.tolist()


# Saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Grid(num_envs=2, side=4, limit=12), lambda: Catch(num_envs=2, frame_stack=2)])
def test_saved_and_loaded_it_goes_on_bit_equal(make, tmp_path):
    """But for running episodes, which begin anew in both."""
    env = make()
    one, other = ngu(env), ngu(env)
    train(one, env, 200)
    torch.save(one.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert same(one.state_dict(), other.state_dict()) == []
    assert other.novelty.memory is None
    histories = []
    for method in (one, other):
        history, replay = played(method, make(), 60, seed=9)
        metrics = [method.update(replay) for _ in range(3)]
        histories.append((history, metrics))
    for (_, rows), (_, others) in zip(histories[0][0], histories[1][0], strict=True):
        assert all(np.array_equal(value, others[name]) for name, value in rows.items())
    for m, n in zip(histories[0][1], histories[1][1], strict=True):
        assert all(torch.equal(value, n[name]) for name, value in m.items())
    assert same(one.state_dict(), other.state_dict()) == []


def test_its_tables_and_errors():
    env = Grid(num_envs=2, side=4)
    method = ngu(env)
    assert tuple(sorted(method.state_dict())) == tuple(sorted(NGU.parts))
    for table in NGU.TRANSFER.values():
        assert set(NGU.parts) <= set(table) and table["embedding"] == RESET
    assert NGU.TRANSFER["whole"]["q"] == LOAD
    state = method.state_dict()
    with pytest.raises(ValueError, match="state: must have the parts"):
        ngu(env).load_state_dict({part: state[part] for part in state if part != "rnd"})
    with pytest.raises(ValueError, match=r"part: must be one of encoder, .*, got 'critic'"):
        method.load_part("critic", {})
    with pytest.raises(ValueError, match="actions are vectors"):
        NGU(TINY, (4,), (2,), frame_stack=1)
    with pytest.raises(ValueError, match="extrinsic_weight: must be at least 0"):
        dataclasses.replace(TINY, extrinsic_weight=-1.0)
    with pytest.raises(ValueError, match="period: must divide trace_length"):
        dataclasses.replace(TINY, period=3)
    assert NGUConfig.cpt().sequence_length == 161 and NGUConfig().sequence_length == 121


def test_weights_depend_on_the_seed_and_no_two_networks_are_alike():
    env = Catch(num_envs=1, frame_stack=2)
    assert same(ngu(env).state_dict(), ngu(env).state_dict()) == []
    assert same(ngu(env).state_dict(), ngu(env, seed=1).state_dict())
    method = ngu(env)
    networks = [
        method.agent.learner.encoder,
        method.novelty.embedding["f"][0][0],
        *(method.novelty.rnd[n][0] for n in ("target", "predictor")),
    ]
    weights = [net.conv[0].weight for net in networks]
    assert all(not torch.equal(x, y) for i, x in enumerate(weights) for y in weights[:i])


# Learning ------------------------------------------------------------------------------------------------------------

COVER = dataclasses.replace(
    TINY,
    learner=dataclasses.replace(LEARNER, lstm=64, hidden=64, burn_in=0),
    novelty=NoveltyConfig(embedding=16, k=3, hidden=64, rnd_features=16),
    trace_length=20,
    period=10,
    batch_size=16,
    replay_ratio=16.0,
    learning_start=1000,
    replay_capacity=100_000,
)


def covered(config, seed, steps=22_000) -> float:
    """Cells that the trained policy meets in an episode of 40 steps, greedily but for one action in a hundred; 41 are possible."""
    env = Grid(seed=seed)
    method = ngu(env, config, seed)
    train(method, env, steps)
    evaluation = Grid(seed=100 + seed)
    policy, step = greedy(method, 0.01, 4, np.random.default_rng(seed)), evaluation.reset()
    while len(evaluation.covered) < 40:
        step = evaluation.step(policy(step))
    return float(np.mean(evaluation.covered))


def test_it_learns_to_cover_a_grid_in_every_episode():
    """A random walk meets 19.7 cells. The same agent on a constant reward stays below it."""
    walk, random = Grid(seed=0), np.random.default_rng(0)
    walk.reset()
    for _ in range(2000):
        walk.step(random.integers(0, 4, 8))
    assert np.mean(walk.covered) == pytest.approx(19.7, abs=0.7)
    found = covered(COVER, seed=0)
    if found < 28:
        found = covered(COVER, seed=1)
    assert found >= 28, found


def test_trained_stopped_resumed_evaluated_and_reported(tmp_path, capsys):
    """On a world of gymnasium, by the command line; a resumed run's memories begin anew, and its statistics go on."""
    options = ["--steps", "600", "--learning-start", "300", "--batch-size", "4", "--learner.lstm", "16", "--learner.hidden", "16"]
    options += ["--learner.torso", "0", "--novelty.hidden", "16", "--replay-ratio", "1", "--env.id", "CartPole-v1", "--runs", str(tmp_path)]
    assert run_train(["ngu", "gym", *options, "--checkpoint-every", "300", "--log-every", "100"]) == 0
    run = Run(next(tmp_path.glob("ngu-gym-*")))
    moments = read_latest(run.folder).state["method"]["moments"]
    assert run_train(["--resume", str(run.folder), "--steps", "900"]) == 0
    later = read_latest(run.folder).state["method"]["moments"]
    assert later["error"]["count"] >= moments["error"]["count"] + 300 and later["distance"]["count"] > moments["distance"]["count"]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] >= 900 and {"intrinsic_reward", "inverse_accuracy", "rnd_loss", "q_loss"} <= lines[-1].keys()
    evaluate(EvaluateConfig((str(run.folder),), episodes=4, num_envs=2, video=False))
    page = report([run.folder]).read_text()
    assert "NGU on" in page and "Inverse accuracy" in page and "NGU&#x27;s reward" in page and "hangs on what the episode had seen" in page
    with pytest.raises(UserError, match="ngu takes no continuous actions"):
        run_train(["ngu", "gym", "--env.id", "Pendulum-v1", "--runs", str(tmp_path)])
    with pytest.raises(UserError, match="learning_start: must be at least"):
        run_train(["cpt", "gym", *options, "--learning-start", "5"])

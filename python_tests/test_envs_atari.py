"""Atari's two backends against a plain ALE loop, against each other, and against the rules of urlfast.envs.Step."""

import dataclasses
import gc
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ale_py import ALEInterface, LoggerMode, roms

from urlfast.envs import stream_seeds
from urlfast.envs.atari import AtariConfig, games, make_atari, rom_id
from urlfast.envs.atari_rewards import ghosts, miners
from urlfast.envs.atari_worker import AreaResize

BACKENDS = ["vector", "processes"]


def reference_resize(image, size):
    """The mean of the area under each pixel: every pixel is cut into equal parts until whole ones fill each area."""
    down, right = (size // math.gcd(size, side) for side in image.shape)
    parts = image.repeat(down, 0).repeat(right, 1)
    return parts.reshape(size, parts.shape[0] // size, size, parts.shape[1] // size).mean((1, 3))


def reference_rows(config, seed, actions):
    """What one environment must show for a list of actions (no-ops off), by the loop one would write down first."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.setInt("random_seed", int(seed))
    ale.setFloat("repeat_action_probability", config.sticky)
    ale.loadROM(roms.get_rom_path(config.game))
    legal = ale.getMinimalActionSet()
    ale.reset_game()
    row = dict(reward=0, terminated=False, is_first=True, is_last=False, score=0, length=0, screen=ale.getScreenGrayscale())
    rows = [row]
    frames, screens = 0, []
    for action in actions:
        if row["is_last"]:
            if not ale.game_over():  # the step that a time limit costs, for the random numbers of sticky actions
                for _ in range(config.frame_skip):
                    ale.act(legal[0])
            ale.reset_game()
            frames = 0
            row = dict(reward=0, terminated=False, is_first=True, is_last=False, score=0, length=0, screen=ale.getScreenGrayscale())
            rows.append(row)
            continue
        lives, reward, screens = ale.lives(), 0, []
        for _ in range(config.frame_skip):
            reward += ale.act(legal[action])
            frames += 1
            screens.append(ale.getScreenGrayscale())
            if ale.game_over():
                break
        lost = 0 < ale.lives() < lives
        row = dict(
            reward=reward,
            terminated=ale.game_over() or (lost and config.life_loss_terminal),
            is_first=False,
            is_last=ale.game_over() or frames >= config.max_frames,
            score=row["score"] + reward,
            length=row["length"] + 1,
            screen=None if ale.game_over() else np.maximum(screens[-1], screens[-2]),
        )
        rows.append(row)
    return rows


def play(env, actions, seed=None):
    """All Steps for actions [T, N], the reset's first."""
    return [env.reset(seed), *(env.step(row) for row in actions)]


def same_rows(one, other, observations=True):
    for t, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in ("reward", "terminated", "is_first", "is_last", "score", "length"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), f"{name} of row {t}")
        if observations:
            np.testing.assert_array_equal(a.observation, b.observation, f"observation of row {t}")


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).integers(0, env.num_actions, (steps, env.num_envs))


# Against the plain loop ----------------------------------------------------------------------------------------------------------

CASES = {
    "life loss, game over": dict(game="breakout"),
    "life loss does not count": dict(game="breakout", life_loss_terminal=False),
    "time limit": dict(game="ms_pacman", max_frames=400),
    "sticky actions": dict(game="seaquest", sticky=0.25, max_frames=1200),
    "no lives": dict(game="pong"),
    "0 lives shown, and the game goes on": dict(game="bank_heist"),
}

# (terminated, is_last) of rows that must have come up in a case
MUST = {
    "life loss, game over": {(True, False), (True, True)},
    "life loss does not count": {(True, True)},
    "time limit": {(False, True)},
    "sticky actions": {(True, False), (False, True)},
    "no lives": {(True, True)},
    "0 lives shown, and the game goes on": {(True, False), (True, True)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_equal_a_plain_loop(backend, case):
    config = AtariConfig(num_envs=2, noop_max=0, backend=backend, **CASES[case])
    with make_atari(config) as env:
        actions = random_actions(env, {"pong": 950, "bank_heist": 700}.get(config.game, 500))
        steps = play(env, actions, seed=5)
    seen = set()
    for i, seed in enumerate(stream_seeds(5, 2)):
        for t, (step, row) in enumerate(zip(steps, reference_rows(config, seed, actions[:, i]), strict=True)):
            got = {name: getattr(step, name)[i] for name in row if name != "screen"}
            assert got == {name: value for name, value in row.items() if name != "screen"}, f"environment {i}, row {t}"
            seen.add((bool(row["terminated"]), bool(row["is_last"])))
            if row["screen"] is not None and (row["is_last"] or t % 100 == 0):
                difference = step.observation[i, -1] - reference_resize(row["screen"], 84)
                assert np.abs(difference).max() <= 0.501, f"environment {i}, row {t}"
    assert MUST[case] <= seen


def test_a_life_lost_in_the_last_step_of_a_time_limit_is_terminated_and_last():
    with make_atari(AtariConfig(game="breakout", num_envs=1, noop_max=0)) as env:
        actions = random_actions(env, 100)
        steps = play(env, actions)
    lost = next(step.length[0] for step in steps if step.terminated[0])
    for backend in BACKENDS:
        with make_atari(AtariConfig(game="breakout", num_envs=1, noop_max=0, max_frames=int(lost) * 4, backend=backend)) as env:
            *_, last, after = play(env, actions[: lost + 1])
        assert last.terminated[0] and last.is_last[0] and after.is_first[0]


# The two backends ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(game="ms_pacman", noop_max=0, max_frames=600),
        dict(game="breakout", noop_max=0, life_loss_terminal=False),
        dict(game="qbert", noop_max=0),
        dict(game="space_invaders", noop_max=0, full_action_set=True, max_frames=800),
        dict(game="seaquest", sticky=0.25, max_frames=600),  # no-ops on, too
        dict(game="freeway", frame_skip=1, frame_size=64, frame_stack=1, max_frames=100),
    ],
    ids=lambda settings: settings["game"],
)
def test_both_backends_show_the_same(settings):
    both = []
    for backend in BACKENDS:
        with make_atari(AtariConfig(num_envs=3, backend=backend, workers=2, **settings), seed=7) as env:
            both.append(play(env, random_actions(env, 400)))
            assert env.reset().is_first.all()
    same_rows(*both, observations=False)
    assert sum(step.is_last.sum() for step in both[0]) >= 3
    off = [np.abs(a.observation.astype(int) - b.observation) for a, b in zip(*both, strict=True)]
    assert max(o.max() for o in off) <= 1  # OpenCV adds in float32, so it rounds a tie either way
    assert np.mean([o.mean() for o in off]) < 1e-4


def test_resize_is_the_mean_over_areas():
    image = np.random.default_rng(0).integers(0, 256, (210, 160)).astype(np.uint8)
    for size in (84, 30):
        exact = reference_resize(image, size)
        assert np.abs(AreaResize(size, 210, 160)(image) - exact).max() <= 0.5 + 1e-9
    assert (AreaResize(84, 250, 160)(np.full((250, 160), 255, np.uint8)) == 255).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_same_rows(backend):
    config = AtariConfig(game="seaquest", num_envs=3, sticky=0.25, max_frames=160, backend=backend)
    with make_atari(config, seed=3) as env, make_atari(dataclasses.replace(config, workers=1)) as other:
        actions = random_actions(env, 100)
        first = play(env, actions)
        second = play(env, actions)  # the random numbers go on
        same_rows(first, play(env, actions, seed=3))
        same_rows(first, play(other, actions, seed=3))
        assert any((a.observation != b.observation).any() for a, b in zip(first, second, strict=True))
        assert len({step.tobytes() for step in first[10].observation}) == 3  # each environment has its own no-ops
        assert not set(stream_seeds(3, 8)) & set(stream_seeds(4, 8))


# The rules of a Step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_episode_is_followed_by_its_reset(backend):
    config = AtariConfig(game="breakout", num_envs=2, max_frames=200, backend=backend, sticky=0.25)
    with make_atari(config) as env:
        actions = random_actions(env, 160)
        steps = play(env, actions, seed=1)
        ignored = actions.copy()
        for t, step in enumerate(steps[:-1]):
            ignored[t, step.is_last] = -1  # not even looked at
        assert (ignored == -1).sum() >= 4
        same_rows(steps, play(env, ignored, seed=1))
    assert steps[0].is_first.all()
    for before, step in itertools.pairwise(steps):
        np.testing.assert_array_equal(step.is_first, before.is_last)
        for name in ("reward", "terminated", "is_last", "score", "length"):
            assert not getattr(step, name)[step.is_first].any()
        assert (step.score[~step.is_first] == (before.score + step.reward)[~step.is_first]).all()
        assert (step.length[~step.is_first] == before.length[~step.is_first] + 1).all()
        assert not step.observation[step.is_first, :-1].any()  # the stack is black before the first frame
        assert all(frame.any() for frame in step.observation[step.is_first, -1])
        np.testing.assert_array_equal(step.observation[~step.is_first, :-1], before.observation[~step.is_first, 1:])
    assert [x.dtype for x in (step.observation, step.reward, step.score, step.length)] == [np.uint8, np.float32, np.float64, np.int64]
    assert all(x.dtype == bool for x in (step.terminated, step.is_first, step.is_last))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_belongs_to_the_caller(backend):
    with make_atari(AtariConfig(num_envs=2, backend=backend)) as env:
        step = env.reset()
        copy = pickle.loads(pickle.dumps(step))
        for actions in random_actions(env, 12):
            env.step(actions)
        same_rows([step], [copy])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_counts(backend):
    with make_atari(AtariConfig(num_envs=2, frame_size=64, frame_stack=3, frame_skip=5, backend=backend)) as env:
        assert (env.num_envs, env.num_actions, env.action_repeat) == (2, 9, 5)
        assert (env.observation_shape, env.frame_shape, env.frame_stack) == ((3, 64, 64), (1, 64, 64), 3)
        assert env.reset().observation.shape == (2, 3, 64, 64)
    with make_atari(AtariConfig(num_envs=1, full_action_set=True, backend=backend)) as env:
        assert env.num_actions == 18


def test_evaluation_counts_no_lost_life_and_gives_ram():
    with make_atari(AtariConfig(game="breakout", noop_max=0), num_envs=1, evaluation=True) as env:
        steps = play(env, random_actions(env, 300))
    assert all(step.terminated == step.is_last for step in steps) and any(step.is_last for step in steps)
    assert all(step.ram.shape == (1, 128) and step.ram.dtype == np.uint8 for step in steps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_out_of_order_are_errors(backend):
    env = make_atari(AtariConfig(num_envs=2, backend=backend))
    with pytest.raises(RuntimeError, match="call reset first"):
        env.send(np.zeros(2, int))
    env.reset()
    with pytest.raises(RuntimeError, match="call send first"):
        env.recv()
    env.send(np.zeros(2, int))
    with pytest.raises(RuntimeError, match="call recv first"):
        env.send(np.zeros(2, int))
    assert env.reset().is_first.all()  # takes back what was sent
    for actions, error, match in [
        (np.zeros(3, int), ValueError, r"actions: must have shape \(2,\)"),
        (np.zeros(2), TypeError, "actions: must be integers, got float64"),
        (np.array([0, 9]), ValueError, r"actions: must lie in 0\.\.8, got 0\.\.9"),
        (np.array([-1, 0]), ValueError, r"actions: must lie in 0\.\.8, got -1\.\.0"),
    ]:
        with pytest.raises(error, match=match):
            env.send(actions)
    with pytest.raises(ValueError, match="seed: must be 0 or more, got -1"):
        env.reset(-1)
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(np.zeros(2, int))
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()


# Names and settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["MsPacman", "ms_pacman", "ms-pacman", "Ms. Pacman", "ALE/MsPacman-v5", "MsPacmanNoFrameskip-v4", "MsPacman-ramDeterministic-v0"],
)
def test_spellings_of_one_game(name):
    assert rom_id(name) == "ms_pacman"


def test_every_game_is_found_by_its_id_and_by_gymnasiums_name():
    assert len(games()) >= 104
    for game in games():
        assert ALEInterface.isSupportedROM(roms.get_rom_path(game)) == game
        camel = "".join(part.capitalize() for part in game.split("_"))
        assert rom_id(game) == rom_id(f"ALE/{camel}-v5") == rom_id(f"{camel}NoFrameskip-v4") == game


@pytest.mark.parametrize("game", ["air_raid", "atlantis2", "et", "tic_tac_toe_3d", "video_chess", "Montezuma's Revenge", "Up'n Down"])
def test_odd_games_play(game):
    with make_atari(AtariConfig(game=game, num_envs=1)) as env:
        assert play(env, random_actions(env, 5))[-1].observation[0, -1].any()


def test_an_unknown_game_lists_the_nearest_names():
    for name, match in [("mspackman", "nearest are ms_pacman"), ("space invader", "space_invaders"), ("1", "the games are adventure, ")]:
        with pytest.raises(ValueError, match=f"^game: no game is called '{name}'; .*{match}"):
            make_atari(AtariConfig(game=name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_game_for_two_players_is_an_error_and_not_the_end_of_the_process(backend):
    assert "warlords" not in games()
    with pytest.raises(ValueError, match=r"game: ale-py .* cannot run its ROM of 'warlords' for one player"):
        make_atari(AtariConfig(game="Warlords", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_rom_is_named(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="game: the ROM of 'pong' is missing from the folder that ALE_ROMS_DIR names"):
        make_atari(AtariConfig(game="Pong", backend=backend))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_envs=0), "num_envs: must be at least 1, got 0"),
        (dict(frame_skip=0), "frame_skip: must be at least 1, got 0"),
        (dict(frame_stack=0), "frame_stack: must be at least 1, got 0"),
        (dict(noop_max=-1), "noop_max: must be at least 0, got -1"),
        (dict(workers=-1), "workers: must be at least 0, got -1"),
        (dict(sticky=1.5), r"sticky: must lie in 0\.\.1, got 1\.5"),
        (dict(sticky=float("nan")), r"sticky: must lie in 0\.\.1, got nan"),
        (dict(max_frames=1001), r"max_frames: must be a multiple of frame_skip \(4\), got 1001"),
        (dict(frame_size=161), "frame_size: must be at most 160"),
        (dict(backend="threads"), "backend: must be one of vector, processes, got 'threads'"),
        (dict(reward="ghosts"), "reward: must be one of game, ghosts-easy, .*, got 'ghosts'"),
        (dict(reward="ghosts-easy"), "reward: ghosts-easy is read off the memory, which takes --env.backend processes, got vector"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AtariConfig(**settings)


# What only the processes give ----------------------------------------------------------------------------------------------------


def processes(**settings):
    return make_atari(AtariConfig(backend="processes", workers=2, **settings))


def test_frame_rewards_and_ram_are_those_of_the_emulator():
    config = dict(game="ms_pacman", num_envs=3, noop_max=0)
    with processes(**config) as env:
        steps = play(env, random_actions(env, 200), seed=2)
        actions = random_actions(env, 200)[:, 1]
    ale = ALEInterface()
    ale.setInt("random_seed", int(stream_seeds(2, 3)[1]))
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path("ms_pacman"))
    ale.reset_game()
    for t, action in enumerate(actions):
        np.testing.assert_array_equal(steps[t].ram[1], ale.getRAM())
        frames = [ale.act(ale.getMinimalActionSet()[action]) for _ in range(4)]
        assert steps[t + 1].frame_reward[1].tolist() == frames
        assert not ale.game_over()
    paid = next(step.length[0] for step in steps if step.reward[0])
    with processes(**config, max_frames=int(paid) * 4) as env:  # a last row that pays: nothing of it is left over in the reset's
        cut = play(env, random_actions(env, 200), seed=2)
    assert any(step.reward[step.is_last].any() for step in cut)
    for step in steps + cut:
        assert step.frame_reward.shape == (3, 4) and step.frame_reward.dtype == np.float32
        np.testing.assert_array_equal(step.frame_reward.sum(1), step.reward)


# Other tasks in a game -----------------------------------------------------------------------------------------------------------


class Ghosts:
    """By the points alone: on the first levels no fruit is worth a ghost, and ghosts double from one energiser to the next."""

    def __init__(self, dot):
        self.dot, self.eaten = dot, 0

    def __call__(self, points, before, after):
        dot = points % 50 == 10
        points -= 10 * dot
        energiser = points % 100 == 50
        points -= 50 * energiser
        ghost = points == 200 * 2**self.eaten
        self.eaten = 0 if energiser and not ghost else self.eaten + ghost
        return ghost * points + dot * self.dot


class Miners:
    """By the memory alone: byte 114 goes up with a rescue; 32 goes to 0 with a wall while a stick of dynamite is used up."""

    def __init__(self, wall):
        self.wall = wall

    def __call__(self, points, before, after):
        blown_up = before[32] > 0 and after[32] == 0 and before[50] == after[50] + 1
        return 1000 * (before[114] == 0 and after[114] == 255) + self.wall * blown_up


@pytest.mark.parametrize(
    "reward, reference, seen",
    [
        ("ghosts-easy", Ghosts(0), {200, 400}),
        ("ghosts-hard", Ghosts(-10), {200, 400, -10, 190}),
        ("miners-easy", Miners(0), {1000}),
        ("miners-hard", Miners(-300), {1000, -300}),
    ],
)
def test_other_rewards_are_those_of_a_plain_loop(reward, reference, seen):
    """Frame by frame; actions and seed are those of games in which something happens."""
    game = {"ghosts": "ms_pacman", "miners": "hero"}[reward.partition("-")[0]]
    random, seed, paid = np.random.default_rng(3), 3, set()
    with processes(game=game, num_envs=2, noop_max=0, reward=reward) as env:
        actions = np.repeat(random.integers(0, env.num_actions, (500, 2)), 3, axis=0)[:1100]
        steps = play(env, actions, seed)
    for i, stream in enumerate(stream_seeds(seed, 2)):
        ale = ALEInterface()
        ale.setInt("random_seed", int(stream))
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(roms.get_rom_path(game))
        ale.reset_game()
        for t, action in enumerate(actions[:, i]):
            frames = []
            if steps[t].is_last[i]:
                ale.reset_game()
            else:
                for _ in range(4):
                    before = ale.getRAM().astype(int)
                    points = ale.act(ale.getMinimalActionSet()[action])
                    frames.append(reference(points, before, ale.getRAM().astype(int)))
                    if ale.game_over():
                        break
            assert steps[t + 1].frame_reward[i].tolist() == frames + [0] * (4 - len(frames)), f"environment {i}, step {t}"
            paid.update(frames)
    assert paid - {0} == seen
    for step in steps:
        np.testing.assert_array_equal(step.frame_reward.sum(1), step.reward)


def test_the_fourth_ghost_is_worth_1600_and_an_energisers_end_nothing():
    """Random play never eats four: the memory is told of three after the first, and the game goes on as if it were so."""
    ale, random = ALEInterface(), np.random.default_rng(1)
    ale.setInt("random_seed", 1)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path("ms_pacman"))
    ale.reset_game()
    actions, hold, events = ale.getMinimalActionSet(), 0, []
    for _ in range(13_900):
        if hold == 0:
            action, hold = actions[random.integers(len(actions))], random.integers(4, 24)
        hold -= 1
        before = ale.getRAM().tolist()
        points = ale.act(action)
        after = ale.getRAM().tolist()
        if before[116] >> 6 != after[116] >> 6:
            events.append((points, ghosts(points, before, after, 0), ghosts(points, before, after, -10)))
        if (before[116] >> 6, after[116] >> 6) == (0, 1):
            ale.setRAM(116, after[116] | 192)
        if ale.game_over():
            ale.reset_game()
    # The first with an energiser, the fourth with a dot; the first, and the time is over with three eaten, it was told.
    assert events == [(250, 200, 200), (1610, 1600, 1590), (200, 200, 200), (0, 0, 0)]


def test_a_strawberry_is_no_ghost_and_a_counter_that_runs_over_is_no_wall():
    quiet, one = [0] * 128, [0] * 128
    one[116] = 64
    assert ghosts(200, quiet, quiet, -10) == 0 and ghosts(200, quiet, one, -10) == 200
    assert miners(-999_925, quiet, quiet, -300) == 0 and miners(125, quiet, quiet, -300) == -300 and miners(50, quiet, quiet, -300) == 0


def test_a_reward_of_another_game_is_refused():
    with pytest.raises(ValueError, match="reward: miners-easy is of the game hero, got ms_pacman"):
        processes(reward="miners-easy")


def columns(step):
    return [(name, column) for name, column in vars(step).items() if column is not None]


def test_a_cloned_state_goes_on_as_it_did():
    with processes(game="seaquest", num_envs=3, sticky=0.25, max_frames=240) as env:
        actions = random_actions(env, 150)
        *_, before = play(env, actions[:50])
        state = pickle.loads(pickle.dumps(env.clone_state(2)))
        now = env.step(actions[50])
        steps = [now, *(env.step(row) for row in actions[51:])]
        assert sum(step.is_last[2] for step in steps) >= 1
        env.restore_state(2, state)
        again = [env.step(row) for row in actions[50:]]
        shown = env.restore_state(0, state)  # in another worker and another place
        for name, column in columns(shown):
            np.testing.assert_array_equal(column[0], getattr(before, name)[2], name)
            np.testing.assert_array_equal(column[1:], getattr(again[-1], name)[1:], name)
        elsewhere = [env.step(row[[2, 1, 0]]) for row in actions[50:]]
    for one, two, three in zip(steps, again, elsewhere, strict=True):
        for name, column in columns(one):
            np.testing.assert_array_equal(column[2], getattr(two, name)[2], name)
            np.testing.assert_array_equal(column[2], getattr(three, name)[0], name)


def test_states_and_places_that_do_not_fit_are_errors():
    with processes(num_envs=1) as env, processes(num_envs=1, game="pong") as pong:
        with pytest.raises(RuntimeError, match="only after reset or recv"):
            env.clone_state(0)
        env.reset(), pong.reset()
        with pytest.raises(ValueError, match=r"state: must come from .*pong.*, got one from .*ms_pacman"):
            pong.restore_state(0, env.clone_state(0))
        with pytest.raises(ValueError, match=r"i: must lie in 0\.\.0, got 1"):
            env.render(1)
        with pytest.raises(RuntimeError, match=r"(?s)environments 0\.\.0 failed:.*Traceback"):
            env.restore_state(0, dataclasses.replace(env.clone_state(0), emulator=b"not a state"))


def test_render_is_the_screen_in_colour():
    with processes(num_envs=2) as env:
        env.reset()
        first = env.render()
        env.step(np.array([0, 0]))
        assert first.shape == (210, 160, 3) and first.dtype == np.uint8 and first.any()
        assert (env.render(1) != first).any()


def test_a_dead_worker_is_an_error_and_leaves_nothing_behind():
    env = processes(num_envs=4)
    env.reset()
    workers = [worker.process for worker in env._pool]
    os.kill(workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"Atari process of environments 2\.\.3 was killed by SIGKILL"):
        for _ in range(2):
            env.step(np.zeros(4, int))
    assert all(worker.returncode is not None for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        env.reset()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_the_process_that_made_them():
    script = (
        f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}\n"
        "from urlfast.envs.atari import *\n"
        "env = make_atari(AtariConfig(num_envs=2, backend='processes', workers=2)); env.reset()\n"
        "print(*(worker.process.pid for worker in env._pool), flush=True)\n"
        "sys.stdin.read()\n"
    )
    for how in (signal.SIGKILL, signal.SIGINT, None):
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as parent:
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 2 and all(alive(pid) for pid in pids)
            if how:
                parent.send_signal(how)
            parent.stdin.close()  # or it runs to its end, without close()
            parent.wait(timeout=20)
            for _ in range(100):
                if not any(alive(pid) for pid in pids):
                    break
                time.sleep(0.1)
            assert not any(alive(pid) for pid in pids), how


def test_workers_import_neither_torch_nor_the_main_module(tmp_path):
    with processes(num_envs=1) as env:
        env.reset()
        pid = env._pool[0].process.pid
        with open(f"/proc/{pid}/maps") as maps:
            assert "torch" not in maps.read()
        assert os.getpgid(pid) != os.getpgid(0)  # a Ctrl-C in the terminal is this process's to handle
    (tmp_path / "main.py").write_text(
        f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}\n"
        "from urlfast.envs.atari import *\n"
        "print('imported', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    with make_atari(AtariConfig(num_envs=2, backend='processes', workers=2)) as env:\n"
        "        env.reset()\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "imported\n", "")


def test_workers_end_with_the_environment_that_is_forgotten():
    env = processes(num_envs=2)
    env.reset()
    workers = [worker.process for worker in env._pool]
    assert all(alive(worker.pid) for worker in workers)
    del env
    gc.collect()
    assert not any(alive(worker.pid) for worker in workers)

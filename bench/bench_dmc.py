"""Sixteen DMControl environments over processes, beside dm_control in one process; as states and as pixels (84 x 84, two control steps).

A call is sixteen agent steps, and resets where episodes end. dm_control makes them in one environment, which is its fastest way: several in
one process would also take turns on its OpenGL contexts. Floor: MuJoCo alone on each thread, without tasks, observations and processes.
"""

import itertools
import os

import numpy as np

from bench.harness import Case, optional
from urlfast.envs import rendering, stream_seeds
from urlfast.envs.dmc import DMCConfig, make_dmc

ENVS, SIZE = 16, 84


def script(task):
    """A few hundred steps of random actions, for everyone the same."""

    def actions():
        size = {"walker_walk": 6, "quadruped_walk": 12, "cartpole_swingup": 1}[task]
        return (np.random.default_rng(0).uniform(-1, 1, (500, ENVS, size)),)

    return actions


def ours(task, observation, threads):
    def make(actions):
        env = make_dmc(DMCConfig(task=task, observation=observation, num_envs=ENVS, workers=threads, frame_stack=1))
        env.reset(0)
        steps = itertools.cycle(actions)
        return lambda: env.step(next(steps)).observation

    return make


def load(task):
    """dm_control's environment with the random numbers of our first."""
    from dm_control import suite  # no earlier: it chooses what to draw with when it is imported

    domain, name = task.split("_")
    kwargs = {"random": int(stream_seeds(0, ENVS)[0])}
    return suite.load(domain, name, task_kwargs=kwargs, environment_kwargs={"flat_observation": True})


def plain(task, observation):
    def make(actions):
        env = load(task)
        env.reset()
        steps = itertools.cycle(actions)
        repeat = 2 if observation == "pixels" else 1

        def shown(now):
            if observation == "states":
                return now.observation["observations"].astype(np.float32)
            return env.physics.render(SIZE, SIZE, camera_id=0).transpose(2, 0, 1).copy()

        spec = env.action_spec()

        def call():
            rows = []
            for action in spec.minimum + (next(steps) + 1) / 2 * (spec.maximum - spec.minimum):
                for _ in range(repeat):
                    now = env.step(action)  # or resets, after an episode's end
                    if now.last():
                        break
                rows.append(shown(now))
            return np.stack(rows)

        return call

    return make


def mujoco(task, observation, threads):
    def make(actions):
        from dm_control.mujoco.engine import Camera

        env = load(task)
        env.reset()
        physics, repeat = env.physics, 2 if observation == "pixels" else 1
        camera = Camera(physics, SIZE, SIZE, 0) if observation == "pixels" else None
        controls = itertools.cycle(actions[:, 0])

        def call():
            for _ in range(-(-ENVS // threads)):
                physics.set_control(next(controls))
                physics.step(env._n_sub_steps * repeat)
                if camera:
                    camera.render()

        return call

    return make


def check(results):
    """From one seed and one action on, our first environment is where dm_control is."""
    ours, plain = results.values()
    assert ours.shape == plain.shape and ours.dtype == plain.dtype, f"{ours.dtype}{ours.shape} and {plain.dtype}{plain.shape}"
    np.testing.assert_allclose(ours[0].astype(float), plain[0].astype(float), rtol=1e-5, atol=1e-5)


def cases(threads):
    if not optional("dm_control"):
        return []
    games = [("walker_walk", "states"), ("quadruped_walk", "states"), ("cartpole_swingup", "states")]
    try:
        os.environ.update(rendering.variables(rendering.choose()))
        games.append(("walker_walk", "pixels"))
    except rendering.NoRenderer:
        pass  # then there are no pixels to compare
    return [
        Case(
            "dmc",
            f"{ENVS} x {task}, {observation}",
            threads,
            script(task),
            {"urlfast": ours(task, observation, threads), "dm_control, one process": plain(task, observation)},
            check,
            floor=mujoco(task, observation, threads),
            targets={"dm_control, one process": 1.8} if threads == 2 and task != "cartpole_swingup" else {},
            processes=True,
        )
        for task, observation in games
    ]

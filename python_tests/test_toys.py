"""The toy worlds do what the learning tests take for granted."""

import numpy as np
from toys import Catch, NineRooms


def scores(env, policy, steps):
    step, done = env.reset(), []
    for _ in range(steps):
        step = env.step(policy(step))
        done += step.score[step.is_last].tolist()
        assert (step.length[step.is_last] == 9).all() and (step.terminated == step.is_last).all()
    return done


def test_catch_is_lost_at_random_and_won_by_following_the_ball():
    rng = np.random.default_rng(0)
    assert abs(np.mean(scores(Catch(50, seed=1), lambda step: rng.integers(0, 3, 50), 1000)) - (2 / 7 - 1)) < 0.03

    def follow(step):  # white blocks of 4 x 6 pixels within a black frame
        board = step.observation[:, -1, 2:42:4, 1:43:6]
        ball, paddle = board[:, :-1].any(1).argmax(-1), board[:, -1].argmax(-1)
        return np.where(step.length < 9, np.sign(ball - paddle) + 1, 1)

    assert np.mean(scores(Catch(50, seed=1), follow, 100)) == 1


def test_nine_rooms_are_joined_and_walls_stop():
    env = NineRooms(1, limit=40)
    step = env.reset()
    for action, still in [(0, True), (2, True), (1, False), (3, False)]:  # it begins in the upper left corner
        after = env.step(np.array([action]))
        assert (after.observation[0, -1] == step.observation[0, -1]).all() == still
        step = after
    assert env.visited.sum() == 3
    frame = step.observation[0, -1]
    assert (frame == 255).sum() == 9 and (frame == 64).sum() == 9 * 35  # the agent, and the rest of its lit room
    while not step.is_last[0]:
        step = env.step(np.array([1]))
    assert step.length[0] == 40 and not step.terminated[0]
    assert env.step(np.array([1])).is_first[0] and env._at.tolist() == [[1, 1]]

    reached, edge = {(1, 1)}, [(1, 1)]
    while edge:
        row, column = edge.pop()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if env.floor[cell] and cell not in reached:
                reached.add(cell)
                edge.append(cell)
    assert len(reached) == env.floor.sum() == 9 * 36 + 12


def test_random_moves_see_little_of_nine_rooms():
    for seed in range(3):
        env = NineRooms(4, seed)
        env.reset()
        rng = np.random.default_rng(seed)
        for _ in range(2000):
            env.step(rng.integers(0, 4, 4))
        assert 64 < env.visited.sum() < 0.45 * env.floor.sum()

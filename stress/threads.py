"""Every native object from several threads at once, and every function once: what stress/sanitize runs under ThreadSanitizer and valgrind.

python stress/threads.py [SECONDS for each, 2]
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "python_tests"))
import numpy as np
import replay_fire as fire
from together import together

import urlfast


def main(seconds):
    urlfast.set_num_threads(3)  # and never as many as one caller wants: all of them share the pool
    rng = np.random.default_rng(0)
    small, large = rng.standard_normal((3, 40, 8)).astype(np.float32), rng.standard_normal((300, 40)).astype(np.float32)
    many = rng.standard_normal((2, 5000, 8)).astype(np.float32)
    distances = rng.standard_normal(100_000).astype(np.float32)

    statistic, other = urlfast.RunningNormalizer("std"), urlfast.RunningNormalizer("std")
    features = urlfast.RunningNormalizer("var", shape=(8,))
    together(
        lambda: urlfast.knn(large, k=5),  # symmetric, in blocks
        lambda: urlfast.knn(small, many[:1].repeat(3, 0), 3, lengths=[5000, 0, 7]),
        lambda: urlfast.knn_reward(large, 5, normalizer=statistic),
        lambda: urlfast.knn_reward(many[0, :3], 4, many[1]),  # few queries, many keys
        seconds=seconds,
    )
    together(
        lambda: statistic(distances),
        lambda: statistic.normalize(distances[:10]),
        lambda: (statistic.merge(other), statistic.load_state_dict(statistic.state_dict())),
        lambda: (other.update(distances), other.merge(statistic), features(distances.reshape(-1, 8)), features.scale),
        seconds=seconds,
    )
    memory = urlfast.EpisodicMemory(40, 60, 8)
    flags = rng.random((64, 40)) < 0.1
    together(
        lambda: [memory.step(many[0, i : i + 40], flags[i % 64]) for i in range(64)],
        lambda: [memory.step(many[1, i : i + 40], flags[i % 64]) for i in range(64)],
        lambda: (memory.lengths(), memory.load_state_dict(memory.state_dict())),
        seconds=seconds,
    )
    latent = urlfast.LatentDynamics(400, 64, 5, episode_length=5)
    latent.reset()
    action = np.zeros((400, 64), np.float32)
    together(lambda: latent.step(action), latent.reset, lambda: latent.load_state_dict(latent.state_dict()), seconds=seconds)
    targets = [[np.zeros(50_000, np.float32), np.zeros((30, 30))] for _ in range(2)]
    sources = [np.ones(50_000, np.float32), np.ones((30, 30))]
    together(*[lambda t=t: urlfast.ema_update_(t, sources, 0.1) for t in targets], lambda: urlfast.set_num_threads(3), seconds=seconds)
    for mode in (fire.WINDOWS, fire.SEQUENCES):
        print("batches, rows:", *fire.add_beside_sample(mode, seconds))
    fire.update_against_integers(200_000, rows=1 << 12, batch=20_000)
    print("done")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2)

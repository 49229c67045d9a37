"""A replay as the definitions read: every row ever added is kept in lists, and every question walks over them.

Beside it what a replay is tried with: its settings, and the rows of several environments.
"""

import numpy as np

from urlfast import Field

FLAGS = ("terminated", "is_first", "is_last")


def replay_settings(pick, observations, n_steps=range(1, 7), lengths=range(2, 7), exponents=(0.5, 1.0), importance=(0.6,)):
    """(capacity, fields, options) of a small replay, with a ring of a few rows to spare. pick: takes one of a sequence."""
    options = {"num_streams": pick(range(1, 4)), "frame_stack": pick([None, 1, 2, 4])}
    fields = {"observation": pick(observations), "action": Field((), "int64")}
    if pick([True, False]):
        window = options["n_step"] = pick(n_steps)
        options["gamma"] = pick([0.0, 0.9, 1.0])
    else:
        options["burn_in"] = pick(range(4))
        window = options["sequence_length"] = options["burn_in"] + pick(lengths)
        options["stride"] = pick(range(1, 10))
        options["cross_episodes"] = pick([True, False])
        if options["cross_episodes"]:
            options["frame_stack"] = None
        if options["stride"] > 1:
            fields["state"] = Field((2, 3), "float32", every=options["stride"])
    if pick([True, False]):
        options.update(priority_exponent=pick(exponents), importance_exponent=pick(importance), eta=pick([0.9, 0.0]))
    rows = window + (options["frame_stack"] or 1) + pick(range(13))
    return rows * options["num_streams"] + pick(range(options["num_streams"])), fields, options


def replay_rows(rng, fields, closed, streams, *, ends=0.12, cuts=0.04, lives=0.1, priority=False):
    """A random row of each of `streams`, in their order: ends, time limits, lost lives, and cuts where a run was resumed.

    closed: (streams of the replay,) bool, true where an episode has to begin; what these rows leave behind is written to it.
    priority: give some of the rows one, half of the times.
    """
    n, rows = len(streams), {}
    for name, f in fields.items():
        rows[name] = rng.integers(0, 2 if f.dtype == "bool" else 250, (n, *f.shape)).astype(f.dtype)
    rows["reward"] = rng.normal(size=n).astype(np.float32)
    rows["terminated"] = rng.random(n) < lives
    first, last = np.zeros(n, bool), rng.random(n) < ends
    for i, s in enumerate(streams):
        first[i] = closed[s] or rng.random() < cuts
        closed[s] = last[i]
    rows["is_first"], rows["is_last"] = first, last
    if priority and rng.random() < 0.5:
        rows["priority"] = np.where(rng.random(n) < 0.5, np.nan, rng.random(n) * 3).astype(np.float32)
    return rows


def check_batch(batch, reference, drawn):
    """The batch, item by item, is what the reference has drawn."""
    assert [(i % reference.streams, i // reference.streams) for i in batch.indices.tolist()] == [item for item, _, _ in drawn]
    np.testing.assert_allclose(batch.probability, [p for _, p, _ in drawn], rtol=1e-5)
    np.testing.assert_allclose(batch.weight, [w for _, _, w in drawn], rtol=1e-4)
    for i, (item, _, _) in enumerate(drawn):
        for name, value in reference.item(*item).items():
            if name in ("reward", "discount"):
                np.testing.assert_allclose(batch[name][i], value, rtol=1e-6, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(batch[name][i], value, err_msg=name)


def opening_rows(n, observation):
    """Rows of zeros that open an episode in each of n streams. observation: its uint8 shape."""
    flags = {"terminated": np.zeros(n, bool), "is_first": np.ones(n, bool), "is_last": np.zeros(n, bool)}
    return {"observation": np.zeros((n, *observation), np.uint8), "reward": np.zeros(n, np.float32), **flags}


def philox(seed, stream, position):
    """Philox4x32-10's first 64 bits."""
    c = [position & 0xFFFFFFFF, position >> 32, stream & 0xFFFFFFFF, stream >> 32]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[1] << 32 | c[0]


class ReferenceReplay:
    def __init__(
        self,
        capacity,
        fields,
        *,
        num_streams,
        sequence_length=None,
        stride=1,
        burn_in=0,
        n_step=None,
        gamma=None,
        frame_stack=None,
        cross_episodes=False,
        priority_exponent=0.0,
        importance_exponent=0.0,
        eta=0.9,
        seed=0,
    ):
        self.fields, self.streams, self.kept = fields, num_streams, capacity // num_streams
        self.length, self.stride, self.burn_in = sequence_length, stride, burn_in
        self.n, self.gamma, self.stack, self.cross = n_step, gamma, frame_stack or 1, cross_episodes
        self.alpha, self.beta, self.eta = priority_exponent, importance_exponent, eta
        self.rows = [[] for _ in range(num_streams)]
        self.priority, self.highest = {}, 1.0  # of items, by (stream, row); kept for as long as they exist
        self.seed, self.draws, self.stale = seed, 0, 0
        self.ring = self.kept + min(64, self.kept // 256 + 1)  # slots of a stream: they decide the order of the draw

    def add(self, rows, streams=None):
        for i, s in enumerate(range(self.streams) if streams is None else streams):
            self.rows[s].append({name: np.array(value[i]) for name, value in rows.items()})
            for item in self.items():  # those that this row completed
                if item not in self.priority:
                    given = self.rows[item[0]][item[1]].get("priority", np.nan)
                    self.priority[item] = self.highest if np.isnan(given) else float(given)
                    self.highest = max(self.highest, self.priority[item])

    def tail(self, s):
        return max(0, len(self.rows[s]) - self.kept)

    def flag(self, s, t, name):
        return bool(self.rows[s][t][name])

    def exists(self, s, t):
        """The transition from row t to row t + 1."""
        return t + 1 < len(self.rows[s]) and not self.flag(s, t, "is_last") and not self.flag(s, t + 1, "is_first")

    def first(self, s, t):
        while not self.flag(s, t, "is_first"):
            t -= 1
        return t

    def ended(self, s, t):
        """Row t is known to close its episode."""
        return self.flag(s, t, "is_last") or (t + 1 < len(self.rows[s]) and self.flag(s, t + 1, "is_first"))

    def window(self, s, t):
        """Steps of the n-step window at t, whether it terminates, whether it is complete."""
        m = 0
        while m < self.n and self.exists(s, t + m):
            m += 1
            if self.flag(s, t + m - 1, "terminated"):
                return m, True, True
        return m, False, m == self.n or self.ended(s, t + m)

    def sequence(self, s, t):
        """Rows of the sequence at t, whether it is complete."""
        k = 1
        while k < self.length and (t + k < len(self.rows[s]) if self.cross else self.exists(s, t + k - 1)):
            k += 1
        return k, k == self.length or (not self.cross and self.ended(s, t + k - 1))

    def items(self):
        found = []
        for s in range(self.streams):
            for t in range(self.tail(s), len(self.rows[s])):
                if max(self.first(s, t), t - self.stack + 1) < self.tail(s):
                    continue  # a frame of its stack is gone
                if self.n is not None:
                    m, _, complete = self.window(s, t)
                    ok = complete and m >= 1
                else:
                    k, complete = self.sequence(s, t)
                    origin = 0 if self.cross else self.first(s, t)
                    ok = complete and (t - origin) % self.stride == 0 and k >= self.burn_in + 2
                if ok:
                    found.append((s, t))
        return found

    def frames(self, s, t):
        """The stack the agent saw in row t: oldest first, zeros before its episode."""
        newest = self.rows[s][t]["observation"]
        stack = [
            self.rows[s][q]["observation"] if q >= self.first(s, t) else np.zeros_like(newest) for q in range(t - self.stack + 1, t + 1)
        ]
        return np.concatenate(stack) if self.stack > 1 else newest

    def item(self, s, t):
        """What a batch holds of one item. Padding is zeros."""
        rows = self.rows[s]
        if self.n is not None:
            m, terminated, _ = self.window(s, t)
            out = {name: rows[t][name] for name in self.fields}
            out["observation"], out["next_observation"] = self.frames(s, t), self.frames(s, t + m)
            out["reward"] = sum(self.gamma**i * float(rows[t + i]["reward"]) for i in range(m))
            out["discount"], out["steps"] = (0.0 if terminated else self.gamma**m), m
            return out
        k, _ = self.sequence(s, t)
        out = {}
        for name in [*self.fields, "reward", *FLAGS]:
            if name in self.fields and self.fields[name].every > 1:
                out[name] = rows[t][name]
                continue
            stacked = name == "observation" and self.stack > 1
            values = [self.frames(s, t + j) if stacked else rows[t + j][name] for j in range(k)]
            while len(values) < self.length:  # of zeros; a stack forgets its frames one by one
                zeros, frame = np.zeros_like(values[-1]), len(rows[t][name]) if stacked else 0
                values.append(np.concatenate([values[-1][frame:], zeros[:frame]]) if stacked else zeros)
            out[name] = np.stack(values)
        out["mask"] = np.array([j + 1 < k and self.exists(s, t + j) for j in range(self.length - 1)])
        return out

    def leaves(self):
        """Fixed-point weights in the order of their slots: [((stream, row), integer)]."""
        most = 2**63 // (self.streams * self.ring)
        weight = (lambda p: min(max(int(p**self.alpha * 2**24 + 0.5), 1), most)) if self.alpha else (lambda p: 1)
        return sorted(((item, weight(self.priority[item])) for item in self.items()), key=lambda x: (x[0][0], x[0][1] % self.ring))

    def sample(self, batch):
        """[((stream, row), probability, weight)]"""
        leaves = self.leaves()
        total = sum(w for _, w in leaves)
        ends = np.cumsum([w for _, w in leaves], dtype=object)
        out = []
        for i in range(batch):
            r = philox(self.seed, ord("R") << 56 | self.draws, i) * total >> 64
            item, w = leaves[int(np.searchsorted(ends, r, side="right"))]
            out.append((item, w / total, (len(leaves) * w / total) ** -self.beta))
        self.draws += 1
        most = max(w for _, _, w in out)
        return [(item, p, w / most) for item, p, w in out]

    def update(self, indices, td, mask=None):
        items = set(self.items())
        for index, row in zip(np.asarray(indices).tolist(), np.asarray(td).reshape(len(indices), -1), strict=True):
            item = (index % self.streams, index // self.streams)
            if item not in items:
                self.stale += 1
                continue
            if self.n is not None:
                counted = [True]
            elif mask is None:
                counted = self.item(*item)["mask"][self.burn_in :]
            else:
                counted = mask[list(indices).index(index)]
            errors = [abs(float(x)) for x, real in zip(row, counted, strict=True) if real]
            if errors and self.alpha:
                p = self.eta * max(errors) + (1 - self.eta) * sum(errors) / len(errors)
                self.priority[item] = p if self.n is None else max(errors)
                self.highest = max(self.highest, self.priority[item])

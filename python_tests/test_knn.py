import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import reference_knn as reference
import torch
from conftest import DEVICES, OTHER_ISAS, rerun_under, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from together import together

import urlfast
from urlfast import _core

TOLERANCE = {"float64": 1e-12, "float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def threads():
    before = _core.num_threads()
    yield
    urlfast.set_num_threads(before)


def on(device, array, dtype=None):
    """On the CPU a NumPy array where NumPy has the dtype, else a tensor; beside it what its values are in float64."""
    if device == "cpu" and dtype != "bfloat16":
        array = array if dtype is None else array.astype(dtype)
        return array, array.astype(np.float64)
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = (tensor if dtype is None else tensor.to(getattr(torch, dtype))).to(device)
    return tensor, tensor.double().cpu().numpy()


def close(got, want, dtype="float32"):
    np.testing.assert_allclose(to_numpy(got), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_neighbours(got, pool, queries, k, dtype, include_self=True, own=True):
    """Distances as the reference has them; indices distinct and at those distances (rounding may swap near-ties)."""
    distances, indices = (to_numpy(x) for x in got)
    want, _ = reference.knn(queries, None if own else pool, k, include_self)
    assert distances.dtype == (np.float64 if dtype == "float64" else np.float32) and indices.dtype == np.int64
    close(distances, want, dtype)
    assert all(len(set(row)) == k for row in indices)
    if not include_self:
        assert (indices != np.arange(len(queries))[:, None]).all()
    close(np.sqrt(((queries[:, None] - pool[indices]) ** 2).sum(-1)), want, dtype)
    assert (np.diff(distances, axis=1) >= 0).all()


# Values ---------------------------------------------------------------------------------------------------------------


@every_device
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_knn_and_reward_match_the_reference(device, data):
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"]))
    b, d, own = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 70)), data.draw(st.booleans())
    m = b if own else data.draw(st.integers(1, 300))
    include_self = not own or b == 1 or data.draw(st.booleans())
    k = data.draw(st.integers(1, m - (not include_self)) | st.just(m - (not include_self)))
    urlfast.set_num_threads(data.draw(st.integers(1, 3)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mean = data.draw(st.sampled_from([0.0, 100.0]))  # a large mean punishes |a|^2 + |b|^2 - 2ab
    q = rng.normal(mean, 1, (b, d))
    q[: b // 3] = q[0]
    pool = q if own else np.concatenate([rng.normal(mean, 1, (m - m // 4, d)), np.repeat(q[:1], m // 4, 0)])
    x, q = on(device, q, dtype)
    y, pool = (None, q) if own else on(device, pool, dtype)
    check_neighbours(urlfast.knn(x, y, k, include_self=include_self), pool, q, k, dtype, include_self, own)
    how = dict(
        reduction=data.draw(st.sampled_from(["mean", "kth"])),
        exponent=data.draw(st.sampled_from([1.0, 2.0, 0.5])),
        c=data.draw(st.sampled_from([1.0, 0.01])),
    )
    got = to_numpy(urlfast.knn_reward(x, k, y, include_self=include_self, **how))
    want = reference.knn_reward(q, k, None if own else pool, include_self=include_self, **how)
    np.testing.assert_allclose(got, want, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@every_device
@pytest.mark.parametrize(
    "b, m, d, k",
    [
        (1024, None, 15, 12),
        (400, None, 300, 16),
        (64, None, 3136, 16),
        (193, None, 40, 193),
        (1, 9000, 32, 10),
        (2, 9000, 31, 10),
        (3, 3000, 17, 500),
        (7, 2500, 1100, 5),
        (300, 2100, 33, 12),
        (1, 1, 1, 1),
    ],
)
def test_larger_shapes(device, b, m, d, k):
    """The shapes where blocks, symmetry, streaming and divided keys each take over."""
    rng = np.random.default_rng(b + d)
    x, q = on(device, rng.normal(3, 1, (b, d)).astype(np.float32))
    y, pool = (None, q) if m is None else on(device, rng.normal(3, 1, (m, d)).astype(np.float32))
    check_neighbours(urlfast.knn(x, y, k), pool, q, k, "float32", own=m is None)
    close(urlfast.knn_reward(x, k, y), reference.knn_reward(q, k, y if y is None else pool))


@every_device
def test_ties_go_to_the_lowest_index(device):
    rng = np.random.default_rng(0)
    for b, d in ((300, 2), (300, 64), (1, 2)):  # a grid: whole numbers, so distances are exact and tie often
        q, keys = rng.integers(0, 3, (b, d)).astype(np.float32), rng.integers(0, 3, (3000, d)).astype(np.float32)
        for pool in (None, keys):
            k = min(20, b if pool is None else 20)
            _, index = urlfast.knn(on(device, q)[0], None if pool is None else on(device, pool)[0], k)
            np.testing.assert_array_equal(to_numpy(index), reference.knn(q, pool, k)[1])
    same = np.ones((500, 40), np.float32)
    distance, index = urlfast.knn(on(device, same)[0], k=500)
    assert (to_numpy(distance) == 0).all() and (to_numpy(index) == np.arange(500)).all()
    for d in (16, 32, 64, 90) * 9:  # one query: a key's distance has the same bits wherever it lies, also beyond the last whole vector
        point, query = rng.normal(size=(2, 1, d)).astype(np.float32)
        _, index = urlfast.knn(on(device, query)[0], on(device, np.repeat(point, 253, 0))[0], k=253)
        assert (to_numpy(index) == np.arange(253)).all()
    _, index = urlfast.knn(on(device, same)[0], k=3, include_self=False)
    assert to_numpy(index)[:4].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


@every_device
def test_batches_are_independent_problems(device):
    rng = np.random.default_rng(1)
    for s, b, m, d, k in ((3, 5, 40, 7, 4), (2, 130, 130, 50, 12), (40, 1, 64, 32, 10)):
        q, pool = rng.normal(size=(s, b, d)).astype(np.float32), rng.normal(size=(s, m, d)).astype(np.float32)
        x, y = on(device, q)[0], on(device, pool)[0]
        close(urlfast.knn_reward(x, k, y), reference.knn_reward(q, k, pool))
        distance, index = (to_numpy(a) for a in urlfast.knn(x, y, k))
        for i in range(s):
            np.testing.assert_array_equal(index[i], reference.knn(q[i], pool[i], k)[1])
            close(distance[i], reference.knn(q[i], pool[i], k)[0])
        if k <= b:
            close(urlfast.knn_reward(x, k), reference.knn_reward(q, k))


@every_device
def test_ragged_memories(device):
    """Empty, shorter than k, full; what lies beyond a length is never looked at."""
    rng = np.random.default_rng(2)
    lengths = [0, 1, 3, 700, 5000, 4999, 10]
    for b in (1, 6):
        q = rng.normal(size=(7, b, 12)).astype(np.float32)
        pool = rng.normal(size=(7, 5000, 12)).astype(np.float32)
        for i, n in enumerate(lengths):
            pool[i, n:] = np.nan
        x, y = on(device, q)[0], on(device, pool)[0]
        for how in (dict(), dict(reduction="kth", exponent=2.0, c=0.5)):
            got = urlfast.knn_reward(x, 5, y, lengths=lengths, **how)
            close(got, reference.knn_reward(q, 5, pool, lengths, **how))
            assert (to_numpy(got)[0] == np.float32(np.log(how.get("c", 1.0)))).all()
        close(urlfast.knn_reward(x, 2**62, y, lengths=lengths), reference.knn_reward(q, 5000, pool, lengths))
        distance, index = (to_numpy(a) for a in urlfast.knn(x, y, 5, lengths=np.array(lengths)))
        for i, n in enumerate(lengths):
            found = min(5, n)
            assert np.isinf(distance[i, :, found:]).all() and (index[i, :, found:] == -1).all()
            if found:
                np.testing.assert_array_equal(index[i, :, :found], reference.knn(q[i], pool[i, :n], found)[1])
    assert to_numpy(urlfast.knn_reward(on(device, q)[0], 5, on(device, pool[:, :0])[0], lengths=[0] * 7)).tolist() == [[0.0] * 6] * 7


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-25, 1e18, 1e25, 1e37])
@pytest.mark.parametrize("shape", [(40, 9), (150, 64)])
def test_scales_whose_squares_leave_the_range(scale, shape):
    z = (np.random.default_rng(3).normal(size=shape) * scale).astype(np.float32)
    for pool in (None, z[::-1].copy()):
        got, _ = urlfast.knn(z, pool, 7)
        np.testing.assert_allclose(got.astype(np.float64), reference.knn(z, pool, 7)[0], rtol=3e-6, atol=2e-45)
    one, memory = z[:1], np.concatenate([np.ones((5, shape[1]), np.float32), z[1:]])  # an ordinary query or rows beside them
    np.testing.assert_allclose(urlfast.knn(one, memory, 3)[0], reference.knn(one, memory, 3)[0], rtol=1e-5, atol=1e-18)
    huge = (z.astype(np.float64) * 1e250).astype(np.float64)
    np.testing.assert_allclose(urlfast.knn(huge, k=7)[0], reference.knn(huge / scale / 1e250, k=7)[0] * scale * 1e250, rtol=1e-5)


def hard(kind, rng, d):
    """70 queries and 1500 keys that are hard to tell apart by bounds, or whose bounds overflow, underflow or say nothing."""
    q, y = (rng.normal(size=(n, d)).astype(np.float32) for n in (70, 1500))
    if kind == "near-ties":  # keys one unit in the last place apart, all queries at one point
        q[:], y[:] = q[0], q[0]
        y[np.arange(1500), np.arange(1500) % d] = np.nextafter(y[0, np.arange(1500) % d], np.float32(9))
    elif kind == "duplicates":
        q, y = y[:70].copy(), np.tile(y[:500], (3, 1))
    elif kind == "offset":
        q, y = q * np.float32(1e-3) + 30000, y * np.float32(1e-3) + 30000
    elif kind == "heavy tails":
        q, y = q**5, y**5
    elif kind == "outliers":  # some queries' bounds say nothing, the others' do
        q[rng.random(q.shape) < 0.1 / d] *= 100
        y[rng.random(y.shape) < 0.1 / d] *= 100
    elif kind == "clusters":
        q, y = q + np.repeat(50 * q[:7], 10, 0), y + np.repeat(50 * y[:15], 100, 0)
    elif kind == "grid":
        q, y = np.round(q), np.round(y)
    elif kind == "far keys":
        y[1400:] *= np.float32(1e18)
    elif kind in ("1e30", "1e-30", "1e-42"):
        q, y = q * np.float32(kind), y * np.float32(kind)
    return q, y


HARD = ["plain", "near-ties", "duplicates", "offset", "heavy tails", "outliers", "clusters", "grid", "far keys", "1e30", "1e-30", "1e-42"]


@pytest.mark.parametrize("kind", HARD)
def test_a_first_pass_changes_no_bit(kind):
    """Few queries at a time are searched directly: bounds, and what is then measured, must come to the same."""
    urlfast.set_num_threads(1)  # a thread's share of the 70 queries may be too small for a first pass
    for d, k, dtype in ((33, 12, np.float32), (100, 90, np.float32), (513, 12, np.float32), (200, 12, np.float16)):
        q, y = hard(kind, np.random.default_rng(d), d)
        if dtype == np.float16:
            q, y = (np.clip(x, -60000, 60000).astype(dtype) for x in (q, y))
        distance, index = urlfast.knn(q, y, k)
        for i in range(0, 70, 20):
            few = urlfast.knn(q[i : i + 20], y, k)
            np.testing.assert_array_equal(distance[i : i + 20], few[0])
            np.testing.assert_array_equal(index[i : i + 20], few[1])
        distance, index = urlfast.knn(y[:600], k=k, include_self=False)
        few = urlfast.knn(y[:20], y[:600], k + 1)
        assert (index != np.arange(600)[:, None]).all()
        np.testing.assert_array_equal(distance[:20], few[0][:, 1:])


def bytes_of(sample):
    """Centre and step with which the CPU's first pass (csrc/knn/knn_isa.cpp) turns rows into bytes, from the rows it samples."""
    centre = sample.mean(0).astype(np.float32).astype(np.float64)
    deviation = np.sqrt(((sample - sample.mean(0)) ** 2).mean())
    step, least, reach = None, np.inf, 3.0
    while reach < 64:
        tried = float(np.float32(reach * deviation / 127))
        whole = np.clip(np.rint((sample - centre) / tried), -127, 127)
        lost = np.linalg.norm(sample - centre - tried * whole, axis=1).sum()
        if not lost < least:
            break
        step, least, reach = tried, lost, reach * 1.15
    return centre, step


def attained_bounds(d, dtype, own, k):
    """Queries, keys (None for `own`), which 8 queries are attacked, and which key is the nearest of each.

    What matters lies on a line, t * sign: rounding then moves all features of a row by as much, and a bound of the distance
    of two rows is attained where these moves have the signs that it fears. A site is a query; its nearest key, which a bound
    takes to be no nearer than it is; and k equal decoys, a little farther, which bounds take to be near. They come first, so
    that they set the limit which the nearest is held against. Nothing else is near a site.
    """
    rng, n = np.random.default_rng(d), 560
    rows = -(-min(256, 2**20 // (4 * d)) // 12) * 12 if own else 48  # of queries, that the first pass takes at a time
    sign = rng.choice([-1.0, 1.0], d)
    keys = np.repeat(rng.choice([-1.0, 1.0], (n // 8, d)), 8, 0) + rng.normal(0, 0.05, (n, d))  # groups of 8, off the line
    queries = keys if own else np.zeros((rows, d))
    sample_keys, sample_queries = np.arange(16) * n // 16, np.arange(16) * rows // 16
    for x, taken in ((keys, sample_keys), (queries, sample_queries)):
        x[taken] = (rng.uniform(1, 1.2, 16) * (-1.0) ** np.arange(16))[:, None] * sign
    free_keys = sorted({*range(n)} - {*sample_keys} - ({*sample_queries} if own else set()))
    free_queries = free_keys if own else sorted({*range(rows)} - {*sample_queries})

    def rounded(x):
        return on("cpu", np.asarray(x, np.float32), dtype)[1]

    centre, step = bytes_of(rounded(np.concatenate([queries[sample_queries], keys[sample_keys]])))
    middle = centre[0] * sign[0]
    np.testing.assert_array_equal(centre, middle * sign)

    def in_steps(t):
        """The whole number that a byte holds, and the rest."""
        whole = np.clip(np.rint((t - middle) / step), -127, 127)
        return whole, (t - middle) / step - whole

    def value(at):
        return rounded([middle + at * step])[0]

    def off(at, side):
        """Of the values that a byte takes for `at`, the one farthest above or below (side 1, -1), up to 0.49."""
        t = rounded(middle + (at + np.linspace(-0.49, 0.49, 491)) * step)
        whole, rest = in_steps(t)
        return t[np.argmax(np.where((whole == at) & (abs(rest) <= 0.49), side * rest, -1))]

    targets, nearest = [], []
    for kind, at in [
        (kind, side * at) for kind, at in (("first", 4), ("second", 12), ("second", 20), ("cut off", 135)) for side in (1, -1)
    ]:
        out = 1 if at > 0 else -1
        if kind == "first":  # both errors along the difference: the triangle inequality is attained
            query, key = off(at, out), off(at + 2 * out, -out)
            decoys = rounded([query + f * (query - key) for f in (0.85, 1.5)])
        elif kind == "second":  # all errors along the rows: the inequality of their products is attained; the decoys' go against them
            query, key = off(at, out), off(at + 2 * out, out)
            decoys = off(at + 2 * out, -out), off(at + 4 * out, -out)
        else:  # the same beyond what a byte holds
            query, key = value(at), value(at + 8 * out)
            decoys = value(at - 6 * out), value(at + 10 * out)
        # some features have one value and some the other, so that the decoys lie at just over the nearest's distance
        close_by, far = (t - query for t in decoys)
        some = int(np.ceil(d * ((key - query) ** 2 * (1 + 2**-9) - close_by**2) / (far**2 - close_by**2)))
        assert 0 < some <= d
        decoy = np.where(rng.permutation(d) < some, decoys[1], decoys[0])

        # With less than this share of its error a bound would exceed the decoys' distance, and the nearest be lost.
        (q, q_rest), (y, y_rest) = in_steps(query), in_steps(key)
        square = ((decoy - query) ** 2).mean() / step**2
        if kind == "first":
            share = (abs(q - y) - np.sqrt(square)) / (abs(q_rest) + abs(y_rest))
        else:
            gains = (q + q_rest) ** 2 - q**2 + (y + y_rest) ** 2 - y**2
            share = ((q - y) ** 2 + gains - square) / (2 * (abs(q * y_rest) + abs(q_rest) * (abs(y) + abs(y_rest))))
        assert 0.98 < share < 1

        keys[free_keys[:k]] = decoy * sign
        del free_keys[:k]
        nearest.append(free_keys.pop())
        keys[nearest[-1]] = key * sign
        targets.append(query)
    places = [free_queries.pop(0) for _ in targets]
    queries[places] = np.array(targets)[:, None] * sign
    if not own:
        queries[free_queries] = queries[np.resize(places, len(free_queries))]
    return queries, None if own else keys, places, nearest


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("d", [64, 200, 300, 1024, 4096])
@pytest.mark.parametrize("own, include_self", [(False, True), (True, True), (True, False)])
def test_near_ties_that_attain_the_bounds(dtype, d, own, include_self):
    """The first pass would lose the nearest neighbour if either bound took less than 98 % of its error into account."""
    urlfast.set_num_threads(1)
    k = 4
    x, y, attacked, nearest = attained_bounds(d, dtype, own, k)
    x, queries = on("cpu", x.astype(np.float32), dtype)
    y, keys = (None, queries) if own else on("cpu", y.astype(np.float32), dtype)
    distance, index = (to_numpy(a)[attacked] for a in urlfast.knn(x, y, k, include_self=include_self))
    itself = int(own and not include_self)  # comes first where it is not left out
    want_distance, want = (a[:, itself:] for a in reference.knn(queries[attacked], keys, k + itself))
    np.testing.assert_array_equal(want[:, int(own and include_self)], nearest)
    np.testing.assert_array_equal(index, want)
    close(distance, want_distance, dtype)


def test_more_neighbours_than_a_block_of_keys_has():
    """A first pass sets its limits from its first block, 64 keys of 3136 features: k of them, or k besides the row itself."""
    rng = np.random.default_rng(0)
    q, y = rng.normal(size=(64, 3136)).astype(np.float32), rng.normal(size=(1100, 3136)).astype(np.float32)
    got = urlfast.knn(q, y, 65)
    for i in range(0, 64, 16):  # few queries are searched directly
        for all_rows, few in zip(got, urlfast.knn(q[i : i + 16], y, 65), strict=True):
            np.testing.assert_array_equal(all_rows[i : i + 16], few)
    x = rng.normal(size=(2400, 3)) * np.repeat([0.3, 0.3, 1.0], [50, 14, 2336])[:, None]
    x += np.repeat([0, 4, -8], [50, 14, 2336])[:, None]  # 50 close rows, then a gap: the 50th neighbour is beyond it
    z = (x @ rng.normal(size=(3, 3136))).astype(np.float32)
    got, few = urlfast.knn(z, k=50, include_self=False), urlfast.knn(z[:20], z, 51)
    np.testing.assert_array_equal(got[0][:20], few[0][:, 1:])
    np.testing.assert_array_equal(got[1][:20], few[1][:, 1:])


def test_results_do_not_depend_on_threads():
    rng = np.random.default_rng(4)
    for q, pool in (((700, 64), None), ((700, 15), None), ((90, 33), (5000, 33)), ((1, 32), (20000, 32))):
        q, pool = rng.normal(size=q).astype(np.float32), None if pool is None else rng.normal(size=pool).astype(np.float32)
        results = []
        for n in (1, 2, 5):
            urlfast.set_num_threads(n)
            results.append(urlfast.knn(q, pool, 12 if pool is None else 40))
        for distance, index in results[1:]:
            assert (distance == results[0][0]).all() and (index == results[0][1]).all()


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_every_instruction_set(isa):
    rerun_under(isa, __file__)


# Statistic ------------------------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("mode", ["mean", "std", "var", "ema_abs"])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "kth"])
def test_normalizer_sees_the_kept_distances_then_divides_them(device, mode, clip, reduction):
    """Search, update, divide, subtract and floor, power, reduce, log; beside it the same steps one by one."""
    rng = np.random.default_rng(8)
    inside, beside = (urlfast.RunningNormalizer(mode, clip=clip, device=device) for _ in range(2))
    lengths = [0, 3, 200]
    for step in range(4):
        z, memory = rng.normal(size=(3, 10, 6)).astype(np.float32), rng.normal(size=(3, 200, 6)).astype(np.float32)
        before = inside.state_dict()
        how = dict(reduction=reduction, exponent=2.0, c=0.5)
        got = urlfast.knn_reward(
            on(device, z)[0], 5, on(device, memory)[0], lengths=lengths, normalizer=inside, update_normalizer=step != 2, **how
        )
        found = [[reference.knn(q[None], m[:n], 5)[0][0] for q in one] for one, m, n in zip(z, memory, lengths, strict=True)]
        kept = np.concatenate([d[-1:] if reduction == "kth" else d for one in found for d in one])
        if step == 2:
            assert inside.state_dict() == before
        else:
            beside.update(on(device, kept)[0])
        want = [[reference.reward(d, scale=beside.scale, clip=clip, **how) for d in one] for one in found]
        np.testing.assert_allclose(to_numpy(got), want, rtol=1e-5, atol=1e-5)
        assert inside.scale == pytest.approx(beside.scale, rel=1e-6)


@every_device
def test_memories_that_are_all_empty_leave_the_statistic_alone(device):
    normalizer = urlfast.RunningNormalizer("mean", device=device)
    z, memory = on(device, np.ones((2, 1, 3), np.float32))[0], on(device, np.ones((2, 4, 3), np.float32))[0]
    got = urlfast.knn_reward(z, 5, memory, lengths=[0, 0], normalizer=normalizer, c=2.0)
    np.testing.assert_allclose(to_numpy(got), np.log(2.0), rtol=1e-6)
    assert normalizer.state_dict()["count"] == 0


def test_a_refused_batch_leaves_the_statistic_alone():
    normalizer = urlfast.RunningNormalizer("mean")
    with pytest.raises(ValueError, match=r"^z: must be finite"):
        urlfast.knn_reward(np.full((5, 3), np.nan, np.float32), 2, normalizer=normalizer)
    assert normalizer.state_dict()["count"] == 0


@pytest.mark.arguments
def test_the_normalizer_is_checked():
    with pytest.raises(TypeError, match=r"^normalizer: must be a RunningNormalizer, got float$"):
        urlfast.knn_reward(Z, 2, normalizer=1.0)
    with pytest.raises(ValueError, match=r"^normalizer: must have shape \(\), got 3 features$"):
        urlfast.knn_reward(Z, 2, normalizer=urlfast.RunningNormalizer("mean", shape=(3,)))


MEASURED = """
import sys
import numpy as np, urlfast

def peak():  # not getrusage's, which begins with that of the process that started this one
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def matrix(q, k, m):
    return np.sort(np.sqrt(((q**2).sum(1)[:, None] + (m**2).sum(1) - 2 * q @ m.T).clip(0)), 1)[:, :k]

random = np.random.default_rng(0)
q, m = random.random((512, 16), np.float32), random.random((100_000, 16), np.float32)
before = peak()
{"core": urlfast.knn_reward, "matrix": matrix}[sys.argv[1]](q, 12, m)
print(peak() - before)
"""


@pytest.mark.parametrize("how, whole", [("core", False), ("matrix", True)])
def test_no_matrix_of_all_distances_is_made(how, whole):
    """Peak of a process's memory. Of the formula that makes the matrix it shows."""
    done = subprocess.run([sys.executable, "-c", MEASURED, how], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 512 * 100_000 * 4 / 8) == whole


# Episodic memory ------------------------------------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("streams, capacity, dim, k", [(3, 5, 4, 3), (1, 1, 1, 4), (6, 40, 33, 10)])
def test_episodic_memory_is_lists_of_rows(device, streams, capacity, dim, k):
    rng = np.random.default_rng(9)
    memory = urlfast.EpisodicMemory(streams, capacity, dim, k=k, device=device)
    held = [[] for _ in range(streams)]
    for t in range(3 * capacity + 5):
        x, reset = rng.normal(size=(streams, dim)).astype(np.float32), rng.random(streams) < 0.03
        if t == capacity // 2 or t == 2 * capacity + 1:  # also with a ring that has wrapped
            state = memory.state_dict()
            assert state["lengths"] == memory.lengths() == [len(h) for h in held]
            np.testing.assert_array_equal(state["rows"], np.array([row for h in held for row in h], np.float32).reshape(-1, dim))
            memory = urlfast.EpisodicMemory(streams, capacity + t % 2, dim, k=k, device=device)
            memory.load_state_dict(state)
            if memory.capacity != capacity:
                memory = urlfast.EpisodicMemory(streams, capacity, dim, k=k, device=device)
                memory.load_state_dict(state)
        want = np.full((streams, k), np.inf)
        for n in range(streams):
            held[n] = [] if reset[n] else held[n]
            if held[n]:
                distance = reference.knn(x[n : n + 1], np.array(held[n]), k)[0][0]
                want[n, : len(distance)] = distance
            held[n] = [*held[n], x[n]][-capacity:]
        where = reset if t % 2 or device == "cpu" else on(device, reset)[0]
        close(memory.step(on(device, x)[0], where), want)


def test_a_state_taken_beside_steps_is_whole():
    """Every row holds its step, and now and then a reset empties all streams: lengths and rows must be of one moment."""
    memory, stop, seen = urlfast.EpisodicMemory(64, 20, 2), threading.Event(), set()

    def step():
        t = 0
        try:
            while not stop.is_set():
                memory.step(np.full((64, 2), t, np.float32), np.full(64, t % 3 == 0))
                t += 1
        finally:
            stop.set()

    def look():
        try:
            looks, end = 0, time.monotonic() + 60
            while not stop.is_set() and (looks < 3000 or len(seen) < 10) and time.monotonic() < end:
                looks += 1
                state = memory.state_dict()
                n = state["lengths"][0] if state["rows"].size else 0
                assert state["lengths"] == [n] * 64
                rows = state["rows"].reshape(64, n, 2)
                np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1, :1] + np.arange(n)[:, None], rows.shape))
                assert n == 0 or rows[0, 0, 0] % 3 == 0
                seen.add(tuple(rows[0, :, 0]))
        finally:
            stop.set()

    together(step, look)
    assert len(seen) >= 10  # so the steps went on meanwhile


def test_episodic_memory_refuses_by_name_and_then_is_unchanged():
    memory = urlfast.EpisodicMemory(2, 4, 3, k=2)
    x, no = np.ones((2, 3), np.float32), np.zeros(2, bool)
    memory.step(x, no)
    for arguments, message in (
        ((x[:1], no), r"^embeddings: must have shape \(2, 3\), got \(1, 3\)$"),
        ((x, no[:1]), r"^reset: must have shape \(2,\), got \(1,\)$"),
        ((x * np.float32(np.nan), ~no), r"^embeddings: must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            memory.step(*arguments)
    with pytest.raises(TypeError, match=r"^reset: must have dtype bool, got int64$"):
        memory.step(x, np.zeros(2, np.int64))
    assert memory.lengths() == [1, 1]
    for arguments, options, name in (
        ((0, 4, 3), {}, "num_streams"),
        ((2, 0, 3), {}, "capacity"),
        ((2, 4, 0), {}, "dim"),
        ((2, 4, 3), dict(k=0), "k"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: must lie in 1"):
            urlfast.EpisodicMemory(*arguments, **options)
    with pytest.raises(ValueError, match=r"^rows: must have shape \(3, 3\), got \(2, 3\)$"):
        memory.load_state_dict({"lengths": [1, 2], "rows": x})
    with pytest.raises(ValueError, match=r"^state: has no 'rows'"):
        memory.load_state_dict({"lengths": [1, 2]})
    assert isinstance(memory.step(torch.ones(2, 3, requires_grad=True), torch.zeros(2, dtype=torch.bool)), torch.Tensor)


# Libraries ------------------------------------------------------------------------------------------------------------


@every_device
def test_torch_in_torch_out(device):
    z = torch.randn(20, 8, device=device, requires_grad=True)
    reward = urlfast.knn_reward(z, 5)
    assert isinstance(reward, torch.Tensor) and reward.device == z.device and not reward.requires_grad and reward.dtype == torch.float32
    distance, index = urlfast.knn(z.double(), z.double(), 5)
    assert distance.dtype == torch.float64 and index.dtype == torch.int64
    want = torch.cdist(z.detach().double(), z.detach().double(), compute_mode="donot_use_mm_for_euclid_dist").topk(5, largest=False)
    torch.testing.assert_close(distance, want.values)


def test_read_only_and_empty_strides():
    z = np.random.default_rng(5).normal(size=(20, 8)).astype(np.float32)
    want = urlfast.knn_reward(z, 5)
    z.setflags(write=False)
    assert (urlfast.knn_reward(z, 5) == want).all()
    assert isinstance(want, np.ndarray) and want.shape == (20,) and want.dtype == np.float32
    assert urlfast.knn_reward(z[::2][:1], 1).shape == (1,)  # an axis of length 1 may have any stride


# Errors ---------------------------------------------------------------------------------------------------------------

Z = np.random.default_rng(6).normal(size=(4, 3)).astype(np.float32)
ZZ = np.zeros((2, 4, 3), np.float32)


@pytest.mark.arguments
@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((Z, 5), {}, r"^k: must lie in 1\.\.4 \(the rows of z\), got 5$"),
        ((Z, 0), {}, r"^k: must lie in 1\.\.4 .* got 0$"),
        ((Z, 4), dict(include_self=False), r"^k: must lie in 1\.\.3 \(the rows of z but the row itself\), got 4$"),
        ((Z, 6, ZZ[0]), {}, r"^k: must lie in 1\.\.4 \(the rows of memory\), got 6$"),
        ((Z, 2, ZZ[0]), dict(include_self=False), r"^include_self: must be True with memory"),
        ((Z[0],), {}, r"^z: must have shape \(B, D\) or \(S, B, D\), got \(3,\)$"),
        ((Z[:0],), {}, r"^z: must not be empty, got \(0, 3\)$"),
        ((Z[:, :2], 2), {}, r"^z: must be C-contiguous; pass np\.ascontiguousarray\(z\)$"),
        ((torch.zeros(3, 4).T, 2), {}, r"^z: must be C-contiguous; pass z\.contiguous\(\)$"),
        ((Z, 2, Z[:, :2].copy()), {}, r"^memory: must have 3 features as z has, got \(4, 2\)$"),
        ((Z, 2, ZZ), {}, r"^memory: must have 2 axes as z has, got \(2, 4, 3\)$"),
        ((ZZ, 2, np.zeros((3, 4, 3), np.float32)), {}, r"^memory: must have 2 memories as z has, got \(3, 4, 3\)$"),
        ((Z, 1, Z[:0]), {}, r"^memory: must not be empty without lengths"),
        ((Z, 2), dict(lengths=[4]), r"^lengths: needs memory of shape \(S, M, D\)"),
        ((Z, 2, Z), dict(lengths=[4]), r"^lengths: needs memory of shape \(S, M, D\), got \(4, 3\)$"),
        ((ZZ, 2, ZZ), dict(lengths=[4]), r"^lengths: must have one entry for each of the 2 memories, got 1$"),
        ((ZZ, 2, ZZ), dict(lengths=[4, 5]), r"^lengths: must lie in 0\.\.4, got 5$"),
        ((ZZ, 2, ZZ), dict(lengths=[-1, 4]), r"^lengths: must lie in 0\.\.4, got -1$"),
        ((Z, 2), dict(reduction="max"), r"^reduction: must be 'mean' or 'kth', got 'max'$"),
        ((Z, 2), dict(exponent=0.0), r"^exponent: must be positive and finite, got 0$"),
        ((Z, 2), dict(c=0.0), r"^c: must be positive and finite, got 0$"),
        ((Z, 2), dict(c=float("nan")), r"^c: must be positive and finite, got nan$"),
    ],
)
def test_values_are_refused_by_name(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        urlfast.knn_reward(*arguments, **options)


@pytest.mark.arguments
@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (([[1.0]], 1), {}, r"^z: must be an array .* got list$"),
        ((np.zeros((2, 2), np.int32), 1), {}, r"^z: must have dtype float16, bfloat16, float32, float64, got int32$"),
        ((Z, 2, Z.astype(np.float64)), {}, r"^memory: must have dtype float32 as z has, got float64$"),
        ((ZZ, 2, ZZ), dict(lengths=[1.5, 2]), r"^lengths: must hold integers, got 1\.5$"),
        ((ZZ, 2, ZZ), dict(lengths=np.ones(2)), r"^lengths: must have dtype int64, int32, got float64$"),
        ((ZZ, 2, ZZ), dict(lengths=3), r"^lengths: must be a sequence of integers, got int$"),
    ],
)
def test_types_are_refused_by_name(arguments, options, message):
    with pytest.raises(TypeError, match=message):
        urlfast.knn_reward(*arguments, **options)


@pytest.mark.arguments
def test_knn_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"^keys: must have 3 features as queries has, got \(4, 2\)$"):
        urlfast.knn(Z, Z[:, :2].copy(), 2)
    with pytest.raises(ValueError, match=r"^queries: must be finite"):
        urlfast.knn(Z * np.float32(np.nan), k=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_and_infinity_are_refused_on_the_cpu(bad, dtype):
    rng = np.random.default_rng(7)
    for b, d in ((5, 3), (150, 40), (1, 33)):
        z = rng.normal(size=(b, d)).astype(dtype)
        memory = rng.normal(size=(600, d)).astype(dtype)
        broken = z.copy()
        broken[b // 2, d - 1] = bad
        with pytest.raises(ValueError, match=r"^z: must be finite, has NaN or infinity$"):
            urlfast.knn_reward(broken, 1)
        with pytest.raises(ValueError, match=r"^z: must be finite"):
            urlfast.knn_reward(broken[None], 1, memory[None], lengths=[0])
        for at in (0, 599):
            broken = memory.copy()
            broken[at, 0] = bad
            with pytest.raises(ValueError, match=r"^memory: must be finite, has NaN or infinity$"):
                urlfast.knn_reward(z, 1, broken)
        assert np.isfinite(urlfast.knn_reward(z[None], 1, broken[None], lengths=[599])).all()


@pytest.mark.arguments
@pytest.mark.skipif(_core.build_info()["cuda_usable"], reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_clear_error():
    class Elsewhere:
        def __dlpack_device__(self):
            return (2, 0)

        def __dlpack__(self, **_):
            raise AssertionError("must not be asked")

    with pytest.raises(RuntimeError, match=r"^z: CUDA is not usable here: "):
        urlfast.knn_reward(Elsewhere(), 1)

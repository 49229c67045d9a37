import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch
from conftest import DEVICES, on, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_stats import ReferenceNormalizer, urlb_rms

import urlfast
from urlfast import RunningNormalizer

MODES = ["mean", "std", "var", "ema_abs"]
FLOATS = {"float64": 1e-12, "float32": 2e-7, "float16": 2e-7}  # results of halves are float32


def values(rng, shape, dtype, offset=3.0):
    return (offset + rng.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(sorted(FLOATS)))
def test_matches_the_reference(device, mode, data, seed, dtype):
    rng = np.random.default_rng(seed)
    shape = data.draw(st.sampled_from([(), (1,), (3,), (17,), (2, 5), (300,)]))
    clip = data.draw(st.sampled_from([None, 0.0, 1e-4, 0.5]))
    ours = RunningNormalizer(mode, shape=shape, clip=clip, device=device)
    reference = ReferenceNormalizer(mode, shape, clip=clip)
    for _ in range(data.draw(st.integers(1, 4))):
        lead = data.draw(st.sampled_from([(1,), (7,), (64,), (4, 33), (2, 130)]))
        x = values(rng, (*lead, *shape), dtype)
        got = to_numpy(ours(on(device, x)))
        reference.update(x)
        assert got.shape == x.shape and got.dtype == (np.float64 if dtype == "float64" else np.float32)
        np.testing.assert_allclose(ours.scale, reference.scale, rtol=1e-11)
        np.testing.assert_allclose(got, reference.normalize(x), rtol=FLOATS[dtype], atol=2 * FLOATS[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (7,), (1000,)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_arrays_over_several_threads(device, mode, shape, dtype):
    x = values(np.random.default_rng(0), (300_001,) if shape == () else (300_000 // shape[0] + 1, *shape), dtype)
    reference = ReferenceNormalizer(mode, shape)
    reference.update(x)
    results = []
    threads = urlfast._core.num_threads()
    for n in (1, 2, 5):
        urlfast.set_num_threads(n)
        ours = RunningNormalizer(mode, shape=shape, device=device)
        results.append((to_numpy(ours(on(device, x))), ours.scale))
    urlfast.set_num_threads(threads)
    np.testing.assert_allclose(results[0][1], reference.scale, rtol=1e-11)
    np.testing.assert_allclose(results[0][0], reference.normalize(x), rtol=2e-7, atol=1e-6)
    for y, scale in results[1:]:  # the same bits whatever the number of threads
        np.testing.assert_array_equal(y, results[0][0])
        np.testing.assert_array_equal(scale, results[0][1])


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_read_exactly(device):
    x = (3 + torch.randn(1000, generator=torch.Generator().manual_seed(0))).bfloat16().to(device)
    ours, exact = RunningNormalizer("std", device=device), RunningNormalizer("std", device=device)
    got, want = ours(x), exact(x.float())
    assert got.dtype == torch.float32 and got.device == x.device
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_every_half_is_read_exactly(device):
    bits = np.arange(65536, dtype=np.uint16)
    x = bits.view(np.float16)
    x = x[np.isfinite(x)]
    ours = RunningNormalizer("std", device=device)  # has seen nothing: divides by 1
    np.testing.assert_array_equal(to_numpy(ours.normalize(on(device, x))), x.astype(np.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["mean", "std", "var"])
@pytest.mark.parametrize("shape", [(), (5,)])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_merging_any_split_equals_one_pass(device, mode, shape, data, seed):
    rng = np.random.default_rng(seed)
    x = values(rng, (data.draw(st.integers(2, 400)), *shape), "float64")
    cuts = sorted(data.draw(st.lists(st.integers(1, len(x) - 1), max_size=5, unique=True)))
    whole = RunningNormalizer(mode, shape=shape, device=device)
    whole.update(on(device, x))
    merged = RunningNormalizer(mode, shape=shape, device=device)
    for part in np.split(x, cuts):
        one = RunningNormalizer(mode, shape=shape, device=device)
        one.update(on(device, part))
        merged.merge(one)
    np.testing.assert_allclose(merged.scale, whole.scale, rtol=1e-12)
    assert merged.state_dict()["count"] == len(x)


def test_merging_with_itself_doubles_it():
    r = RunningNormalizer("std")
    r.update(np.arange(10.0))
    r.merge(r)
    reference = ReferenceNormalizer("std")
    reference.update(np.tile(np.arange(10.0), 2))
    np.testing.assert_allclose(r.scale, reference.scale, rtol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("offset", [1e6, -1e9, 1e12])
def test_a_large_mean_does_not_cancel(device, shape, offset):
    x = offset + np.random.default_rng(0).standard_normal((50_000, *shape))
    x[0] = 0  # and an outlier first, which a sum shifted by the first value would stumble over
    ours, reference = RunningNormalizer("var", shape=shape, device=device), ReferenceNormalizer("var", shape)
    for part in np.array_split(x, 7):
        ours.update(on(device, part))
        reference.update(part)
    np.testing.assert_allclose(ours.scale, reference.scale, rtol=1e-9)
    ours, reference = RunningNormalizer("var", shape=shape, epsilon=0, device=device), ReferenceNormalizer("var", shape, epsilon=0)
    ours.update(on(device, x[1:]))
    variance = np.array(ours.state_dict()["m2"]) / (len(x) - 1)  # without the prior, whose mean is 0; x - offset is exact
    np.testing.assert_allclose(variance, np.var(x[1:] - offset, axis=0).reshape(-1), rtol=1e-5)


def test_the_prior_is_urlbs():
    rng = np.random.default_rng(3)
    batches = [rng.random(n) for n in (1, 5, 12 * 64)]
    for mode, index in (("mean", 0), ("var", 1)):
        r = RunningNormalizer(mode, epsilon=0)
        for i, x in enumerate(batches):
            r.update(x)
            np.testing.assert_allclose(r.scale, urlb_rms(batches[: i + 1])[index], rtol=1e-13)


def test_apv_streamnorm():
    r = RunningNormalizer("ema_abs", momentum=0.99)
    r.update(np.array([-3.0, 1.0]))
    np.testing.assert_allclose(r.scale, 0.99 * 1 + 0.01 * 2 + 1e-8, rtol=1e-15)


@pytest.mark.parametrize("module", ["gymnasium.wrappers.utils", "stable_baselines3.common.running_mean_std"])
def test_matches_gymnasium_and_stable_baselines(module):
    rng = np.random.default_rng(0)
    theirs, ours = pytest.importorskip(module).RunningMeanStd(), RunningNormalizer("std", epsilon=0)
    for _ in range(20):
        x = rng.normal(5, 2, 256).astype(np.float32)
        theirs.update(x)
        ours.update(x)
    np.testing.assert_allclose(ours.scale, np.sqrt(theirs.var), rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_seen_divides_by_one_and_constants_stay_finite(device, mode):
    r = RunningNormalizer(mode, device=device)
    x = on(device, np.array([1.0, -2.0]))
    np.testing.assert_allclose(to_numpy(r.normalize(x)), [1, -2], rtol=1e-7)
    assert np.isfinite(to_numpy(r(on(device, np.zeros(8))))).all()
    assert np.isfinite(to_numpy(r(on(device, np.full(8, 5.0))))).all()


def test_a_negative_mean_does_not_turn_signs():
    r = RunningNormalizer("mean")
    np.testing.assert_allclose(r(np.array([-4.0, -2.0])), [-4 / 3, -2 / 3], rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_out(device):
    x = on(device, np.linspace(1, 2, 100, dtype=np.float32))
    r = RunningNormalizer(device=device)
    want = to_numpy(r(x))
    out = on(device, np.empty(100, np.float32))
    assert r.normalize(x, out=out) is out
    np.testing.assert_array_equal(to_numpy(out), want)
    r.normalize(x, out=x)
    np.testing.assert_array_equal(to_numpy(x), want)


def test_results_are_the_callers_and_carry_no_gradient():
    r = RunningNormalizer("std")
    x = torch.nn.Parameter(torch.randn(4, 3))
    y = r(x)
    assert type(y) is torch.Tensor and not y.requires_grad and y.shape == (4, 3)
    read_only = np.random.default_rng(0).random(8)
    read_only.flags.writeable = False
    assert isinstance(r(read_only), np.ndarray)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_not_finite_is_refused_and_changes_nothing(bad, mode, shape, dtype):
    r = RunningNormalizer(mode, shape=shape)
    r.update(np.ones((8, 4), dtype))
    before = r.state_dict()
    for where in (0, 17, 39_999):
        x = np.ones((10_000, 4), dtype)
        x.flat[where] = bad
        with pytest.raises(ValueError, match="x: must be finite"):
            r(x)
    assert r.state_dict() == before


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_normalize_passes_on_what_is_not_finite(clip, dtype):
    """Wherever it stands among the lanes of a vector, and in what is left behind them."""
    r = RunningNormalizer(clip=clip)
    r.update(np.full(8, 2.0))
    bad = np.array([np.nan, np.inf, -np.inf, 2])
    want = [np.nan, np.inf, -np.inf if clip is None else 0, 1 - (clip or 0)]
    np.testing.assert_allclose(r.normalize(bad.astype(dtype)), want, rtol=1e-3)
    np.testing.assert_allclose(r.normalize(np.tile(bad, 20)[:77].astype(dtype)), np.tile(want, 20)[:77], rtol=1e-3)
    r = RunningNormalizer(shape=(4,), clip=clip)
    r.update(np.full((8, 4), 2.0))
    np.testing.assert_allclose(r.normalize(np.tile(bad, (5, 1)).astype(dtype)), np.tile(want, (5, 1)), rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_state_passes_a_safe_load_and_continues(device, mode):
    rng = np.random.default_rng(0)
    a, b = (values(rng, (20, 3), "float32") for _ in range(2))
    r = RunningNormalizer(mode, shape=(3,), device=device)
    r.update(on(device, a))
    file = io.BytesIO()
    torch.save(r.state_dict(), file)
    file.seek(0)
    again = RunningNormalizer(mode, shape=(3,), device=device)
    again.load_state_dict(torch.load(file, weights_only=True))
    for same in (again, copy.deepcopy(r), pickle.loads(pickle.dumps(r))):
        assert same.state_dict() == r.state_dict() and repr(same) == repr(r)
    np.testing.assert_array_equal(to_numpy(again(on(device, b))), to_numpy(r(on(device, b))))


def test_threads_share_one_normalizer():
    r = RunningNormalizer("std")
    x = np.random.default_rng(0).random(5000)
    threads = [threading.Thread(target=lambda: [r(x) for _ in range(50)]) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert r.state_dict()["count"] == 4 * 50 * 5000


ok = np.ones((4, 3), np.float32)
ERRORS = [
    (ValueError, "mode: must be 'mean', 'std', 'var' or 'ema_abs', got 'max'", lambda: RunningNormalizer("max")),
    (ValueError, r"shape: must hold positive sizes, got \(0,\)", lambda: RunningNormalizer(shape=(0,))),
    (ValueError, "shape: must have at most 2\\^28", lambda: RunningNormalizer(shape=(1 << 28, 1 << 28, 1 << 28))),
    (ValueError, "shape: must have at most 7 axes", lambda: RunningNormalizer(shape=(1,) * 8)),
    (ValueError, "epsilon: must be finite and not negative, got -1", lambda: RunningNormalizer(epsilon=-1)),
    (ValueError, "epsilon", lambda: RunningNormalizer(epsilon=np.nan)),
    (ValueError, "clip: must be None, or finite and not negative", lambda: RunningNormalizer(clip=-0.1)),
    (ValueError, r"momentum: must lie in \[0, 1\), got 1", lambda: RunningNormalizer(momentum=1.0)),
    (ValueError, "device: must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'", lambda: RunningNormalizer(device="tpu")),
    (TypeError, "x: must be an array", lambda: RunningNormalizer()([1.0, 2.0])),
    (TypeError, "x: must have dtype float16, bfloat16, float32, float64, got int64", lambda: RunningNormalizer()(np.arange(3))),
    (ValueError, "x: must not be empty", lambda: RunningNormalizer().update(np.empty((0, 2)))),
    (ValueError, r"x: must end in the normalizer's shape \(3,\), got \(3, 4\)", lambda: RunningNormalizer(shape=(3,))(ok.T.copy())),
    (ValueError, "x: must be C-contiguous; pass np.ascontiguousarray", lambda: RunningNormalizer()(ok.T)),
    (ValueError, r"x: must be C-contiguous; pass x.contiguous\(\)", lambda: RunningNormalizer()(torch.ones(4, 3).T)),
    (ValueError, "out: must have x's shape", lambda: RunningNormalizer()(ok, out=np.empty((3, 4), np.float32))),
    (TypeError, "out: must have dtype float32, got float64", lambda: RunningNormalizer()(ok, out=np.empty((4, 3)))),
    (ValueError, "out: must be x itself or share no memory", lambda: RunningNormalizer().normalize(ok.ravel()[:8], out=ok.ravel()[2:10])),
    (ValueError, "other: cannot be merged", lambda: RunningNormalizer("ema_abs").merge(RunningNormalizer("ema_abs"))),
    (ValueError, "other: must have mode 'mean', got 'std'", lambda: RunningNormalizer().merge(RunningNormalizer("std"))),
    (ValueError, r"other: must have shape \(\), got \(2,\)", lambda: RunningNormalizer().merge(RunningNormalizer(shape=2))),
    (ValueError, "state: was saved with mode 'std'", lambda: RunningNormalizer().load_state_dict(RunningNormalizer("std").state_dict())),
    (ValueError, "state: has no 'mode'", lambda: RunningNormalizer().load_state_dict({})),
    (ValueError, "state: holds a value that is not finite", lambda: damaged(mean=[np.nan])),
    (ValueError, "state: holds a value that is not finite", lambda: damaged(m2=[-1.0])),
    (ValueError, "state: is damaged", lambda: damaged(count=-1.0)),
    (ValueError, "state: 'mean' has the wrong type", lambda: damaged(mean="nothing")),
]


def damaged(**change):
    RunningNormalizer().load_state_dict({**RunningNormalizer().state_dict(), **change})


@pytest.mark.arguments
@pytest.mark.parametrize("kind, message, call", ERRORS, ids=[f"{i}-{m.split(':')[0]}" for i, (_, m, _) in enumerate(ERRORS)])
def test_errors_name_the_argument(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.arguments
def test_read_only_out_is_refused():
    out = np.empty((4, 3), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: must be writable"):
        RunningNormalizer()(ok, out=out)

import threading

import numpy as np
import pytest
import torch
from conftest import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_stats import ema

import urlfast
from urlfast import ema_update_

# the result's rounding, of values below 8: half a unit in the last place
ROUNDING = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 2.1e-3, torch.bfloat16: 1.7e-2}


def float64(tensor):
    return np.array(tensor.detach().cpu().double().numpy())  # a copy: float64 on the CPU would share


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", sorted(ROUNDING, key=str))
@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31), tau=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.995, 1.0]))
def test_matches_the_reference(device, dtype, data, seed, tau):
    generator = torch.Generator().manual_seed(seed)
    shapes = data.draw(st.lists(st.sampled_from([(), (1,), (7,), (0, 3), (33, 5), (4, 3, 2, 2), (20_001,)]), max_size=130))
    targets = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    sources = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    before = [(float64(t), float64(s)) for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, tau)
    for t, s, (old, source) in zip(targets, sources, before, strict=True):
        np.testing.assert_array_equal(float64(s), source)
        np.testing.assert_allclose(float64(t), ema(old, source, tau), rtol=0, atol=ROUNDING[dtype])
        if tau in (0.0, 1.0):
            np.testing.assert_array_equal(float64(t), (old, source)[int(tau)])


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_of_halves_is_torchs(device):
    """Every half as a target; tau = 0.5 and 1 make the float results that torch rounds to the same bits."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16).to(device)
    y = torch.randn(65536, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        target = (x.view(dtype) if dtype == torch.bfloat16 else x).clone()
        source = (y * 3).to(dtype)
        want = (source.float() - (source.float() - target.float()) * 0.5).to(dtype)
        ema_update_([target], [source], 0.5)
        torch.testing.assert_close(target, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_module_with_channels_last_weights(device):
    make = lambda: torch.nn.Sequential(torch.nn.Conv2d(4, 32, 8), torch.nn.Conv2d(32, 64, 4), torch.nn.Linear(64, 10))  # noqa: E731
    online, average = (make().to(device, memory_format=torch.channels_last) for _ in range(2))
    assert not online[0].weight.is_contiguous()
    want = [torch.lerp(a, o, 0.01) for a, o in zip(average.parameters(), online.parameters(), strict=True)]
    ema_update_(average.parameters(), online.parameters(), 0.01)
    for got, expected in zip(average.parameters(), want, strict=True):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-6, atol=1e-7)
        assert got.requires_grad and got.grad is None


def test_numpy_lists_and_mixed_dtypes():
    targets = [np.zeros(3, np.float32), np.zeros((2, 2)), np.zeros(5, np.float16)]
    ema_update_(targets, [np.ones_like(t) for t in targets], 0.25)
    for t in targets:
        np.testing.assert_array_equal(t, np.full_like(t, 0.25))


def test_an_empty_list_does_nothing():
    ema_update_([], (), 0.5)
    ema_update_(torch.nn.ReLU().parameters(), torch.nn.ReLU().parameters(), 0.5)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_split_the_concatenation_anywhere(threads):
    sizes = [1, 40_000, 3, 100_001, 16_384, 7] * 3
    generator = torch.Generator().manual_seed(0)
    targets, sources = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(2))
    want = [torch.lerp(t, s, 0.1) for t, s in zip(targets, sources, strict=True)]
    before = urlfast._core.num_threads()
    urlfast.set_num_threads(threads)
    ema_update_(targets, sources, 0.1)
    urlfast.set_num_threads(before)
    for got, expected in zip(targets, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_several_threads_call_at_once():
    pairs = [([torch.zeros(100_000)], [torch.ones(100_000)]) for _ in range(4)]
    callers = [threading.Thread(target=lambda p=p: [ema_update_(*p, 0.5) for _ in range(20)]) for p in pairs]
    [c.start() for c in callers]
    [c.join() for c in callers]
    for targets, _ in pairs:
        torch.testing.assert_close(targets[0], torch.full((100_000,), 1 - 0.5**20), rtol=1e-6, atol=0)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def read_only():
    array = zeros(3)
    array.flags.writeable = False
    return array


ERRORS = [
    (ValueError, r"tau: must lie in \[0, 1\], got 1.5", lambda: ema_update_([], [], 1.5)),
    (ValueError, "tau", lambda: ema_update_([], [], float("nan"))),
    (TypeError, "targets: must be a list or another iterable of arrays, got ndarray", lambda: ema_update_(zeros(3), [zeros(3)], 0.5)),
    (TypeError, "sources: must be a list or another iterable of arrays, got dict", lambda: ema_update_([zeros(3)], {"a": zeros(3)}, 0.5)),
    (TypeError, "targets: must be a list or another iterable of arrays, got int", lambda: ema_update_(3, [], 0.5)),
    (TypeError, r"targets\[1\]: must be an array", lambda: ema_update_([zeros(3), 4.0], [zeros(3), 4.0], 0.5)),
    (ValueError, "sources: must be as many as targets, 1, got 2", lambda: ema_update_([zeros(3)], [zeros(3)] * 2, 0.5)),
    (TypeError, r"targets\[1\]: must have dtype float16, bfloat16, float32, float64, got int64", lambda: ema_update_(
        [zeros(3), zeros(3, dtype=np.int64)], [zeros(3), zeros(3, dtype=np.int64)], 0.5)),
    (TypeError, r"sources\[0\]: must have dtype float32, got float64", lambda: ema_update_([zeros(3)], [zeros(3, dtype=np.float64)], 0.5)),
    (ValueError, r"sources\[1\]: must have the shape of targets\[1\], \(3, 4\), got \(4, 3\)", lambda: ema_update_(
        [zeros(1), zeros(3, 4)], [zeros(1), zeros(4, 3)], 0.5)),
    (ValueError, r"targets\[0\]: must be dense", lambda: ema_update_([zeros(4, 4)[:, :2]], [zeros(4, 4)[:, :2]], 0.5)),
    (ValueError, r"targets\[0\]: must be dense", lambda: ema_update_([torch.zeros(1).expand(3)], [torch.zeros(3)], 0.5)),
    (ValueError, r"sources\[0\]: must lie in memory as targets\[0\]", lambda: ema_update_([zeros(3, 4)], [zeros(4, 3).T], 0.5)),
    (ValueError, r"targets\[0\]: must be writable", lambda: ema_update_([read_only()], [zeros(3)], 0.5)),
]  # fmt: skip


@pytest.mark.arguments
@pytest.mark.parametrize("kind, message, call", ERRORS, ids=[f"{i}" for i in range(len(ERRORS))])
def test_errors_name_the_array(kind, message, call):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.arguments
def test_an_error_leaves_every_target_as_it_was():
    targets = [np.zeros(3), np.zeros(3)]
    with pytest.raises(ValueError, match=r"sources\[1\]"):
        ema_update_(targets, [np.ones(3), np.ones(4)], 0.5)
    assert not targets[0].any()


@pytest.mark.arguments
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_devices_must_agree():
    with pytest.raises(ValueError, match=r"sources\[0\]: must lie on cpu as targets\[0\] does, got cuda:0"):
        ema_update_([torch.zeros(3)], [torch.zeros(3, device="cuda")], 0.5)

"""What only a GPU can show: graphs, streams, no waiting, and the search's first pass. The kernels' values are tested beside the CPU's."""

import ctypes
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference_knn as reference
import torch
from conftest import DEVICES, to_numpy

import urlfast
from urlfast import EpisodicMemory, LatentDynamics, RunningNormalizer, ema_update_, knn, knn_reward
from urlfast.device import Arithmetic, Captured
from urlfast.learners.ddpg import DDPG, DDPGConfig, ddpg_networks
from urlfast.learners.drq_sac import DrQSAC, DrQSACConfig, drq_sac_networks
from urlfast.methods.apt import APT, APTConfig
from urlfast.methods.ngu import NGU, NGUConfig
from urlfast.methods.recurrent import RecurrentConfig, RecurrentTask

every_gpu = pytest.mark.parametrize("device", DEVICES[1:])


def normal(device, *shape, seed=0, mean=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)).to(device)


# The first pass on tensor cores: shapes at which it is taken ----------------------------------------------------------


def direct(z, memory, k, rows=48):
    """The same search in pieces too small for a first pass: its results are the direct search's."""
    pieces = [knn(part.contiguous(), memory, k) for part in z.split(rows)]
    return torch.cat([d for d, _ in pieces]), torch.cat([i for _, i in pieces])


def near_ties(device, b, m, d):
    """Every key about as far from every query, by less than bfloat16 tells apart."""
    q = normal(device, b, d) * 1e-3
    keys = normal(device, m, d, seed=1)
    return q, keys / keys.norm(dim=1, keepdim=True) * (1 + 1e-5 * torch.arange(m, device=device)[:, None] / m)


def clusters(device, b, m, d):
    """Far from each other and narrow: rounded about one centre, nothing within a cluster is told apart."""
    centres = normal(device, 8, d) * 1000
    rows = centres[torch.arange(m, device=device) % 8] + normal(device, m, d, seed=1) * 1e-2
    return rows[:b].contiguous(), rows


def whole_numbers(device, b, m, d):
    """Exact distances that tie often."""
    rng = np.random.default_rng(0)
    return tuple(torch.from_numpy(rng.integers(0, 3, (n, d)).astype(np.float32)).to(device) for n in (b, m))


def with_nan(device, b, m, d):
    q, keys = normal(device, b, d), normal(device, m, d, seed=1)
    keys[5], keys[7, 3], q[2] = torch.nan, torch.inf, torch.nan
    return q, keys


@every_gpu
@pytest.mark.parametrize("make", [near_ties, clusters, whole_numbers, with_nan], ids=lambda make: make.__name__)
@pytest.mark.parametrize("b, m, d, k", [(512, 4096, 1024, 16), (200, 30_000, 130, 100)])
def test_the_first_pass_changes_no_bit(device, make, b, m, d, k):
    q, keys = make(device, b, m, d)
    for got, want in zip(knn(q, keys, k), direct(q, keys, k), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@every_gpu
@pytest.mark.parametrize("b", [300, 4096])
def test_queries_may_begin_where_the_keys_do(device, b):
    memory = normal(device, 4096, 1024)
    for got, want in zip(knn(memory[:b], memory, 16), direct(memory[:b], memory.clone(), 16), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@every_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("include_self", [True, False])
def test_a_batch_as_its_own_pool_at_large_dim(device, dtype, include_self):
    z = normal(device, 1024, 520, mean=100).to(dtype)
    z[300:340] = z[0]
    distance, _ = knn(z, k=12, include_self=include_self)
    exact = torch.cdist(z.double(), z.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if not include_self:
        exact.fill_diagonal_(torch.inf)
    torch.testing.assert_close(distance.double(), exact.topk(12, largest=False).values, rtol=3e-6, atol=3e-6)


@every_gpu
def test_ragged_batches_at_large_dim(device):
    rng = np.random.default_rng(3)
    q, pool = rng.normal(size=(3, 128, 256)).astype(np.float32), rng.normal(size=(3, 9000, 256)).astype(np.float32)
    lengths = [0, 9, 9000]
    for s, n in enumerate(lengths):
        pool[s, n:] = np.nan
    got = knn_reward(torch.from_numpy(q).to(device), 12, torch.from_numpy(pool).to(device), lengths=lengths)
    np.testing.assert_allclose(to_numpy(got), reference.knn_reward(q, 12, pool, lengths), rtol=1e-5)


# Graphs, streams, waiting ---------------------------------------------------------------------------------------------


def pieces(device):
    """Every native call that an update may make, on static inputs: name -> (inputs, function of them)."""
    z, memory = normal(device, 64, 40), normal(device, 300, 40, seed=1)
    wide, keys = normal(device, 256, 1024), normal(device, 4096, 1024, seed=1)
    normalizer, statistic = RunningNormalizer("var", device=device), RunningNormalizer("std", shape=(40,), device=device)
    target = torch.zeros(1000, device=device)
    dynamics = LatentDynamics(64, 40, episode_length=3, seed=1, device=device)
    dynamics.reset()
    episodes = EpisodicMemory(64, 100, 40, k=5, device=device)
    reset = torch.zeros(64, dtype=torch.bool, device=device)
    lengths = list(range(64))

    def ema(x):
        ema_update_([target], [x.flatten()[:1000]], 0.1)
        return target.clone()

    def step(x):
        return torch.from_dlpack(dynamics.step(x)[0]).clone()

    return {
        "knn": ([z, memory], lambda x, m: knn(x, m, 5)[0]),
        "knn, parts": ([wide[:, :64].contiguous(), keys[:, :64].contiguous()], lambda x, m: knn(x, m, 200)[0]),
        "knn, first pass": ([wide, keys], lambda x, m: knn(x, m, 16)[0]),
        "knn_reward": ([z], lambda x: knn_reward(x, 12, normalizer=normalizer)),
        "ragged": ([z[:, None].contiguous(), memory.repeat(64, 1, 1)], lambda x, m: knn_reward(x, 5, m, lengths=lengths)),
        "normalizer": ([z], lambda x: statistic(x)),
        "ema": ([wide], ema),
        "latent": ([z], step),
        "episodes": ([z], lambda x: episodes.step(x, reset)),
    }


CALLS = ["knn, first pass", "knn_reward", "ragged", "normalizer", "ema", "latent", "episodes"]


@every_gpu
@pytest.mark.parametrize("name", ["knn", "knn, parts", *CALLS])
def test_calls_can_be_captured_and_replayed(device, name):
    """A replay with new inputs does what the call does: the states on the device move on as they would."""
    inputs, captured = pieces(device)[name]
    _, eager = pieces(device)[name]
    static = [x.clone() for x in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured(*static), eager(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = captured(*static)
    for seed in range(3):
        fresh = [x + normal(device, *x.shape, seed=10 + seed) for x in inputs]
        for to, x in zip(static, fresh, strict=True):
            to.copy_(x)
        graph.replay()
        torch.testing.assert_close(output, eager(*fresh), rtol=0, atol=0)


@every_gpu
@pytest.mark.parametrize("name", CALLS)
def test_calls_run_on_the_callers_stream_and_wait_for_nothing(device, name):
    """Behind a stream that is held up: the call returns at once, and what it computes comes after what was queued before it."""
    inputs, call = pieces(device)[name]
    _, beside = pieces(device)[name]
    late = [torch.empty_like(x) for x in inputs]
    call(*inputs), beside(*inputs)
    stream = torch.cuda.Stream()  # non-blocking: the legacy stream does not wait for it, nor it for that
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # some 0.3 s
        for to, x in zip(late, inputs, strict=True):
            to.copy_(x)
        got = call(*late)
        assert not stream.query()
    stream.synchronize()
    torch.testing.assert_close(got, beside(*inputs), rtol=0, atol=0)


@every_gpu
@pytest.mark.parametrize("config", [APTConfig(batch_size=16), replace(APTConfig.mini_apt(), batch_size=16)], ids=["paper", "mini_apt"])
def test_an_apt_update_waits_for_nothing(device, config):
    """Else it could not be captured, and acting would wait for it."""
    method = APT(config, (4, 84, 84), 3, device=device, seed=0)
    rng = np.random.default_rng(0)
    arrays = dict(
        observation=rng.integers(0, 256, (16, 4, 84, 84), np.uint8),
        next_observation=rng.integers(0, 256, (16, 4, 84, 84), np.uint8),
        action=rng.integers(0, 3, 16),
        discount=np.ones(16, np.float32),
    )
    batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    method.gradient_step(**batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.gradient_step(**batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_gpu
@pytest.mark.parametrize("make", [RecurrentTask, NGU])
def test_acting_with_a_memory_waits_once_a_step(device, make):
    """For Q. What else the host needs, the state and the novelty that are stored, has come before; uploads are not waited for."""
    config = RecurrentConfig() if make is RecurrentTask else NGUConfig()
    method, random = make(config, (4, 84, 84), 3, device=device, seed=0), np.random.default_rng(0)

    def step(first):
        shown = SimpleNamespace(observation=random.integers(0, 256, (5, 4, 84, 84), np.uint8), reward=np.ones(5, np.float32))
        shown.is_first, shown.is_last = np.full(5, first), np.zeros(5, bool)
        return shown

    method.act(step(True))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True, action="always") as waits:
            method.act(step(False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(warning.message) for warning in waits]


@every_gpu
@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("kind", ["ddpg", "sac"])
def test_captured_updates_of_continuous_control_equal_eager_ones(device, kind, convolutions):
    """Each kind of update as a graph of its own: noise follows its schedule, and draws go on between the graphs. Eager ones never wait."""
    features, actions, rows = 20, 3, 16
    rng = np.random.default_rng(0)

    def learner():
        torch.manual_seed(0)
        if kind == "ddpg":
            make, networks, config = DDPG, ddpg_networks, DDPGConfig(hidden=32, sigma=1.0, sigma_final=0.1, sigma_steps=12)
        else:
            make, networks, config = DrQSAC, drq_sac_networks, DrQSACConfig(hidden=32)
        generators = torch.Generator(), torch.Generator(device).manual_seed(0)
        arithmetic = Arithmetic.choose(device, "fp32")
        built = make(config, *networks(config, features, actions, convolutions), actions, arithmetic, *generators)

        def step(observation, after, action, reward, discount):
            batch = SimpleNamespace(action=action, discount=discount)
            online = [observation.detach().requires_grad_() for _ in range(2)]
            metrics, priorities = built.update(batch, reward, online, [(after, after), (after + 1, after)])
            return metrics | {"priorities": priorities, "gradient": online[1].grad}

        return built, step

    (captured, step), (eager, eager_step) = learner(), learner()
    graphs = {whole: Captured(step, torch.device(device), (captured.update_generator,)) for whole in (True, False)}
    for i in range(12):
        arrays = {name: rng.normal(size=(rows, features)).astype(np.float32) for name in ("observation", "after")}
        arrays |= {"action": rng.uniform(-1, 1, (rows, actions)).astype(np.float32)}
        arrays |= {name: rng.uniform(0, 1, rows).astype(np.float32) for name in ("reward", "discount")}
        tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        got = graphs[captured.prepare(i)](**arrays)
        eager.prepare(i)
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        try:
            expected = eager_step(**tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)
    assert graphs[True].graph is not None and (kind == "ddpg" or graphs[False].graph is not None)


@every_gpu
def test_arrays_of_two_streams_are_ordered(device):
    """A search reads its memory after the other library's stream has written it."""
    cupy = pytest.importorskip("cupy")
    q, keys = normal(device, 64, 40), np.random.default_rng(1).normal(size=(300, 40)).astype(np.float32)
    theirs = cupy.cuda.Stream(non_blocking=True)
    with theirs:
        memory = cupy.zeros((300, 40), np.float32)
        big = cupy.ones((1 << 28,), np.float32)
        for _ in range(20):
            big *= 1.5
        memory.set(keys)
        got = urlfast.knn(q, memory, 5)[0]
    torch.testing.assert_close(got, knn(q, torch.from_numpy(keys).to(device), 5)[0], rtol=0, atol=0)


@every_gpu
def test_our_arrays_speak_both_generations_of_dlpack(device):
    """Who names no version, as torch before 2.9 and JAX, understands the first alone."""
    array = LatentDynamics(4, 3, episode_length=3, seed=1, device=device).reset()[0]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    for options, generation in (
        ({}, b"dltensor"),
        ({"stream": 1, "max_version": None}, b"dltensor"),
        ({"max_version": (0, 8)}, b"dltensor"),
        ({"max_version": (1, 0)}, b"dltensor_versioned"),
        ({"max_version": (1, 3), "copy": False}, b"dltensor_versioned"),
    ):
        assert name(array.__dlpack__(**options)) == generation

    class Older:
        __dlpack_device__ = array.__dlpack_device__

        def __dlpack__(self, stream=None):
            return array.__dlpack__(stream=stream)

    torch.testing.assert_close(torch.from_dlpack(Older()), torch.from_dlpack(array), rtol=0, atol=0)
    for refused in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError):
            array.__dlpack__(**refused)


@every_gpu
def test_our_arrays_are_ordered_for_whoever_takes_them(device):
    """A library without an allocator that we know gets memory of ours, filled on the stream it named; another one waits for it."""

    class Foreign:
        def __init__(self, tensor):
            self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__

    z, stream = normal(device, 64, 40), torch.cuda.Stream()
    late, want = torch.zeros_like(z), knn_reward(z, 12)
    dynamics, beside = (LatentDynamics(64, 40, episode_length=3, seed=1, device=device) for _ in range(2))
    dynamics.reset(), beside.reset()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # some 0.3 s
        late.copy_(z)
        reward, row = knn_reward(Foreign(late), 12), dynamics.step(Foreign(late))[0]
        assert not stream.query()
    torch.testing.assert_close(torch.from_dlpack(reward), want, rtol=0, atol=0)
    torch.testing.assert_close(torch.from_dlpack(row), torch.from_dlpack(beside.step(Foreign(z))[0]), rtol=0, atol=0)

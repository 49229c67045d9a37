"""Wrong scalars, paths and dicts: every public function names the argument, what came and what is accepted."""

import copy
import pickle

import numpy as np
import pytest
import torch
from reference_replay import opening_rows

import urlfast
from urlfast import EpisodicMemory, Field, LatentDynamics, RunningNormalizer, SequenceReplay, _core, ema_update_, knn, knn_reward

Z = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
ROWS = {"observation": Field((2,), "uint8")}
REPLAY = {"capacity": 100, "fields": ROWS, "num_streams": 2, "n_step": 3, "gamma": 0.99}
SEQUENCES = {**REPLAY, "n_step": None, "gamma": None, "sequence_length": 8}


def replay(**change):
    return SequenceReplay(**{**REPLAY, **change})


def good_rows():
    return opening_rows(2, ROWS["observation"].shape)


NO_INT = {"2.0": 2.0, "None": None, "'3'": "3", "True": True, "list": [3], "ndarray": np.ones(2)}
NO_NUMBER = {"'x'": "x", "None": None, "True": True, "list": [1.0]}
NO_BOOL = {"None": None, "1": 1, "'yes'": "yes", "0.0": 0.0}
INTS = {  # by the name in the message
    "k": [
        lambda v: knn(Z, k=v),
        lambda v: knn_reward(Z, v),
        lambda v: EpisodicMemory(2, 4, 3, k=v),
    ],
    "num_streams": [lambda v: EpisodicMemory(v, 4, 3), lambda v: replay(num_streams=v)],
    "capacity": [lambda v: EpisodicMemory(2, v, 3), lambda v: replay(capacity=v)],
    "dim": [lambda v: EpisodicMemory(2, 4, v)],
    "n": [urlfast.set_num_threads],
    "num_envs": [lambda v: LatentDynamics(v, 4)],
    "latent_dim": [lambda v: LatentDynamics(4, v)],
    "num_classes": [lambda v: LatentDynamics(4, 4, v)],
    "episode_length": [lambda v: LatentDynamics(4, 4, episode_length=v)],
    "seed": [lambda v: LatentDynamics(4, 4, seed=v), lambda v: replay(seed=v)],
    "ring": [lambda v: replay(ring=v)],
    "stride": [lambda v: replay(stride=v)],
    "burn_in": [lambda v: replay(burn_in=v)],
    "B": [lambda v: replay().sample(v), lambda v: replay().layout(v), lambda v: replay().sample(v, out={})],
}
NUMBERS = {
    "exponent": [lambda v: knn_reward(Z, 2, exponent=v)],
    "c": [lambda v: knn_reward(Z, 2, c=v)],
    "epsilon": [lambda v: RunningNormalizer(epsilon=v)],
    "momentum": [lambda v: RunningNormalizer(momentum=v)],
    "alpha": [lambda v: LatentDynamics(4, 4, alpha=v)],
    "beta": [lambda v: LatentDynamics(4, 4, beta=v)],
    "tau": [lambda v: ema_update_([], [], v)],
    "eta": [lambda v: replay(eta=v)],
    "priority_exponent": [lambda v: replay(priority_exponent=v)],
    "importance_exponent": [lambda v: replay(importance_exponent=v)],
}
BOOLS = {
    "include_self": [lambda v: knn(Z, k=2, include_self=v), lambda v: knn_reward(Z, 2, include_self=v)],
    "update_normalizer": [lambda v: knn_reward(Z, 2, update_normalizer=v)],
    "cross_episodes": [lambda v: SequenceReplay(**{**SEQUENCES, "cross_episodes": v})],
    "read_only": [lambda v: SequenceReplay.load("nowhere", read_only=v)],
}


def cases(calls, wrong):
    return [
        pytest.param(call, value, name, shown, id=f"{name}-{i}-{shown}")
        for name, several in calls.items()
        for i, call in enumerate(several)
        for shown, value in wrong.items()
    ]


@pytest.mark.parametrize("call, value, name, shown", cases(INTS, NO_INT))
def test_what_is_no_int_is_refused_by_name(call, value, name, shown):
    with pytest.raises(TypeError) as error:
        call(value)
    assert str(error.value) == f"{name}: must be an int, got {shown}"


@pytest.mark.parametrize("call, value, name, shown", cases(NUMBERS, NO_NUMBER))
def test_what_is_no_number_is_refused_by_name(call, value, name, shown):
    with pytest.raises(TypeError) as error:
        call(value)
    assert str(error.value) == f"{name}: must be a number, got {shown}"


@pytest.mark.parametrize("call, value, name, shown", cases(BOOLS, NO_BOOL))
def test_what_is_no_bool_is_refused_by_name(call, value, name, shown):
    with pytest.raises(TypeError) as error:
        call(value)
    assert str(error.value) == f"{name}: must be a bool, got {shown}"


@pytest.mark.parametrize("call, value, name, shown", cases(INTS, {"2^70": 2**70, "-2^70": -(2**70)}))
def test_integers_beyond_64_bits_are_refused_by_name(call, value, name, shown):
    with pytest.raises(ValueError, match=rf"^{name}: must lie in .*, got -?118"):
        call(value)


@pytest.mark.parametrize("call, value, name, shown", cases(NUMBERS, {"10^400": 10**400}))
def test_numbers_beyond_float64_are_refused_by_name(call, value, name, shown):
    with pytest.raises(ValueError, match=rf"^{name}: must lie in the range of float64, got 1000"):
        call(value)


def test_numpy_scalars_are_numbers():
    got = knn_reward(Z, np.int64(2), exponent=np.float32(1), c=np.int32(1), include_self=np.bool_(False))
    np.testing.assert_array_equal(got, knn_reward(Z, 2, include_self=False))
    assert LatentDynamics(np.int32(3), 4, seed=np.uint64(2**64 - 1)).num_envs == 3
    assert RunningNormalizer(shape=np.int64(3)).shape == RunningNormalizer(shape=[3]).shape == (3,)
    assert replay(seed=np.uint64(2**64 - 1)).sampleable == 0
    with pytest.raises(TypeError, match=r"^k: must be an int, got bool"):
        knn(Z, k=np.bool_(True))


OTHERS = [
    (TypeError, r"reduction: must be 'mean' or 'kth', got None", lambda: knn_reward(Z, 2, reduction=None)),
    (ValueError, r"reduction: must be 'mean' or 'kth', got 'max'", lambda: knn_reward(Z, 2, reduction="max")),
    (TypeError, r"mode: must be 'mean', 'std', 'var' or 'ema_abs', got 1", lambda: RunningNormalizer(1)),
    (TypeError, r"shape: must be an int or a tuple of ints, got 2\.0", lambda: RunningNormalizer(shape=2.0)),
    (TypeError, r"shape: must be an int or a tuple of ints, got 1\.5", lambda: RunningNormalizer(shape=(3, 1.5))),
    (TypeError, r"shape: must be an int or a tuple of ints, got True", lambda: RunningNormalizer(shape=True)),
    (TypeError, r"device: must be 'cpu', 'cuda' or 'cuda:N', got '\\ud800'", lambda: RunningNormalizer(device="\ud800")),
    (TypeError, r"clip: must be None or a number, got 'x'", lambda: RunningNormalizer(clip="x")),
    (TypeError, r"other: must be a RunningNormalizer, got None", lambda: RunningNormalizer().merge(None)),
    (TypeError, r"state: must be a dict, got None", lambda: RunningNormalizer().load_state_dict(None)),
    (TypeError, r"state: must be a dict, got list", lambda: LatentDynamics(3, 4).load_state_dict([])),
    (TypeError, r"state: must be a dict, got 3", lambda: EpisodicMemory(2, 4, 3).load_state_dict(3)),
    (TypeError, r"rows: must be a dict of str to arrays, got None", lambda: replay().add(None)),
    (TypeError, r"out: must be a dict of str to arrays, got 5", lambda: replay().sample(2, out=5)),
    (TypeError, r"fields: must be a dict of str to urlfast.Field, got None", lambda: replay(fields=None)),
    (TypeError, r"gamma: must be a number, got True", lambda: replay(gamma=True)),
    (TypeError, r"expected_rows: must be an int, got True", lambda: replay(expected_rows=True)),
    (TypeError, r"fields: 'observation' must have an int every, got True", lambda: replay(fields={"observation": Field((2,), every=True)})),
    (TypeError, r"fields: 'observation' must have a tuple of ints", lambda: replay(fields={"observation": Field((True,))})),
    (ValueError, r"storage: must be 'memory' or 'file', got list", lambda: replay(storage=[])),
    (ValueError, r"storage: must be 'memory' or 'file', got 'disk'", lambda: SequenceReplay.load("nowhere", storage="disk")),
    (TypeError, r"path: must be a path, got 3", lambda: replay(storage="file", path=3)),
    (TypeError, r"folder: must be a path, got None", lambda: replay().save(None)),
    (TypeError, r"folder: must be a path, got None", lambda: SequenceReplay.load(None)),
    (TypeError, r"manifest: must be a path, got 1", lambda: SequenceReplay.load("nowhere", manifest=1)),
    (TypeError, r"folder: must be a path, got None", lambda: SequenceReplay.prune(None)),
    (TypeError, r"keep: must be a list of paths, got 'manifest.json'", lambda: SequenceReplay.prune("nowhere", keep="manifest.json")),
]


@pytest.mark.parametrize("kind, message, call", OTHERS, ids=[f"{i}-{m.split(':')[0]}" for i, (_, m, _) in enumerate(OTHERS)])
def test_the_message_names_the_argument(kind, message, call):
    with pytest.raises(kind, match=f"^{message}"):
        call()


@pytest.mark.parametrize("make", [lambda: RunningNormalizer(clip="x"), lambda: EpisodicMemory(2, 4, "x")], ids=["normalizer", "memory"])
def test_an_object_that_was_refused_can_be_shown(make):
    with pytest.raises(TypeError) as error:
        make()
    shown = repr(error.traceback[2].frame.f_locals["self"])  # as pytest, rich and debuggers do
    assert shown in ("RunningNormalizer(refused)", "EpisodicMemory(refused)")


# Arrays that cannot be taken ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="longdouble is float64 here")
def test_a_longdouble_is_told_what_is_accepted():
    with pytest.raises(TypeError, match=r"^z: must have one of the dtypes bool, uint8, .*float16, bfloat16, float32, float64, got \w+$"):
        knn_reward(Z.astype(np.longdouble), 2)
    with pytest.raises(TypeError, match=r"^x: must have dtype float16, bfloat16, float32, float64, got int64$"):
        RunningNormalizer().update(np.arange(3))


class Tensor(torch.Tensor):
    """Not torch's own type: it is asked by __dlpack__, not by the C exchange table."""


UNSHARED = {
    "meta": lambda: torch.empty(5, 3, device="meta"),
    "meta of a subclass": lambda: torch.empty(5, 3, device="meta").as_subclass(Tensor),
    "sparse": lambda: torch.ones(5, 3).to_sparse(),
}


@pytest.mark.parametrize("make", UNSHARED.values(), ids=UNSHARED)
def test_what_torch_cannot_share_is_one_line(make):
    with pytest.raises(TypeError, match=r"\Az: cannot be shared: \w+: .+\Z") as error:
        knn_reward(make(), 2)
    assert "\n" not in str(error.value)


# Devices, copies and rewards ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(_core.build_info()["cuda_usable"], reason="CUDA is usable here")
@pytest.mark.parametrize(
    "call",
    [
        lambda: RunningNormalizer(device="cuda"),
        lambda: EpisodicMemory(2, 4, 3, device="cuda"),
        lambda: LatentDynamics(3, 4, device="cuda"),
        lambda: replay(device="cuda"),
        lambda: replay(device="cuda:3"),
    ],
)
def test_a_device_that_is_not_usable_is_a_runtime_error(call):
    with pytest.raises(RuntimeError, match=r"^device: CUDA is not usable here: "):
        call()


@pytest.mark.parametrize("change, message", [(REPLAY, "another is for sequences"), (SEQUENCES, "the stride is 1")])
def test_every_without_a_stride_is_refused(change, message):
    with pytest.raises(ValueError, match=rf"^fields: 'state' must have every=1 \({message}\), got 2$"):
        SequenceReplay(**{**change, "fields": {**ROWS, "state": Field((3,), every=2)}})


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_replay_is_saved_not_copied(copied):
    with pytest.raises(TypeError, match=r"^SequenceReplay: cannot be copied or pickled; save\(folder\)"):
        copied(replay())


@pytest.mark.parametrize("tensor", [False, True])
def test_a_nan_reward_is_refused_and_nothing_is_appended(tensor):
    r, rows = replay(), good_rows()
    rows["reward"] = np.array([[0, 9], [np.nan, 9]], np.float32)[:, 0]  # rows need not lie together
    if tensor:
        rows["reward"] = torch.from_numpy(rows["reward"])
    with pytest.raises(ValueError, match=r"^reward: must not be NaN, got NaN in row 1$"):
        r.add(rows)
    assert len(r) == 0
    r.add(good_rows())
    assert len(r) == 2


# What used to reach memory that nobody owns, or to lose what it was given -------------------------------------------------


@pytest.mark.parametrize(
    "cls, call",
    [
        (EpisodicMemory, lambda m: m.lengths()),
        (EpisodicMemory, lambda m: m.step(np.zeros((1, 1), np.float32), np.zeros(1, bool))),
        (RunningNormalizer, lambda n: n.state_dict()),
        (RunningNormalizer, lambda n: RunningNormalizer().merge(n)),
        (RunningNormalizer, lambda n: knn_reward(Z, 2, normalizer=n)),
        (LatentDynamics, lambda d: d.reset()),
        (_core.SequenceReplay, lambda r: r.size()),
    ],
)
def test_an_object_whose_init_never_ran_says_so(cls, call):
    with pytest.raises(RuntimeError, match=rf"^{cls.__name__}: its __init__ was refused, or never called$"):
        call(cls.__new__(cls))


def test_so_does_one_that_was_refused():
    memory = EpisodicMemory.__new__(EpisodicMemory)
    with pytest.raises(ValueError, match="num_streams"):
        memory.__init__(0, 1, 1)
    with pytest.raises(RuntimeError, match="refused, or never called"):
        memory.lengths()

    class Both(EpisodicMemory, RunningNormalizer):  # two C++ parts, of which one is made
        def __init__(self):
            EpisodicMemory.__init__(self, 2, 4, 3)

    with pytest.raises((RuntimeError, TypeError), match="__init__"):
        Both().state_dict() and RunningNormalizer.state_dict(Both())


@pytest.mark.parametrize(
    "name, call",
    [
        ("k", lambda: knn(Z[None], Z[None], 2**63 - 1, lengths=[2])),
        ("k", lambda: EpisodicMemory(2**15, 4, 3, k=2**31 - 1).step(np.zeros((2**15, 3), np.float32), np.zeros(2**15, bool))),
        ("capacity", lambda: EpisodicMemory(2, 2**31 - 1, 2**26)),
        ("num_envs", lambda: LatentDynamics(2**31, 32)),
        # products that leave int64: the first one came out as no bytes at all
        ("capacity", lambda: replay(capacity=2**31 - 64, num_streams=1, expected_rows=1, fields={"observation": Field((2**33,), "uint8")})),
        ("capacity", lambda: replay(capacity=2**31 - 64, num_streams=1, fields={"observation": Field((2**40,), "uint8")})),
    ],
)
def test_more_than_any_memory_is_refused_by_name(name, call):
    with pytest.raises(MemoryError, match=rf"^{name}: "):
        call()


@pytest.mark.parametrize("length", [2**10, 2**20])
def test_a_batch_larger_than_memory_is_refused_by_name(length):
    fields = {"observation": Field((2**16,), "uint8")}
    r = SequenceReplay(2**21, fields, num_streams=1, sequence_length=length, stride=length, expected_rows=3)
    for t in range(3):
        flags = {"terminated": np.zeros(1, bool), "is_first": np.array([t == 0]), "is_last": np.array([t == 2])}
        r.add({"observation": np.zeros((1, 2**16), np.uint8), "reward": np.zeros(1, np.float32), **flags})
    assert r.sampleable == 1
    with pytest.raises(MemoryError, match=r"^B: 16777216 items of this replay take "):
        r.sample(2**24)


def test_lengths_beyond_64_bits_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^lengths: must lie in -2\^63\.\.2\^63-1, got 118"):
        knn(Z[None], Z[None], 2, lengths=[2**70])
    with pytest.raises(TypeError, match=r"^lengths: must hold integers, got True$"):
        knn(Z[None], Z[None], 2, lengths=[True])


@pytest.mark.parametrize("device", [None, (1,), ("x", 0), 3])
def test_an_exporter_that_names_no_device_is_refused_by_name(device):
    class Exporter:
        def __dlpack__(self, **_):
            return None

        def __dlpack_device__(self):
            return device

    with pytest.raises(TypeError, match=r"^queries: must be an array whose __dlpack_device__ is two ints, got "):
        knn(Exporter())


def test_a_refused_out_leaves_the_statistic_as_it_was():
    n = RunningNormalizer()
    before = n.state_dict()
    with pytest.raises(ValueError, match="out: must have x's shape"):
        n(np.ones(3, np.float32), out=np.zeros(2, np.float32))
    assert n.state_dict() == before


def test_a_merge_that_would_not_be_finite_changes_nothing():
    a, b = RunningNormalizer("std"), RunningNormalizer("std")
    state = {"mode": "std", "shape": [], "count": 2.0, "mean": [0.0], "m2": [1.7e308]}
    a.load_state_dict(state), b.load_state_dict(state)
    with pytest.raises(ValueError, match=r"^other: has seen too much"):
        a.merge(b)
    assert a.state_dict() == state


def test_booleans_of_other_bytes_than_0_and_1_are_true():
    """NumPy's and torch's views of bytes as bool hold any of them."""
    true = np.array([2, 252], np.uint8).view(bool)
    r = replay(n_step=1)
    for t in range(6):
        flags = {"is_first": true if t % 3 == 0 else ~true & False, "terminated": np.zeros(2, bool), "is_last": np.zeros(2, bool)}
        r.add({**good_rows(), **flags, **({"is_last": true} if t == 2 else {}), **({"terminated": true} if t == 1 else {})})
    assert r.sampleable == 8
    batch = r.sample(200)
    np.testing.assert_array_equal(batch.discount == 0, batch.indices // 2 == 1)
    memory = EpisodicMemory(2, 4, 3)
    for _ in range(2):
        memory.step(Z[:2], true)
    assert memory.lengths() == [1, 1]
    prioritised = replay(n_step=1, priority_exponent=1.0)
    for t in range(3):
        prioritised.add({**good_rows(), "is_first": np.full(2, t == 0)})
    before = prioritised._core.totals()
    prioritised.update_priorities(np.arange(2), np.full(2, 9, np.float32), true)
    assert prioritised._core.totals()[0] == before[0] + 2 * 8 * 2**24


@pytest.mark.parametrize("call", [SequenceReplay.load, SequenceReplay.prune, replay().save, lambda p: replay(storage="file", path=p)])
def test_a_null_character_in_a_path_is_refused_by_name(call):
    with pytest.raises(ValueError, match=r"^(folder|path): must not hold a null character"):
        call("a\0b")


def test_a_manifest_that_nests_without_end_is_refused_by_name(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json: is not the manifest of a saved replay"):
        SequenceReplay.load(tmp_path)


@pytest.mark.parametrize("dtype", ["(2,", "float32,,", "(-1,)f4", 3.0, object])
def test_no_dtype_at_all_is_refused_by_name(dtype):
    with pytest.raises((TypeError, ValueError), match=r"^fields: 'observation' must have "):
        replay(fields={"observation": Field((2,), dtype)})


def test_importance_exponents_above_1_overflowed():
    with pytest.raises(ValueError, match=r"^importance_exponent: must lie in 0\.\.1, got 100"):
        replay(priority_exponent=1.0, importance_exponent=100.0)


@pytest.mark.parametrize("junk", [np.array("x"), len, object(), {}, "x"], ids=repr)
@pytest.mark.parametrize("make", [RunningNormalizer, lambda: LatentDynamics(2, 3)])
def test_a_state_of_wrong_types_is_refused_by_its_key(make, junk):
    target = make()
    for key in target.state_dict():
        for value in (junk, [junk]):
            with pytest.raises(ValueError, match=r"^state: "):
                target.load_state_dict({**target.state_dict(), key: value})


def test_text_that_numpy_would_read_as_a_number_is_refused_by_name():
    with pytest.raises(TypeError, match=r"^exponent: must be a number, got ndarray$"):
        knn_reward(Z, 2, exponent=np.array("x"))
    with pytest.raises(TypeError, match=r"^keep: must be a list of paths, got ndarray$"):
        SequenceReplay.prune("nowhere", keep=np.array("x"))


def test_an_update_of_nothing_is_taken_however_it_lies_in_memory():
    r = SequenceReplay(**SEQUENCES, priority_exponent=1.0)
    r.add(good_rows())
    td = np.random.default_rng(0).standard_normal((0, 7)).astype(np.float32)  # its strides are zeros
    r.update_priorities(np.zeros(0, np.int64), td, td > 0)

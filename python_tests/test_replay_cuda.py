"""SequenceReplay on a CUDA device beside the one on the CPU: the same rows and seed give the same batches."""

import numpy as np
import pytest
import torch
from conftest import DEVICES, on, to_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_replay import FLAGS, replay_rows, replay_settings

from urlfast import Field, SequenceReplay

CUDA = [device for device in DEVICES if device != "cpu"]
GOOD = {"capacity": 100, "fields": {"observation": Field((1, 2, 3), "uint8")}, "num_streams": 2, "n_step": 3, "gamma": 0.99}


def moved(device, rows, rng):
    """Some of the columns on the device: those that need not be on the host."""
    return {name: on(device, value) if name not in FLAGS and rng.random() < 0.4 else value for name, value in rows.items()}


class Pair:
    """One replay on the CPU, one on the device, fed alike."""

    def __init__(self, device, capacity, fields, seed, **options):
        self.device, self.fields, self.rng = device, fields, np.random.default_rng(seed)
        self.cpu = SequenceReplay(capacity, fields, **options, seed=seed)
        self.cuda = SequenceReplay(capacity, fields, **options, seed=seed, device=device)
        self.streams, self.prioritised = options["num_streams"], options.get("priority_exponent", 0) > 0
        self.closed = np.ones(self.streams, bool)

    def feed(self, steps, bulk=0, ends=0.12):
        for _ in range(steps):
            everyone = self.rng.random() < 0.5 and not bulk
            streams = (
                np.arange(self.streams)
                if everyone
                else self.rng.integers(0, self.streams, bulk or self.rng.integers(1, 2 * self.streams + 1))
            )
            rows = replay_rows(self.rng, self.fields, self.closed, streams, ends=ends, priority=self.prioritised)
            self.cpu.add(rows, None if everyone else streams)
            self.cuda.add(moved(self.device, rows, self.rng), None if everyone else streams)

    def compare(self, batch_size, exact=True):
        assert len(self.cuda) == len(self.cpu) and self.cuda.sampleable == self.cpu.sampleable
        if exact:
            assert self.cuda._core.totals() == self.cpu._core.totals()
        if self.cpu.sampleable == 0:
            with pytest.raises(ValueError, match="sample: nothing to sample yet"):
                self.cuda.sample(batch_size)
            with pytest.raises(ValueError, match="sample: nothing to sample yet"):
                self.cpu.sample(batch_size)
            return None
        ours, theirs = self.cuda.sample(batch_size), self.cpu.sample(batch_size)
        assert ours.keys() == theirs.keys()
        for name in theirs.keys():
            if name == "weight":  # the power is each device's own
                np.testing.assert_allclose(to_numpy(ours[name]), theirs[name], rtol=1e-6)
            else:
                np.testing.assert_array_equal(to_numpy(ours[name]), theirs[name], err_msg=name)
        return ours, theirs

    def update(self, ours, theirs, mask=False):
        td = self.rng.normal(
            size=(len(theirs.indices), *([] if "steps" in theirs.keys() else [theirs.mask.shape[1] - self.burn_in]))
        ).astype(np.float32)
        where = self.rng.random(td.shape) < 0.7 if mask else None
        self.cpu.update_priorities(theirs.indices, td, where)
        self.cuda.update_priorities(ours.indices, on(self.device, td), None if where is None else on(self.device, where))
        assert self.cuda.stale_updates == self.cpu.stale_updates

    @property
    def burn_in(self):
        return self.cpu._options["burn_in"]


@st.composite
def settings_of_a_replay(draw):
    observations = [Field((1, 2, 3), "uint8"), Field((2, 2), "float32"), Field((5,), "int16"), Field((1, 96, 96), "uint8")]
    # 1.0 and 0.0: powers that are exact, so that leaves must agree to the bit
    how = {"n_steps": [1, 3, 6, 40], "lengths": [2, 3, 6, 37], "exponents": [1.0]}
    capacity, fields, options = replay_settings(lambda choices: draw(st.sampled_from(choices)), observations, **how)
    if draw(st.booleans()):
        fields |= {f"extra{i}": Field((i % 3 + 1,), "uint8") for i in range(26)}  # more columns than one launch takes
    return capacity, fields, options


@pytest.mark.parametrize("device", CUDA)
@settings(max_examples=60, deadline=None)
@given(replay=settings_of_a_replay(), seed=st.integers(0, 2**32 - 1), ends=st.sampled_from([0.02, 0.12, 0.4]))
def test_both_devices_give_the_same_batches(device, replay, seed, ends):
    capacity, fields, options = replay
    pair = Pair(device, capacity, fields, seed, **options)
    batches = []
    for _ in range(6):
        pair.feed(int(pair.rng.integers(1, 12)), ends=ends)
        drawn = pair.compare(5)
        if drawn:
            pair.update(*drawn, mask=pair.rng.random() < 0.5)
            batches.append((on(device, to_numpy(drawn[0].indices).copy()), drawn[1].indices.copy()))
            late = batches[int(pair.rng.integers(len(batches)))]  # some of these rows are gone
            td = pair.rng.random((5, *([] if "n_step" in options else [options["sequence_length"] - 1 - options["burn_in"]]))).astype(
                np.float32
            )
            pair.cpu.update_priorities(late[1], td)
            pair.cuda.update_priorities(late[0], on(device, td))
            assert pair.cuda.stale_updates == pair.cpu.stale_updates
    pair.feed(1, bulk=int(pair.rng.integers(1, 4 * capacity)), ends=ends)  # slots are written several times in one call
    pair.compare(7)


@pytest.mark.parametrize("device", CUDA)
def test_priorities_of_any_power_agree_within_rounding(device):
    fields = {"observation": Field((3,), "float32")}
    pair = Pair(device, 300, fields, 3, num_streams=2, n_step=3, gamma=0.9, priority_exponent=0.6, importance_exponent=0.4)
    pair.feed(100)
    for _ in range(30):
        ours, theirs = pair.cuda.sample(32), pair.cpu.sample(32)
        same = to_numpy(ours.indices) == theirs.indices  # a leaf's last bit can move a draw to its neighbour
        assert same.mean() > 0.9
        np.testing.assert_allclose(to_numpy(ours.probability)[same], theirs.probability[same], rtol=1e-5)
        if same.all():
            pair.update(ours, theirs)


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("options", [{"n_step": 3, "gamma": 0.9}, {"sequence_length": 6, "stride": 4, "frame_stack": 2}])
@pytest.mark.parametrize("to_cuda", [True, False])
def test_a_save_loads_on_either_device(device, options, to_cuda, tmp_path):
    fields = {"observation": Field((2, 3, 4), "uint8")}
    if "stride" in options:
        fields["state"] = Field((2, 3), "float32", every=4)
    pair = Pair(device, 120, fields, 5, num_streams=2, priority_exponent=1.0, **options)
    for steps in (20, 7, 90):  # the last save comes after the ring has wrapped
        pair.feed(steps)
        pair.update(*pair.compare(4))
        source = pair.cpu if to_cuda else pair.cuda
        source.save(tmp_path)
    loaded = SequenceReplay.load(tmp_path, device=device if to_cuda else "cpu")
    if to_cuda:
        pair.cuda = loaded
    else:
        pair.cpu = loaded
    for _ in range(4):
        pair.compare(6)
        pair.feed(5)


@pytest.mark.parametrize("device", CUDA)
def test_a_batch_stays_until_the_ring_comes_round(device):
    pair = Pair(device, 100, {"observation": Field((4,), "float32")}, 1, num_streams=2, n_step=2, gamma=0.9, ring=3)
    pair.feed(50)
    first = pair.cuda.sample(16)
    kept = to_numpy(first.observation).copy()
    for _ in range(2):
        pair.cuda.sample(16)
        pair.feed(30)
    np.testing.assert_array_equal(to_numpy(first.observation), kept)
    assert pair.cuda.sample(16).observation is first.observation


@pytest.mark.parametrize("device", CUDA)
def test_a_batch_is_written_to_arrays_of_the_caller(device):
    pair = Pair(device, 100, {"observation": Field((1, 4), "uint8")}, 1, num_streams=2, sequence_length=5, frame_stack=3)
    pair.feed(50)
    out = {name: on(device, np.zeros(shape, dtype)) for name, (shape, dtype) in pair.cuda.layout(6).items()}
    pair.cuda.sample(6, out=out)
    theirs = pair.cpu.sample(6)
    for name in theirs.keys():
        np.testing.assert_array_equal(to_numpy(out[name]), theirs.frames[name] if name == "observation" else theirs[name])
    with pytest.raises(ValueError, match=r"out\['reward'\]: must lie on cuda:0 as the replay does, got cpu"):
        pair.cuda.sample(6, out={**out, "reward": np.zeros((6, 5), np.float32)})


@pytest.mark.parametrize("device", CUDA)
def test_updates_that_cannot_be_made_are_dropped_and_counted(device):
    pair = Pair(device, 100, {"observation": Field((4,), "float32")}, 1, num_streams=2, n_step=2, gamma=0.9, priority_exponent=1.0)
    pair.feed(50, ends=0)
    indices = to_numpy(pair.cuda.sample(4).indices).copy()
    pair.cpu.sample(4)
    wrong = np.array([-1, 2**62, -(2**63), indices[0]])
    pair.cuda.update_priorities(on(device, wrong), on(device, np.array([1, 1, 1, np.nan], np.float32)))
    assert pair.cuda.stale_updates == 4
    pair.compare(8)  # and nothing else has changed
    twice = np.array([indices[1], indices[1]])
    td = np.array([5, 0.25], np.float32)
    pair.cuda.update_priorities(on(device, twice), on(device, td))
    pair.cpu.update_priorities(twice, td)
    pair.compare(8)


@pytest.mark.parametrize("device", CUDA)
def test_what_a_device_cannot_do_is_named(device):
    replay = SequenceReplay(**GOOD, device=device)
    flags = {"terminated": np.zeros(2, bool), "is_first": np.ones(2, bool), "is_last": np.zeros(2, bool)}
    rows = {"observation": np.zeros((2, 1, 2, 3), np.uint8), "reward": np.zeros(2, np.float32), **flags}
    with pytest.raises(ValueError, match="is_first: must lie on the CPU, got cuda:0"):
        replay.add({**rows, "is_first": on(device, rows["is_first"])})
    with pytest.raises(ValueError, match="is_first: must be True in the first row of a stream"):
        replay.add({**rows, "is_first": np.zeros(2, bool)})
    assert len(replay) == 0
    with pytest.raises(ValueError, match="indices: must lie on cuda:0 as the replay does, got cpu"):
        replay.update_priorities(np.zeros(2, np.int64), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="storage: must be 'memory' with device='cuda:0'"):
        SequenceReplay(**GOOD, device=device, storage="file")
    with pytest.raises(
        MemoryError, match=r"capacity: 2000000000 rows take .* of cuda:0 are available; use a smaller capacity, or device='cpu'"
    ):
        SequenceReplay(2_000_000_000, {"observation": Field((1, 84, 84), "uint8")}, num_streams=1, n_step=1, gamma=1.0, device=device)
    host = SequenceReplay(**GOOD)
    with pytest.raises(ValueError, match="observation: must lie on the CPU, got cuda:0"):
        host.add({**rows, "observation": on(device, rows["observation"])})


def filled(device, **options):
    pair = Pair(device, 400, {"observation": Field((4, 64, 64), "uint8")}, 7, num_streams=2, n_step=2, gamma=0.9, **options)
    pair.feed(100)
    return pair


@pytest.mark.parametrize("device", CUDA)
def test_work_on_several_streams_is_ordered(device):
    """Each step runs on a stream of its own, some of them held up: batches are those of one stream."""
    pair = filled(device, priority_exponent=1.0, ring=2)
    streams = [torch.cuda.Stream() for _ in range(4)]
    taken = []
    for step in range(40):
        with torch.cuda.stream(streams[step % 4]):
            if step % 3 == 0:
                torch.cuda._sleep(20_000_000)
            ours, theirs = pair.cuda.sample(64), pair.cpu.sample(64)
        with torch.cuda.stream(streams[(step + 1) % 4]):  # taken by another stream, which is late with it
            torch.cuda._sleep(10_000_000)
            kept = {name: torch.from_dlpack(ours[name]).clone() for name in ("observation", "reward", "indices")}
            td = torch.rand(64, device=device)
            pair.cuda.update_priorities(ours.indices, td)
        taken.append((kept, {name: theirs[name].copy() for name in kept}))
        pair.cpu.update_priorities(theirs.indices, td.cpu().numpy())
        pair.feed(1)
    for kept, expected in taken:
        for name, array in expected.items():
            np.testing.assert_array_equal(kept[name].cpu().numpy(), array, err_msg=name)


@pytest.mark.parametrize("device", CUDA)
def test_batches_of_the_cpu_are_pinned_and_wait_for_their_copies(device):
    torch.zeros(1, device=device)
    replay = filled(device, ring=2).cpu
    copies = []
    for _ in range(20):
        batch = replay.sample(64)
        assert torch.from_numpy(batch.observation).is_pinned()
        torch.cuda._sleep(20_000_000)
        copies.append((torch.from_numpy(batch.observation).to(device, non_blocking=True), batch.observation.copy()))
    for copy, expected in copies:
        np.testing.assert_array_equal(copy.cpu().numpy(), expected)


@pytest.mark.parametrize("device", CUDA)
def test_a_capture_is_refused(device):
    replay, graph = filled(device).cuda, torch.cuda.CUDAGraph()
    replay.sample(8)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), torch.cuda.graph(graph):
        replay.sample(8)

import errno
import gc
import json
import os
import resource

import numpy as np
import pytest
import replay_fire
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_replay import ReferenceReplay, check_batch, opening_rows, replay_rows, replay_settings
from scipy import stats

import urlfast
from urlfast import Field, SequenceReplay

GREY = Field((1, 2, 3), "uint8")


class Source:
    """Random rows for several replays at once."""

    def __init__(self, fields, num_streams, rng, **how):
        self.fields, self.streams, self.rng, self.how = fields, num_streams, rng, how
        self.closed = np.ones(num_streams, bool)

    def feed(self, *replays, steps):
        for _ in range(steps):
            streams = None if self.rng.random() < 0.5 else self.rng.integers(0, self.streams, self.rng.integers(1, 2 * self.streams + 1))
            which = range(self.streams) if streams is None else streams
            rows = replay_rows(self.rng, self.fields, self.closed, which, **self.how)
            for replay in replays:
                replay.add(rows, streams)


@st.composite
def settings_of_a_replay(draw):
    return replay_settings(lambda options: draw(st.sampled_from(options)), [GREY, Field((2, 2), "float32"), Field((5,), "int16")])


@settings(max_examples=150, deadline=None)
@given(replay=settings_of_a_replay(), seed=st.integers(0, 2**32 - 1), quiet=st.booleans())
def test_batches_match_the_reference(replay, seed, quiet):
    capacity, fields, options = replay
    rng = np.random.default_rng(seed)
    replay = SequenceReplay(capacity, fields, **options, seed=seed)
    reference = ReferenceReplay(capacity, fields, **options, seed=seed)
    calm = {"ends": 0.02, "cuts": 0.01, "lives": 0.02} if quiet else {}
    source = Source(fields, options["num_streams"], rng, priority=options.get("priority_exponent", 0) > 0, **calm)
    old = None
    for _ in range(4):
        source.feed(replay, reference, steps=int(rng.integers(1, 12)))
        count = len(reference.items())
        assert replay.sampleable == count
        if count == 0:
            with pytest.raises(ValueError, match="sample: nothing to sample yet"):
                replay.sample(2)
            continue
        batch = replay.sample(9)
        assert len(replay) == sum(min(len(rows), reference.kept) for rows in reference.rows)
        check_batch(batch, reference, reference.sample(9))
        indices = batch.indices[:5].copy() if old is None else np.concatenate([old, np.unique(batch.indices)])
        old = indices[-4:].copy()  # come back later: perhaps too late
        shape = (len(indices),) if "n_step" in options else (len(indices), options["sequence_length"] - 1 - options["burn_in"])
        td = rng.normal(size=shape).astype(np.float32)
        mask = None
        if "n_step" not in options and rng.random() < 0.4 and len(set(indices.tolist())) == len(indices):
            mask = rng.random(shape) < 0.4
        replay.update_priorities(indices, td, mask)
        reference.update(indices, td, mask)
        assert replay.stale_updates == reference.stale
        root, leaves = replay._core.totals()
        assert root == leaves
        check_batch(replay.sample(3), reference, reference.sample(3))


@pytest.mark.parametrize("mode", [{"n_step": 3, "gamma": 0.9}, {"sequence_length": 7, "stride": 3, "burn_in": 1}])
def test_stacks_are_what_the_environment_showed(mode):
    """An environment that stacks its own frames beside a replay that is given the newest one alone."""
    rng, n, depth = np.random.default_rng(0), 2, 4
    replay = SequenceReplay(
        400, {"observation": Field((3, 2, 2), "uint8"), "seen": Field((12, 2, 2), "uint8")}, num_streams=n, frame_stack=depth, **mode
    )
    seen, first = np.zeros((n, 12, 2, 2), np.uint8), np.ones(n, bool)
    for _ in range(500):
        frame = rng.integers(0, 256, (n, 3, 2, 2)).astype(np.uint8)
        seen = np.where(first[:, None, None, None], 0, seen)  # a reset empties the stack
        seen = np.concatenate([seen[:, 3:], frame], 1)
        last = rng.random(n) < 0.15
        flags = {"terminated": rng.random(n) < 0.1, "is_first": first, "is_last": last}
        replay.add({"observation": seen[:, -3:], "seen": seen, "reward": np.zeros(n, np.float32), **flags})
        first = last
    batch = replay.sample(300)
    if "n_step" in mode:
        np.testing.assert_array_equal(batch.observation, batch.seen)
    else:
        real = np.concatenate([np.ones((300, 1), bool), batch.mask], 1)
        np.testing.assert_array_equal(batch.observation[real], batch.seen[real])
        assert np.shares_memory(batch.observation, batch.frames["observation"])


@pytest.mark.parametrize("size", [3, 400])
@pytest.mark.parametrize("mode", [{"n_step": 3, "gamma": 0.9}, {"sequence_length": 9, "stride": 4}])
def test_long_rows_arrive_whole(mode, size):
    """Rows of no round length, in batches that go through the caches and (the larger one) past them."""
    n, steps, episode, depth, frame = 2, 400, 30, 4, (1, 37, 41)
    replay = SequenceReplay(600, {"observation": Field(frame, "uint8")}, num_streams=n, frame_stack=depth, **mode)
    frames = np.random.default_rng(0).integers(0, 256, (n, steps, *frame), dtype=np.uint8)
    for t in range(steps):
        first, last = np.full(n, t % episode == 0), np.full(n, t % episode == episode - 1)
        row = {"observation": frames[:, t], "reward": np.zeros(n, np.float32), "terminated": np.zeros(n, bool)}
        replay.add({**row, "is_first": first, "is_last": last})

    def seen(stream, begin, end):
        """Frames begin..end-1, zeros where the episode of frame end-1 had not begun."""
        opened = (end - 1) // episode * episode
        return np.stack([frames[stream, t] if t >= opened else np.zeros(frame, np.uint8) for t in range(begin, end)])

    batch = replay.sample(size)
    for i, index in enumerate(batch.indices.tolist()):
        t, stream = divmod(index, n)
        if "n_step" in mode:
            for array, row in ((batch.observation, t), (batch.next_observation, t + int(batch.steps[i]))):
                np.testing.assert_array_equal(array[i], seen(stream, row + 1 - depth, row + 1)[:, 0])
        else:
            rows, held = int(batch.mask[i].sum()) + 1, batch.frames["observation"][i]
            np.testing.assert_array_equal(held[: depth - 1 + rows], seen(stream, t + 1 - depth, t + rows))
            assert not held[depth - 1 + rows :].any()


def filled(n=2, steps=60, capacity=100, seed=0, fields=None, ends=0.1, **options):
    fields = fields or {"observation": GREY, "action": Field((), "int64")}
    options = options or {"n_step": 3, "gamma": 0.9}
    replay = SequenceReplay(capacity, fields, num_streams=n, seed=seed, **options)
    source = Source(fields, n, np.random.default_rng(seed), ends=ends, lives=0.03, cuts=0.01)
    source.feed(replay, steps=steps)
    return replay, source


def chisquare(counts, expected):
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    return stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue


def test_transitions_are_drawn_uniformly():
    replay, _ = filled(n=3, steps=200, capacity=150)
    drawn = np.concatenate([replay.sample(500).indices.copy() for _ in range(60)])
    values, counts = np.unique(drawn, return_counts=True)
    assert len(values) == replay.sampleable
    assert chisquare(counts, np.ones(len(counts))) > 1e-3


@pytest.mark.parametrize("mode", [{"n_step": 3, "gamma": 0.9}, {"sequence_length": 8, "stride": 4}])
def test_items_are_drawn_in_proportion_to_their_priority(mode):
    replay, _ = filled(n=3, steps=200, capacity=240, priority_exponent=0.7, importance_exponent=0.6, **mode)
    items = np.unique(np.concatenate([replay.sample(500).indices.copy() for _ in range(10)]))
    assert len(items) == replay.sampleable
    p = np.random.default_rng(1).exponential(1, len(items)).astype(np.float32) + 0.05
    replay.update_priorities(items, p if "n_step" in mode else np.repeat(p[:, None], 7, 1), None)
    batch = replay.sample(40000)
    values, counts = np.unique(batch.indices, return_counts=True)
    np.testing.assert_array_equal(values, items)
    share = p.astype(float) ** 0.7 / (p.astype(float) ** 0.7).sum()
    assert chisquare(counts, share) > 1e-3
    drawn = share[np.searchsorted(items, batch.indices)]
    np.testing.assert_allclose(batch.probability, drawn, rtol=1e-5)
    weight = (len(items) * drawn) ** -0.6
    np.testing.assert_allclose(batch.weight, weight / weight.max(), rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("steps", [1, 5, 8, 13, 16, 31, 79])
def test_priorities_are_eta_max_plus_rest_mean(steps, masked):
    """One stream without an end, so that all items' errors are of `steps` transitions, of which a mask may leave none."""
    rng = np.random.default_rng(steps)
    options = {"sequence_length": steps + 1, "stride": steps + 1, "priority_exponent": 1.0, "eta": 0.8}
    replay = SequenceReplay(20 * (steps + 1), {"x": Field((), "float32")}, num_streams=1, **options)
    one, no = np.zeros(1, np.float32), np.zeros(1, bool)
    for t in range(20 * (steps + 1)):
        replay.add({"x": one, "reward": one, "terminated": no, "is_first": np.array([t == 0]), "is_last": no})
    items = np.unique(replay.sample(1000).indices)
    assert len(items) == 20
    td, mask = rng.normal(size=(20, steps)).astype(np.float32), rng.random((20, steps)) < 0.5
    td[~mask] = np.nan if masked else td[~mask]
    replay.update_priorities(items, td, mask if masked else None)
    size = np.abs(np.where(mask | (not masked), td, 0).astype(np.float64))
    count = mask.sum(1) if masked else np.full(20, steps)
    p = np.where(count > 0, 0.8 * size.max(1) + 0.2 * size.sum(1) / np.maximum(count, 1), 1.0)  # 1: what new items have
    batch = replay.sample(1000)
    np.testing.assert_allclose(batch.probability, (p / p.sum())[np.searchsorted(items, batch.indices)], rtol=1e-5)


def test_draws_depend_on_the_seed_and_not_on_threads():
    threads = urlfast.ops._core.num_threads()
    try:
        batches = []
        for n in (1, 4, 3):
            urlfast.set_num_threads(n)
            replay, _ = filled(steps=150, fields={"observation": Field((1, 64, 64), "uint8")}, frame_stack=4, sequence_length=20, stride=5)
            batches.append(replay.sample(64))
    finally:
        urlfast.set_num_threads(threads)
    for name in batches[0].keys():
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
        np.testing.assert_array_equal(batches[0][name], batches[2][name])
    other, _ = filled(steps=150)
    same, _ = filled(steps=150)
    np.testing.assert_array_equal(other.sample(64).indices, same.sample(64).indices)
    assert not np.array_equal(other.sample(64).indices, other.sample(64).indices)


def test_totals_stay_exact():
    """No sequence of updates makes the root differ from the sum of its leaves, or from the same tree built at once."""
    replay, _ = filled(n=4, steps=400, capacity=800, priority_exponent=0.9, n_step=3, gamma=0.9)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        indices = replay.sample(200).indices
        replay.update_priorities(indices, (rng.random(200) * 10.0 ** rng.integers(-9, 12, 200)).astype(np.float32))
    root, leaves = replay._core.totals()
    assert root == leaves
    items = np.unique(np.concatenate([replay.sample(2000).indices.copy() for _ in range(20)]))
    for _ in range(3):
        replay.update_priorities(items, np.ones(len(items), np.float32))
    root, leaves = replay._core.totals()
    assert root == leaves and root > len(items) * 2**24 - 1  # the others keep what they have


def test_a_batch_stays_intact_until_the_ring_comes_round():
    replay, source = filled(ring=4, n_step=3, gamma=0.9, frame_stack=2)
    batches, copies = [], []
    for _ in range(4):
        batches.append(replay.sample(8))
        copies.append({name: batches[-1][name].copy() for name in batches[-1].keys()})
        source.feed(replay, steps=20)
    for batch, copy in zip(batches, copies, strict=True):
        for name, value in copy.items():
            np.testing.assert_array_equal(batch[name], value)
    replay.sample(8)  # the ring has come round: this one took the first one's place
    assert any(not np.array_equal(batches[0][name], value) for name, value in copies[0].items())
    for name, value in copies[1].items():
        np.testing.assert_array_equal(batches[1][name], value)
    kept = replay.sample(8)
    copy = kept.observation.copy()
    replay.close()
    gc.collect()
    np.testing.assert_array_equal(kept.observation, copy)


@pytest.mark.parametrize("mode", [{"n_step": 3, "gamma": 0.9}, {"sequence_length": 6, "stride": 2}])
def test_out_is_written(mode):
    replay, _ = filled(frame_stack=3, **mode)
    twin, _ = filled(frame_stack=3, **mode)
    out = {name: np.empty(shape, dtype) for name, (shape, dtype) in replay.layout(16).items()}
    batch = replay.sample(16, out=out)
    assert batch.reward is out["reward"]
    for name, value in twin.sample(16).__dict__.items():
        if name != "frames":
            np.testing.assert_array_equal(batch[name], value)
    wrong = {
        "must have 'reward'": {k: v for k, v in out.items() if k != "reward"},
        "must have dtype float32": {**out, "reward": out["reward"].astype(float)},
        "must have shape": {**out, "reward": out["reward"][:3].copy()},
        "alone": {**out, "more": out["reward"]},
        "must be a NumPy array": {**out, "reward": None},
        "C-contiguous": {**out, "observation": out["observation"][..., ::-1]},
    }
    for message, arrays in wrong.items():
        with pytest.raises((ValueError, TypeError), match=message):
            replay.sample(16, out=arrays)
    readonly = out["reward"].copy()
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        replay.sample(16, out={**out, "reward": readonly})


def test_recurrent_state_is_that_of_the_sequence_start():
    fields = {"observation": Field((2,), "float32"), "state": Field((4,), "float32", every=5)}
    replay = SequenceReplay(80, fields, num_streams=1, sequence_length=12, stride=5)
    t = 0
    for length in [3, 1, 40, 7, 2, 2, 2, 30, 1, 60]:  # episodes shorter and longer than the stride, past the ring's end
        for i in range(length):
            replay.add(
                {
                    "observation": np.full((1, 2), t, np.float32),
                    "state": np.full((1, 4), t, np.float32),
                    "reward": np.zeros(1, np.float32),
                    "terminated": np.zeros(1, bool),
                    "is_first": np.array([i == 0]),
                    "is_last": np.array([i == length - 1]),
                }
            )
            t += 1
            if replay.sampleable:
                batch = replay.sample(20)
                np.testing.assert_array_equal(batch.state[:, 0], batch.observation[:, 0, 0])


@pytest.mark.parametrize("mode", [replay_fire.WINDOWS, replay_fire.SEQUENCES])
def test_an_adder_beside_a_sampler_tears_nothing(mode):
    batches, added = replay_fire.add_beside_sample(mode, seconds=2.0, least=6)
    assert batches >= 6 and added > 900  # the ring came round several times


def test_many_updates_keep_the_totals_of_integers():
    assert replay_fire.update_against_integers(600_000, rows=1 << 14, batch=20_000) == 600_000


# Saving -----------------------------------------------------------------------------------------------------------------------------

MODES = [
    {"n_step": 3, "gamma": 0.9, "frame_stack": 3},
    {"n_step": 2, "gamma": 0.9, "priority_exponent": 0.6, "importance_exponent": 0.4},
    {"sequence_length": 9, "stride": 4, "burn_in": 2, "frame_stack": 2, "priority_exponent": 0.9},
    {"sequence_length": 6, "cross_episodes": True},
]


def assert_same(a, b, batches=3):
    assert (len(a), a.sampleable, a.stale_updates) == (len(b), b.sampleable, b.stale_updates)
    for _ in range(batches):
        x, y = a.sample(24), b.sample(24)
        for name in x.keys():
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


@pytest.mark.parametrize("storage", ["memory", "file"])
@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_replay_goes_on_as_if_nothing_had_happened(tmp_path, mode, storage):
    fields = {"observation": GREY, "action": Field((), "int64")}
    if mode.get("stride", 1) > 1:
        fields["state"] = Field((3,), "float32", every=mode["stride"])
    replay, source = filled(n=3, steps=0, capacity=120, fields=fields, **mode)
    for again in range(6):  # the ring holds 40 rows a stream: it wraps on the way
        source.feed(replay, steps=12)
        replay.save(tmp_path / "replay")
        loaded = SequenceReplay.load(tmp_path / "replay", storage=storage, path=tmp_path if storage == "file" else None)
        assert_same(replay, loaded)
        source.feed(replay, loaded, steps=7)
        td = np.linspace(0, 2, 16 * (1 if "n_step" in mode else mode["sequence_length"] - 1 - mode.get("burn_in", 0))).astype(np.float32)
        for r in (replay, loaded):
            r.update_priorities(r.sample(16).indices, td if "n_step" in mode else td.reshape(16, -1))
        assert_same(replay, loaded)
        if again % 2:
            replay = loaded  # its next save goes on in the same folder


def test_a_save_writes_only_what_is_new(tmp_path):
    replay, source = filled(n=2, steps=0, capacity=4000, n_step=3, gamma=0.9, fields={"observation": Field((1, 64, 64), "uint8")})
    sizes = []
    for steps in (300, 10, 0):
        source.feed(replay, steps=steps)
        before = {p.name for p in tmp_path.iterdir()}
        names = replay.save(tmp_path)
        assert set(names) <= {p.name for p in tmp_path.iterdir()}
        sizes.append(sum(p.stat().st_size for p in tmp_path.iterdir() if p.name not in before and p.name.startswith("rows")))
    assert sizes[0] > 10 * sizes[1] > 0 and sizes[2] == 0
    assert SequenceReplay.load(tmp_path).save(tmp_path) != []  # the loaded one knows what is there, too
    assert len(list(tmp_path.glob("rows-*"))) == 2
    elsewhere = tmp_path / "elsewhere"
    replay.save(elsewhere)
    assert_same(replay, SequenceReplay.load(elsewhere))
    os.unlink(next(tmp_path.glob("rows-*")))  # someone tidied up: everything is written again
    replay.save(tmp_path)
    assert_same(replay, SequenceReplay.load(tmp_path))


def test_an_older_checkpoint_stays_whole_after_the_ring_has_wrapped(tmp_path):
    folder, (replay, source) = tmp_path / "replay", filled(n=2, steps=0, capacity=60)
    manifests, states = [], []
    for i in range(8):
        source.feed(replay, steps=15)
        replay.save(folder)
        manifests.append(tmp_path / f"{i}.json")
        manifests[-1].write_bytes((folder / "manifest.json").read_bytes())
        states.append(SequenceReplay.load(folder).sample(20).observation)
        SequenceReplay.prune(folder, keep=manifests[-4:])
    for manifest, state in list(zip(manifests, states, strict=True))[4:]:
        np.testing.assert_array_equal(SequenceReplay.load(folder, manifest=manifest).sample(20).observation, state)
    with pytest.raises(ValueError, match=r"rows-.*: is missing"):
        SequenceReplay.load(folder, manifest=manifests[0])

    old = SequenceReplay.load(folder, manifest=manifests[5])  # back, and on from there: the other future stays whole
    Source(source.fields, 2, np.random.default_rng(5)).feed(old, steps=20)
    old.save(folder)
    np.testing.assert_array_equal(SequenceReplay.load(folder, manifest=manifests[7]).sample(20).observation, states[7])
    assert SequenceReplay.prune(folder)
    assert len(list(folder.glob("state-*"))) == 1
    assert_same(old, SequenceReplay.load(folder))


def test_a_prune_that_cannot_read_a_manifest_deletes_nothing(tmp_path):
    replay, source = filled()
    older, folder = tmp_path / "older.json", tmp_path / "replay"
    first = replay.save(folder)
    older.write_bytes((folder / "manifest.json").read_bytes())
    source.feed(replay, steps=5)
    second = replay.save(folder)
    (folder / f".{first[0]}").touch()  # what a crash left
    (folder / "notes.txt").touch()
    before = set(os.listdir(folder))
    for path, keep in ((older, [older]), (folder / "manifest.json", [])):
        whole = path.read_bytes()
        for damage in (whole[:-1], b"{}", whole.replace(b'"size"', b'"Size"')):
            path.write_bytes(damage)
            with pytest.raises(ValueError, match=str(path)):
                SequenceReplay.prune(folder, keep=keep)
        path.unlink() if keep else path.write_bytes(whole)
        if keep:
            with pytest.raises(ValueError, match=f"{path}: is missing"):
                SequenceReplay.prune(folder, keep=keep)
            path.write_bytes(whole)
    assert set(os.listdir(folder)) == before
    assert SequenceReplay.prune(folder, keep=[older]) == [f".{first[0]}"]
    gone = SequenceReplay.prune(folder)
    assert gone == sorted(set(first) - set(second)) and gone
    assert set(os.listdir(folder)) == {"manifest.json", "notes.txt", *second}
    assert_same(replay, SequenceReplay.load(folder))


def test_read_only_takes_the_memory_of_the_rows_alone(tmp_path):
    huge = {"observation": Field((84, 84), "uint8")}
    replay, _ = filled(capacity=2 * 10**9, fields=huge, steps=20, n_step=3, gamma=0.9, expected_rows=1000)
    replay.save(tmp_path)
    hostile(tmp_path, lambda m: m["options"].update(expected_rows=None))  # as one that was made on a larger machine
    with pytest.raises(MemoryError, match="capacity: 2000000000 rows take"):
        SequenceReplay.load(tmp_path)
    loaded = SequenceReplay.load(tmp_path, read_only=True)
    assert_same(replay, loaded)
    for call in (lambda: loaded.add({}), lambda: loaded.update_priorities(np.zeros(1, int), np.zeros(1)), lambda: loaded.save(tmp_path)):
        with pytest.raises(ValueError, match="read_only=True"):
            call()


def test_damaged_files_are_refused_by_name(tmp_path):
    replay, source = filled(n=2, steps=30, capacity=60, sequence_length=5, stride=2, priority_exponent=0.5)
    replay.save(tmp_path)
    source.feed(replay, steps=10)
    names = replay.save(tmp_path)
    rng = np.random.default_rng(0)
    for name in [*names, "manifest.json"]:
        path = tmp_path / name
        whole = path.read_bytes()
        damages = [whole[:cut] for cut in (0, 1, len(whole) // 2, len(whole) - 1)] + [whole + b"\0", b"{}"]
        for place in [0, len(whole) - 1, *rng.integers(0, len(whole), 25).tolist()]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(rng.integers(8))
            damages.append(bytes(flipped))
        for damage in damages:
            path.write_bytes(damage)
            with pytest.raises(ValueError, match=name):
                SequenceReplay.load(tmp_path)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name}: is missing"):
            SequenceReplay.load(tmp_path)
        path.write_bytes(whole)
    assert_same(replay, SequenceReplay.load(tmp_path))


def hostile(folder, change):
    """A manifest that was changed by someone who also mended its checksum."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["crc32c"] = urlfast.ops._manifest_crc(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["state"].update(file="../../etc/passwd"),
        lambda m: m["segments"][0].update(file="/etc/passwd"),
        lambda m: m["segments"][0].update(begin=[0]),
        lambda m: m["segments"][0].update(end=[10**30, 10**30]),
        lambda m: m["segments"][0].update(begin=[-5, 0]),
        lambda m: m["segments"].append(m["segments"][0]),
        lambda m: m["segments"].clear(),
        lambda m: m["options"].update(capacity=80),
        lambda m: m["options"].update(num_streams=1),
        lambda m: m["options"].update(evil=1),
        lambda m: m["options"].pop("n_step"),
        lambda m: m["fields"].pop("action"),
        lambda m: m["fields"].update(action=[[7], "int64", 1]),
        lambda m: m["fields"].update(action=[[], "object", 1]),
        lambda m: m.update(version=2),
        lambda m: m.update(state=None),
        lambda m: m.update(segments={}),
    ],
)
def test_manifests_that_lie_are_refused(tmp_path, change):
    replay, _ = filled()
    replay.save(tmp_path)
    hostile(tmp_path, lambda m: None)
    assert len(SequenceReplay.load(tmp_path)) == len(replay)  # nothing is wrong with being written by someone else
    hostile(tmp_path, change)
    with pytest.raises(ValueError) as error:
        SequenceReplay.load(tmp_path)
    assert "its checksum is not" not in str(error.value)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path):
    replay, source = filled(n=2, steps=50, capacity=600, n_step=3, gamma=0.9, fields={"observation": Field((1, 32, 32), "uint8")})
    replay.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    twin = SequenceReplay.load(tmp_path)
    source.feed(replay, twin, steps=100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="could not write") as error:
            replay.save(tmp_path)
        with pytest.raises(OSError, match="could not reserve") as reserve:
            SequenceReplay(
                600, {"observation": Field((1, 32, 32), "uint8")}, num_streams=1, n_step=1, gamma=1.0, storage="file", path=tmp_path
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and str(tmp_path) in error.value.filename
    assert reserve.value.errno == errno.EFBIG and reserve.value.filename == str(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    replay.save(tmp_path)  # room again
    assert_same(twin, SequenceReplay.load(tmp_path))


def test_a_manifest_that_cannot_be_written_leaves_nothing_new(tmp_path, monkeypatch):
    replay, source = filled()
    replay.save(tmp_path)
    source.feed(replay, steps=5)
    before, rename = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, os.rename

    def full(old, new):
        if new.endswith("manifest.json"):
            raise OSError(errno.ENOSPC, "No space left on device", new)
        rename(old, new)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        replay.save(tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    replay.save(tmp_path)
    assert_same(replay, SequenceReplay.load(tmp_path))


def test_a_missing_folder_for_the_scratch_file_is_named(tmp_path):
    with pytest.raises(OSError, match="could not create") as error:
        SequenceReplay(10, {"observation": GREY}, num_streams=1, n_step=1, gamma=1.0, storage="file", path=tmp_path / "none")
    assert error.value.filename == str(tmp_path / "none")


def test_a_scratch_file_leaves_nothing_behind(tmp_path):
    replay = SequenceReplay(1000, {"observation": GREY}, num_streams=1, n_step=1, gamma=1.0, storage="file", path=tmp_path)
    assert list(tmp_path.iterdir()) == []  # so that whoever dies, however, leaves nothing to reclaim
    replay.close()
    replay_fire.kill_beside_scratch(tmp_path)


def test_kill_9_in_a_save_leaves_the_one_before(tmp_path):
    saved, unfinished = replay_fire.kill_in_saves(tmp_path, kills=8)
    assert saved > 0 and unfinished > 0


# Arguments ------------------------------------------------------------------------------------------------------------------------

GOOD = {"capacity": 100, "fields": {"observation": GREY}, "num_streams": 2, "n_step": 3, "gamma": 0.99}
SEQUENCES = {"n_step": None, "gamma": None, "sequence_length": 8}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"capacity": 0}, r"capacity: must lie in 1\.\..* got 0"),
        ({"capacity": 7}, r"capacity: must be at least 8 .* got 7"),
        ({"num_streams": 0}, r"num_streams: must lie in 1\.\.100 .* got 0"),
        ({"num_streams": 101}, r"num_streams: must lie in 1\.\.100"),
        ({"n_step": None, "gamma": None}, "sequence_length: give either"),
        ({"sequence_length": 5}, "sequence_length: give either"),
        ({"n_step": 0}, "n_step: must be at least 1, got 0"),
        ({"gamma": None}, "gamma: must be given with n_step"),
        ({"gamma": 1.5}, r"gamma: must lie in 0\.\.1, got 1.5"),
        ({"gamma": float("nan")}, "gamma: must lie in"),
        ({"stride": 2}, "stride: is for sequences"),
        ({"burn_in": 1}, "burn_in: is for sequences"),
        ({"cross_episodes": True}, "cross_episodes: is for sequences"),
        ({**SEQUENCES, "gamma": 0.9}, "gamma: is for n_step"),
        ({**SEQUENCES, "burn_in": 7}, "sequence_length: must be at least 9"),
        ({**SEQUENCES, "burn_in": -1}, "burn_in: must not be negative"),
        ({**SEQUENCES, "stride": 0}, "stride: must be at least 1, got 0"),
        ({**SEQUENCES, "frame_stack": 2, "cross_episodes": True}, "frame_stack: cannot go with cross_episodes"),
        ({"frame_stack": 0}, r"frame_stack: must lie in 1\.\.256, got 0"),
        ({"fields": {"image": GREY}}, "fields: must have 'observation' with n_step"),
        ({**SEQUENCES, "fields": {"image": GREY}, "frame_stack": 2}, "fields: must have 'observation' with frame_stack"),
        ({"fields": {"observation": Field()}, "frame_stack": 2}, "fields: 'observation' must have an axis"),
        ({"fields": {"observation": GREY, "reward": Field()}}, "fields: 'reward' is a name"),
        ({"fields": {"observation": GREY, "next_observation": Field()}}, "fields: 'next_observation' is a name"),
        ({"fields": {"observation": GREY, "a b": Field()}}, "fields: 'a b' must be an identifier"),
        ({"fields": {"observation": Field((0, 2), "uint8")}}, "fields: 'observation' must have a shape of positive"),
        (
            {"fields": {"observation": Field((2,), "complex64")}},
            "fields: 'observation' must have one of the dtypes bool, uint8, .*float16, float32, float64, got complex64",
        ),
        ({"fields": {"observation": Field((2**50,), "uint8")}}, "more than 2\\^40 bytes"),
        ({"fields": {"observation": Field((2,) * 6, "uint8")}}, "at most 5 axes"),
        ({"fields": {"observation": GREY, "state": Field((2,), "float32", 3)}}, "'state' must have every=1"),
        ({**SEQUENCES, "stride": 4, "fields": {"state": Field((2,), "float32", 3)}}, "'state' must have every=1 or every=4"),
        ({**SEQUENCES, "stride": 4, "fields": {"observation": Field((2,), "float32", 4)}}, "'observation' must have every=1"),
        ({"fields": [GREY]}, "fields: must be a dict"),
        ({"fields": {"observation": Field([2], "uint8")}}, "must have a tuple of ints"),
        ({"priority_exponent": -1.0}, "priority_exponent: must lie in"),
        ({"importance_exponent": float("nan")}, "importance_exponent: must lie in"),
        ({"eta": 1.1}, "eta: must lie in"),
        ({"ring": 0}, r"ring: must lie in 1\.\.1024, got 0"),
        ({"storage": "disk"}, "storage: must be 'memory' or 'file', got 'disk'"),
        ({"path": "/tmp"}, "path: is for storage='file'"),
        ({"device": "gpu"}, "device: must be 'cpu'"),
        ({"seed": -1}, "seed: must lie in"),
        ({"seed": 2**64}, "seed: must lie in"),
        ({"capacity": 100.0}, "capacity: must be an int, got 100.0"),
        ({"capacity": 2**70}, "capacity: must lie in"),
        ({"num_streams": None}, "num_streams: must be an int, got None"),
        ({"n_step": "3"}, "n_step: must be an int, got '3'"),
        ({"gamma": "x"}, "gamma: must be a number, got 'x'"),
        ({"eta": None}, "eta: must be a number, got None"),
        ({"cross_episodes": 1}, "cross_episodes: must be a bool, got 1"),
        ({"fields": {"observation": Field((1.5,), "uint8")}}, "fields: 'observation' must have a tuple of ints"),
        ({"fields": {"observation": Field((2,), "uint8", every=None)}}, "fields: 'observation' must have an int every"),
        ({"fields": {"observation": Field((2,), "what")}}, "fields: 'observation' must have a NumPy dtype"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SequenceReplay(**{**GOOD, **change})


def good_rows(n=2):
    return opening_rows(n, GREY.shape)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"observation": None}, "observation: must be an array"),
        ({"observation": np.zeros((2, 1, 2, 3), np.int8)}, "observation: must have dtype uint8, got int8"),
        ({"observation": np.zeros((2, 1, 3, 2), np.uint8)}, r"observation: must have shape \(2, 1, 2, 3\), got \(2, 1, 3, 2\)"),
        ({"observation": np.zeros((3, 1, 2, 3), np.uint8)}, "observation: must have shape"),
        ({"observation": np.zeros((2, 1, 3, 2), np.uint8).swapaxes(2, 3)}, "observation: must have C-contiguous rows"),
        ({"reward": np.zeros(2)}, "reward: must have dtype float32, got float64"),
        ({"reward": np.zeros((2, 1), np.float32)}, "reward: must have shape"),
        ({"reward": np.zeros(2, ">f4")}, "reward: must have native byte order"),
        ({"terminated": np.zeros(2, np.uint8)}, "terminated: must have dtype bool, got uint8"),
        ({"is_first": np.zeros(2, bool)}, "is_first: must be True in the first row of a stream"),
        ({"action": np.zeros(2)}, "rows: 'action' is not a column of this replay"),
        ({"priority": np.zeros(2, np.float32)}, "priority: is for a replay with priority_exponent > 0"),
        ({3: np.zeros(2)}, "rows: '3' is not a column"),
    ],
)
def test_wrong_rows_are_named_and_nothing_is_appended(change, message):
    replay = SequenceReplay(**GOOD)
    with pytest.raises((ValueError, TypeError), match=message):
        replay.add({**good_rows(), **change})
    rows = good_rows()
    del rows["is_last"]
    with pytest.raises(ValueError, match="rows: must have 'is_last'"):
        replay.add(rows)
    assert len(replay) == 0


def test_rows_are_checked_against_those_before():
    replay = SequenceReplay(**GOOD)
    replay.add(good_rows())
    closing = {**good_rows(), "is_first": np.zeros(2, bool), "is_last": np.array([False, True])}
    replay.add(closing)
    with pytest.raises(ValueError, match="is_first: must be True in the row after an is_last; in stream 1"):
        replay.add({**good_rows(), "is_first": np.array([False, False])})
    with pytest.raises(ValueError, match="is_first: must be True in the row after an is_last; in stream 0"):
        rows = {**good_rows(), "is_first": np.zeros(2, bool), "is_last": np.array([True, False])}
        replay.add(rows, np.array([0, 0]))
    for streams, message in [
        (np.array([0, 2]), r"streams: must lie in 0\.\.1, got 2"),
        (np.array([-1, 0]), "streams: must lie"),
        (np.array([0, 1], np.int32), "streams: must have dtype int64"),
        (np.array([[0, 1]]), "streams: must be one-dimensional"),
        (np.array([0, 1, 0]), "must have shape"),
        (3, "streams: must be an array"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            replay.add(good_rows(), streams)
    assert len(replay) == 4
    replay.add({name: value[:0] for name, value in good_rows().items()}, np.zeros(0, int))
    assert len(replay) == 4
    prioritised = SequenceReplay(**GOOD, priority_exponent=1.0)
    for p in (-1.0, np.inf):
        with pytest.raises(ValueError, match="priority: must be finite"):
            prioritised.add({**good_rows(), "priority": np.full(2, p, np.float32)})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros(2, np.int32), np.zeros(2, np.float32)), "indices: must have dtype int64"),
        ((np.zeros((2, 1), int), np.zeros(2, np.float32)), r"indices: must have shape \(n,\)"),
        ((np.array([-1]), np.zeros(1, np.float32)), "indices: must be those of a sampled batch, got -1"),
        ((np.array([10**9]), np.zeros(1, np.float32)), "indices: must be those of a sampled batch"),
        ((np.array([8]), np.zeros(1)), "td: must have dtype float32"),
        ((np.array([8]), np.zeros(2, np.float32)), "td: must have shape"),
        ((np.array([8]), np.zeros((1, 1), np.float32)), "td: must have shape"),
        ((np.array([8]), np.float32(0)), "td: must"),
        ((np.array([8]), np.full(1, np.nan, np.float32), np.ones(1, np.uint8)), "mask: must have dtype bool"),
    ],
)
def test_wrong_updates_are_named(arguments, message):
    replay, _ = filled(priority_exponent=1.0, n_step=3, gamma=0.9, ends=0)
    with pytest.raises((ValueError, TypeError), match=message):
        replay.update_priorities(*arguments)


def test_td_that_is_not_finite_changes_nothing():
    replay, _ = filled(priority_exponent=1.0, n_step=3, gamma=0.9)
    indices, before = replay.sample(3).indices.copy(), replay._core.totals()
    with pytest.raises(ValueError, match="td: must be finite where it counts, got NaN or infinity in row 2"):
        replay.update_priorities(indices, np.array([5, 5, np.nan], np.float32))
    assert replay._core.totals() == before
    replay.update_priorities(indices, np.array([5, 5, np.nan], np.float32), np.array([True, True, False]))


def test_a_closed_replay_says_so(tmp_path):
    replay, _ = filled()
    batch = replay.sample(4)
    replay.close()
    replay.close()
    calls = [
        lambda: replay.sample(4),
        lambda: replay.add(good_rows()),
        lambda: replay.update_priorities(batch.indices, batch.reward),
        lambda: len(replay),
        lambda: replay.sampleable,
        lambda: replay.stale_updates,
        lambda: replay.bytes,
        lambda: replay.capacity,
        lambda: replay.layout(3),
        lambda: replay.save(tmp_path),
        lambda: replay.sample(4, out={}),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="SequenceReplay: it has been closed"):
            call()


@pytest.mark.parametrize("size", [0, -1, 2**40, 2**70, 1.0, None, "3"])
def test_batch_sizes_are_checked(size):
    replay, _ = filled()
    with pytest.raises((ValueError, TypeError), match=r"B: must (lie in (1|-2\^63)\.\.|be an int)"):
        replay.sample(size)


def test_memory_is_counted_before_it_is_taken():
    with pytest.raises(MemoryError, match=r"capacity: 2000000000 rows take \d+\.\d+ GB \(\d+ bytes a row\), but .* available"):
        SequenceReplay(2_000_000_000, {"observation": Field((1, 84, 84), "uint8")}, num_streams=1, n_step=1, gamma=1.0)
    fields = {"observation": Field((1, 84, 84), "uint8"), "action": Field((), "int64")}
    replay = SequenceReplay(100_000, fields, num_streams=8, n_step=10, gamma=0.99, frame_stack=4)
    row = 84 * 84 + 8 + 4 + 3
    assert row <= replay.bytes / 100_000 <= 1.02 * row
    fields["state"] = Field((2, 512), "float32", every=40)
    options = {"sequence_length": 120, "stride": 40, "burn_in": 40, "frame_stack": 4, "priority_exponent": 0.9}
    row += 2 * 512 * 4 / 40
    assert row <= SequenceReplay(100_000, fields, num_streams=8, **options).bytes / 100_000 <= 1.02 * row


def test_rows_that_are_never_added_need_no_memory(tmp_path):
    huge = {"observation": Field((84, 84), "uint8"), "action": Field((), "int64")}
    with pytest.raises(MemoryError, match="capacity: "):
        SequenceReplay(2 * 10**9, huge, num_streams=1, n_step=1, gamma=0.99)
    replay = SequenceReplay(10**8, huge, num_streams=1, n_step=1, gamma=0.99, expected_rows=1000)
    rows = {"observation": np.zeros((1, 84, 84), np.uint8), "action": np.zeros(1, np.int64), "reward": np.zeros(1, np.float32)}
    for t in range(20):
        replay.add(rows | {"terminated": np.zeros(1, bool), "is_first": np.array([t == 0]), "is_last": np.zeros(1, bool)})
    replay.save(tmp_path)
    again = SequenceReplay.load(tmp_path)  # with the same promise
    assert again.capacity == 10**8 and len(again) == 20
    with pytest.raises(ValueError, match="expected_rows: must be at least 0"):
        SequenceReplay(10, huge, num_streams=1, n_step=1, gamma=0.99, expected_rows=-1)

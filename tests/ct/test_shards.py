import concurrent.futures
import copy
import dataclasses
import hashlib
import itertools
import json
import pickle
import struct

import numpy as np
import pytest
from array_record.python import array_record_module

from bhsd_jax.platform import files
from bhsd_jax.shards import jobs, record, store
from bhsd_jax.volume import Grid, Network, Plan

SHAPE = (11, 70, 90)  # more than one block along every axis

PLAN = Plan(
    dataset="made up",
    classes=("background", "a", "b", "c"),
    modality="ct",
    spacing_mm=(5.0, 0.5, 0.5),
    transpose=(0, 1, 2),
    crop_hu=-200.0,
    foreground=(1.0, 2.0, 3.0, 4.0),
    median_shape=SHAPE,
    network=Network((8, 32, 32), 2, (8,), ((1, 1, 1),), ((3, 3, 3),), (2,), (), True),
    source_sha256="",
)


def case(name, *, is_labeled=True, dtype=np.int16):
    random = np.random.default_rng(sum(name.encode()))
    image = (random.normal(0, 300, SHAPE)).astype(dtype)
    label = (random.integers(0, 40, SHAPE) % 37 % 3).astype(np.uint8)  # class 3 never occurs
    positions = [np.argwhere(label == c).astype(np.int32)[:50] for c in (1, 2, 3)]
    empty = np.zeros((0, 3), np.int32)
    return store.Prepared(
        case=name,
        patient=name[:1],
        split="train" if is_labeled else "unlabeled",
        bleeding=is_labeled,
        slice_labels=((1, 0, -1),) * SHAPE[0],
        image=image,
        label=label if is_labeled else None,
        grid=Grid(
            (12, 80, 90),
            tuple(map(tuple, np.diag([5.0, 0.5, 0.5, 1.0]).tolist())),
            (0, 1, 2),
            (False, True, False),
            (1, 5, 0),
            (12, 75, 90),
            SHAPE,
            (5.0, 0.5, 0.5),
        ),
        foreground=tuple(positions) if is_labeled else (empty,) * 3,
        volume_ml=(1.5, 0.25, 2.0, 0.0) if is_labeled else (),
        source_sha256="ab" * 32,
    )


@pytest.fixture
def cases():
    return [case("c1"), case("a2", is_labeled=False), case("b3", dtype=np.float32)]


@pytest.fixture
def folder(tmp_path, cases):
    entries = store.write_shard(tmp_path / "shard-0.arrayrecord", cases)
    files.write_json(tmp_path / "plan.json", PLAN.to_json())
    store.write_index(tmp_path, entries)
    return tmp_path


def assert_same(left, right):
    for field in dataclasses.fields(store.Prepared):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name == "foreground":
            assert len(a) == len(b)
            assert all(
                x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
            )
        elif isinstance(b, np.ndarray):
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
        else:
            assert a == b, field.name


def test_what_is_written_is_read_back_bit_for_bit(folder, cases):
    found = store.Shards(folder)
    assert found.plan == PLAN
    for written in cases:
        assert_same(found.load(written.case), written)


def test_the_index_is_sorted_and_says_what_the_records_hold(folder, cases):
    entries = store.Shards(folder).entries
    assert [entry.id for entry in entries] == ["a2", "b3", "c1"]
    assert [entry.record for entry in entries] == [1, 2, 0]
    by_id = {entry.id: entry for entry in entries}
    counts = [int((cases[0].label == c).sum()) for c in range(4)]
    assert by_id["c1"] == store.Entry(
        "c1", "c", "train", True, True, SHAPE, tuple(counts), (1.5, 0.25, 2.0, 0.0),
        "shard-0.arrayrecord", 0,
    )  # fmt: skip
    assert (by_id["a2"].has_label, by_id["a2"].voxels, by_id["a2"].volume_ml) == (False, (), ())


def test_a_patch_is_the_slice_of_the_array_at_any_box(folder, cases):
    random = np.random.default_rng(0)
    for name, reader in ((c.case, store.Shards(folder).open(c.case)) for c in cases):
        whole = next(c for c in cases if c.case == name)
        assert reader.shape == SHAPE
        for _ in range(25):
            start = [int(random.integers(-n, n + 5)) for n in SHAPE]
            stop = [a + int(random.integers(1, n)) for a, n in zip(start, SHAPE, strict=True)]
            image, label = reader.patch(tuple(start), tuple(stop))
            box = tuple(
                slice(max(a, 0), max(b, 0)) for a, b in zip(start, stop, strict=True)
            )  # NumPy itself cuts at the far end
            np.testing.assert_array_equal(image, whole.image[box])
            assert image.dtype == whole.image.dtype
            if whole.label is None:
                assert label is None
            else:
                np.testing.assert_array_equal(label, whole.label[box])


def test_a_record_is_length_header_and_three_frames(folder, cases):
    path = folder / "shard-0.arrayrecord"
    data = array_record_module.ArrayRecordReader(str(path)).read([0])[0]
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert header["case"] == "c1"
    assert header["shape"] == list(SHAPE)
    assert header["dtype"] == "int16"
    assert header["foreground"] == [len(positions) for positions in cases[0].foreground]
    assert header["sha256"]["image"] == hashlib.sha256(cases[0].image.tobytes()).hexdigest()
    assert 8 + length + sum(header["frames"].values()) == len(data)


def test_the_same_cases_give_the_same_bytes_and_leave_nothing_else(tmp_path, cases):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        store.write_shard(tmp_path / name / "s.arrayrecord", iter(cases))
        assert [path.name for path in (tmp_path / name).iterdir()] == ["s.arrayrecord"]
    one, two = ((tmp_path / name / "s.arrayrecord").read_bytes() for name in ("x", "y"))
    assert one == two


def test_a_failure_half_way_leaves_the_old_shard_as_it_was(folder, cases):
    before = (folder / "shard-0.arrayrecord").read_bytes()

    def broken():
        yield cases[1]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        store.write_shard(folder / "shard-0.arrayrecord", broken())
    assert (folder / "shard-0.arrayrecord").read_bytes() == before


def test_no_case_no_file(tmp_path):
    assert store.write_shard(tmp_path / "s.arrayrecord", []) == []
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_a_shard_that_lost_its_seal_is_not_believed(tmp_path, cases):
    job = jobs.ShardJob(tmp_path / "shard-0.arrayrecord", tmp_path / "record.json", (), (), PLAN)
    jobs.remember(job, store.write_shard(job.path, cases), {})
    whole = json.loads(job.record.read_text())
    assert jobs.written(job, {}) == whole
    files.write_json(job.record, {k: v for k, v in whole.items() if k != "seal"})
    assert jobs.written(job, {}) is None
    older = {k: v for k, v in whole.items() if k not in ("seal", "sha256")}
    files.write_json(job.record, older)
    assert jobs.written(job, {}) == older


def test_a_flipped_bit_anywhere_in_a_record_is_noticed_and_the_record_named(folder, cases):
    path = folder / "shard-0.arrayrecord"
    good = path.read_bytes()
    data = array_record_module.ArrayRecordReader(str(path)).read([0])[0]
    start = good.index(data[:200])
    found = store.Shards(folder)
    for place in np.linspace(start, start + len(data) - 1, 12).astype(int):
        bad = bytearray(good)
        bad[place] ^= 4
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"shard-0\.arrayrecord, record 0: damaged"):
            found.load("c1")


def test_a_record_whose_container_checks_out_is_still_compared_with_its_digests(folder, cases):
    forged = with_digests_of(cases[0], dataclasses.replace(cases[0], image=cases[0].image + 1))
    with pytest.raises(ValueError, match=r"here: damaged .image does not match"):
        record.unpack(record.Reader(forged, "here"))


@pytest.mark.parametrize("name", ["image", "label", "foreground"])
def test_digests_cover_every_array_to_its_last_value(cases, name):
    changed = copy.deepcopy(cases[0])
    # Of the third class there are no positions.
    array = changed.foreground[1] if name == "foreground" else getattr(changed, name)
    array[(-1,) * array.ndim] ^= 1
    forged = with_digests_of(cases[0], changed)
    with pytest.raises(ValueError, match=f"here: damaged .{name} does not match"):
        record.unpack(record.Reader(forged, "here"))


def with_digests_of(case, other):
    """The record of `other`, whose header has the digests of `case`."""
    header, _ = record.pack(case)
    _, packed = record.pack(other)
    (length,) = struct.unpack_from("<Q", packed)
    lie = json.loads(packed[8 : 8 + length]) | {"sha256": header["sha256"]}
    text = json.dumps(lie).encode()
    return struct.pack("<Q", len(text)) + text + packed[8 + length :]


def test_a_shard_cut_short_or_gone_is_named(folder):
    path = folder / "shard-0.arrayrecord"
    data = path.read_bytes()
    for kept in (len(data) // 2, 70_000, 100, 0):
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"shard-0\.arrayrecord, record 1: damaged"):
            store.Shards(folder).open("a2")
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-0\.arrayrecord.*not there.*preprocess"):
        store.Shards(folder).load("a2")


def test_a_folder_without_index_or_with_another_schema_is_refused(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        store.Shards(folder)
    (folder / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocess"):
        store.Shards(folder)


def test_a_case_the_folder_does_not_have_is_refused(folder):
    with pytest.raises(ValueError, match="no case 'd4' among 3"):
        store.Shards(folder).open("d4")


def test_a_shard_written_anew_under_its_name_gives_no_neighbor_of_the_case(folder, cases):
    """A training holds the index in memory; what was added since has moved the others."""
    found, path = store.Shards(folder), folder / "shard-0.arrayrecord"
    store.write_shard(path, [case("a0"), *cases[:2]])
    for read in (found.open, found.load):
        with pytest.raises(ValueError, match=r"record 1: holds another case than index\.json says"):
            read("a2")
    cut = {"image": cases[1].image[1:], "slice_labels": cases[1].slice_labels[1:]}
    store.write_shard(path, [cases[0], dataclasses.replace(cases[1], **cut), cases[2]])
    with pytest.raises(ValueError, match="or another version of it"):
        found.open("a2")
    assert found.load("b3").case == "b3"


def test_threads_read_side_by_side_and_a_copy_reads_the_same(folder, cases):
    found = pickle.loads(pickle.dumps(store.Shards(folder)))
    names = list(itertools.islice(itertools.cycle(c.case for c in cases), 48))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda name: found.load(name).image, names))
    by_name = {c.case: c.image for c in cases}
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(image, by_name[name])

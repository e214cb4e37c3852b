"""Slice labels find their slices again after mirroring, cropping and turning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.assemble.recipe import make_augment
from bhsd_jax.augment.chain import IntensityChain, SpatialChain
from bhsd_jax.augment.slices import follow, mark
from bhsd_jax.augment.spatial import Affine, Mirror
from bhsd_jax.types import Batch

AIR = -1000


def head(depth=6, size=24, radius=9, center=None):
    """One raw patch [1 D H W 1]: a disk of tissue in every slice."""
    at = np.asarray(center or ((size - 1) / 2,) * 2)[:, None, None]
    far = np.sqrt(((np.indices((size, size)) - at) ** 2).sum(0))
    disk = np.where(far <= radius, 40, AIR).astype(np.int16)
    return jnp.asarray(np.broadcast_to(disk, (1, depth, size, size))[..., None])


def moved(raw, rows, ops, patch, key=0, reach=None):
    chain = SpatialChain(ops, patch)
    reach = (0 if chain.keeps_slices else 1) if reach is None else reach

    @jax.jit
    def run(key, raw, rows):
        marks, whole = mark(raw[..., 0] > -200)
        _, marks = chain(key, raw.astype(jnp.float32), marks)
        return follow(marks, whole, rows, reach=reach)

    return np.asarray(run(jax.random.key(key), raw, jnp.asarray(rows, jnp.int8)[None]))[0]


ROWS = [[0, 1], [0, 0], [1, -1], [0, 0], [-1, 0], [0, 0]]


def test_nothing_moved_is_nothing_changed():
    np.testing.assert_array_equal(moved(head(), ROWS, (), (6, 24, 24)), ROWS)


def test_mirroring_along_d_turns_the_rows_around_and_within_a_slice_nothing():
    flipped = moved(head(), ROWS, (Mirror(1.0, axes=(0,)),), (6, 24, 24))
    np.testing.assert_array_equal(flipped, ROWS[::-1])
    kept = moved(head(), ROWS, (Mirror(1.0, axes=(1, 2)),), (6, 24, 24))
    np.testing.assert_array_equal(kept, ROWS)


def test_a_part_of_a_slice_inherits_absence_and_not_presence():
    raw = head()
    part = moved(raw, ROWS, (), (6, 12, 12))
    np.testing.assert_array_equal(part, np.where(np.asarray(ROWS) == 1, -1, ROWS))
    # Nearly all of the head is seen, but the scan was cut through it before.
    cut = moved(head(center=(2.0, 11.5)), ROWS, (), (6, 24, 24))
    np.testing.assert_array_equal(cut, np.where(np.asarray(ROWS) == 1, -1, ROWS))


@pytest.mark.parametrize(("side", "seen"), [(60, True), (52, True), (51, True), (46, False)])
def test_presence_needs_95_percent_of_the_head(side, seen):
    """The share of a disk in a centered square, counted."""
    raw = head(depth=1, size=64, radius=26)
    disk = np.asarray(raw[0, 0, ..., 0]) > -200
    start = (64 - side) // 2
    share = disk[start : start + side, start : start + side].sum() / disk.sum()
    part = raw[:, :, start : start + side, start : start + side, 0]
    marks, whole = mark(part > -200)
    found = follow(marks, whole, jnp.ones((1, 1, 1), jnp.int8), reach=0)
    assert int(found[0, 0, 0]) == (1 if seen else -1)
    assert (share >= 0.95) == seen


def test_an_empty_slice_is_air_and_lacks_everything():
    raw = jnp.where(jnp.arange(6)[None, :, None, None, None] < 2, AIR, head())
    found = moved(raw, [[1, -1]] * 6, (), (6, 24, 24))
    np.testing.assert_array_equal(found, [[0, 0]] * 2 + [[1, -1]] * 4)


def test_turning_within_the_slices_keeps_them_apart():
    ops = (Affine(1.0, 1.0, scale=(1.2, 1.2)), Mirror(1.0, axes=(0,)))
    chain = SpatialChain(ops, (4, 20, 20))
    assert chain.keeps_slices
    source = chain.source_patch
    rows = ROWS[: source[0]]
    found = moved(head(source[0], source[1], 6), rows, ops, (4, 20, 20))
    np.testing.assert_array_equal(found, rows[::-1])


class Blurred:
    """An operation of one's own: the image of a slice and of the next, the label of the first."""

    def __call__(self, key, image, label):
        return 0.6 * image + 0.4 * jnp.roll(image, -1, axis=0), label


class Kept(Blurred):
    keeps_slices = True


def test_an_operation_of_ones_own_is_taken_to_mix_neighbors_unless_it_says_otherwise():
    patch = (6, 24, 24)
    assert not SpatialChain((Mirror(), Blurred()), patch).keeps_slices
    assert SpatialChain((Mirror(), Kept()), patch).keeps_slices
    rows = [[0], [0], [1], [0], [0], [0]]
    augment = make_augment(
        lambda x: x.astype(jnp.float32), SpatialChain((Blurred(),), patch), IntensityChain(())
    )
    raw, inside = head(), np.ones((1, *patch), np.int8)
    batch = Batch(raw, inside, raw, jnp.asarray([rows], jnp.int8), inside)
    found = np.asarray(jax.jit(augment)(jax.random.key(0), batch).slice_labels)[0]
    np.testing.assert_array_equal(found[:, 0], [0, -1, 1, -1, 0, 0])


def test_turning_out_of_the_slices_leaves_only_what_all_of_them_lack():
    """Against all voxels: a slice called negative holds no tissue from a slice that is not."""
    ops, patch = (Affine(1.0, 0.0, dummy_2d=False, rotation_deg=30.0),), (12, 16, 16)
    chain = SpatialChain(ops, patch)
    assert not chain.keeps_slices
    depth = chain.source_patch[0]
    raw = head(depth, chain.source_patch[1], 8)
    rows = np.where(np.arange(depth) < depth // 2, 0, -1)[:, None]
    tissue = (raw[..., 0] > -200) & (rows[None, :, :, None] != 0)
    doubtful, _ = chain(jax.random.key(3), tissue[..., None].astype(jnp.float32), None)
    found = moved(raw, rows, ops, patch, key=3)[:, 0]
    touched = np.asarray(doubtful[0, ..., 0] > 0).any((1, 2))
    assert not (touched & (found == 0)).any()
    assert {-1, 0} == set(found.tolist())
    assert not (moved(raw, np.abs(rows), ops, patch, key=3) == 1).all()

"""Chains over a batch: modes, keys, labels, shardings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bhsd_jax.augment.chain import IntensityChain, SpatialChain
from bhsd_jax.augment.intensity import (
    Brightness,
    Gamma,
    GaussianBlur,
    GaussianNoise,
    LowResolution,
)
from bhsd_jax.augment.spatial import Affine, Mirror
from bhsd_jax.build import build
from bhsd_jax.configs import common
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train.mesh import batch_sharding, make_mesh

PATCH = (2, 12, 10)


def from_config(part):
    specs = common.get_config().augment.to_dict()[part]
    return tuple(build("bhsd_jax.augment", spec) for spec in specs)


def batch(chain, size=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (size, *chain.source_patch)
    image = jnp.asarray(rng.normal(size=(*shape, 1)), jnp.float32)
    return image, jnp.asarray(rng.integers(-1, 4, shape), jnp.int8)


def test_every_operation_of_the_config_builds():
    assert [type(op).__name__ for op in from_config("spatial")] == ["Affine", "Mirror"]
    assert len(from_config("intensity")) == 7
    affine = build("bhsd_jax.augment", {"name": "spatial.Affine"}, fill=(-3.0,))
    assert affine.fill == (-3.0,)


@pytest.mark.parametrize("sequential", [False, True])
def test_intensity_operations_leave_what_lies_outside_a_mask_at_zero(key, sequential):
    """As nnU-Net's `MaskImageTransform`: of masked channels alone, and where all of them are 0."""
    image = np.random.default_rng(0).normal(size=(3, 4, 6, 5, 3)).astype(np.float32)
    image[:, :, :2] = 0
    image[:, :, 2, :, 0] = 0  # the other masked channel shows that this is inside
    ops = (GaussianNoise(p=1.0), Brightness(p=1.0))
    masked = IntensityChain(ops, sequential, masked=(0, 2))
    found = np.asarray(jax.jit(masked)(key, jnp.asarray(image)))
    plain = np.asarray(jax.jit(IntensityChain(ops, sequential))(key, jnp.asarray(image)))
    want = plain.copy()
    want[:, :, :2, :, ::2] = 0
    np.testing.assert_array_equal(found, want)
    assert (plain[:, :, :2] != 0).all()


def test_both_modes_give_the_same_patches(key):
    ops = (Affine(0.5, 0.5), Mirror())
    together, one_by_one = (SpatialChain(ops, PATCH, mode) for mode in (False, True))
    image, label = batch(together, 8)
    a_image, a_label = jax.jit(together)(key, image, label)
    b_image, b_label = jax.jit(one_by_one)(key, image, label)
    np.testing.assert_allclose(a_image, b_image, atol=1e-5)
    np.testing.assert_array_equal(a_label, b_label)


def test_devices_that_share_a_batch_give_the_same_patches(key):
    ops, mesh = (Affine(0.5, 0.5), Mirror()), make_mesh()
    alone, shared = (SpatialChain(ops, PATCH, True, places) for places in (None, mesh))
    image, label = batch(alone, 8)
    a_image, a_label = jax.jit(alone)(key, image, label)
    rows = batch_sharding(mesh)
    b_image, b_label = jax.jit(shared)(key, jax.device_put(image, rows), label)
    np.testing.assert_allclose(a_image, b_image, atol=1e-5)
    np.testing.assert_array_equal(a_label, b_label)
    assert b_image.sharding.is_equivalent_to(rows, 5)


def test_both_modes_give_the_same_intensities(key):
    ops = (GaussianNoise(0.6), GaussianBlur(0.6), LowResolution(0.6), Gamma(0.6, invert=True))
    image = jax.random.normal(key, (6, *PATCH, 1))
    a = jax.jit(IntensityChain(ops, False))(key, image)
    b = jax.jit(IntensityChain(ops, True))(key, image)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.allclose(a, image, atol=1e-3)


def test_the_key_decides_and_patches_differ(key):
    spatial = SpatialChain((Affine(1.0, 1.0), Mirror()), PATCH)
    image, label = batch(spatial, 2)
    image, label = jnp.stack([image[0]] * 2), jnp.stack([label[0]] * 2)
    intensity = IntensityChain((GaussianNoise(1.0), Brightness(1.0), Gamma(1.0)))

    @jax.jit
    def run(key):
        moved, classes = spatial(key, image, label)
        return intensity(key, moved), intensity(key, moved[:, ::-1]), classes

    first, again, other = run(key), run(key), run(jax.random.key(1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
        assert not np.array_equal(a[0], a[1])


def test_equal_operations_in_a_chain_draw_differently(key):
    image = jnp.ones((1, *PATCH, 1))
    once = IntensityChain((Brightness(1.0),))(key, image)
    twice = IntensityChain((Brightness(1.0), Brightness(1.0)))(key, image)
    assert abs(float(twice[0, 0, 0, 0, 0]) - float(once[0, 0, 0, 0, 0]) ** 2) > 1e-4


@pytest.mark.parametrize("sequential", [False, True])
def test_an_unlabeled_patch_is_moved_alike_and_costs_no_label_work(key, sequential):
    chain = SpatialChain((Affine(1.0, 1.0), Mirror()), PATCH, sequential)
    image, label = batch(chain)
    with_label, _ = jax.jit(chain)(key, image, label)
    alone = jax.jit(lambda key, image: chain(key, image, None))
    np.testing.assert_allclose(alone(key, image)[0], with_label, atol=1e-6)
    assert alone(key, image)[1] is None
    assert "s8[" not in alone.lower(key, image).compile().as_text()


def test_outside_becomes_background_at_the_end(key):
    chain = SpatialChain((Affine(1.0, 1.0, scale=(1.4, 1.4)), Mirror()), PATCH)
    image, _ = batch(chain)
    classes = jax.jit(chain)(key, image, jnp.full(image.shape[:4], 3, jnp.int8))[1]
    assert classes.dtype == jnp.int8
    assert set(np.unique(classes)) == {0, 3}


def test_an_empty_chain_is_the_center_crop(key):
    chain = SpatialChain((), (2, 4, 4))
    assert chain.source_patch == (2, 4, 4)
    image = jnp.arange(2 * 2 * 6 * 8.0).reshape(2, 2, 6, 8, 1)
    label = jnp.full((2, 2, 6, 8), -1, jnp.int8).at[:, :, 1, 2].set(5)
    moved, classes = chain(key, image, label)
    np.testing.assert_array_equal(moved, image[:, :, 1:5, 2:6])
    np.testing.assert_array_equal(classes[:, :, 0, 0], np.full((2, 2), 5))
    assert int(classes.sum()) == 20
    np.testing.assert_array_equal(IntensityChain(())(key, image), image)


def test_fill_is_what_lies_outside_the_source(key):
    for fill, expected in ((-2.0, (-2.0, -2.0)), ((-3.0, 5.0), (-3.0, 5.0))):
        op = Affine(0.0, 1.0, scale=(4.0, 4.0), fill=fill)
        chain = SpatialChain((op,), PATCH)
        image = jnp.zeros((1, *chain.source_patch, 2))
        moved, classes = jax.jit(chain)(key, image, jnp.ones(image.shape[:4], jnp.int8))
        np.testing.assert_allclose(moved[0, :, 0, 0], np.tile(expected, (2, 1)))
        assert int(classes[0, 0, 0, 0]) == 0


def test_the_chain_asks_for_the_crop_of_nnunet():
    assert SpatialChain(from_config("spatial"), (20, 320, 256)).source_patch == (20, 376, 376)
    assert SpatialChain((Mirror(),), (20, 320, 256)).source_patch == (20, 320, 256)


def test_a_cutting_operation_must_come_first():
    with pytest.raises(ValueError, match="Affine must come first"):
        SpatialChain((Mirror(), Affine()), PATCH)


def test_a_source_smaller_than_the_patch_is_refused(key):
    chain = SpatialChain((Affine(),), PATCH)
    with pytest.raises(ValueError, match="smaller than"):
        chain(key, jnp.zeros((1, 2, 12, 9, 1)), None)


def test_a_sharded_batch_is_augmented_where_it_lies(key):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spatial = SpatialChain((Affine(0.5, 0.5), Mirror()), PATCH)
    intensity = IntensityChain(from_config("intensity"))

    def augment(key, image, label):
        where_key, value_key = jax.random.split(key)
        image, label = spatial(where_key, image, label)
        return intensity(value_key, image), label

    image, label = batch(spatial, 8)
    sharded = jax.jit(augment, in_shardings=(None, rows, rows), out_shardings=(rows, rows))
    text = sharded.lower(key, image, label).compile().as_text()
    assert "num_partitions=8" in text
    assert not re.findall(
        r"all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter", text
    )


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (IntensityChain((lambda key, image: image[1:],)), r"must return one image of the shape"),
        (
            IntensityChain((lambda key, image: (image, None),)),
            r"got \(\(4, 4, 4, 1\) float32, None",
        ),
        (SpatialChain((lambda key, image, label: image,), (4, 4, 4)), r"must return image \(4, 4"),
        (SpatialChain((lambda key, image, label: (label, image),), (4, 4, 4)), "of the shapes it"),
        (
            SpatialChain((lambda key, image, label: (image[1:], label[1:]),), (4, 4, 4)),
            r"got \(\(3, 4, 4, 1\) float32, \(3, 4, 4\) int8\)",
        ),
    ],
)
def test_an_operation_of_ones_own_that_returns_something_else_is_refused(chain, said, key):
    image, label = jnp.zeros((2, 4, 4, 4, 1)), jnp.zeros((2, 4, 4, 4), jnp.int8)
    given = (image,) if isinstance(chain, IntensityChain) else (image, label)
    with pytest.raises(UserError, match=said):
        jax.eval_shape(chain, key, *given)

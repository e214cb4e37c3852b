"""Changes of a first network's label map: what they are, and that they come as often as nnU-Net's.

`augment_cascade.npz` has a label map, and of 1500 draws of batchgeneratorsv2 0.3.6 each: voxels of
both labels, of both at once, and how many have changed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from bhsd_jax.augment.cascade import BinaryOperator, RemoveComponent, components, dilate

CORNERS = np.ones((3, 3, 3))


@pytest.fixture(scope="module")
def reference(request):
    with np.load(request.path.parents[1] / "golden" / "augment_cascade.npz") as stored:
        return dict(stored)


def ball(size):
    """Offsets that a ball of so many voxels across covers; of an even number half a voxel off."""
    steps = np.arange(-8, 9) - (0.5 if size % 2 == 0 else 0)
    grid = np.meshgrid(steps, steps, steps, indexing="ij")
    return (np.square(grid).sum(0) <= ((size - 1) / 2) ** 2).astype(np.int32)


def test_a_dilation_covers_what_balls_cover(reference):
    mask = reference["label"] == 1
    found = jax.jit(dilate, static_argnums=2)
    for size in (3, 4, 7, 10, 16):
        want = ndimage.correlate(mask.astype(np.int32), ball(size), mode="constant") > 0
        assert (np.asarray(found(mask, jnp.float32(size), 8)) == want).all()
        assert want.sum() > mask.sum()


def test_components_are_those_that_touch(reference):
    for value in (1, 2):
        mask = reference["label"] == value
        found = np.asarray(jax.jit(components)(mask))
        want, count = ndimage.label(mask, CORNERS)
        assert count > 1
        pairs = set(zip(found[mask].tolist(), want[mask].tolist(), strict=True))
        assert len(pairs) == count == len(set(found[mask].tolist()))
        assert (found[~mask] == 0).all()
    assert (np.asarray(jax.jit(components)(np.zeros((3, 4, 5), bool))) == 0).all()


def test_a_removed_component_is_a_whole_one(reference):
    maps = np.stack([reference["label"] == 1, reference["label"] == 2], -1).astype(np.float32)
    operation = jax.jit(RemoveComponent(p=1.0, p_per_label=1.0))
    for seed in range(4):
        left = np.asarray(operation(jax.random.key(seed), maps))
        for label in range(2):
            lost = (maps[..., label] > 0) & (left[..., label] == 0)
            named = ndimage.label(maps[..., label], CORNERS)[0]
            (name,) = set(named[lost].tolist())
            assert (lost == (named == name)).all()
    whole = np.ones((4, 4, 4, 1), np.float32)
    assert (np.asarray(operation(jax.random.key(0), whole)) == 1).all(), "too large"


@pytest.mark.parametrize("name", ["operator", "component"])
def test_changes_are_distributed_as_nnunets(reference, name):
    operation = {"operator": BinaryOperator(), "component": RemoveComponent()}[name]
    maps = jnp.stack([reference["label"] == 1, reference["label"] == 2], -1).astype(jnp.float32)

    def draw(key):
        made = operation(key, maps)
        both = (made[..., 0] * made[..., 1]).sum()
        return jnp.stack([*made.sum((0, 1, 2)), both, (made != maps).sum()])

    keys = jax.random.split(jax.random.key(0), 1500)
    found = np.asarray(jax.jit(lambda keys: jax.lax.map(draw, keys))(keys))
    for ours, theirs in zip(found.T, reference[name].T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 0.01
    changed, theirs = np.mean(found[:, 3] > 0), np.mean(reference[name][:, 3] > 0)
    assert abs(changed - theirs) < 0.04
    assert theirs > 0.1


def test_what_no_chance_is_given_changes_nothing(reference):
    maps = np.stack([reference["label"] == 1, reference["label"] == 2], -1).astype(np.float32)
    for operation in (BinaryOperator(p=0.0), RemoveComponent(p=0.0)):
        assert (np.asarray(jax.jit(operation)(jax.random.key(1), maps)) == maps).all()
    with pytest.raises(ValueError, match=r"p_per_label must be in \[0, 1\]"):
        BinaryOperator(p_per_label=2.0)

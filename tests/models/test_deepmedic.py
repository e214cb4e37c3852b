"""DeepMedic against BLAST-CT's numbers; tiles that bring their margin; sizes and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import jit, read, relative

from bhsd_jax.models.deepmedic import DeepMedic
from bhsd_jax.nnunet import planner
from bhsd_jax.torch_weights import exporting, importing
from bhsd_jax.torch_weights.deepmedic import from_torch

SMALL = {
    "scales": ((2, 2, 2), (1, 1, 1)),
    "features": (3, 3),
    "joined": (4,),
    "dropout": (0.0, 0.0),
}


def test_outputs_and_gradients_are_those_of_the_reference(golden):
    about, arrays, state = read(golden, "deepmedic_1")
    module, variables = importing.load(about["backbone"], about["constructor_args"], state)
    statistics = {"batch_stats": variables["batch_stats"]}

    @jit
    def run(params, image):
        def loss(params, image):
            (out,) = module.apply({"params": params, **statistics}, image, train=False)
            return jnp.square(out).mean(), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, image)
        return out, *grads

    image = np.moveaxis(arrays["input"].astype(np.float32) / 32, 1, -1)
    out, weight_grads, image_grad = run(variables["params"], image)
    ours, theirs = np.moveaxis(out, -1, 1), arrays["output/0"]
    assert relative(ours, theirs) < 2e-5
    assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()
    assert relative(np.moveaxis(image_grad, -1, 1)[..., ::4, ::4], arrays["grad_input"]) < 1e-3
    weights = from_torch(about["backbone"], about["constructor_args"]).weights
    for name, norm in about["param_grad_l2"].items():
        _, *path = weights[name].path.split("/")
        leaf = functools.reduce(lambda tree, key: tree[key], path, weight_grads)
        np.testing.assert_allclose(np.linalg.norm(leaf), norm, rtol=1e-3, atol=1e-6, err_msg=name)


def test_weights_come_back_as_they_were(golden):
    about, _, state = read(golden, "deepmedic_1")
    _, variables = importing.load(about["backbone"], about["constructor_args"], state)
    back = exporting.dump(about["backbone"], about["constructor_args"], variables)
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_the_published_network_has_as_many_parameters():
    constructor = {"input_channels": 1, "num_classes": 5}
    recipe = from_torch("DeepMedic", constructor)
    tree = jax.eval_shape(
        lambda x: recipe.module.init(jax.random.key(0), x, train=False),
        jax.ShapeDtypeStruct(recipe.image, jnp.float32),
    )
    assert recipe.image[1:4] == (95, 95, 95)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == 1_030_033
    # With running statistics; the file has a counter more for each of its 27 norms.
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == 1_032_986 - 27


def test_tiles_that_bring_their_margin_give_what_the_whole_gives(key):
    """Side by side, from multiples of the stride on; the whole is continued by its edge."""
    edge = DeepMedic(3, **SMALL, norm="")  # a norm over the sample would see another sample
    given = edge.clone(context="given")
    assert (edge.margin, given.margin) == ((0, 0, 0), (4, 4, 4))
    image = jax.random.normal(key, (1, 8, 4, 6, 1))
    params = edge.init(key, image, train=False)
    whole = jit(lambda x: edge.apply(params, x, train=False)[0])(image)
    padded = jnp.pad(image, ((0, 0), (4, 4), (4, 4), (4, 4), (0, 0)), mode="edge")
    apply = jit(lambda x: given.apply(params, x, train=False)[0])
    tiles = [apply(padded[:, n : n + 10]) for n in range(0, 8, 2)]
    assert tiles[0].shape == (1, 2, 4, 6, 3)
    np.testing.assert_allclose(np.concatenate(tiles, axis=1), whole, atol=1e-5)


def test_what_does_not_fit_is_refused(key):
    image = jnp.zeros((1, 10, 10, 10, 1))
    given = DeepMedic(2, **SMALL, context="given")
    with pytest.raises(ValueError, match="for prediction; train with 'edge'"):
        given.init(key, image, train=True)
    with pytest.raises(ValueError, match=r"patch \(3, 2, 2\) must be a multiple of \(2, 2, 2\)"):
        given.init(key, jnp.zeros((1, 11, 10, 10, 1)), train=False)
    with pytest.raises(ValueError, match=r"dropout needs 2 shares"):
        given.clone(dropout=(0,)).init(key, image, train=False)
    with pytest.raises(ValueError, match=r"context is 'none'; choose from edge, given"):
        given.clone(context="none").init(key, image, train=False)
    with pytest.raises(ValueError, match=r"widths is not known; num_classes is missing"):
        from_torch("DeepMedic", {"input_channels": 1, "widths": 3})


def test_thick_slices_are_seen_by_every_path():
    network = planner.topology((5.0, 0.5, 0.5), (20, 320, 256))
    made = DeepMedic.for_plan(network, (20, 320, 256), (5.0, 0.5, 0.5), num_classes=3)
    assert made.scales == ((1, 4, 4), (1, 2, 2), (1, 1, 1))
    made = DeepMedic.for_plan(network, (30, 64, 64), (1.0, 1.0, 1.0), num_classes=3)
    assert made.scales == ((2, 4, 4), (2, 2, 2), (1, 1, 1))

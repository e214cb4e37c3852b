"""Primus against the reference's numbers; sizes, refusals, steps of the decoder."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from networks import jit, read, relative, require_norms, shapes

from bhsd_jax.models.primus import HEAD_CT, Primus, decoder_of
from bhsd_jax.models.primus_blocks import rotary_angles, rotate
from bhsd_jax.torch_weights import exporting, importing
from bhsd_jax.torch_weights.primus import from_torch

TINY = {"width": 12, "heads": 2, "layers": 2, "token": (4, 4, 4)}


def _read(folder, case):
    about, *stored = read(folder, case)
    arrays, state = ({k: v.astype(np.float32) for k, v in each.items()} for each in stored)
    return about, arrays, state or _drawn(about["param_shapes"])


def _drawn(shapes):
    """Weights by name, as the reference was given them; more than a fixture should hold."""
    random, state = np.random.default_rng(0), {}
    for name in sorted(shapes):
        value = random.random(shapes[name], np.float32) - np.float32(0.5)
        fan = value[0].size if value.ndim > 1 else 4
        state[name] = value * np.float32(3 * fan**-0.5) + np.float32(value.ndim == 1)
    return state


@pytest.mark.parametrize("case", ["primus_1", "primus_2", "primus_v2"])
def test_outputs_and_recomputed_gradients_are_those_of_the_reference(golden, case):
    about, arrays, state = _read(golden, case)
    module, variables = importing.load(about["backbone"], about["constructor_args"], state)
    recomputed = module.clone(remat="blocks")

    @jit
    def run(variables, image):
        def loss(variables, image):
            (out,) = recomputed.apply(variables, image, train=False)
            return jnp.square(out).mean(), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, image)
        return module.apply(variables, image, train=False)[0], out, *grads

    image = np.moveaxis(arrays["input"], 1, -1)
    out, again, weight_grads, image_grad = run(variables, image)
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5 * abs(out).max())
    ours, theirs = np.moveaxis(out, -1, 1), arrays["output/0"]
    assert relative(ours, theirs) < 2e-5
    assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()
    assert relative(np.moveaxis(image_grad, -1, 1), arrays["grad_input"]) < 1e-3
    weights = from_torch(about["backbone"], about["constructor_args"]).weights
    assert weights.keys() == about["param_grad_l2"].keys()
    require_norms(weight_grads, weights, about["param_grad_l2"])


def test_weights_leave_under_the_names_and_shapes_they_came_with(golden):
    about, _, state = _read(golden, "primus_1")
    named = about["backbone"], about["constructor_args"]
    _, variables = importing.load(*named, state)
    found = exporting.dump(*named, variables)
    assert found.keys() == state.keys() - {"mask_token"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


@pytest.mark.parametrize(
    ("reference", "parameters"),
    [("PrimusS", 23_419_407), ("PrimusM", 145_733_499), ("PrimusV2B", 92_979_059)],
)
def test_published_sizes_have_as_many_parameters(reference, parameters):
    shape = {"input_channels": 1, "output_channels": 3, "input_shape": (64, 64, 64)}
    recipe = from_torch(reference, shape | {"patch_embed_size": (8, 8, 8)})
    _, variables = shapes(recipe.module, recipe.image)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_head_ct_keeps_five_planes_of_tokens():
    net = Primus(6, **TINY | HEAD_CT)
    (logits,), variables = shapes(net, (2, 20, 320, 256, 1))
    assert logits.shape == (2, 20, 320, 256, 6)
    assert variables["params"]["positions"].shape == (1, 5 * 20 * 16, 12)
    assert decoder_of(net)[0] == ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))


def test_without_learned_positions_any_patch_is_taken():
    net = Primus(2, patch=(8, 8, 8), absolute=False, **TINY)
    _, variables = shapes(net, (1, 8, 8, 8, 1))
    image = jax.ShapeDtypeStruct((1, 12, 8, 4, 1), jnp.float32)
    (logits,) = jax.eval_shape(lambda v, x: net.apply(v, x, train=False), variables, image)
    assert logits.shape == (1, 12, 8, 4, 2)


def test_the_score_of_two_rotated_tokens_depends_on_their_distance_alone():
    angles = rotary_angles((3, 4, 5), 12)
    query, key = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)

    def score(one, other):
        one, other = (np.ravel_multi_index(place, (3, 4, 5)) for place in (one, other))
        tokens = [jnp.broadcast_to(x, (1, 60, 1, 12)) for x in (query, key)]
        turned = [rotate(x, angles, 0) for x in tokens]
        return float(turned[0][0, one, 0] @ turned[1][0, other, 0])

    near = score((0, 0, 0), (1, 2, 1))
    assert near == pytest.approx(score((1, 1, 3), (2, 3, 4)), abs=1e-5)
    assert abs(near - score((0, 0, 0), (1, 2, 3))) > 1e-2


def test_dropout_and_dropped_branches_draw_in_training_alone():
    net = Primus(2, dropout=0.5, attention_dropout=0.5, drop_path=0.5, registers=1, **TINY)
    image = jax.random.normal(jax.random.key(1), (2, 8, 8, 8, 1))
    variables = net.init(jax.random.key(0), image, train=False)

    def logits(seed, *, train):
        return net.apply(variables, image, train=train, rngs={"dropout": jax.random.key(seed)})[0]

    np.testing.assert_array_equal(logits(0, train=False), logits(1, train=False))
    assert float(abs(logits(0, train=True) - logits(1, train=True)).max()) > 0


def test_registers_are_before_any_number_of_patches():
    """The batch of an export is a symbol."""
    net = Primus(2, registers=1, **TINY)
    (batch,) = jax.export.symbolic_shape("b")
    variables = shapes(net, (1, 8, 8, 8, 1))[1]
    image = jax.ShapeDtypeStruct((batch, 8, 8, 8, 1), jnp.float32)
    (logits,) = jax.eval_shape(lambda v, x: net.apply(v, x, train=False), variables, image)
    assert logits.shape == (batch, 8, 8, 8, 2)


@pytest.mark.parametrize(
    ("fields", "image", "message"),
    [
        ({}, (8, 10, 8), r"multiple of \(4, 4, 4\) .* nearest is \(8, 12, 8\)"),
        ({"patch": (8, 8, 8)}, (8, 8, 12), r"positions are those of patch \(8, 8, 8\)"),
        ({"heads": 5}, (8, 8, 8), "width must be a multiple of heads"),
        ({"heads": 3}, (8, 8, 8), "width / heads must be a multiple of 6"),
        ({"token": (4, 6, 4)}, (8, 12, 8), "must be powers of two"),
        ({"token": (1, 1, 1)}, (8, 8, 8), "one of them above 1"),
        ({"embedding": "conv"}, (8, 8, 8), "embedding must be linear or residual"),
        ({"embedding": "residual"}, (8, 8, 8), r"residual makes tokens of \(8, 8, 8\)"),
    ],
)
def test_primus_refuses_what_does_not_fit(fields, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(Primus(6, **TINY | fields), (1, *image, 1))


def test_primus_lists_every_argument_without_a_counterpart():
    arguments = {
        "input_channels": 1,
        "num_classes": 2,
        "embed_dim": 12,
        "patch_embed_size": (4, 4, 4),
        "decoder_act": "torch.nn.ReLU",
        "patch_drop_rate": 0.5,
        "skips": True,
    }
    with pytest.raises(ValueError, match="constructor not supported") as error:
        from_torch("Primus", arguments)
    for word in ("skips is not known", "input_shape is missing", "decoder_act", "patch_drop_rate"):
        assert word in str(error.value)

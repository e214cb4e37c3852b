"""UNETR against the reference's numbers; sizes, refusals, and the norms it may be built with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import jit, read, relative, require_norms, shapes

from bhsd_jax.models.norms import BatchNorm, GroupNorm, make_norm
from bhsd_jax.models.unetr import HEAD_CT, UNETR
from bhsd_jax.models.unetr_blocks import TransformerBlock
from bhsd_jax.torch_weights import importing
from bhsd_jax.torch_weights.unetr import from_torch


def test_unetr_outputs_and_recomputed_gradients_are_those_of_the_reference(golden):
    about, arrays, state = read(golden, "unetr_2")
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
    ours, theirs = np.moveaxis(out, -1, 1)[..., ::4, ::4], arrays["output/0"]
    assert relative(ours, theirs) < 2e-5
    assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()
    assert relative(np.moveaxis(image_grad, -1, 1)[..., ::4, ::4], arrays["grad_input"]) < 1e-3
    weights = from_torch(about["backbone"], about["constructor_args"]).weights
    require_norms(weight_grads, weights, about["param_grad_l2"])


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        # The reference counts 12 * 2 * 768 more: norms of a cross-attention that it never runs.
        ({}, 92_802_478 - 18_432),
        ({"feature_size": 32}, 101_805_646 - 18_432),
        ({"embedding": "perceptron"}, 92_802_478 - 18_432),
    ],
)
def test_unetr_parameter_counts_are_those_of_the_reference(fields, parameters):
    _, variables = shapes(UNETR(14, **fields), (1, 96, 96, 96, 1))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_unetr_preset_keeps_a_depth_of_tokens_to_attend_along():
    net = UNETR(6, **HEAD_CT)
    assert net.stride == (4, 16, 16)
    (logits,), variables = shapes(net, (2, *net.patch, 3))
    assert logits.shape == (2, 20, 320, 256, 6)
    assert variables["params"]["positions"].shape == (1, 5 * 20 * 16, 768)


@pytest.mark.parametrize(
    ("fields", "image", "message"),
    [
        ({}, (24, 250, 256), r"multiple of \(16, 16, 16\) .* nearest is \(32, 256, 256\)"),
        ({"patch": (32, 64, 64)}, (64, 64, 64), r"positions are those of patch \(32, 64, 64\)"),
        ({"heads": 7}, (16, 16, 16), "hidden_size must be a multiple of heads"),
        ({"taps": (4, 7, 13)}, (16, 16, 16), "taps needs 3 numbers of blocks"),
        ({"up_strides": ((2, 2, 2),)}, (16, 16, 16), "up_strides needs 4"),
        ({"embedding": "linear"}, (16, 16, 16), "embedding must be conv or perceptron"),
        ({"remat": "all"}, (16, 16, 16), "choose 'none' or 'blocks'"),
        ({"norm": "layer"}, (16, 16, 16), "norm 'layer' is not known"),
        ({"norm": ("group", {})}, (16, 16, 16), "'group' needs eps, affine, num_groups"),
        ({"norm": ("batch", {"decay": 1})}, (16, 16, 16), "'batch' takes eps, affine, momentum"),
    ],
)
def test_unetr_refuses_what_does_not_fit(fields, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(UNETR(6, **fields), (1, *image, 1))


def test_unetr_lists_everything_wrong_with_its_weights(golden):
    about, _, state = read(golden, "unetr_2")
    dead = "vit.blocks.3.norm_cross_attn.weight", "encoder1.layer.norm1.num_batches_tracked"
    state |= dict.fromkeys(dead, np.ones(3))
    importing.load("UNETR", about["constructor_args"], state)
    state["vit.norm.weight"] = np.ones(3, np.float32)
    state["out.conv.conv.weight"] = np.ones(3, np.float32)
    state["surprise"] = np.ones(3, np.float32)
    del state["encoder3.transp_conv_init.conv.weight"]
    with pytest.raises(ValueError, match="do not fit") as error:
        importing.load("UNETR", about["constructor_args"], state)
    lines = "\n".join(sorted(line.strip() for line in str(error.value).splitlines()[1:]))
    assert [line.split(":")[0] for line in lines.splitlines()] == [
        "missing encoder3.transp_conv_init.conv.weight",
        "out.conv.conv.weight",
        "unknown surprise",
        "vit.norm.weight",
    ]


def test_unetr_lists_every_argument_without_a_counterpart():
    arguments = {"in_channels": 1, "img_size": 96, "spatial_dims": 2, "norm_name": "layer", "x": 1}
    with pytest.raises(
        ValueError, match=r"x is not known; out_channels is missing; spatial_dims=2 .*norm 'layer'"
    ):
        from_torch("UNETR", arguments)


def test_unetr_arguments_become_fields():
    arguments = {"in_channels": 2, "out_channels": 3, "img_size": 32, "pos_embed": "perceptron"}
    arguments |= {"norm_name": ["GROUP", {"num_groups": 4}], "dropout_rate": 0.1}
    recipe = from_torch("UNETR", arguments)
    assert recipe.module == UNETR(
        3,
        patch=(32, 32, 32),
        embedding="perceptron",
        norm=("GROUP", {"num_groups": 4}),
        dropout=0.1,
    )
    assert recipe.image == (1, 32, 32, 32, 2)
    assert "encoder1.layer.norm3.bias" in recipe.weights  # group norms have weights


def test_a_block_whose_dropout_takes_everything_leaves_the_input(key):
    block = TransformerBlock(2, 8, False, 1.0, train=True)
    tokens = jax.random.normal(key, (2, 3, 4))
    variables = jit(block.init)(key, tokens)
    run = jit(lambda block, x: block.apply(variables, x, rngs={"dropout": key}), static_argnums=0)
    np.testing.assert_array_equal(run(block, tokens), tokens)
    assert abs(run(block.clone(train=False), tokens) - tokens).max() > 0.1


def test_batch_norm_learns_the_unbiased_variance_and_uses_it_later(key):
    image = 3 + 2 * jax.random.normal(key, (2, 2, 3, 2, 4))
    layer = BatchNorm(1e-5, True, jnp.float32, 0.1, train=True)
    start = jit(layer.init)(key, image)
    assert not start["batch_stats"]["mean"].any()
    out, change = jit(lambda v, x: layer.apply(v, x, mutable=["batch_stats"]))(start, image)
    np.testing.assert_allclose(out.mean((0, 1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2, 3)), 1, rtol=1e-4)
    flat = np.asarray(image).reshape(-1, 4)
    mean, var = 0.1 * flat.mean(0), 0.9 + 0.1 * flat.var(0, ddof=1)
    np.testing.assert_allclose(change["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(change["batch_stats"]["var"], var, rtol=1e-5)
    later = jit(layer.clone(train=False).apply)({**start, **change}, image)
    np.testing.assert_allclose(later, (image - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)


def test_group_norm_of_one_channel_each_is_an_instance_norm(key):
    image = 5 + jax.random.normal(key, (2, 2, 3, 2, 4))
    alone = jit(GroupNorm(1e-5, False, jnp.float32, groups=4).apply)({}, image)
    instance = jit(make_norm("instance", True, jnp.float32, "norm").apply)({}, image)
    np.testing.assert_allclose(alone, instance, rtol=1e-4, atol=1e-5)
    paired = jit(GroupNorm(1e-5, False, jnp.float32, groups=2).apply)({}, image)
    np.testing.assert_allclose(paired[0, ..., 2:].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(paired[0, ..., 2:].std(), 1, rtol=1e-4)
    assert abs(paired[0, ..., 2].mean()) > 1e-3

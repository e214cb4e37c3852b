"""nnU-Net's networks: sizes, outputs, refusals. Their numbers are checked in test_torch_import."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bhsd_jax.models import nnunet
from bhsd_jax.models.nnunet import PlainConvUNet, ResidualEncoderUNet

BHSD = {
    "num_classes": 6,
    "features": (32, 64, 128, 256, 320, 320, 320),
    "strides": ((1, 1, 1), *((1, 2, 2),) * 3, *((2, 2, 2),) * 2, (1, 2, 2)),
    "kernels": ((1, 3, 3),) * 3 + ((3, 3, 3),) * 4,
}
SMALL = {"num_classes": 3, "features": (4, 6), "strides": ((1, 1, 1), (1, 2, 2))}
SMALL["kernels"] = ((1, 3, 3), (3, 3, 3))
PLAIN = PlainConvUNet(**SMALL, convs_encoder=1, convs_decoder=1)
RESIDUAL = ResidualEncoderUNet(**SMALL, blocks_encoder=1)


def _weights(net, image):
    """Some parameters, without the cost of compiling an initialization."""
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=True), image)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda s: random.normal(0, 0.5, s.shape).astype(np.float32), shapes)


def _count(model, patch):
    image = jax.ShapeDtypeStruct((1, *patch, 1), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), image)
    assert set(variables) == {"params"}
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("model", "patch", "parameters"),
    [
        (PlainConvUNet(**BHSD), (20, 320, 256), 43_533_284),
        (PlainConvUNet(**BHSD, deep_supervision=False), (20, 320, 256), 43_526_726),
        (PlainConvUNet(6, features=BHSD["features"]), (4, 64, 64), 43_533_284),
        (ResidualEncoderUNet(**BHSD), (16, 320, 320), 137_883_556),
        (
            PlainConvUNet(
                3,
                features=(32, 64, 128, 256),
                strides=((1, 1, 1), *((2, 2, 2),) * 3),
                kernels=((3, 3, 3),) * 4,
            ),
            (40, 56, 40),
            5_603_177,
        ),
    ],
)
def test_parameter_counts_are_those_of_the_reference(model, patch, parameters):
    assert _count(model, patch) == parameters


@pytest.mark.parametrize("model", [PlainConvUNet, ResidualEncoderUNet])
def test_outputs_are_float32_logits_from_full_resolution_down(model):
    net = model(num_classes=6, dtype=jnp.bfloat16)
    assert net.stride == (4, 32, 32)
    image = jax.ShapeDtypeStruct((2, 8, 64, 32, 2), jnp.float32)
    logits, _ = jax.eval_shape(
        lambda x: net.init_with_output(jax.random.key(0), x, train=True), image
    )
    assert [out.shape for out in logits] == [
        (2, 8, 64, 32, 6),
        (2, 8, 32, 16, 6),
        (2, 8, 16, 8, 6),
        (2, 8, 8, 4, 6),
        (2, 4, 4, 2, 6),
    ]
    assert all(out.dtype == jnp.float32 for out in logits)


def test_a_residual_encoder_of_eight_stages_has_nnunets_blocks():
    net = ResidualEncoderUNet(2, features=(4,) * 8)
    assert nnunet.blocks_of(net) == (1, 3, 4, 6, 6, 6, 6, 6)


def test_without_deep_supervision_the_same_parameters_give_the_first_output(key):
    image = jax.random.normal(key, (1, 2, 8, 8, 1))
    whole = PlainConvUNet(3, features=(4, 4, 6), convs_encoder=1, convs_decoder=1)
    variables = _weights(whole, image)
    single = whole.clone(deep_supervision=False)
    run = jax.jit(lambda net, v, x: net.apply(v, x, train=True), static_argnums=0)
    outputs = run(whole, variables, image)
    (output,) = run(single, variables, image)
    assert len(outputs) == 2
    np.testing.assert_array_equal(output, outputs[0])


@pytest.mark.parametrize("net", [PLAIN, RESIDUAL])
def test_rematerialization_changes_neither_parameters_nor_gradients(net, key):
    image = jax.random.normal(key, (1, 2, 8, 8, 1))
    params = _weights(net, image)

    def grads(net):
        def loss(params):
            return sum(jnp.square(out).mean() for out in net.apply(params, image, train=True))

        return jax.jit(jax.grad(loss))(params)

    plain, recomputed = grads(net), grads(net.clone(remat="blocks"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, recomputed
    )


def test_a_new_residual_block_is_its_shortcut(key):
    def scales(image):
        stage = RESIDUAL.init(key, image, train=True)["params"]["encoder_1"]
        return {name: unit["norm"]["scale"] for name, unit in stage.items()}

    found = {
        name: set(v.tolist()) for name, v in jax.jit(scales)(jnp.zeros((1, 1, 2, 2, 1))).items()
    }
    assert found == {"block_0_conv1": {1.0}, "block_0_conv2": {0.0}, "block_0_skip": {1.0}}


@pytest.mark.parametrize("model", [PlainConvUNet, ResidualEncoderUNet])
def test_a_patch_that_cannot_be_halved_is_refused_with_the_nearest_that_can(model):
    image = jax.ShapeDtypeStruct((1, 7, 300, 320, 1), jnp.float32)
    with pytest.raises(ValueError, match=r"nearest is \(8, 288, 320\)"):
        jax.eval_shape(lambda x: model(6).init(jax.random.key(0), x, train=True), image)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strides": ((1, 1, 1),)}, "strides needs 2 entries"),
        ({"kernels": ((3, 3, 3),) * 3}, "kernels needs 2 entries"),
        ({"kernels": ((1, 2, 2), (3, 3, 3))}, "kernels must be odd"),
        ({"convs_decoder": (2, 2)}, "convs_decoder needs 1 entries"),
        ({"remat": "all"}, "choose 'none' or 'blocks'"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    net = PlainConvUNet(**(SMALL | fields))
    image = jax.ShapeDtypeStruct((1, 2, 8, 8, 1), jnp.float32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=True), image)

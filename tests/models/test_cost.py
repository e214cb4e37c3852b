"""Multiply-adds against counts by hand and against nnU-Net's own; precision inside the networks."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from bhsd_jax.configs.backbones import BACKBONES
from jax import lax

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import supervised
from bhsd_jax.models import nnunet
from bhsd_jax.models.conv import Conv, ConvTranspose
from bhsd_jax.models.cost import cost, equations, multiply_adds
from bhsd_jax.models.norms import InstanceNorm
from tools import model_table


def abstract(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("layer", "image", "count"),
    [
        (Conv(5, (3, 3, 3)), (2, 4, 6, 8, 3), 2 * 4 * 6 * 8 * 5 * 3 * 27),
        (Conv(5, (1, 3, 3), (1, 2, 2)), (1, 4, 6, 8, 3), 4 * 3 * 4 * 5 * 3 * 9),
        (Conv(5, (1, 1, 1)), (1, 4, 6, 8, 3), 4 * 6 * 8 * 5 * 3),
        (ConvTranspose(5, (1, 2, 2)), (1, 4, 6, 8, 3), 4 * 6 * 8 * 5 * 3 * 4),
        (InstanceNorm(), (1, 4, 6, 8, 3), 0),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_costs_what_one_counts_by_hand(layer, image, count, dtype):
    layer = layer.clone(dtype=dtype)  # in bfloat16 the pointwise layers, too, are made per platform
    image = abstract(*image)
    variables = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), image)
    assert multiply_adds(layer.apply, variables, image) == count


def test_loops_count_every_turn_and_inner_functions_once():
    def turn(x, _):
        return jnp.tanh(x @ x), None

    @jax.checkpoint
    def run(x):
        return jax.jit(lambda y: lax.scan(turn, y, length=7)[0])(x)

    assert multiply_adds(run, abstract(4, 4)) == 7 * 4**3


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_the_cost_of_a_network_is_that_of_its_forward_pass(remat):
    net = nnunet.ResidualEncoderUNet(3, features=(4, 8), blocks_encoder=1, remat=remat)
    image = (1, 4, 8, 8, 1)
    variables = jax.eval_shape(
        lambda x: net.init(jax.random.key(0), x, train=False), abstract(*image)
    )
    found = cost(net, image)
    apply = functools.partial(net.apply, train=False)
    assert found.multiply_adds == multiply_adds(apply, variables, abstract(*image))
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert found.heads == 1
    assert found.activation_bytes > 4 * 4 * 8 * 8 * 4, "more than one map of the first stage"


def test_recomputing_stages_keeps_fewer_activations():
    net = nnunet.PlainConvUNet(3, features=(4, 8))
    plain = cost(net, (1, 4, 8, 8, 1))
    recomputed = cost(net.clone(remat="blocks"), (1, 4, 8, 8, 1))
    assert recomputed.activation_bytes < 0.7 * plain.activation_bytes


# nnU-Net's two are its own counts. The others agree with counts of the PyTorch networks on patches
# that these accept; they are left out of the default suite for their tracing time alone.
@pytest.mark.parametrize(
    ("backbone", "figures"),
    [
        ("nnunet", "43,533,284 | 462.287 | 6"),
        pytest.param("nnunet_resenc", "137,883,556 | 1085.893 | 6", marks=pytest.mark.slow),
        pytest.param("unetr", "91,473,190 | 376.281 | 1", marks=pytest.mark.slow),
        pytest.param("swin_unetr", "59,811,000 | 902.077 | 1", marks=pytest.mark.slow),
        pytest.param("cotr", "41,817,688 | 936.578 | 4", marks=pytest.mark.slow),
        pytest.param("nnformer", "37,262,310 | 218.259 | 3", marks=pytest.mark.slow),
    ],
)
def test_the_table_has_the_published_networks_on_head_ct(backbone, figures):
    assert f"| `{backbone}` | 20 x 320 x 256 | {figures} |" in model_table.row(
        backbone, model_table.PATCH
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_attention_weights_and_norms_are_float32_inside_a_bfloat16_network(backbone):
    config = supervised.get_config(f"smoke,backbone={backbone}")
    config.precision = "bfloat16"
    net = wiring.model(Run.of(config, Path("run"), model_table.head_ct_plan()))
    image = abstract(1, *config.input.patch, 1)
    variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), image)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def forward(variables, image):
        return net.apply(variables, image, train=True, rngs={"dropout": jax.random.key(0)})

    found = list(equations(forward, variables, image))
    wide = {"exp", "rsqrt", "reduce_sum", "reduce_max"}  # of softmax, and of statistics
    for equation in found:
        if equation.primitive.name in wide:
            assert equation.invars[0].aval.dtype == jnp.float32, equation
    assert {"rsqrt", "reduce_sum"} <= {equation.primitive.name for equation in found}
    products = ("dot_general", "conv_general_dilated")
    narrow = [e for e in found if e.primitive.name in products]
    assert any(e.invars[0].aval.dtype == jnp.bfloat16 for e in narrow), "computes in bfloat16"

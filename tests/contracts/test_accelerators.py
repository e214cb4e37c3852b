"""Train steps as they are lowered for GPUs and TPUs, which needs neither."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from bhsd_jax.configs.backbones import BACKBONES

from bhsd_jax import build
from bhsd_jax.assemble.program import of_any_length
from bhsd_jax.assemble.recipe import make_recipe
from bhsd_jax.assemble.run import Run
from bhsd_jax.models import conv
from bhsd_jax.models.cost import multiply_adds
from bhsd_jax.settings import Settings
from tools import model_table

PLAN = dataclasses.replace(model_table.head_ct_plan(), foreground=(15.0, 54.0, 20.0, 92.0))
SMALL = dataclasses.replace(
    PLAN,
    network=dataclasses.replace(
        PLAN.network,
        patch=(8, 32, 32),
        features=(8, 16),
        strides=((1, 1, 1), (2, 2, 2)),
        kernels=((1, 3, 3), (3, 3, 3)),
        convs_encoder=(1, 1),
        convs_decoder=(1,),
    ),
)
OBJECTIVES = ("entropy", "mean_teacher", "ict", "cps", "cps_cutmix", "w2s", "bcp")
TYPES = re.compile(r": \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>")


def step_of(experiment, words, plan):
    """The step that `train` compiles, and its abstract arguments, of which the state is first."""
    config = build.find("bhsd_jax.configs", f"{experiment}.get_config")(words)
    config.precision = "bfloat16"  # what `auto` is where there is an accelerator
    recipe = make_recipe(Run.of(Settings.of(config), Path("nowhere"), plan))
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    step = jax.jit(of_any_length(recipe), donate_argnums=0)
    return step, (state, recipe.abstract_batch(), steps)


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        *(("supervised", f"smoke,backbone={name}") for name in BACKBONES),
        *((name, "smoke") for name in OBJECTIVES),
    ],
)
def test_convolutions_are_in_bfloat16_the_state_is_donated_and_the_host_is_not_called(
    experiment, words
):
    step, arguments = step_of(experiment, words, SMALL)
    step = step.trace(*arguments)  # not yet lowered for any machine
    for platform in ("cuda", "tpu"):
        text = step.lower(lowering_platforms=(platform,)).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
        assert lines
        for line in lines:
            types = TYPES.search(line)
            assert types is not None, line
            assert all(tensor.endswith("bf16") for tensor in types.groups()), line
        head = text[text.index("@main") :].partition("->")[0]
        donated = len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", head))
        assert donated == len(jax.tree.leaves(arguments[0]))
        assert "callback" not in text


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA wheels"
)
def test_for_an_h100_every_convolution_is_cudnns_in_bfloat16_and_channels_last():
    """As compiled; XLA of itself has them channels first, between transposes (jaxlib 0.10.2)."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_program.py"))]
    # There need not be a GPU, nor what is checked beside one.
    env = os.environ | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cuda,cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calls = re.findall(r"= \((\w+)\[.*dim_labels=(\w+)->(\w+), .*__cudnn\$conv", done.stdout)
    assert len(calls) == 8  # three layers, forward and both gradients but that of the image
    for kind, given, found in calls:
        assert (kind, given, found) == ("bf16", "b012f_o012i", "b012f")
    assert " convolution(" not in done.stdout


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "flags", "told"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", "", True),
        ("NVIDIA H100 80GB HBM3", "gpu", "float32", "", False),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", "--xla_gpu_force_conv_nhwc=false", False),
        ("AMD Instinct MI300X", "gpu", "bfloat16", "", False),
        ("TPU v5 lite", "tpu", "bfloat16", "", False),
        ("cpu", "cpu", "bfloat16", "", False),
    ],
)
def test_channels_last_is_for_nvidia_in_bfloat16_unless_the_user_says_no(
    kind, platform, dtype, flags, told, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    found = conv.compiler_options(jnp.dtype(dtype), platform, kind)
    assert found == ({"xla_gpu_force_conv_nhwc": True} if told else {})


def test_a_step_multiplies_three_times_what_the_forward_pass_does():
    """Gradients of kernels and of images cost a forward pass each; the first image needs none."""
    config = build.find("bhsd_jax.configs", "supervised.get_config")("data=bhsd")
    recipe = make_recipe(Run.of(Settings.of(config), Path("nowhere"), PLAN))
    state = jax.eval_shape(recipe.init, jax.random.key(0))
    batch = recipe.abstract_batch()
    image = jax.ShapeDtypeStruct((recipe.labeled, *recipe.cut.patch, recipe.channels), jnp.float32)

    def forward(params, image):
        return recipe.parts.model.apply({"params": params}, image, train=False)

    ahead = multiply_adds(forward, state.params, image)
    step = multiply_adds(of_any_length(recipe), state, batch, jnp.int32(1))
    assert step == pytest.approx(3 * ahead, rel=2e-3)

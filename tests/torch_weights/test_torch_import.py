"""Imported PyTorch weights give the reference's outputs and gradients; wrong ones are refused."""

import functools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from bhsd_jax.models.nnunet import PlainConvUNet
from bhsd_jax.torch_weights import exporting, importing, nnunet

CASES = ("nnunet_plain_2", "nnunet_resenc_2")


@functools.partial(jax.jit, static_argnums=0)
def _outputs_and_gradients(module, variables, image):
    def loss(variables, image):
        outputs = module.apply(variables, image, train=False)
        return sum(jnp.square(out).mean() for out in outputs), outputs

    (_, outputs), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, image)
    return outputs, grads


def _relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def _seen(image):
    """What the reference files keep of an image."""
    return np.moveaxis(image, -1, 1)[..., ::2, ::2]


def _exact_weight_grads(module, variables, image, wanted):
    """Gradients of the weights in float64, where but a leaky ReLU's kink sets float32 apart.

    A value that rounds to the other side of 0 changes the gradient at all voxels that see it, and
    which value does is up to the processor: with AVX-512 it is one in the deep stages of
    `nnunet_plain_2`. In float64 the image's gradient has to be the reference's, and for most
    mirrored images float32's that of float64.
    """
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)

        def exact(image):
            image = np.asarray(image, np.float64)
            found = _outputs_and_gradients(module.clone(dtype=jnp.float64), wide, image)
            return jax.tree.map(np.asarray, found[1])

        weight_grads, image_grad = exact(image)
        assert _relative(_seen(image_grad), wanted) < 1e-4
        mirrored = [np.flip(image, axes) for axes in (2, 3, (1, 2))]
        exactly = [exact(flipped)[1] for flipped in mirrored]
    apart = [
        _relative(_outputs_and_gradients(module, variables, flipped)[1][1], grad)
        for flipped, grad in zip(mirrored, exactly, strict=True)
    ]
    assert sorted(apart)[1] < 1e-3, apart
    return weight_grads


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(case, golden):
    about, arrays, state = networks.read(golden, case)
    module, variables = importing.load(about["backbone"], about["constructor_args"], state)
    image = np.moveaxis(arrays["input"], 1, -1)
    outputs, (weight_grads, image_grad) = _outputs_and_gradients(module, variables, image)
    assert len(outputs) == 1
    ours = np.moveaxis(outputs[0], -1, 1)[..., ::2, ::2]
    assert _relative(ours, arrays["output/0"]) < 2e-5
    assert abs(ours - arrays["output/0"]).max() < 2e-4 * abs(arrays["output/0"]).max()
    if _relative(_seen(image_grad), arrays["grad_input"]) >= 1e-3:
        weight_grads = _exact_weight_grads(module, variables, image, arrays["grad_input"])
    recipe = nnunet.from_torch(about["backbone"], about["constructor_args"])
    for name, weight in recipe.weights.items():
        leaf = functools.reduce(lambda tree, key: tree[key], weight.path.split("/"), weight_grads)
        # A bias before a norm has no gradient but rounding: 1e-6 is far below every other norm.
        np.testing.assert_allclose(
            np.linalg.norm(leaf), about["param_grad_l2"][name], rtol=1e-3, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("case", ["nnunet_plain_bn", "nnunet_resenc_bn"])
def test_networks_with_batch_norms_and_dropout_predict_as_the_reference(case, golden):
    about, arrays, state = networks.read(golden, case)
    module, variables = importing.load(about["backbone"], about["constructor_args"], state)
    assert module.norm == "batch"
    image = np.moveaxis(arrays["input"], 1, -1).astype(np.float32)
    apply = jax.jit(lambda v, x: module.apply(v, x, train=False))
    found = apply(variables, image)
    assert len(found) == 2
    for index, ours in enumerate(found):
        assert _relative(np.moveaxis(ours, -1, 1), arrays[f"output/{index}"]) < 2e-5
    given = about["backbone"], about["constructor_args"]
    out = exporting.dump(*given, variables)
    assert {n for n in state if "all_modules" not in n} - out.keys() == {
        n for n in state if n.endswith(".norm.num_batches_tracked")
    }
    for name in out.keys() & state.keys():
        np.testing.assert_array_equal(out[name], state[name], err_msg=name)


def test_another_norm_is_refused(golden):
    about, _, _ = networks.read(golden, "nnunet_plain_bn")
    arguments = about["constructor_args"] | {"norm_op": "torch.nn.GroupNorm"}
    with pytest.raises(ValueError, match=r"norm_op='GroupNorm' \(supported: .*BatchNorm3d"):
        nnunet.from_torch("PlainConvUNet", arguments)
    with pytest.raises(ValueError, match="norm must be instance or batch; got group"):
        PlainConvUNet(2, features=(4, 8), norm="group").init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 8, 1)), train=False
        )


def test_heads_of_lower_stages_are_loaded_under_deep_supervision(golden):
    about, _, state = networks.read(golden, "nnunet_plain_2")
    arguments = about["constructor_args"] | {"deep_supervision": True}
    _, variables = importing.load("PlainConvUNet", arguments, state)
    lowest = variables["params"]["head_3"]["kernel"][0, 0, 0]
    np.testing.assert_array_equal(lowest, state["decoder.seg_layers.0.weight"][:, :, 0, 0, 0].T)


def test_aliases_and_wrappers_are_accepted_when_they_agree(golden):
    about, _, state = networks.read(golden, "nnunet_resenc_2")
    stem = state["encoder.stem.convs.0.conv.weight"]
    aliased = state | {
        "encoder.stem.convs.0.all_modules.0.weight": stem,
        "decoder.encoder.stem.convs.0.all_modules.0.weight": stem,
    }
    wrapped = {f"module._orig_mod.{name}": value for name, value in aliased.items()}
    arguments = (about["backbone"], about["constructor_args"])
    _, plain = importing.load(*arguments, state)
    _, same = importing.load(*arguments, wrapped)
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    broken = aliased | {"decoder.encoder.stem.convs.0.conv.weight": stem + 1}
    with pytest.raises(ValueError, match=r"decoder\.encoder\.stem.* differs"):
        importing.load(*arguments, broken)


def test_a_network_beside_weights_of_its_loss_is_found_by_its_prefix(golden):
    """As Lightning saves `self._model` and what else the module that trains it holds."""
    about, _, state = networks.read(golden, CASES[0])
    arguments = about["backbone"], about["constructor_args"]
    module, variables = importing.load(*arguments, state)
    held = {f"_model.{n}": v for n, v in state.items()} | {"loss.weight": np.ones(2)}
    same, found = importing.load(*arguments, held)
    assert same == module
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    held |= {f"ema.{n}": v + 1 for n, v in state.items()}
    with pytest.raises(ValueError, match=r"several networks, _model\., ema\.; save the weights of"):
        importing.load(*arguments, held)


def test_everything_wrong_with_the_weights_is_in_one_message(golden):
    about, _, state = networks.read(golden, "nnunet_resenc_2")
    state["encoder.stem.convs.0.conv.weight"] = np.zeros((5, 3, 3, 3, 3), np.float32)
    state["decoder.transpconvs.0.weight"] = np.zeros(4, np.float32)
    state["decoder.surprise"] = np.zeros(1, np.float32)
    del state["decoder.seg_layers.2.bias"]
    with pytest.raises(ValueError, match="do not fit") as error:
        importing.load(about["backbone"], about["constructor_args"], state)
    listed = [" ".join(line.split()[:2]) for line in str(error.value).splitlines()[1:]]
    assert sorted(listed) == [
        "decoder.transpconvs.0.weight: axes",
        "encoder.stem.convs.0.conv.weight: axes",
        "missing decoder.seg_layers.2.bias",
        "unknown decoder.surprise",
    ]


def test_arguments_without_a_counterpart_are_listed(golden):
    about, _, _ = networks.read(golden, "nnunet_plain_2")
    arguments = about["constructor_args"] | {"norm_op": "GroupNorm", "nonlin_first": True, "x": 1}
    del arguments["strides"]
    with pytest.raises(ValueError, match=r"norm_op='GroupNorm'.*nonlin_first.*x is.*strides is"):
        importing.load("PlainConvUNet", arguments, {})


def test_an_unknown_reference_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'VNet'.*PlainConvUNet, ResidualEncoderUNet"):
        importing.load("VNet", {}, {})


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"nonlin_kwargs": {"negative_slope": 0.2}}, "slope", 0.2),
        ({"nonlin_kwargs": None}, "slope", 0.01),
        ({"nonlin": "torch.nn.ReLU"}, "slope", 0.0),
        ({"norm_op_kwargs": {"eps": 1e-3}}, "epsilon", 1e-3),
        ({"norm_op_kwargs": None}, "affine", False),
        ({"kernel_sizes": 3}, "kernels", ((3, 3, 3),) * 5),
        ({"strides": [1, 2, 2, 2, 2]}, "strides", ((1, 1, 1), *((2, 2, 2),) * 4)),
        ({"n_conv_per_stage_decoder": [4, 3, 2, 1]}, "convs_decoder", (1, 2, 3, 4)),
    ],
)
def test_arguments_become_fields(changes, field, value, golden):
    about, _, _ = networks.read(golden, "nnunet_plain_2")
    recipe = nnunet.from_torch("PlainConvUNet", about["constructor_args"] | changes)
    assert getattr(recipe.module, field) == value


def test_a_bottleneck_encoder_and_its_stem_are_mapped_completely(golden):
    about, _, _ = networks.read(golden, "nnunet_resenc_2")
    arguments = about["constructor_args"] | {
        "block": "BottleneckD",
        "bottleneck_channels": [2, 2, 3, 3],
        "stem_channels": 7,
        "norm_op_kwargs": {"affine": False},
    }
    recipe = nnunet.from_torch("ResidualEncoderUNet", arguments)
    image = jax.ShapeDtypeStruct(recipe.image, jnp.float32)
    tree = jax.eval_shape(lambda x: recipe.module.init(jax.random.key(0), x, train=False), image)
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert {weight.path for weight in recipe.weights.values()} == paths
    assert "encoder.stages.0.blocks.0.skip.0.conv.weight" in recipe.weights
    assert "encoder.stages.2.blocks.0.skip.1.conv.weight" in recipe.weights
    assert "encoder.stages.3.blocks.0.conv3.conv.weight" in recipe.weights

"""nnFormer: the reference's numbers, windows and masks against plain rules, sizes, refusals."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import read, shapes

from bhsd_jax.models.nnformer import ACDC, HEAD_CT, SYNAPSE, TUMOR, NNFormer
from bhsd_jax.models.nnformer_blocks import Block, Expand, Options, fit_window, position_rows
from bhsd_jax.torch_weights import importing, nnformer

SMALL = {"num_classes": 2, "embed": 4, "depths": (1, 1, 1, 1), "heads": (1, 2, 2, 2)}
SMALL |= {"attn_windows": (2, 2, 2, 2)}
PATCH = (16, 32, 32)


def _shapes(net, patch, channels=1):
    return shapes(net, (1, *patch, channels))


def test_outputs_are_those_of_the_reference(golden):
    about, arrays, state = read(golden, "nnformer_acdc_2")
    module, variables = importing.load("nnFormer/acdc", about["constructor_args"], state)
    image = np.moveaxis(arrays["input"], 1, -1)
    (output,) = jax.jit(functools.partial(module.apply, train=False))(variables, image)
    ours, theirs = np.moveaxis(output, -1, 1)[..., ::2, ::2], arrays["output/0"]
    assert np.linalg.norm(ours - theirs) < 2e-5 * np.linalg.norm(theirs)
    assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()


@pytest.mark.slow
def test_gradients_are_those_of_the_reference(golden, plain_compilation):
    about, arrays, state = read(golden, "nnformer_acdc_2")
    arguments = ("nnFormer/acdc", about["constructor_args"])
    module, variables = importing.load(*arguments, state)

    def loss(variables, image):
        outputs = module.apply(variables, image, train=False)
        return sum(jnp.square(out).mean() for out in outputs)

    image = np.moveaxis(arrays["input"], 1, -1)
    grads, image_grad = jax.jit(jax.grad(loss, (0, 1)))(variables, image)
    ours, theirs = np.moveaxis(image_grad, -1, 1)[..., ::2, ::2], arrays["grad_input"]
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
    for name, weight in nnformer.from_torch(*arguments).weights.items():
        leaf = functools.reduce(lambda tree, key: tree[key], weight.path.split("/"), grads)
        norm = about["param_grad_l2"][name]
        np.testing.assert_allclose(np.linalg.norm(leaf), norm, rtol=1e-3, err_msg=name)


def test_position_rows_are_those_of_the_reference(golden):
    about, _, state = read(golden, "nnformer_acdc_2")
    windows = about["constructor_args"]["window_size"]
    for stage, window in enumerate(windows):
        name = f"model_down.layers.{stage}.blocks.0.attn.relative_position_index"
        np.testing.assert_array_equal(position_rows(tuple(window), True), state[name])


def test_without_the_bug_every_offset_has_its_own_row():
    window = (2, 3, 2)
    rows = position_rows(window, False)
    places = list(itertools.product(*map(range, window)))
    offsets = [[tuple(np.subtract(a, b)) for b in places] for a in places]
    pairs = {
        (row, o) for r, os in zip(rows, offsets, strict=True) for row, o in zip(r, os, strict=True)
    }
    assert len(pairs) == len({row for row, _ in pairs}) == 3 * 5 * 3
    assert {row for row, _ in pairs} == set(range(3 * 5 * 3))


@pytest.mark.parametrize("window", [(1, 2, 1), (3, 2, 1), (3, 6, 2)])
def test_windows_beyond_the_reference_table_are_refused(window):
    with pytest.raises(ValueError, match=r"needs row \d+ of a table of \d+"):
        position_rows(window, True)
    assert position_rows(window, False).max() == np.prod(2 * np.array(window) - 1) - 1


@pytest.mark.parametrize(
    ("window", "grid", "used", "shift"),
    [
        (4, (8, 8, 16), (4, 4, 4), (2, 2, 2)),
        (4, (4, 8, 16), (4, 4, 4), (0, 0, 0)),
        (4, (3, 8, 16), (3, 3, 3), (0, 0, 0)),
        (1, (3, 8, 16), (1, 1, 1), (0, 0, 0)),
        ((3, 5, 5), (2, 20, 20), (3, 5, 5), (1, 2, 2)),
        ((3, 5, 5), (3, 5, 5), (3, 5, 5), (0, 0, 0)),
        ((3, 5, 5), (3, 5, 10), (3, 5, 5), (1, 2, 2)),
        ((1, 5, 5), (3, 20, 20), (1, 5, 5), (0, 0, 0)),
    ],
)
def test_cubes_shrink_to_the_grid_and_other_windows_do_not(window, grid, used, shift):
    assert fit_window(window, grid) == (used, shift)


@pytest.mark.parametrize("masked", [True, False])
def test_a_shifted_window_sees_across_the_border_only_without_mask(masked):
    options = Options(masked, False, False, jnp.float32)
    block = Block(options, 1, (2, 2, 2), (1, 1, 1), 0.0)
    random = np.random.default_rng(0)
    grid = (4, 4, 4)
    x = random.normal(size=(1, *grid, 4)).astype(np.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: random.normal(0, 0.5, s.shape).astype(np.float32), shapes)

    def corner(x, variables):
        return block.apply(variables, x)[0, 0, 0, 0].sum()

    influence = np.abs(jax.jit(jax.grad(corner))(x, variables)[0]).max(-1)
    seen = {tuple(place) for place in np.argwhere(influence > 1e-6).tolist()}
    # Its window holds what lies one voxel before it, that is, the last of each axis.
    around = set(itertools.product((0, 3), repeat=3))
    assert seen == ({(0, 0, 0)} if masked else around)


def test_an_extra_slice_holds_the_bias_alone():
    expand = Expand(3, (2, 2, 2), jnp.float32, extra_slice=True)
    random = np.random.default_rng(0)
    image = random.normal(size=(1, 2, 1, 1, 2)).astype(np.float32)
    bias = random.normal(size=3).astype(np.float32)
    kernel = random.normal(size=(2, 2, 2, 2, 3)).astype(np.float32)
    out = jax.jit(expand.apply)({"params": {"kernel": kernel, "bias": bias}}, image)
    assert out.shape == (1, 5, 2, 2, 3)
    np.testing.assert_array_equal(out[0, 4], np.broadcast_to(bias, (2, 2, 3)))
    expected = image[0, 1, 0, 0] @ kernel[1, 0, 1] + bias
    np.testing.assert_allclose(out[0, 3, 0, 1], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "classes", "patch", "parameters"),
    [
        (SYNAPSE, 14, (64, 128, 128), 150_054_210),
        (ACDC, 4, (14, 160, 160), 37_160_200),
        (TUMOR, 4, (128, 128, 128), 37_606_726),
    ],
)
def test_parameter_counts_are_those_of_the_reference(fields, classes, patch, parameters):
    channels = 4 if fields is TUMOR else 1
    _, variables = _shapes(NNFormer(classes, **fields), patch, channels)
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_outputs_are_float32_logits_from_full_resolution_down():
    outputs, _ = _shapes(NNFormer(6, **HEAD_CT, dtype=jnp.bfloat16), (20, 320, 256), channels=3)
    planes = [(20, 320, 256), (20, 160, 128), (10, 80, 64)]
    assert [out.shape for out in outputs] == [(1, *plane, 6) for plane in planes]
    assert {out.dtype for out in outputs} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "patch", "message"),
    [
        (SYNAPSE, (24, 250, 256), r"multiple of \(16, 32, 32\).*nearest is \(32, 256, 256\)"),
        (HEAD_CT, (22, 320, 300), r"multiple of \(4, 32, 32\).*nearest is \(24, 320, 288\)"),
        (ACDC, (17, 320, 300), r"odd multiple of 2.*nearest is \(18, 320, 288\)"),
        (ACDC, (2, 64, 64), r"nearest is \(6, 64, 64\)"),
        (ACDC, (14, 64, 70), r"nearest is \(14, 64, 64\)"),
    ],
)
def test_a_patch_that_does_not_fit_is_refused_with_the_nearest_that_does(fields, patch, message):
    with pytest.raises(ValueError, match=message):
        _shapes(NNFormer(2, **fields), patch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (1, 1)}, "depths needs 4 entries"),
        ({"heads": (3, 2, 2, 2)}, "divide embed 4"),
        ({"heads_decoder": (1, 2)}, "must be 4 and 3"),
        ({"remat": "all"}, "choose 'none' or 'blocks'"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _shapes(NNFormer(**(SMALL | fields)), PATCH)


def test_rematerialization_covers_every_block_and_keeps_the_parameters():
    def blocks(net):
        image = jax.ShapeDtypeStruct((1, *PATCH, 1), jnp.float32)
        variables = _shapes(net, PATCH)[1]
        apply = functools.partial(net.apply, train=False)
        traced = str(jax.make_jaxpr(apply)(variables, image))
        return len(re.findall(r"(?:checkpoint|remat2?)\[", traced)), jax.tree.structure(variables)

    net = NNFormer(**SMALL)
    (none, plain), (some, wrapped) = blocks(net), blocks(net.clone(remat="blocks"))
    assert (none, some) == (0, 7)
    assert plain == wrapped


def test_drop_path_grows_with_depth_and_acts_in_training_only():
    net, drops = NNFormer(**(SMALL | {"depths": (1, 2, 1, 1)})), []
    image = jax.ShapeDtypeStruct((1, *PATCH, 1), jnp.float32)
    variables = _shapes(net, PATCH)[1]

    def note(next_call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            drops.append((context.module.rate, context.module.deterministic))
        return next_call(*args, **kwargs)

    for train in (True, False):
        rngs = {"dropout": jax.random.key(0)}
        with nn.intercept_methods(note):
            jax.eval_shape(functools.partial(net.apply, train=train, rngs=rngs), variables, image)
    assert [deterministic for _, deterministic in drops] == [False] * 18 + [True] * 18
    encoder, decoder = [0, 0.05, 0.1, 0.15, 0.2], [0, 0.2 / 3, 0.4 / 3, 0.2]
    rates = np.repeat(encoder + decoder, 2)  # two parts a block; the deepest decoder stage first
    np.testing.assert_allclose([rate for rate, _ in drops[:18]], rates)


def test_everything_wrong_with_the_weights_is_in_one_message(golden):
    about, _, state = read(golden, "nnformer_acdc_2")
    state["surprise"] = np.zeros(1)
    state["final.0.up.bias"] = np.zeros(3)
    state["final.1.up.bias"] = np.zeros(3)  # of deep supervision, which is off
    del state["decoder.layers.2.blocks.0.attn.kv.bias"]
    with pytest.raises(ValueError, match="do not fit") as error:
        importing.load("nnFormer/acdc", about["constructor_args"], state)
    listed = [" ".join(line.split()[:2]) for line in str(error.value).splitlines()[1:]]
    assert sorted(listed) == [
        "final.0.up.bias: axes",
        "missing decoder.layers.2.blocks.0.attn.kv.bias",
        "unknown surprise",
    ]


def test_arguments_without_a_counterpart_are_listed():
    arguments = {"num_classes": 2, "patch_size": [4, 4, 4], "surprise": 1}
    match = r"surprise is not known; crop_size is missing; patch_size=\[4, 4, 4\] \(supported: "
    with pytest.raises(ValueError, match=match + r"\(4, 4, 4\)|\(8, "):
        importing.load("nnFormer/synapse", arguments, {})
    with pytest.raises(ValueError, match=r"name the variant, as nnFormer/<synapse\|acdc\|tumor>"):
        importing.load("nnFormer", arguments, {})


def test_the_variant_decides_what_its_constructor_leaves_open():
    crops = {"synapse": (64, 128, 128), "acdc": (14, 160, 160), "tumor": (128, 128, 128)}
    for variant, fields in {"synapse": SYNAPSE, "acdc": ACDC, "tumor": TUMOR}.items():
        arguments = {"num_classes": 3, "crop_size": crops[variant]}
        made = nnformer.from_torch(f"nnFormer/{variant}", arguments).module
        assert made == NNFormer(3, **fields)
    heads = {"num_heads": [1, 2, 4, 8], "num_classes": 3, "crop_size": (32, 32, 32)}
    assert nnformer.from_torch("nnFormer/tumor", heads).module.heads_decoder == (2, 4, 8)

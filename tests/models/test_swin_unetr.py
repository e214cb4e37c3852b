"""Swin UNETR against the reference's numbers; windows, shifts, biases, merging by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import jit, read, relative, require_norms, shapes

from bhsd_jax.models.attention import from_windows, to_windows
from bhsd_jax.models.swin_blocks import (
    SwinBlock,
    WindowAttention,
    merging_order,
    position_index,
)
from bhsd_jax.models.swin_unetr import HEAD_CT, SwinUNETR
from bhsd_jax.torch_weights import importing
from bhsd_jax.torch_weights.swin_unetr import from_torch


def test_swin_unetr_outputs_and_gradients_are_those_of_the_reference(golden):
    about, arrays, state = read(golden, "swin_unetr_v2")
    module, variables = importing.load(about["backbone"], about["constructor_args"], state)

    @jit
    def run(variables, image):
        def loss(variables, image):
            (out,) = module.apply(variables, image, train=False)
            return jnp.square(out).mean(), out

        (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, image)
        return out, *grads

    out, weight_grads, image_grad = run(variables, np.moveaxis(arrays["input"], 1, -1))
    ours, theirs = np.moveaxis(out, -1, 1)[..., ::4, ::4], arrays["output/0"]
    assert relative(ours, theirs) < 2e-5
    assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()
    assert relative(np.moveaxis(image_grad, -1, 1)[..., ::4, ::4], arrays["grad_input"]) < 1e-3
    weights = from_torch(about["backbone"], about["constructor_args"]).weights
    require_norms(weight_grads, weights, about["param_grad_l2"])


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 62_187_296),
        ({"feature_size": 24}, 15_703_304),
        ({"feature_size": 12}, 4_078_220),
        ({"convolve_stages": True}, 72_762_656),
    ],
)
def test_swin_unetr_parameter_counts_are_those_of_the_reference(fields, parameters):
    _, variables = shapes(SwinUNETR(14, **fields), (1, 32, 32, 32, 1))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_swin_unetr_preset_halves_depth_twice_and_needs_no_padding():
    net = SwinUNETR(6, **HEAD_CT)
    assert net.stride == (4, 32, 32)
    size = np.array((20, 320, 256))
    for strides in (net.patch_embed, *net.merge_strides[:3]):
        size //= strides
        assert not (size % net.attn_window).any()
    (logits,), variables = shapes(net, (1, 20, 320, 256, 1))
    assert logits.shape == (1, 20, 320, 256, 6)
    count = sum(
        leaf.size
        for leaf in jax.tree.leaves(shapes(net.clone(attn_window=(6, 8, 8)), (1, 4, 32, 32, 1))[1])
    )
    assert round(count / 1e6, 2) == 59.80
    assert set(variables) == {"params"}


def test_swin_unetr_recomputes_stages_and_blocks_with_the_same_parameters():
    net = SwinUNETR(2, feature_size=12, depths=(1, 1, 1, 1))
    image = jax.ShapeDtypeStruct((1, 32, 32, 32, 1), jnp.float32)
    logits, variables = shapes(net, image.shape)
    recomputed = net.clone(remat="blocks")
    assert shapes(recomputed, image.shape) == (logits, variables)
    traced = [
        jax.make_jaxpr(lambda v, x, n=n: n.apply(v, x, train=True))(variables, image)
        for n in (net, recomputed)
    ]
    marked = [
        sum("policy" in equation.params for equation in jaxpr.eqns) for jaxpr in traced
    ]  # only a recomputed part has a policy of what to keep
    # Four stages, encoders 1, 2, 3, 4 and 10, five decoders.
    assert marked == [0, 14]


@pytest.mark.parametrize(
    ("fields", "image", "message"),
    [
        ({}, (24, 300, 256), r"multiple of \(32, 32, 32\) .* nearest is \(32, 288, 256\)"),
        ({"depths": (2, 2, 2)}, (32, 32, 32), r"need 4 entries each; got \[3, 4, 4\]"),
        ({"heads": (3, 6, 12, 5)}, (32, 32, 32), r"must divide the channels \[48, 96, 192, 384\]"),
        ({"merging": "new"}, (32, 32, 32), "choose from fixed, legacy, v2"),
        ({"merging": "legacy", **HEAD_CT}, (32, 32, 32), "'legacy' cannot have strides"),
        ({"merge_strides": ((3, 2, 2),) * 4}, (81, 16, 16), "takes 1 or 2 along every axis"),
        ({"clamped_bias": "right"}, (32, 32, 32), "choose 'corner' or 'geometry'"),
        ({"remat": "all"}, (32, 32, 32), "choose 'none' or 'blocks'"),
    ],
)
def test_swin_unetr_refuses_what_does_not_fit(fields, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(SwinUNETR(6, **fields), (1, *image, 1))


def test_swin_unetr_lists_everything_wrong_with_its_weights(golden):
    about, _, state = read(golden, "swin_unetr_v2")
    block = "swinViT.layers1.0.blocks.0"
    state[f"{block}.attn.relative_position_index"] = np.zeros((60, 60), np.int64)
    importing.load("SwinUNETR", about["constructor_args"], state)
    state[f"{block}.norm1.bias"] = np.ones(3, np.float32)
    state["surprise"] = np.ones(3, np.float32)
    del state["decoder1.transp_conv.conv.weight"]
    with pytest.raises(ValueError, match="do not fit") as error:
        importing.load("SwinUNETR", about["constructor_args"], state)
    lines = sorted(line.strip().split(":")[0] for line in str(error.value).splitlines()[1:])
    assert lines == [
        "missing decoder1.transp_conv.conv.weight",
        f"{block}.norm1.bias",
        "unknown surprise",
    ]


def test_swin_unetr_lists_every_argument_without_a_counterpart():
    arguments = {"in_channels": 1, "patch_size": 4, "downsample": "pool", "x": 1}
    with pytest.raises(
        ValueError,
        match=r"x is not known; out_channels is missing; patch_size=4.*downsample='pool'",
    ):
        from_torch("SwinUNETR", arguments)


LEGACY = {"feature_size": 24, "merging": "legacy"}


@pytest.mark.parametrize(
    ("reference", "changes", "fields"),
    [
        ("SwinUNETR", {"downsample": "merging"}, {"feature_size": 24}),
        ("SwinUNETR/legacy", {}, LEGACY),
        ("SwinUNETR", {"merging": "legacy"}, LEGACY),
        ("SwinUNETR", {"downsample": "mergingv2"}, {"feature_size": 24, "merging": "v2"}),
        (
            "SwinUNETR",
            {"use_v2": True, "downsample": "mergingv2"},
            {"feature_size": 24, "convolve_stages": True, "merging": "v2"},
        ),
        ("SwinUNETR/legacy", {"window_size": [4, 3, 5]}, {"attn_window": (4, 3, 5)} | LEGACY),
        ("SwinUNETR", {"img_size": 96}, LEGACY),
    ],
)
def test_swin_unetr_arguments_become_fields(reference, changes, fields):
    recipe = from_torch(reference, {"in_channels": 1, "out_channels": 14} | changes)
    assert recipe.module == SwinUNETR(14, **fields)


def test_swin_unetr_asks_which_release_built_it():
    with pytest.raises(ValueError, match=r'"merging" if MONAI 1\.5 or later'):
        from_torch("SwinUNETR", {"in_channels": 1, "out_channels": 14})


def test_windows_are_cut_in_order_and_put_back():
    volume = jnp.arange(2 * 4 * 6 * 4 * 3).reshape(2, 4, 6, 4, 3)
    windows = to_windows(volume, (2, 3, 4))
    np.testing.assert_array_equal(windows[1, 3], volume[1, 2:, 3:].reshape(24, 3))
    np.testing.assert_array_equal(from_windows(windows, (2, 3, 4), (4, 6, 4)), volume)


def test_position_index_is_that_of_the_paper_for_a_whole_window():
    window = (2, 3, 2)
    index = position_index(window, window, "corner")
    tokens = list(itertools.product(*map(range, window)))
    for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2):
        d, h, w = (p - q + k - 1 for p, q, k in zip(a, b, window, strict=True))
        assert index[i, j] == d * 5 * 3 + h * 3 + w
    np.testing.assert_array_equal(index, position_index(window, window, "geometry"))


def test_a_clamped_window_has_the_biases_of_a_corner_or_its_own():
    whole = position_index((2, 3, 2), (2, 3, 2), "corner")
    np.testing.assert_array_equal(position_index((2, 3, 2), (1, 3, 2), "corner"), whole[:6, :6])
    np.testing.assert_array_equal(position_index((2, 3, 2), (2, 2, 2), "corner"), whole[:8, :8])
    own = [
        i for i, (_, h, _) in enumerate(itertools.product(range(2), range(3), range(2))) if h < 2
    ]
    geometry = position_index((2, 3, 2), (2, 2, 2), "geometry")
    np.testing.assert_array_equal(geometry, whole[np.ix_(own, own)])


def test_a_shifted_window_sees_its_neighbors_but_never_the_opposite_end(key):
    layer = WindowAttention(1, (1, 1, 4), True, "corner", True, None)
    volume = jax.random.normal(key, (1, 1, 1, 8, 4))
    variables = jit(layer.init)(key, volume)
    run = jit(layer.apply)

    def reached(place):
        change = run(variables, volume.at[:, :, :, place].add(1.0)) - run(variables, volume)
        return [i for i in range(8) if abs(change[0, 0, 0, i]).max() > 0]

    # Shifted by 2: windows are 0-1, 2-5, 6-7; the first and last lie in one after the roll.
    assert reached(0) == [0, 1]
    assert reached(3) == [2, 3, 4, 5]
    assert reached(7) == [6, 7]


def test_a_dropped_path_leaves_the_input(key):
    layer = SwinBlock(1, (1, 2, 2), "corner", 2.0, True, 0.0, 0.0, 1.0, shift=True, train=True)
    volume = jax.random.normal(key, (2, 1, 4, 4, 2))
    variables = jit(layer.init)(key, volume)
    run = jit(lambda layer, v, x: layer.apply(v, x, rngs={"dropout": key}), static_argnums=0)
    np.testing.assert_array_equal(run(layer, variables, volume), volume)
    assert abs(run(layer.clone(train=False), variables, volume) - volume).max() > 0.1


def test_merging_orders_are_those_of_their_releases():
    assert merging_order("v2", (2, 2, 2)) == list(itertools.product((0, 1), repeat=3))
    assert set(merging_order("fixed", (2, 2, 2))) == set(itertools.product((0, 1), repeat=3))
    assert merging_order("fixed", (2, 2, 2))[1:5] == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    legacy = merging_order("legacy", (2, 2, 2))
    assert len(legacy) == 8
    assert legacy.count((0, 1, 0)) == legacy.count((0, 0, 1)) == 2
    assert not {(1, 1, 0), (0, 1, 1)} & set(legacy)
    assert merging_order("fixed", (1, 2, 2)) == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]

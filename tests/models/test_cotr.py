"""CoTr: the reference's numbers, its attention against plain loops, sizes, refusals."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import read, shapes

from bhsd_jax.models.cotr import HEAD_CT, CoTr
from bhsd_jax.models.cotr_attention import DeformableAttention, Options, weighted_rows
from bhsd_jax.models.cotr_layers import Unit, standardized, upsample
from bhsd_jax.models.norms import BatchNorm
from bhsd_jax.torch_weights import cotr, importing

SMALL = {"num_classes": 2, "features": (4, 6, 12), "blocks": (1, 1, 1), "heads": 2, "layers": 1}
SMALL |= {"points": 2, "ffn": 8}
PATCH = (8, 16, 16)
KINDS = ("params", "batch_stats")


def _shapes(net, patch, channels=1):
    return shapes(net, (1, *patch, channels))


def test_outputs_are_those_of_the_reference(golden):
    about, arrays, state = read(golden, "cotr_2")
    module, variables = importing.load("CoTr", about["constructor_args"], state)
    image = np.moveaxis(arrays["input"], 1, -1)
    outputs = jax.jit(functools.partial(module.apply, train=False))(variables, image)
    assert len(outputs) == 4
    for i, output in enumerate(outputs):
        ours, theirs = np.moveaxis(output, -1, 1), arrays[f"output/{i}"]
        ours = ours[..., ::2, ::2] if i == 0 else ours
        assert np.linalg.norm(ours - theirs) < 2e-5 * np.linalg.norm(theirs)
        assert abs(ours - theirs).max() < 2e-4 * abs(theirs).max()


@pytest.mark.slow
def test_gradients_are_those_of_the_reference(golden, plain_compilation):
    about, arrays, state = read(golden, "cotr_2")
    module, variables = importing.load("CoTr", about["constructor_args"], state)

    def loss(params, stats, image):
        outputs = module.apply({"params": params, "batch_stats": stats}, image, train=False)
        return sum(jnp.square(out).mean() for out in outputs)

    image = np.moveaxis(arrays["input"], 1, -1)
    grads, image_grad = jax.jit(jax.grad(loss, (0, 2)))(*(variables[k] for k in KINDS), image)
    ours, theirs = np.moveaxis(image_grad, -1, 1)[..., ::2, ::2], arrays["grad_input"]
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
    recipe = cotr.from_torch("CoTr", about["constructor_args"])
    for name, weight in recipe.weights.items():
        kind, *path = weight.path.split("/")
        if kind == "params":
            leaf = functools.reduce(lambda tree, key: tree[key], path, grads)
            norm = about["param_grad_l2"][f"U_ResTran3D.{name}"]
            np.testing.assert_allclose(np.linalg.norm(leaf), norm, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(("classes", "parameters"), [(12, 41_871_088), (6, 41_866_840)])
def test_parameter_counts_are_those_of_the_reference(classes, parameters):
    _, variables = _shapes(CoTr(classes), (8, 32, 16))
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_outputs_are_float32_logits_from_full_resolution_down():
    net = CoTr(6, **HEAD_CT, dtype=jnp.bfloat16)
    outputs, _ = _shapes(net, (20, 320, 256), channels=3)
    planes = [(20, 320, 256), (20, 160, 128), (20, 80, 64), (10, 40, 32)]
    assert [out.shape for out in outputs] == [(1, *plane, 6) for plane in planes]
    assert {out.dtype for out in outputs} == {jnp.dtype("float32")}


def test_a_patch_that_does_not_fit_is_refused_with_the_nearest_that_does():
    with pytest.raises(ValueError, match=r"multiple of \(8, 16, 16\).*nearest is \(32, 256, 304\)"):
        _shapes(CoTr(2), (28, 260, 300))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "layer"}, "norm is 'layer'; choose from .*group"),
        ({"axes": "dhw"}, "axes is 'dhw'; choose from .*fixed"),
        ({"remat": "all"}, "choose 'none' or 'blocks'"),
        ({"blocks": (1, 1)}, "blocks needs 3 entries"),
        ({"heads": 5}, r"12 channels must divide into heads \(5\)"),
        ({"features": (4, 6, 10)}, "10 channels give 4, 3, 3"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        _shapes(CoTr(**(SMALL | fields)), PATCH)


def test_weighted_rows_and_its_gradients_are_those_of_one_plain_gather():
    random = np.random.default_rng(0)
    rows = random.normal(size=(2, 5, 3)).astype(np.float32)
    index = jnp.asarray(random.integers(0, 5, (4, 2, 6, 8)))  # most rows are read several times
    weight = random.normal(size=index.shape).astype(np.float32)
    target = random.normal(size=(2, 6, 3)).astype(np.float32)

    def plain(rows, index, weight):
        return jnp.einsum("bsmkc,sbmk->bmc", jax.vmap(lambda r, i: r[i])(rows, index), weight)

    def value_and_grads(function, index):
        def loss(rows, weight):
            return (function(rows, index, weight) * target).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(rows, weight)

    ours = value_and_grads(weighted_rows, index)
    theirs = value_and_grads(plain, index.swapaxes(0, 1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), ours, theirs)


@pytest.mark.parametrize("axes", ["reference", "fixed"])
@pytest.mark.parametrize("offset", [0.0, 1.0, -9.0])
def test_a_query_reads_the_voxel_at_its_place_plus_offset_and_zero_outside(axes, offset):
    size = 3
    options = Options(1, 1, 8, 0.0, axes, False, jnp.float32)
    attention = DeformableAttention(options, ((size, size, size),))
    tokens = np.random.default_rng(0).normal(size=(1, size**3, 2)).astype(np.float32)
    bias, eye, two = np.float32([offset, 0, 0]), np.eye(2, dtype=np.float32), np.zeros(2)
    params = {
        "offsets": {"kernel": np.zeros((2, 3), np.float32), "bias": bias},  # along "d"
        "weights": {"kernel": np.zeros((2, 1), np.float32), "bias": np.zeros(1, np.float32)},
        "value": {"kernel": eye, "bias": two.astype(np.float32)},
        "output": {"kernel": eye, "bias": two.astype(np.float32)},
    }
    found = jax.jit(attention.apply)({"params": params}, tokens, tokens)
    volume, expected = tokens.reshape(size, size, size, 2), []
    for d, h, w in itertools.product(range(size), repeat=3):
        moved = int(d + offset)
        # The reference follows d along W, w along H, and h along D.
        place = (moved, h, w) if axes == "fixed" else (h, w, moved)
        expected.append(volume[place] if 0 <= moved < size else np.zeros(2))
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize("factors", [(1, 2, 2), (2, 3, 4)])
def test_upsample_is_trilinear_interpolation_between_voxel_centers(factors):
    image = np.random.default_rng(0).normal(size=(1, 2, 3, 1, 2)).astype(np.float32)
    shape = [n * f for n, f in zip(image.shape, (1, *factors, 1), strict=True)]
    expected = jax.jit(lambda x: jax.image.resize(x, shape, "trilinear"))(image)
    ours = jax.jit(upsample, static_argnums=1)(image, factors)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_standardized_filters_have_mean_zero_and_variance_one():
    kernel = np.random.default_rng(0).normal(3, 5, (3, 3, 3, 2, 4)).astype(np.float32)
    flat = np.asarray(jax.jit(standardized)(kernel)).reshape(-1, 4)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(flat.std(0, ddof=1), 1, rtol=1e-5)


def test_batch_norm_uses_the_batch_in_training_and_remembers_a_tenth_of_it():
    image = np.random.default_rng(0).normal(3, 2, (2, 1, 2, 3, 2)).astype(np.float32)
    affine = {"scale": np.float32([2, 1]), "bias": np.float32([0, 1])}
    stats = {"mean": np.float32([1, 2]), "var": np.float32([4, 9])}
    variables = {"params": affine, "batch_stats": stats}

    @functools.partial(jax.jit, static_argnums=0)
    def apply(train):
        norm = BatchNorm(1e-5, True, jnp.float32, 0.1, train)
        return norm.apply(variables, jnp.asarray(image), mutable=["batch_stats"])

    out, updated = apply(True)
    voxels = image.reshape(-1, 2)
    normal = (image - voxels.mean(0)) / np.sqrt(voxels.var(0) + 1e-5)
    np.testing.assert_allclose(out, normal * affine["scale"] + affine["bias"], atol=1e-5)
    mean = 0.9 * stats["mean"] + 0.1 * voxels.mean(0)
    var = 0.9 * stats["var"] + 0.1 * voxels.var(0, ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-5)
    out, updated = apply(False)
    normal = (image - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(out, normal * affine["scale"] + affine["bias"], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], stats)


def test_group_norm_normalizes_sixteen_groups_of_channels():
    unit = Unit(32, norm="group", slope=None)
    image = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 1)).astype(np.float32)
    out, _ = jax.jit(unit.init_with_output)(jax.random.key(0), image)
    groups = np.asarray(out).reshape(2, -1, 16, 2)
    np.testing.assert_allclose(groups.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std((1, 3)), 1, atol=1e-3)


def test_rematerialization_covers_every_block_and_layer_and_keeps_the_parameters():
    def blocks(net):
        image = jax.ShapeDtypeStruct((1, *PATCH, 1), jnp.float32)
        variables = _shapes(net, PATCH)[1]
        apply = functools.partial(net.apply, train=False)
        traced = str(jax.make_jaxpr(apply)(variables, image))
        return len(re.findall(r"(?:checkpoint|remat2?)\[", traced)), jax.tree.structure(variables)

    net = CoTr(**SMALL)
    (none, plain), (some, wrapped) = blocks(net), blocks(net.clone(remat="blocks"))
    assert (none, some) == (0, 7)
    assert plain == wrapped


def test_dropout_acts_in_training_only():
    drops = []
    net = CoTr(**SMALL, norm="batch")
    image = jax.ShapeDtypeStruct((1, *PATCH, 1), jnp.float32)
    variables = _shapes(net, PATCH)[1]

    def note(next_call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            drops.append((context.module.rate, context.module.deterministic))
        return next_call(*args, **kwargs)

    for train in (True, False):
        rngs = {"dropout": jax.random.key(0)}
        apply = functools.partial(net.apply, train=train, rngs=rngs, mutable=["batch_stats"])
        with nn.intercept_methods(note):
            jax.eval_shape(apply, variables, image)
    assert drops == [(0.1, False)] * 3 + [(0.1, True)] * 3


def test_without_deep_supervision_the_other_heads_of_a_file_are_left_out(golden):
    about, _, state = read(golden, "cotr_2")
    arguments = about["constructor_args"] | {"deep_supervision": False}
    bare = {name.removeprefix("U_ResTran3D."): value for name, value in state.items()}
    module, variables = importing.load("CoTr", arguments, bare)
    assert {name for name in variables["params"] if name.startswith("head")} == {"head"}
    assert len(_shapes(module, PATCH)[0]) == 1


def test_everything_wrong_with_the_weights_is_in_one_message(golden):
    about, _, state = read(golden, "cotr_2")
    state["U_ResTran3D.backbone.layer1.0.norm1.num_batches_tracked"] = np.zeros((), np.int64)
    state["U_ResTran3D.surprise"] = np.zeros(1)
    state["U_ResTran3D.cls_conv.bias"] = np.zeros(3)
    del state["U_ResTran3D.backbone.norm1.running_var"]
    with pytest.raises(ValueError, match="do not fit") as error:
        importing.load("CoTr", about["constructor_args"], state)
    listed = [" ".join(line.split()[:2]) for line in str(error.value).splitlines()[1:]]
    assert sorted(listed) == [
        "cls_conv.bias: axes",
        "missing backbone.norm1.running_var",
        "unknown U_ResTran3D.surprise",
    ]


def test_arguments_without_a_counterpart_are_listed():
    arguments = {"num_classes": 2, "norm_cfg": "LN", "surprise": 1}
    match = r"surprise is not known; activation_cfg is missing; norm_cfg='LN' \(supported: IN, BN"
    with pytest.raises(ValueError, match=match):
        importing.load("CoTr", arguments, {})

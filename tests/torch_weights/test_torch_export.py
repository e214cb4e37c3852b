"""Exported weights are what was imported, under every name PyTorch has."""

import json
import re

import jax
import numpy as np
import pytest

from bhsd_jax.torch_weights import exporting, importing, nnunet
from bhsd_jax.torch_weights.recipe import recipe_of, shapes_of

CASES = (
    *("nnunet_plain_2", "nnunet_resenc_2", "unetr_2", "swin_unetr_v2"),
    *("cotr_2", "nnformer_acdc_2"),
)
BOTTLENECK = {
    "block": "BottleneckD",
    "bottleneck_channels": [2, 2, 3, 3],
    "stem_channels": 7,
    "norm_op_kwargs": {"affine": False},
}


def _read(folder, case):
    about = json.loads((folder / f"{case}.json").read_text())
    variant = about.get("variant")
    reference = about["backbone"] + (f"/{variant}" if variant else "")
    with np.load(folder / f"{case}.npz") as file:
        names = [name for name in file.files if name.startswith("param/")]
        state = {name.removeprefix("param/"): file[name] for name in names}
    return reference, about["constructor_args"], state


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("case", CASES)
def test_export_undoes_import(case, golden):
    reference, constructor, state = _read(golden, case)
    _, variables = importing.load(reference, constructor, state)
    found = exporting.dump(reference, constructor, variables)
    recipe = recipe_of(reference, constructor)
    canonical = {recipe.canonical(name): value for name, value in state.items()}
    for name in recipe.weights:
        np.testing.assert_array_equal(found[name], canonical[name], err_msg=name)
    _, again = importing.load(reference, constructor, found)
    _same(again, variables)


def _drawn(recipe):
    random = np.random.default_rng(0)
    shapes = shapes_of(recipe)
    flat = {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("unetr_2", {"proj_type": "perceptron", "norm_name": "batch"}),
        ("cotr_2", {"norm_cfg": "BN"}),
        ("nnunet_resenc_2", BOTTLENECK),
    ],
)
def test_running_statistics_and_other_layouts_come_back_too(case, changes, golden):
    reference, constructor, _ = _read(golden, case)
    constructor = {k: v for k, v in constructor.items() if k != "pos_embed"} | changes
    variables = _drawn(recipe_of(reference, constructor))
    assert ("batch_stats" in variables) == (case != "nnunet_resenc_2")
    state = exporting.dump(reference, constructor, variables)
    _, again = importing.load(reference, constructor, state)
    _same(again, variables)


@pytest.mark.parametrize(
    ("case", "changes"),
    [("nnunet_plain_2", {}), ("nnunet_resenc_2", {}), ("nnunet_resenc_2", BOTTLENECK)],
)
def test_a_module_tells_the_constructor_it_was_made_of(case, changes, golden):
    reference, constructor, _ = _read(golden, case)
    recipe = nnunet.from_torch(reference, constructor | changes)
    found = nnunet.constructor_of(recipe.module, recipe.image[-1])
    again = nnunet.from_torch(*found)
    assert again.module == recipe.module
    assert again.weights.keys() == recipe.weights.keys()
    with pytest.raises(ValueError, match="PlainConvUNet and ResidualEncoderUNet"):
        nnunet.constructor_of(recipe_of(*_read(golden, "unetr_2")[:2]).module, 1)


def test_nnunets_state_has_second_names_and_every_head(golden):
    reference, constructor, state = _read(golden, "nnunet_resenc_2")
    _, variables = importing.load(reference, constructor, state)
    found = exporting.dump(reference, constructor, variables)
    heads = {name for name in found if re.fullmatch(r"decoder\.seg_layers\.\d\.weight", name)}
    assert len(heads) == constructor["n_stages"] - 1
    stem = "encoder.stem.convs.0"
    for name in (f"{stem}.all_modules.0", f"decoder.{stem}.conv", f"decoder.{stem}.all_modules.0"):
        np.testing.assert_array_equal(found[f"{name}.weight"], state[f"{stem}.conv.weight"])
    assert "decoder.stages.0.convs.0.all_modules.1.bias" in found


def test_variables_of_another_network_are_listed(golden):
    reference, constructor, state = _read(golden, "nnunet_plain_2")
    _, variables = importing.load(reference, constructor, state)
    del variables["params"]["head_0"]["bias"]
    variables["params"]["head_0"]["kernel"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"params/head_0/bias, params/head_0/kernel"):
        exporting.dump(reference, constructor, variables)

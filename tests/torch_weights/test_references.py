"""Files of PyTorch's names are found by existing; their layouts are undone exactly."""

import sys

import numpy as np
import pytest

import bhsd_jax.torch_weights
from bhsd_jax.torch_weights import exporting, importing, layout
from bhsd_jax.torch_weights.layout import Layout
from bhsd_jax.torch_weights.recipe import references

FILE = """
import flax.linen as nn

from bhsd_jax.torch_weights import layout
from bhsd_jax.torch_weights.recipe import Recipe

REFERENCES = ("torch.nn.Linear",)


class Linear(nn.Module):
    features: int

    @nn.compact
    def __call__(self, image, *, train):
        return (nn.Dense(self.features, name="dense")(image),)


def from_torch(reference, constructor):
    module = Linear(constructor["out_features"])
    image = (1, 1, 1, 1, constructor["in_features"])
    weights = layout.layer("linear", "dense", layout.LINEAR)
    return Recipe(module, image, weights)
"""


def test_every_network_of_the_benchmark_has_a_reference():
    assert set(references()) == {
        *("PlainConvUNet", "ResidualEncoderUNet", "UNETR", "SwinUNETR", "CoTr", "nnFormer"),
        "DeepMedic",
        *("Primus", "PrimusV2"),
        *(f"Primus{version}{size}" for version in ("", "V2") for size in "SBML"),
    }


def test_a_file_of_ones_own_is_found_by_existing(tmp_path, monkeypatch):
    package = bhsd_jax.torch_weights
    (tmp_path / "own.py").write_text(FILE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    constructor = {"in_features": 2, "out_features": 3}
    state = {"linear.weight": np.arange(6.0).reshape(3, 2), "linear.bias": np.zeros(3)}
    try:
        _, variables = importing.load("torch.nn.Linear", constructor, state)
        kernel = variables["params"]["dense"]["kernel"]
        np.testing.assert_array_equal(kernel, state["linear.weight"].T)
        found = exporting.dump("torch.nn.Linear", constructor, variables)
    finally:
        sys.modules.pop("bhsd_jax.torch_weights.own", None)
    assert found.keys() == state.keys()
    np.testing.assert_array_equal(found["linear.weight"], state["linear.weight"])


@pytest.mark.parametrize(
    ("one", "torch", "linen"),
    [
        (layout.SAME, (5,), (5,)),
        (layout.LINEAR, (2, 3), (3, 2)),
        (layout.CONV, (2, 3, 4, 5, 6), (4, 5, 6, 3, 2)),
        (layout.CONV_TRANSPOSE, (2, 3, 4, 5, 6), (4, 5, 6, 2, 3)),
        (layout.POINTWISE, (2, 3, 1, 1, 1), (3, 2)),
        (layout.linear_over_blocks((4, 5, 6, 3, 2)), (2, 4 * 5 * 6 * 3), (4, 5, 6, 3, 2)),
    ],
)
def test_a_layout_there_and_back_is_nothing(one: Layout, torch, linen):
    tensor = np.random.default_rng(0).normal(size=torch)
    assert one.to_linen(tensor).shape == linen
    np.testing.assert_array_equal(one.to_torch(one.to_linen(tensor)), tensor)

"""Weights of another training by name: what is taken, what stays, and what is refused."""

import numpy as np
import pytest

from bhsd_jax.platform.errors import UserError
from bhsd_jax.train.transfer import transfer


def full(value, *shape):
    return np.full(shape, value, np.float32)


def network(value, outputs=3):
    return {
        "encoder_0": {"conv_0": {"kernel": full(value, 3, 4), "bias": full(value, 4)}},
        "head_0": {"kernel": full(value, 4, outputs)},
    }


def test_names_and_shapes_that_agree_are_taken():
    made = transfer(network(0.0), network(1.0), leave=("head",))
    assert made.params["encoder_0"]["conv_0"]["kernel"].min() == 1
    assert made.params["head_0"]["kernel"].max() == 0
    assert made.taken == ("encoder_0/conv_0/kernel", "encoder_0/conv_0/bias")
    assert made.drawn == ("head_0/kernel",)
    other = transfer(network(0.0), network(1.0, outputs=5))
    assert other.drawn == ("head_0/kernel",), "another size stays as drawn"


def test_each_twin_takes_the_same():
    made = transfer(
        {"a": network(0.0), "b": network(2.0)}, network(1.0), twins=("a", "b"), leave=("head",)
    )
    for twin, drawn in (("a", 0), ("b", 2)):
        assert made.params[twin]["encoder_0"]["conv_0"]["bias"].min() == 1
        assert made.params[twin]["head_0"]["kernel"].max() == drawn


def test_another_kind_of_network_is_refused():
    with pytest.raises(UserError, match=r"ours with encoder_0/conv_0/bias \(4,\)"):
        transfer(network(0.0), {"stem": {"kernel": full(0.0, 2, 2)}})

"""nnU-Net's pooling rule at the lengths where it changes, by hand."""

import pytest

from bhsd_jax.nnunet.topology import pool

ONCE = (1, 1, 1)


@pytest.mark.parametrize(
    ("spacing", "size", "strides"),
    [
        ((1, 1, 1), (8, 8, 7), (ONCE, (2, 2, 1))),  # 8 leave 4, 7 would leave fewer
        ((1, 1, 1), (16, 8, 8), (ONCE, (2, 2, 2))),  # the 8 that are left of 16 are too few alone
        ((1, 5, 5), (12, 7, 7), (ONCE, (2, 1, 1))),  # an axis alone needs 12
        ((1, 5, 5), (11, 7, 7), (ONCE,)),
    ],
)
def test_an_axis_is_halved_from_eight_voxels_on_and_alone_from_twelve(spacing, size, strides):
    assert pool(spacing, size).strides == strides

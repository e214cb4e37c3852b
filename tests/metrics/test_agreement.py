"""Agreement of masks by hand."""

import numpy as np
import pytest

from bhsd_jax.metrics.agreement import mean_pairwise_dice


def mask(*on):
    made = np.zeros((2, 3, 2), bool)
    made.ravel()[list(on)] = True
    return made


def test_it_is_the_mean_over_pairs():
    masks = [mask(0, 1, 2, 3), mask(2, 3), mask(3, 4, 5, 6)]
    assert mean_pairwise_dice(masks) == pytest.approx((4 / 6 + 2 / 8 + 2 / 6) / 3)


def test_nothing_drawn_is_agreed_upon_and_something_is_not():
    assert mean_pairwise_dice([mask(), mask()]) == 1
    assert mean_pairwise_dice([mask(), mask(1)]) == 0
    with pytest.raises(ValueError, match="two masks or more; got 1"):
        mean_pairwise_dice([mask()])

"""What validation in the loop tells the checkpoints."""

import math

from bhsd_jax.assemble.validation import Validation


def test_only_a_step_that_was_validated_itself_is_saved_with_a_dice():
    validation = object.__new__(Validation)  # the rest of it is a whole run
    assert math.isnan(validation.dice_at(0))
    validation.newest = (40, 0.75)
    assert validation.dice_at(40) == 0.75
    assert math.isnan(validation.dice_at(50))

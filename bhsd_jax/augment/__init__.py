"""Random changes of one patch, inside the jitted step, found by name."""

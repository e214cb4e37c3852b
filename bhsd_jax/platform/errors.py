"""`UserError`: an error in input, config or machine that a user can mend."""


class UserError(ValueError):
    """Something in the input, the config or the place that a user can mend; the text says how.

    Programs end with its text alone. Any other `ValueError` is a defect of this package, and ends
    with its traceback.
    """

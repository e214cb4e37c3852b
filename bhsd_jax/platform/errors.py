"""`UserError`: an error in input, config or machine that a user can mend."""

from collections.abc import Sequence


class UserError(ValueError):
    """Something in the input, the config or the place that a user can mend; the text says how.

    Programs end with its text alone. Any other `ValueError` is a defect of this package, and ends
    with its traceback.
    """


BROKEN = (UserError, OSError, EOFError, MemoryError)
"""What reading or writing one scan may raise: it is recorded, and the others go on."""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, for a message, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def explain_extra(extra: str) -> str:
    """How an extra of `pyproject.toml` is installed: the end of a message that it is missing.

    From the repository alone: on PyPI the name is not ours, and anybody may register it.
    """
    return (
        f"install the extra `{extra}`, in the repository: BHSD_EXTRAS={extra} tools/env, or "
        f"pip install '.[{extra}]'"
    )

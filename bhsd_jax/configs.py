"""The experiment files of the repository's `configs/`, as a package; a wheel has them here."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "configs")]

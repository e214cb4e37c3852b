"""The experiment files in the repository's `configs/`, as a package.

In a wheel the folder itself is in place of this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "configs")]

"""A generated data set: heads with bleeds in the layout of BHSD, made on the first use."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.datasets.bhsd import BHSD
from bhsd_jax.phantom.tree import SLICE_LABELS, generate
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE, Case


@dataclass(frozen=True)
class Synthetic:
    """The generated data set; `prepare` makes it, `cases` reads it as BHSD."""

    root: str | Path
    labeled: int = 24  # training cases with masks
    test: int = 12
    bleeding: int = 24  # without masks, known to bleed
    nonbleeding: int = 12
    size: int = 128  # rows and columns
    slices: int = 24  # over 160 mm
    difficulty: str = "default"  # or "large", "easy": see `LEVELS` in `phantom/bleeds.py`
    seed: int = 0
    processes: int = 0  # that make it; 0: one per core if that is worth it
    name: str = field(default="synthetic", init=False)
    classes: tuple[str, ...] = field(default=HEMORRHAGE, init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="CC0-1.0 (generated, shows nobody)", init=False)

    def prepare(self) -> None:
        """Makes what is missing.

        Raises:
            ValueError: If the folder holds something else.
        """
        generate(
            _named(self.root),
            train=self.labeled,
            test=self.test,
            bleeding=self.bleeding,
            nonbleeding=self.nonbleeding,
            seed=self.seed,
            size=self.size,
            slices=self.slices,
            difficulty=self.difficulty,
            processes=self.processes,
        )

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If they have not been made, or not all of them.
        """
        root = _named(self.root)
        if not (root / SLICE_LABELS).is_file():
            raise FileNotFoundError(f"{root}: not generated yet; run the verb `preprocess` first")
        yield from BHSD(root).cases()


def _named(root: str | Path) -> Path:
    if not str(root):
        raise UserError("synthetic: root is empty; set config.data.root to a folder to fill")
    return Path(root)

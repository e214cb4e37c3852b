"""MBH-Seg25: BHSD's scans outlined again by several raters each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.ct.masks import WAYS
from bhsd_jax.datasets.bhsd_files import patient
from bhsd_jax.datasets.label_maps import LabelMap
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case, Label, Masks

_RATER = re.compile(r"label_annot_(\d+)\.nii(\.gz)?$")
# As in "Test_set", "evaluation", "imagesTest" and "TEST", and not in "latest" and "interval".
_WORD = re.compile(r"(?:(?<![A-Za-z])[Ee]?|(?<=[a-z])(?=[TV]))([Tt]est|[Vv]al|TEST|VAL)")
_CONSENSUS = ("label_consensus_staple.nii.gz", "label_consensus_staple.nii")
_IMAGE = ("image.nii.gz", "image.nii")
_MAP = LabelMap.of("bhsd")


@dataclass(frozen=True)
class MBHSeg:
    """One folder per case with `image.nii.gz` and `label_annot_1.nii.gz` to `_5`.

    Not every rater outlined every case. `rater` "majority", "union" and "intersection" combine
    those there are, "first" takes the lowest number there is, "1" to "5" that one, "staple" the
    consensus the authors ship. Cases in a folder with `test` in its name are "test", with `val`
    "val", others "train"; those without any mask are "unlabeled".

    Source: mbh-seg.com, 2025; the scans are BHSD's, so that its train and test sides hold.
    """

    root: str | Path
    rater: str = "majority"
    allow_missing: bool = False  # cases the chosen rater did not outline become unlabeled
    name: str = field(default="MBH-Seg25", init=False)
    classes: tuple[str, ...] = field(default=_MAP.classes, init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="CC BY-NC-ND 4.0 (as BHSD)", init=False)

    def __post_init__(self):
        if self.rater not in (*WAYS, "staple") and not self.rater.isdigit():
            raise UserError(
                f"MBHSeg: rater is {', '.join(WAYS)}, staple or a number; got {self.rater!r}"
            )

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If there is no case.
            ValueError: If the chosen rater did not outline a case others did, or an id comes twice.
        """
        root = Path(self.root)
        images = sorted(path for name in _IMAGE for path in root.glob(f"**/{name}"))
        if not images:
            raise FileNotFoundError(
                f"{root}: no <case>/image.nii.gz in it or below; set data.root to the unpacked set"
            )
        cases: dict[str, Case] = {}
        for image in images:
            id = image.parent.name
            if id in cases:
                raise UserError(f"{root}: {id} lies in two folders; keep one copy")
            label = self._label(image.parent)
            split = _split(root, image.parent) if label is not None else "unlabeled"
            cases[id] = Case(id, patient(id), image, label, split, table_feed=True)  # as BHSD's
        yield from (cases[id] for id in sorted(cases))

    def _label(self, folder: Path) -> Label | None:
        matches = {path: _RATER.match(path.name) for path in folder.iterdir()}
        raters = {int(match.group(1)): path for path, match in matches.items() if match}
        if not raters:
            return None
        files = tuple(raters[number] for number in sorted(raters))
        if self.rater in WAYS:
            return files[0] if self.rater == "first" else Masks(files, self.rater)
        if self.rater == "staple":
            chosen = next((folder / name for name in _CONSENSUS if (folder / name).is_file()), None)
        else:
            chosen = raters.get(int(self.rater))
        if chosen is None and not self.allow_missing:
            raise UserError(
                f"{folder}: not outlined by rater {self.rater}, but by "
                f"{', '.join(map(str, sorted(raters)))}; combine them with rater='majority', or "
                "set --config.data.allow_missing=True"
            )
        return chosen


def _split(root: Path, folder: Path) -> str:
    above = folder.relative_to(root).parts[:-1]
    words = [match.group(1).lower() for part in above for match in _WORD.finditer(part)]
    return next((word for word in ("test", "val") if word in words), "train")

"""INSTANCE 2022: head CTs with all bleeding outlined as one class."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.datasets.label_maps import LabelMap
from bhsd_jax.datasets.pairs import first_folder, pairs
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case

_TRAIN = ("train_2", "train", "training")
_TEST = ("evaluation", "validation", "val", "test")
_IMAGES = ("data", "images")
_MASKS = ("label", "labels")
_MAP = LabelMap.of("binary")


@dataclass(frozen=True)
class INSTANCE:
    """The challenge's archives: `train_2/data/NNN.nii.gz` with `train_2/label`, and `evaluation`.

    Scans of `evaluation`, whose masks were never given out, are "test" if they have masks, else
    "unlabeled". Each scan is a patient.

    Source: Li et al. 2023, arXiv:2301.03281.
    """

    root: str | Path
    name: str = field(default="INSTANCE2022", init=False)
    classes: tuple[str, ...] = field(default=_MAP.classes, init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="CC BY-NC-ND 4.0, signed agreement", init=False)

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If there is no training folder, or no image in one.
            ValueError: If a training scan has no mask, a mask no scan, or an id comes twice.
        """
        root = Path(self.root)
        train = first_folder(root, _TRAIN)
        if train is None:
            raise FileNotFoundError(
                f"{root}: no folder train_2 with data and label in it; set data.root to where the "
                "archive was unpacked"
            )
        cases = _folder(train, "train")
        bare = [case.id for case in cases if case.label is None]
        if bare:
            raise UserError(f"{train}: no mask for {', '.join(bare[:3])}; copy it to label/")
        test = first_folder(root, _TEST)
        if test is not None:
            more = _folder(test, "test")
            double = sorted({case.id for case in cases} & {case.id for case in more})
            if double:
                raise UserError(f"{root}: {', '.join(double[:3])} in {train.name} and {test.name}")
            cases += more
        yield from sorted(cases, key=lambda case: case.id)


def _folder(folder: Path, split: str) -> list[Case]:
    images = first_folder(folder, _IMAGES) or folder
    paired = pairs(images, first_folder(folder, _MASKS))
    return [
        Case(id, id, image, None, "unlabeled" if split == "test" else split)
        if mask is None
        else Case(id, id, image, _MAP.label(mask), split)
        for id, (image, mask) in paired.items()
    ]

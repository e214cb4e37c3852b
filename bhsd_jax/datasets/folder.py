"""Plain folders: NIfTI images, masks for some or all of them, and a label map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.datasets.label_maps import LabelMap
from bhsd_jax.datasets.pairs import pairs
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case


@dataclass(frozen=True)
class Folder:
    """Images and masks of the same names. Each image is a patient.

    Images with a mask train (a fold of them validates), or are what `split` says; others are
    unlabeled. `labels` is a preset of `label_maps.PRESETS`, or names of the classes by mask value,
    background first; values with one name are one class.
    """

    root: str | Path
    images: str = "images"  # in `root`; "" or ".": the root itself
    masks: str = "masks"  # in `root`
    labels: str | Sequence[str] = "bhsd"
    modality: str = "ct"
    split: str = "train"  # of the images with a mask; or "test"
    license: str = ""
    name: str = field(default="folder", init=False)

    def __post_init__(self):
        if self.modality not in ("ct", "mr") or self.split not in ("train", "val", "test"):
            raise UserError(
                "Folder: modality is ct or mr, split is train, val or test; got "
                f"{self.modality!r} and {self.split!r}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """As the label map has them."""
        return LabelMap.of(self.labels).classes

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If there is no image.
            ValueError: If a mask has no image, or the label map is not known.
        """
        root, label_map = Path(self.root), LabelMap.of(self.labels)
        for id, (image, mask) in pairs(root / self.images, root / self.masks).items():
            if mask is None:
                yield Case(id, id, image, None, "unlabeled")
            else:
                yield Case(id, id, image, label_map.label(mask), self.split)

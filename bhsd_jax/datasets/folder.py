"""Plain folders: images in any format that is read, masks for some or all, and a label map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.datasets import label_tables
from bhsd_jax.datasets.bhsd_files import patient
from bhsd_jax.datasets.label_maps import LabelMap, own_names
from bhsd_jax.datasets.pairs import pairs
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case, Survey

_MASKS = "masks"


@dataclass(frozen=True)
class Folder:
    """Images and masks of the same names. Each image is a patient, unless names say whose it is.

    They do as BHSD's, `ID_<patient>_ID_<study>`, and those of BIDS, `sub-<patient>_ses-...`.

    Images with a mask train (a fold of them validates), or are what `split` says; others are
    unlabeled. What is known of scans and slices is read from tables in `root` (`label_tables`).

    `labels` is a preset of `label_maps.PRESETS`, or names of the classes by mask value, background
    first; values with one name are one class. `classes` are one's own names in place of it, of the
    values 1, 2, ...; afterwards it holds all classes, by index. A mask with a value that has no
    class is refused when it is read.

    Raises:
        ValueError: If the label map, the modality or the split is not known.
    """

    root: str | Path
    images: str = "images"  # in `root`; "" or ".": the root itself
    masks: str = _MASKS  # in `root`; it may be missing, as of unlabeled images alone
    labels: str | Sequence[str] = "bhsd"
    modality: str = "ct"
    split: str = "train"  # of the images with a mask; or "test"
    license: str = ""
    classes: str | Sequence[str] = ""  # names, as "a,b" or ("a", "b"); "": those of `labels`
    name: str = field(default="folder", init=False)

    def __post_init__(self):
        if self.modality not in ("ct", "mr") or self.split not in ("train", "val", "test"):
            raise UserError(
                "Folder: modality is ct or mr, split is train, val or test; got "
                f"{self.modality!r} and {self.split!r}"
            )

        if self.classes:
            object.__setattr__(self, "labels", own_names(self.classes))
        object.__setattr__(self, "classes", LabelMap.of(self.labels).classes)

    @property
    def binary_flag(self) -> str:
        """What to set if 1 means any bleeding; "" where a user has said what it means."""
        return "--data.labels=binary" if self.labels == "bhsd" else ""

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: As by `survey`.
            ValueError: Likewise.
        """
        yield from self.survey().cases

    def survey(self) -> Survey:
        """All cases, and which rows of the tables have none.

        Raises:
            FileNotFoundError: If there is no image, or not the folder of masks that was named.
            ValueError: If a mask has no image, the label map is not known, or a table makes no
                sense.
        """
        root, label_map = Path(self.root), LabelMap.of(self.labels)
        if self.masks != _MASKS and not (root / self.masks).is_dir():
            raise FileNotFoundError(f"{root / self.masks}: no such folder; look at data.masks")
        cases = []
        for id, (image, mask) in pairs(root / self.images, root / self.masks).items():
            label = None if mask is None else label_map.label(mask)
            split = "unlabeled" if mask is None else self.split
            cases.append(Case(id, patient(id), image, label, split))
        known, findings = label_tables.Tables.of(root, label_map.classes[1:]).known(cases)
        return Survey(tuple(known), tuple(findings))

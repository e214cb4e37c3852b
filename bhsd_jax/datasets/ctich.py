"""PhysioNet CT-ICH: 75 head CTs, bleeding outlined as one class and typed slice by slice."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.datasets.label_maps import LabelMap
from bhsd_jax.datasets.pairs import pairs
from bhsd_jax.datasets.rsna import any_bleeding
from bhsd_jax.platform import csv_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case

_TABLE = "hemorrhage_diagnosis_raw_ct.csv"
_COLUMNS = ("Epidural", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural")
_MAPS = {"binary": LabelMap.of("binary"), "types": LabelMap.of("bhsd")}


@dataclass(frozen=True)
class CTICH:
    """Version 1.3.1 as unpacked: `ct_scans/NNN.nii`, `masks/NNN.nii` and the table of slices.

    With `masks` "binary" the one class is outlined and every slice is known to show it or not.
    With "types" there are the five classes and no masks, since those do not tell them apart: the
    table's slice labels are all there is, and cases are "unlabeled".

    Source: Hssayeni et al. 2020, doi:10.3390/data5010014; physionet.org/content/ct-ich/1.3.1.
    """

    root: str | Path
    masks: str = "binary"
    name: str = field(default="CT-ICH", init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="PhysioNet Restricted Health Data License 1.5.0", init=False)

    def __post_init__(self):
        if self.masks not in _MAPS:
            raise UserError(f"CTICH: masks is {' or '.join(_MAPS)}; got {self.masks!r}")

    @property
    def classes(self) -> tuple[str, ...]:
        """One, or the five types."""
        return _MAPS[self.masks].classes

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If there are no scans, or no table.
            ValueError: If a mask has no scan, or the table makes no sense.
        """
        root = Path(self.root)
        typed = self.masks == "types"
        rows = _rows(root / _TABLE, typed)
        for id, (image, mask) in pairs(root / "ct_scans", root / "masks").items():
            slice_labels = rows.get(id)
            bleeding = any_bleeding(slice_labels or ())
            if typed or mask is None:
                yield Case(id, id, image, None, "unlabeled", bleeding, slice_labels)
            else:
                label = _MAPS["binary"].label(mask)
                yield Case(id, id, image, label, "train", bleeding, slice_labels)


def _rows(path: Path, typed: bool) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Slice labels by case; the table counts patients from 49 and slices from 1."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; it comes with the data set")
    by_case: dict[str, dict[int, tuple[int, ...]]] = {}
    lines = csv_files.read_records(path)
    lacking = {"PatientNumber", "SliceNumber", *_COLUMNS} - set(next(lines, (0, {}))[1])
    if lacking:
        raise UserError(f"{path}: no column {', '.join(sorted(lacking))}")
    for number, row in lines:
        try:
            values = tuple(csv_files.whole(row[name]) for name in _COLUMNS)
            patient, index = (csv_files.whole(row[n]) for n in ("PatientNumber", "SliceNumber"))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: expected numbers ({error})") from error
        if not set(values) <= {0, 1} or index < 1:
            raise UserError(f"{path}, line {number}: expected 0 or 1; got {values}")
        by_slice = by_case.setdefault(f"{patient:03d}", {})
        shown = values if typed else (max(values),)
        if by_slice.setdefault(index - 1, shown) != shown:
            raise UserError(f"{path}, line {number}: contradicts an earlier line of that slice")
    unknown = (-1,) * (len(_COLUMNS) if typed else 1)
    return {
        case: tuple(slices.get(k, unknown) for k in range(max(slices) + 1))
        for case, slices in by_case.items()
    }

"""Masks of a folder that label maps are compared with, by case."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bhsd_jax.ct.dicom import seg_mask, slice_file
from bhsd_jax.datasets.image_files import scans
from bhsd_jax.defects import Refusal, said_of
from bhsd_jax.platform.csv_files import read_records
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Label

logger = logging.getLogger(__name__)


def masks(root: Path, predictions: Path, classes: Sequence[str]) -> dict[str, Label]:
    """Label maps in every format by their names, and DICOM SEG by their series.

    A case with both has the former, for it may be the SEG that was converted: a line says so.

    Args:
        root: Where they lie.
        predictions: The folder of label maps, whose `series.csv` says which series a case is. A SEG
            of another series is of the case that it is called as.
        classes: Names of the classes, background first, for the segments.

    Raises:
        Refusal: If a file cannot be used, or a segment is of no class.
        UserError: If two SEG are of one case, or two other files.
    """
    found: dict[str, Label] = {
        name: path for name, path in scans(root).items() if not slice_file.is_dicom(path)
    }
    cases, passed = _cases(predictions / "series.csv"), 0
    for path in sorted(root.iterdir()):
        if not path.is_file() or not seg_mask.is_seg(path):
            continue
        try:
            outline = seg_mask.outline(path)
            case = next((cases[uid] for uid in sorted(outline.series) if uid in cases), path.stem)
            if isinstance(found.get(case), Path):
                passed += 1
                continue
            mask = seg_mask.label(outline, classes)
        except Refusal as error:
            raise said_of(path, error) from error
        if case in found:
            raise UserError(f"{root}: two masks of {case}, one of them {path.name}; keep one")
        found[case] = mask
    if passed:
        text = "%s: DICOM SEG of cases whose masks lie there in other formats, passed over: %d"
        logger.warning(text, root, passed)
    return found


def _cases(table: Path) -> dict[str, str]:
    """Case by SeriesInstanceUID, where no two cases share it."""
    if not table.is_file():
        return {}
    rows = [(row.get("SeriesInstanceUID"), row.get("case")) for _, row in read_records(table)]
    count = Counter(uid for uid, _ in rows)
    # The apostrophe keeps spreadsheets from taking a name for a formula.
    return {uid: case.removeprefix("'") for uid, case in rows if uid and case and count[uid] == 1}

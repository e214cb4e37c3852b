"""HemSeg-200 and -500: masks of scans from the RSNA 2019 challenge, as one class."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bhsd_jax.datasets.bhsd import scans
from bhsd_jax.datasets.label_maps import LabelMap
from bhsd_jax.datasets.pairs import first_folder
from bhsd_jax.platform import csv_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case, Image, Series

_IMAGES = ("images", "image", "data")
_MASKS = ("labels", "label", "IPH_IVH_label", "masks", "annotation")
_SPLITS = {"train_set.csv": "train", "val_set.csv": "val", "dev_set.csv": "val"}
_STUDY = re.compile(r"[0-9a-f]{10}$")
_MAP = LabelMap.of("binary")


@dataclass(frozen=True)
class HemSeg:
    """Masks `<study>.nii.gz` beside the lists of the repository, and images from either source.

    Images are NIfTI of the same names, or, with `dicom`, the slices `ID_<slice>.dcm` of the RSNA
    challenge that the file `annotion_file_info*.jsonl` lists. That file also tells patients apart.
    `train_set.csv`, `val_set.csv` and `test_set.csv` give the splits; without them all train.

    Source: Song et al. 2024, arXiv:2405.14559.
    """

    root: str | Path
    dicom: str | Path = ""  # folder of the challenge's slices
    uneven: str = "refuse"  # of them; or "resample"
    name: str = field(default="HemSeg", init=False)
    classes: tuple[str, ...] = field(default=_MAP.classes, init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="RSNA 2019 terms (non-commercial research, education)", init=False)

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If there are no masks, or a mask's image is not there.
            ValueError: If a list makes no sense, or a patient crosses splits.
        """
        root = Path(self.root)
        folder = first_folder(root, _MASKS)
        if folder is None:
            raise FileNotFoundError(
                f"{root}: no folder of masks; expected one of {', '.join(_MASKS)}"
            )
        studies, splits = _studies(root), _splits(root)
        images = self._images(root)
        cases = []
        for name, mask in scans(folder).items():
            study = _study(name, mask)
            patient = str(studies.get(study, {}).get("patient", study))
            image = self._image(study, studies, images)
            split = splits.get(study, "unlabeled") if splits else "train"
            label = None if split == "unlabeled" else _MAP.label(mask)
            cases.append(Case(study, patient, image, label, split))
        _require_apart(root, cases)
        yield from sorted(cases, key=lambda case: case.id)

    def _images(self, root: Path) -> dict[str, Path]:
        folder = first_folder(root, _IMAGES)
        if self.dicom or folder is None:
            return {}
        return {_study(name, path): path for name, path in scans(folder).items()}

    def _image(
        self, study: str, studies: Mapping[str, Mapping[str, Any]], images: Mapping[str, Path]
    ) -> Image:
        if not self.dicom:
            if study not in images:
                raise FileNotFoundError(
                    f"{self.root}: no image of study {study} in {', '.join(_IMAGES)}; put the "
                    "converted scan there, or set data.dicom to the challenge's folder of slices"
                )
            return images[study]
        if study not in studies:
            raise FileNotFoundError(
                f"{self.root}: no annotion_file_info*.jsonl lists the slices of study {study}"
            )
        files = [Path(self.dicom, f"ID_{name}.dcm") for name in studies[study]["slice_list"]]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.dicom}: no {missing[0]} and {len(missing) - 1} more of study {study}"
            )
        return Series(tuple(sorted(files)), study, self.uneven)


def _study(name: str, path: Path) -> str:
    match = _STUDY.search(name)
    if match is None:
        raise UserError(f"{path}: its name does not end with a study, ten hexadecimal digits")
    return match.group()


def _studies(root: Path) -> dict[str, Any]:
    studies = {}
    for path in sorted(root.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                row = json.loads(line)
                study = str(row.get("scan_") or row["scan"]).removeprefix("ID_")
                slices = [str(name).removeprefix("ID_") for name in row["slice_list"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: expected patient, scan_ and slice_list"
                ) from error
            studies[study] = {"patient": row.get("patient", study), "slice_list": slices}
    return studies


def _splits(root: Path) -> dict[str, str]:
    splits = {}
    for name, split in (*_SPLITS.items(), ("test_set.csv", "test")):
        if (root / name).is_file():
            lines = csv_files.read_records(root / name)
            if "filename" not in next(lines, (0, {}))[1]:
                raise UserError(f"{root / name}: no column filename; fetch the list again")
            for _, row in lines:
                study = _study(Path(row["filename"]).name.split(".")[0], root / name)
                if splits.setdefault(study, split) != split:
                    raise UserError(f"{root / name}: {study} is in another list as well")
    return splits


def _require_apart(root: Path, cases: list[Case]) -> None:
    seen: dict[str, str] = {}
    for case in cases:
        if case.split == "unlabeled":
            continue
        if seen.setdefault(case.patient, case.split) != case.split:
            raise UserError(
                f"{root}: scans of one patient, {case.patient}, are in {seen[case.patient]!r} and "
                f"{case.split!r}; move one of them in the lists"
            )

"""BHSD: 192 head CTs with five kinds of bleeding outlined, 1980 known only to bleed or not.

The official lists name files by paths that do not exist, the mask folder has a space in its name,
and mirrors drop suffixes: everything is matched by base name.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.volume import Case

_IMAGES = ("images", "imagesTr")
_MASKS = ("ground truths", "ground_truths", "labelsTr", "masks")
_BLEEDING = {"anybleed": True, "nobleed": False}
_SUFFIX = re.compile(r"\.nii(\.gz)?$")
_PATIENT = re.compile(r"ID_[0-9a-f]{8}(?=_|$)")
_MAGIC = (b"\x1f\x8b", b"\x5c\x01", b"\x00\x00")  # gzip; 348, the first field of NIfTI, either way


@dataclass(frozen=True)
class BHSD:
    """The data set as unpacked from its archives, or a copy in nnU-Net's folder names.

    Splits follow `dataset.json`: `training` is "train", `test` is "test", images known only to
    bleed or not are "unlabeled".

    Source: Wu et al. 2023, arXiv:2308.11298.
    """

    root: str | Path
    label_dir: str | Path | None = None  # folder of masks if it has another name; may be relative
    allow_missing: bool = False  # accept copies that lack some of the listed cases
    name: str = field(default="BHSD", init=False)
    classes: tuple[str, ...] = field(
        default=("background", "EDH", "IPH", "IVH", "SAH", "SDH"), init=False
    )
    modality: str = field(default="ct", init=False)
    license: str = field(
        default="CC BY-NC-ND 4.0 (non-commercial, no derivatives; no redistribution)", init=False
    )

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If there are no images, no masks, or no official split.
            ValueError: If images, masks and split do not agree, or a patient crosses splits.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; unpack BHSD there, or set data.root")
        slices = _slice_labels(root / "slice_labels.csv", self.classes[1:])
        found = [*self._labeled(root, slices), *_unlabeled(root, slices)]
        if not found:
            raise FileNotFoundError(
                f"{root}: no scans; expected label_192/images and label_192/ground truths, "
                "unlabel_*/anybleed and nobleed, or imagesTr and labelsTr"
            )
        found.sort(key=lambda case: case.id)
        _check(root, found)
        yield from found

    def _labeled(self, root: Path, slices: dict[str, tuple]) -> list[Case]:
        folder = _first(root, _IMAGES)
        if folder is None:
            return []
        images = scans(folder)
        masks_folder = root / self.label_dir if self.label_dir else _first(root, _MASKS)
        if masks_folder is None or not masks_folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no masks for these images; expected a folder named "
                f"{', '.join(map(repr, _MASKS))} beside it, or its name as data.label_dir"
            )
        masks = scans(masks_folder)
        unmatched = sorted(set(images) - set(masks))
        if unmatched:
            raise ValueError(
                f"{masks_folder}: no mask for {_some(unmatched)}; copy it there, or move the "
                "image to an unlabel_* folder"
            )
        split = _official_split(root, folder)
        unknown = sorted(set(images) - set(split))
        if unknown:
            raise ValueError(
                f"{folder}: not in dataset.json: {_some(unknown)}; add it to 'training' or 'test'"
            )
        missing = sorted((set(split) | set(masks)) - set(images))
        if missing and not self.allow_missing:
            raise ValueError(
                f"{folder}: no image for {_some(missing)}, listed or outlined; fetch it, or set "
                "allow_missing=True in config.data"
            )
        return [
            Case(id, _patient(id), images[id], masks[id], split[id], None, slices.get(id))
            for id in images
        ]


def scans(folder: Path) -> dict[str, Path]:
    """NIfTI files of a folder by base name, with or without a suffix; sorted.

    Raises:
        ValueError: If two files have one base name.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue  # "._x.nii.gz": what macOS leaves in archives
        if not _SUFFIX.search(path.name) and (path.suffix or not _looks_like_nifti(path)):
            continue
        name = _SUFFIX.sub("", path.name)
        if name in found:
            raise ValueError(f"{folder}: {found[name].name} and {path.name} are one case; keep one")
        found[name] = path
    return found


def _looks_like_nifti(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in _MAGIC


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    bases = [root, *sorted(root.glob("label_*")), *sorted(root.glob("*_label"))]
    return next((base / n for base in bases for n in names if (base / n).is_dir()), None)


def _official_split(root: Path, images: Path) -> dict[str, str]:
    """Split by base name; the folders named in the file do not exist."""
    places = [folder / "dataset.json" for folder in (root, images.parent)]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{places[0]}: not there; it holds the official training and test lists: copy it from "
            "the data set's page, or write {'training': [file names], 'test': [file names]}"
        )
    lists = json.loads(path.read_text(encoding="utf-8-sig"))
    split: dict[str, str] = {}
    for key, value in (("training", "train"), ("test", "test")):
        for item in lists.get(key, []):
            named = item["image"] if isinstance(item, dict) else item
            id = _SUFFIX.sub("", Path(named).name)
            if split.setdefault(id, value) != value:
                raise ValueError(f"{path}: {id} is in 'training' and in 'test'; keep one")
    return split


def _unlabeled(root: Path, slices: dict[str, tuple]) -> list[Case]:
    cases = []
    for base in sorted(root.glob("unlabel_*")):
        for name, bleeding in _BLEEDING.items():
            if (base / name).is_dir():
                for id, image in scans(base / name).items():
                    rows = slices.get(id)
                    cases.append(Case(id, _patient(id), image, None, "unlabeled", bleeding, rows))
    return cases


def _slice_labels(path: Path, classes: tuple[str, ...]) -> dict[str, tuple]:
    """Rows per case from columns case, slice, any, and one per class; -1 where nothing is said."""
    if not path.is_file():
        return {}
    rows: dict[str, dict[int, tuple[int, ...]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        lacking = {"case", "slice"} - set(reader.fieldnames or ())
        if lacking:
            raise ValueError(
                f"{path}: no column {', '.join(sorted(lacking))}; expected "
                f"case, slice, any, {', '.join(classes)}"
            )
        for row in reader:
            # No bleeding at all is known of every class.
            default = 0 if row.get("any") == "0" else -1
            values = tuple(int(row.get(name) or default) for name in classes)
            if not set(values) <= {-1, 0, 1} or int(row["slice"]) < 0:
                raise ValueError(f"{path}, line {reader.line_num}: expected 0, 1 or -1; got {row}")
            rows.setdefault(_SUFFIX.sub("", row["case"]), {})[int(row["slice"])] = values
    unknown = (-1,) * len(classes)
    return {
        case: tuple(found.get(k, unknown) for k in range(max(found) + 1))
        for case, found in rows.items()
    }


def _patient(id: str) -> str:
    match = _PATIENT.match(id)
    return match.group() if match else id


def _check(root: Path, cases: list[Case]) -> None:
    seen: set[str] = set()
    split: dict[str, str] = {}
    for case in cases:
        if case.id in seen:
            raise ValueError(f"{root}: {case.id} lies in two folders; keep one copy")
        seen.add(case.id)
        if split.setdefault(case.patient, case.split) != case.split:
            raise ValueError(
                f"{root}: scans of one patient, {case.patient}, are in {split[case.patient]!r} and "
                f"{case.split!r}; keep them on one side"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

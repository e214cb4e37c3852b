"""BHSD: 192 head CTs with five kinds of bleeding outlined, 1980 known only to bleed or not.

The official lists name files by paths that do not exist, the mask folder has a space in its name,
and mirrors drop suffixes: everything is matched by base name.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.datasets import label_tables
from bhsd_jax.datasets.bhsd_files import (
    Scans,
    find,
    official_split,
    patient,
    unnumbered,
)
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE, Case, Survey

_IMAGES = ("images", "imagesTr")
_MASKS = ("ground truths", "ground_truths", "labelsTr", "masks")
_BLEEDING = {"anybleed": True, "nobleed": False}
_COUNT = re.compile(r"_(\d+)$")  # of scans, in a folder's name


@dataclass(frozen=True)
class BHSD:
    """The data set as unpacked from its archives, or a copy in nnU-Net's folder names.

    Splits follow `dataset.json`: `training` is "train", `test` is "test", images known only to
    bleed or not are "unlabeled". Scans that cannot be used are left out, one by one; `survey`
    says which and why.

    Source: Wu et al. 2023, arXiv:2308.11298.
    """

    root: str | Path
    label_dir: str | Path | None = None  # folder of masks if it has another name; may be relative
    allow_missing: bool = False  # accept copies that lack some of the listed cases
    allow_empty: bool = False  # accept masks without bleeding, of which BHSD itself has none
    name: str = field(default="BHSD", init=False)
    classes: tuple[str, ...] = field(default=HEMORRHAGE, init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(
        default="CC BY-NC-ND 4.0 (non-commercial, no derivatives; no redistribution)", init=False
    )

    def cases(self) -> Iterator[Case]:
        """The usable cases, sorted by id.

        Raises:
            FileNotFoundError: If there are no images, no masks, or no official split.
            ValueError: If the lists cannot be read, or no scan can be used.
        """
        yield from self.survey().cases

    def survey(self, *, pool: bool = True) -> Survey:
        """The usable cases and what is wrong with the rest.

        Args:
            pool: With the scans known only to bleed or not.

        Raises:
            FileNotFoundError: If there are no images, no masks, or no official split.
            ValueError: If the lists cannot be read, or no scan can be used.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; unpack BHSD there, or set data.root")
        labeled, findings = self._labeled(root)
        unlabeled, more = _unlabeled(root, {case.id for case in labeled}) if pool else ([], [])
        cases, overlaps = _patients([*labeled, *unlabeled])
        findings += [*more, *overlaps, *_unused(root, cases)]
        refused = [finding.text for finding in findings if finding.done == "refused"]
        if refused and not cases:
            raise UserError(f"{root}: no scan can be used, {len(refused)} refused: {refused[0]}")
        if not cases:
            raise FileNotFoundError(
                f"{root}: no scans; expected label_192/images and label_192/ground truths, "
                "unlabel_*/anybleed and nobleed, or imagesTr and labelsTr"
            )
        cases, more = label_tables.Tables.of(root, self.classes[1:]).known(cases)
        # Else rows of the pool have no scan here.
        findings += [f for f in more if pool or f.kind is not Kind.SLICE_LABELS_ALONE]
        return Survey(tuple(sorted(cases, key=lambda case: case.id)), tuple(findings))

    def _labeled(self, root: Path) -> tuple[list[Case], list[Finding]]:
        folder = _first(root, _IMAGES)
        if folder is None:
            return [], []
        masks_folder = root / self.label_dir if self.label_dir else _first(root, _MASKS)
        if masks_folder is None or not masks_folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no masks for these images; expected a folder named "
                f"{', '.join(map(repr, _MASKS))} beside it, or its name as data.label_dir"
            )
        split, findings = official_split(_lists(root, folder))
        images, more = find(folder)
        masks, most = find(masks_folder)
        images = unnumbered(images, masks)
        findings += [*more, *most, *_folder_name(folder.parent, len(images))]
        if " " in masks_folder.name:
            text = f"{masks_folder}: found all the same; many tools break a path at its space"
            findings.append(Finding(Kind.FOLDER_SPACE, "repaired", text))
        refused = {finding.case for finding in findings if finding.done == "refused"}
        cases, incomplete = self._pair(folder, masks_folder, images, masks, split, refused)
        return cases, findings + incomplete

    def _pair(
        self,
        folder: Path,
        masks_folder: Path,
        images: Scans,
        masks: Scans,
        split: dict[str, str],
        refused: set[str],
    ) -> tuple[list[Case], list[Finding]]:
        """Cases with image, mask and a place in the lists; of the `known` nothing more is said."""
        cases, findings = [], []
        bleeding = None if self.allow_empty else True
        missing = "kept" if self.allow_missing else "refused"
        for id in sorted({*images, *masks, *split} - refused):
            if id in images and id in masks and id in split:
                image, mask = images[id], masks[id]
                case = Case(id, patient(id), image, mask, split[id], bleeding, table_feed=True)
                cases.append(case)
            elif id not in images:
                text = (
                    f"{folder}: no image for {id}, listed or outlined; fetch it, or set "
                    "--config.data.allow_missing=True"
                )
                findings.append(Finding(Kind.IMAGE_MISSING, missing, text, id))
            elif id not in masks:
                text = (
                    f"{masks_folder}: no mask for {id}; copy it there, or move the image to an "
                    "unlabel_* folder"
                )
                findings.append(Finding(Kind.MASK_MISSING, "refused", text, id))
            else:
                text = f"{folder}: {id} is not in dataset.json; add it to 'training' or 'test'"
                findings.append(Finding(Kind.LIST_NONE, "refused", text, id))
        return cases, findings


def scans(folder: Path, read_too: tuple[str, ...] = ()) -> dict[str, Path]:
    """NIfTI files of a folder by base name, with or without a suffix; sorted.

    Raises:
        Refusal: If one cannot be used, such as two files of one base name, or a volume in another
            format, but for endings that the caller can `read_too`.
    """
    paths, findings = find(folder, read_too)
    for finding in findings:
        if finding.done == "refused":
            raise Refusal(finding.kind, finding.text)
    return paths


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    patterns = ("label_*", "*_label", "label_*/label_*")  # the last: unpacked into its own name
    bases = [root, *(base for pattern in patterns for base in sorted(root.glob(pattern)))]
    return next((base / n for base in bases for n in names if (base / n).is_dir()), None)


def _lists(root: Path, images: Path) -> Path:
    places = [folder / "dataset.json" for folder in (root, images.parent)]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{places[0]}: not there; it holds the official training and test lists: copy it from "
            "the data set's page, or write {'training': [file names], 'test': [file names]}"
        )
    return path


def _pools(root: Path) -> list[Path]:
    """Folders of `anybleed` and `nobleed`, whatever they are called, and `unlabel_*` without them.

    An archive that was unpacked into a folder of its own name lies one folder deeper.
    """
    named = sorted(path for path in root.iterdir() if path.name.casefold().startswith("unlabel"))
    places = [root, *named, *root.glob("*/"), *(deep for path in named for deep in path.glob("*/"))]
    found = {base for base in places if any((base / name).is_dir() for name in _BLEEDING)}
    empty = (base for base in root.glob("unlabel_*") if not any(base in f.parents for f in found))
    return sorted(found.union(empty))


def _unlabeled(root: Path, labeled: set[str]) -> tuple[list[Case], list[Finding]]:
    """Scans known only to bleed or not; a copy of a labeled one, or of another, is no further."""
    cases: dict[str, Case] = {}
    findings, torn = [], set()
    for base in _pools(root):
        count = 0
        for name, bleeding in _BLEEDING.items():
            if not (base / name).is_dir():
                continue
            images, more = find(base / name)
            findings += more
            count += len(images)
            for id, image in images.items():
                case = Case(id, patient(id), image, None, "unlabeled", bleeding, table_feed=True)
                if id in labeled:
                    text = f"{image}: has a mask elsewhere; this copy is left out"
                    findings.append(Finding(Kind.COPY_LABELED, "repaired", text, id))
                elif cases.setdefault(id, case).bleeding is not bleeding:
                    text = f"{image}: lies in anybleed and in nobleed; delete the wrong one"
                    findings.append(Finding(Kind.BLEEDS_AND_NOT, "refused", text, id))
                    torn.add(id)
                elif cases[id] is not case:
                    taken = Path(str(cases[id].image)).parent
                    text = f"{image}: lies in two folders, {taken} is taken"
                    findings.append(Finding(Kind.COPY_IN_FOLDERS, "repaired", text, id))
        findings += [] if base == root else _folder_name(base, count)
    return [case for id, case in cases.items() if id not in torn], findings


def _unused(root: Path, cases: list[Case]) -> list[Finding]:
    """Folders of scans that belong to nothing, such as a later challenge's test scans."""
    used = {
        path.parent for case in cases for path in (case.image, case.label) if isinstance(path, Path)
    }
    findings = []
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder not in used and (count := len(list(folder.glob("*.nii*")))):
            text = f"{folder}: {count} scans without masks or a place in the lists; not used"
            findings.append(Finding(Kind.FOLDER_UNUSED, "kept", text))
    return findings


def _folder_name(folder: Path, count: int) -> list[Finding]:
    """`label_192` with 191 scans; `unlabel_2000`, which has always held 1980."""
    said = _COUNT.search(folder.name)
    if not said or int(said.group(1)) == count:
        return []
    text = f"{folder}: holds {count} scans; what is there counts"
    return [Finding(Kind.FOLDER_COUNT, "kept", text)]


def _patients(cases: list[Case]) -> tuple[list[Case], list[Finding]]:
    """Takes from training what shows a patient of the test set, and names patients seen twice."""
    tested = {case.patient for case in cases if case.split == "test"}
    kept, findings = [], []
    first: dict[str, str] = {}
    for case in sorted(cases, key=lambda case: case.id):
        if case.split != "test" and case.patient in tested:
            text = f"{case.image}: its patient, {case.patient}, is tested on; left out"
            if case.split == "unlabeled":
                text += " of the pool"
                findings.append(Finding(Kind.PATIENT_TESTED_POOL, "repaired", text, case.id))
            else:
                text += ": take it off one of the lists"
                findings.append(Finding(Kind.PATIENT_TESTED, "refused", text, case.id))
            continue
        kept.append(case)
        if case.label is not None and first.setdefault(case.patient, case.id) != case.id:
            text = f"second scan of {case.patient}, after {first[case.patient]}; in the same fold"
            findings.append(Finding(Kind.PATIENT_TWICE, "repaired", text, case.id))
    return kept, findings

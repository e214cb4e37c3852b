"""DICOM folders: every CT series below one, with masks in NIfTI or DICOM SEG if there are any."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bhsd_jax.ct.dicom import seg_mask, segmentation
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.ct.dicom.grouping import Group
from bhsd_jax.ct.dicom.slice_file import Slice
from bhsd_jax.datasets import archives, label_tables, rsna, series_masks
from bhsd_jax.datasets.label_maps import own_names
from bhsd_jax.defects import Finding, Kind, Refusal, refused
from bhsd_jax.platform.csv_files import write_records
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE, Case, Series, Survey

logger = logging.getLogger(__name__)

_MASKS = "masks"
_NOBODY = re.compile(  # what tools and people write over PatientID; letters and digits alone
    r"(anon(ym\w*)?|de?identified|removed|redacted|hidden|unknown|none|null|na|noid|"
    r"(no)?patient(id)?|test|0*|x*)",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True)
class DICOM:
    """Studies and series in folders of any shape and with any names.

    A mask belongs to the series whose SeriesInstanceUID it is named for, or whose folder (its path
    below the root joined by _, or its name if no other has it), or to the only series in the
    folder it lies in, or below that. A DICOM SEG, wherever it lies, is that of the series it refers
    to; its segments are labeled with names of `classes`. Series with a mask train (a fold of them
    validates), others are unlabeled. Patients are told apart by PatientID, else by study, as where
    it is a word such as ANONYMOUS. Unless `show_ids`, cases and patients are called by salted
    hashes.

    In `root`, `scan_labels.csv` may say what scans show, each called as its mask may be, and
    `slice_labels.csv` what slices show, each called by its SOPInstanceUID (`label_tables`).
    """

    root: str | Path
    masks: str | Path | None = None  # their folder; None or "": `root`/masks if there is one
    classes: tuple[str, ...] = HEMORRHAGE
    uneven: str = "refuse"  # slices at uneven steps; or "resample"
    unshear: bool = False
    show_ids: bool = False
    salt: str = ""  # of the hashes; the same for all verbs of a run
    name: str = field(default="DICOM", init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="", init=False)

    def __post_init__(self):
        # `--data.classes=a,b` arrives as one text in a tuple.
        object.__setattr__(self, "classes", own_names(",".join(self.classes)))

    @property
    def binary_flag(self) -> str:
        """What to set if 1 means any bleeding; "" where a user has said what it means."""
        return "--data.classes=any" if self.classes == HEMORRHAGE else ""

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: As by `survey`.
            ValueError: Likewise.
        """
        yield from self.survey().cases

    def survey(self) -> Survey:
        """All cases, and what was left out of studies that have none.

        Raises:
            FileNotFoundError: If there is no folder, or no CT series in it.
            ValueError: If a mask belongs to no series, or a series has two, or one is in another
                format than NIfTI and DICOM SEG; or no series can be used.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; set data.root to the DICOM folder")
        nifti: list[Path] = []
        there = dicom_series.survey(
            root, wanted=lambda path: not _put_aside(path, nifti), segs=True
        )
        groups = there.groups
        if not groups:
            raise FileNotFoundError(
                f"{root}: no DICOM CT series in it or below; look at data.root"
                f"{archives.about(root)}"
            )
        names = _names(root, groups)
        folder = Path(self.masks) if self.masks else root / _MASKS
        if self.masks and not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; look at data.masks")
        masks, findings = series_masks.match(root, folder, groups, names, nifti)
        segs = [*there.segs, *_segs_apart(folder, root)]
        if self.masks and not _has_masks(folder, segs):
            raise FileNotFoundError(
                f"{folder}: no NIfTI file and no DICOM SEG in it, and folders in it are not looked "
                "into; look at data.masks"
            )
        drawn, more = series_masks.match_segs(segs, groups, masks, self.classes)
        findings += more
        tables = _Tables.of(root, self.classes[1:])
        cases = []
        called = series_masks.called(groups, names)
        for group, name, own, mask in zip(groups, names, called, drawn, strict=True):
            id = name if self.show_ids else self._hashed(group.first.series + name)
            if isinstance(mask, Refusal):
                findings.append(refused(mask, id))
                continue
            who = _who(group.first) or name
            image = group.as_series(id, uneven=self.uneven, unshear=self.unshear)
            split = "unlabeled" if mask is None else "train"
            place = _digest(group.first.series + name)
            case = Case(id, self._hashed(who), image, mask, split, sorted_by=place)
            cases.append(tables.known(case, group, own))
        if why := [one.text for one in findings if one.done == "refused" and not cases]:
            raise UserError(f"{root}: no series can be used, {len(why)} refused: {why[0]}")
        cases.sort(key=lambda case: case.id)
        findings += [*_about_patients(groups), *tables.alone(groups, called)]
        return Survey(tuple(cases), (*there.findings, *findings))

    def _hashed(self, text: str) -> str:
        return _digest(self.salt + text)


@dataclass(frozen=True)
class _Tables:
    """What `scan_labels.csv` and `slice_labels.csv` say of series and slices; nothing if not there.

    In the first a series is called as its mask may be, in the second a slice by SOPInstanceUID: in
    which order viewers number slices is not known. Messages name nobody.
    """

    root: Path
    scans: Mapping[str, label_tables.Row]
    slices: Mapping[str, label_tables.Row]

    @classmethod
    def of(cls, root: Path, classes: Sequence[str]) -> "_Tables":
        scans = label_tables.read_scans(root / label_tables.SCANS, classes, _folder_name)
        slices = label_tables.read_instances(root / label_tables.SLICES, classes)
        return cls(root, scans, slices)

    def known(self, case: Case, group: Group, names: set[str]) -> Case:
        """The case with what is known of it."""
        rows = {self.scans[name] for name in names & self.scans.keys()}
        if len(rows) > 1:
            raise UserError(
                f"{self.root / label_tables.SCANS}: two lines, one by folder and one by UID, say "
                "different things of one series; keep one"
            )
        if self.slices and any(rsna.instance(item) in self.slices for item in group.slices):
            assert isinstance(case.image, Series)  # of DICOM
            unknown = (-1,) * len(next(iter(self.slices.values())))
            of_slices = rsna.slice_rows(group, case.image, self.slices, unknown)
            case = replace(case, slice_labels=of_slices)
        return label_tables.labeled(case, next(iter(rows), None))

    def alone(self, groups: Sequence[Group], called: Sequence[set[str]]) -> list[Finding]:
        """Says of how many lines there is no series, or no slice."""
        every = (item for group in groups for item in group.slices)
        slices = set(map(rsna.instance, every)) if self.slices else set[str]()
        findings = []
        for name, rows, there, what in (
            (label_tables.SCANS, self.scans, set[str]().union(*called), "scans"),
            (label_tables.SLICES, self.slices, slices, "slices"),
        ):
            if lonely := len(rows.keys() - there):
                text = (
                    f"{self.root / name}: {lonely} of {len(rows)} lines are of {what} that are not "
                    "used: a scan is called by SeriesInstanceUID or the folder of its series, a "
                    "slice by SOPInstanceUID"
                )
                findings.append(Finding(Kind.SLICE_LABELS_ALONE, "kept", text))
        return findings


def _folder_name(name: str) -> str:
    """A folder below the root as series are called; or what else is given, as it is."""
    return "_".join(Path(name).parts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _segs_apart(folder: Path, root: Path) -> list[Path]:
    """DICOM SEG in a folder of masks that does not lie below the root."""
    if not folder.is_dir() or folder.resolve().is_relative_to(root.resolve()):
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_file() and seg_mask.is_seg(path)]


def _has_masks(folder: Path, segs: Sequence[Path]) -> bool:
    """Whether NIfTI files, or some of these SEG, lie in a folder."""
    nifti = any(map(series_masks.is_nifti, folder.iterdir()))
    return nifti or any(path.parent.resolve() == folder.resolve() for path in segs)


def _is_nobody(patient: str) -> bool:
    """Whether a PatientID was written over by a word that all have."""
    return bool(_NOBODY.fullmatch(re.sub(r"[\W_]", "", patient)))


def _who(item: Slice) -> str:
    """What tells patients apart; "" if nothing does."""
    return item.study if _is_nobody(item.patient) else item.patient


def _about_patients(groups: Sequence[Group]) -> list[Finding]:
    """Says that studies count as patients, where PatientID is there and of nobody."""
    nobody = [g.first for g in groups if g.first.patient and _is_nobody(g.first.patient)]
    if not nobody:
        return []
    text = (
        f"{len(nobody)} series have a PatientID that many may have, such as ANONYMOUS: each study "
        "counts as a patient, and two of one may be on both sides of a split"
    )
    return [Finding(Kind.PATIENT_NOBODY, "kept", text)]


def _put_aside(path: Path, nifti: list[Path]) -> bool:
    """Whether a file is NIfTI, which is then added to those."""
    if is_nifti := series_masks.is_nifti(path):
        nifti.append(path)
    return is_nifti


def scans(root: Path, *, uneven: str, unshear: bool, only: Path | None = None) -> list[Case]:
    """Series to predict, in the order of their paths; called by their folders, which may be names.

    The series itself is called by its number, since its errors are logged. `only` is the one file
    below `root` that counts.
    """
    there = dicom_series.survey(root, wanted=lambda path: only in (None, path))
    for finding in there.findings:
        logger.warning("%s", finding)
    groups = there.groups
    cases = []
    for index, (group, id) in enumerate(zip(groups, _names(root, groups), strict=True), start=1):
        series = group.as_series(
            f"series {index}",
            uneven=uneven,
            unshear=unshear,
            settings="config.predict.dicom",
            own_slices=True,
        )
        cases.append(Case(id, group.first.patient or id, series, None, "test"))
    return cases


def write_series(folder: Path, cases: Sequence[Case], names: Mapping[str, str]) -> None:
    """Writes `series.csv`, which leads from the names of outputs to the series in the archive.

    It is the only table with identifiers, for the eyes of its owner: others may not read the file.
    Without a series there is none. `names` are those of outputs by case.

    Raises:
        faults.WriteError: If the system says no.
    """
    rows = []
    for case in cases:
        if isinstance(case.image, Series):
            rows.append({"case": names[case.id], **segmentation.leads(case.image)})
    before = os.umask(0o077)  # not afterwards: others could read the file until then
    try:
        write_records(folder / "series.csv", rows, line_end="\n", harmless=True)
    finally:
        os.umask(before)


def _names(root: Path, groups: Sequence[Group]) -> list[str]:
    """Folders below the root, with a number where one holds several series; no name twice."""
    folders = [
        "_".join(group.folder.relative_to(root).parts) or root.resolve().name for group in groups
    ]
    taken, last = set(folders), dict.fromkeys(folders, 0)
    names = []
    for name in folders:
        last[name] += 1
        unique = name
        while last[name] > 1 and (unique := f"{name}_{last[name]}") in taken:
            last[name] += 1
        taken.add(unique)
        names.append(unique)
    return names

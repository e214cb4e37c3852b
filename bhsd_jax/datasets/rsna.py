"""The RSNA 2019 challenge: head CTs as loose DICOM slices, labeled slice by slice."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.ct.dicom.grouping import Group
from bhsd_jax.ct.dicom.slice_file import Slice
from bhsd_jax.datasets import bhsd_files
from bhsd_jax.datasets.bhsd import BHSD
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.platform import csv_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE, SOME, Case, Series, Survey

TYPES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
SliceRow = tuple[int, ...]  # per type, as `Case.slice_labels`
UNKNOWN: SliceRow = (-1,) * len(TYPES)
_LABELS = {"0": 0, "1": 1}  # as the challenge writes them, millions of times
_FILE = re.compile(r"\.(dcm|dicom|png|jpg)$", re.IGNORECASE)  # tables of slices name files, too
_CLOSE = 0.25  # of the way to the next slice: as far as an interpolated one is taken for the first


@dataclass(frozen=True)
class RSNA:
    """Slices anywhere below the root, and `stage_2_train.csv`.

    A case is a series, called `<PatientID>_<StudyInstanceUID>` as BHSD's files are; its slice
    labels follow the slices' positions. All are unlabeled, so that a plan needs masks from
    elsewhere: with `bhsd`, the scans outlined there come first, and their patients' are left out,
    those of the scans refused there too.

    Source: Flanders et al. 2020, doi:10.1148/ryai.2020190211.
    """

    root: str | Path
    csv: str = "stage_2_train.csv"  # in `root`
    uneven: str = "resample"  # slices at uneven steps, of which there are many; or "refuse"
    unshear: bool = False
    bhsd: str | Path = ""
    allow_missing: bool = False  # accept copies of BHSD that lack some of the outlined scans
    name: str = field(default="RSNA2019", init=False)
    classes: tuple[str, ...] = field(default=HEMORRHAGE, init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="RSNA 2019 terms (non-commercial research, education)", init=False)

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: As by `survey`.
            ValueError: Likewise.
        """
        yield from self.survey().cases

    def outlined(self) -> Iterator[Case]:
        """The cases with masks, sorted by id: those of `bhsd`; no slice is looked at.

        Raises:
            FileNotFoundError: If there are no scans in BHSD.
            ValueError: If none of them can be used.
        """
        yield from self._outlined()[0]

    def survey(self) -> Survey:
        """All cases, what was left out of studies that have none, and what is wrong in BHSD.

        Raises:
            FileNotFoundError: If there are no slices, no table, or no scans in BHSD.
            ValueError: If the table makes no sense, or no scan of BHSD can be used.
        """
        root = Path(self.root)
        labels = read_table(root / self.csv)
        there = dicom_series.survey(root)
        groups = there.groups
        if not groups:
            raise FileNotFoundError(f"{root}: no DICOM slices in it or below; look at data.root")
        outlined, findings = self._outlined()
        # Those of refused scans as well: once mended, they may be scans to test.
        taken = {case.patient for case in outlined}
        taken |= {bhsd_files.patient(finding.case) for finding in findings if finding.case}
        kept = [group for group in groups if group.first.patient not in taken]
        found = [self._case(id, group, labels) for id, group in named(kept)]
        cases = sorted([*outlined, *found], key=lambda case: case.id)
        lacking = _lacking(root / self.csv, groups, labels)
        return Survey(tuple(cases), (*findings, *there.findings, *lacking))

    def _outlined(self) -> tuple[tuple[Case, ...], tuple[Finding, ...]]:
        """BHSD's scans with masks, and what is wrong with them."""
        if not self.bhsd:
            return (), ()
        found = BHSD(self.bhsd, allow_missing=self.allow_missing).survey(pool=False)
        return found.cases, found.findings

    def _case(self, id: str, group: Group, labels: Mapping[str, SliceRow]) -> Case:
        series = group.as_series(id, uneven=self.uneven, unshear=self.unshear)
        by_slice = [labels.get(instance(item)) for item in group.slices]
        bleeding = any_bleeding(by_slice)
        patient = group.first.patient or group.first.study
        rows = slice_rows(group, series, labels) if any(by_slice) else None
        return Case(id, patient, series, None, "unlabeled", bleeding, rows)


def _lacking(
    path: Path, groups: Sequence[Group], labels: Mapping[str, SliceRow]
) -> tuple[Finding, ...]:
    """Says of how many slices a table has nothing: of all, where its ids are those of scans."""
    slices = [instance(item) for group in groups for item in group.slices]
    lacking = [name for name in slices if name not in labels]
    if not lacking:
        return ()
    text = (
        f"{path}: says nothing of {len(lacking)} of {len(slices)} slices, such as {lacking[0]}, so "
        "that it is not known what they show"
    )
    if len(lacking) == len(slices):
        other = f", such as {next(iter(labels))}," if labels else ""
        text += f"; its ids{other} are of no slice here: give those of slices, SOPInstanceUIDs"
    return (Finding(Kind.SLICES_UNTOLD, "kept", text),)


def read_table(path: Path) -> dict[str, SliceRow]:
    """Rows by slice from the challenge's table of `ID_<slice>_<type>,Label`, or one made of it.

    Such a table has a line per slice and a column per type; columns may be in any order. Lines that
    repeat one are dropped. `any` 0 says 0 of all types; 1 says that one shows of those that are not
    listed, unless a listed one does.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If a line is odd, contradicts one before, or `any` is not the union of types.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; it is the challenge's table of slice labels")
    codes: dict[str, int] = {}  # two bits per type, for the table has millions of lines
    for number, name, kind, label in _cells(path):
        shift, value = 2 * kind, 2 + label
        before = codes.get(name, 0) >> shift & 3
        if before not in (0, value):
            raise UserError(f"{path}, line {number}: contradicts an earlier line")
        codes[name] = codes.get(name, 0) | value << shift
    rows = {code: _row(code) for code in set(codes.values())}
    odd = next((name for name, code in codes.items() if rows[code] is None), None)
    if odd is not None:
        raise UserError(f"{path}: {odd}: 'any' is not the union of the types")
    return {name: row for name, code in codes.items() if (row := rows[code]) is not None}


def _cells(path: Path) -> Iterator[tuple[int, str, int, int]]:
    """Line, slice, number of the type (the last is `any`) and label of all that a table says."""
    lines = csv_files.read_rows(path)
    names = [name.strip().casefold() for name in next(lines, (0, []))[1]]
    kinds = {name: kind for kind, name in enumerate((*TYPES, "any"))}
    columns = [(names.index(name), kind) for name, kind in kinds.items() if name in names]
    if "id" not in names or not ("label" in names or columns):
        raise UserError(
            f"{path}: the first line must be ID,Label, or ID and the names of types, such as "
            f"{', '.join(TYPES)}; got {', '.join(names)}"
        )
    id, wide = names.index("id"), "label" not in names
    at = -1 if wide else names.index("label")
    for number, line in lines:
        try:
            if wide:
                name = _FILE.sub("", line[id].strip())
                said = [(kind, _label(line[column].strip())) for column, kind in columns]
            else:
                name, _, word = line[id].strip().rpartition("_")
                said = [(kinds[word], _label(line[at].strip()))]
        except (LookupError, ValueError):
            name, said = "", []
        if not name:
            what = "a slice and 0|1 of every type" if wide else "ID_<slice>_<type>,0|1"
            raise UserError(f"{path}, line {number}: expected {what}; got {line}")
        for kind, label in said:
            if label is not None:
                yield number, name, kind, label


def _label(cell: str) -> int | None:
    """0 or 1, or None where a cell says nothing.

    Raises:
        ValueError: If it says something else.
    """
    if cell in _LABELS:
        return _LABELS[cell]
    label = csv_files.known(cell, -1)
    if label not in (-1, 0, 1):
        raise ValueError(cell)
    return None if label < 0 else label


def _row(code: int) -> SliceRow | None:
    *types, union = ((code >> 2 * place & 3) - 2 for place in range(len(TYPES) + 1))
    row = tuple(max(value, -1) for value in types)
    if union == 0:
        return None if 1 in row else (0,) * len(TYPES)
    if union == 1 and 1 not in row:
        return tuple(SOME if value == -1 else value for value in row) if -1 in row else None
    return row


def named(groups: Sequence[Group]) -> list[tuple[str, Group]]:
    """Groups under the names BHSD gives its files; numbered where a study has several series."""
    seen: Counter[str] = Counter()
    with_names = []
    for group in groups:
        name = f"{group.first.patient}_{group.first.study}"
        seen[name] += 1
        with_names.append((name if seen[name] == 1 else f"{name}_{seen[name]}", group))
    return with_names


def instance(item: Slice) -> str:
    """What the table calls a slice: its SOPInstanceUID, which files are named for as well."""
    return item.instance or item.file.stem


def slice_rows(
    group: Group,
    series: Series,
    labels: Mapping[str, SliceRow],
    unknown: SliceRow = UNKNOWN,
) -> tuple[SliceRow, ...] | None:
    """A row per slice of the volume that the series becomes; None if it becomes none.

    Where slices are interpolated to even steps, each has the row of the one nearest to it; near
    the middle between two, only what both agree on.
    """
    try:
        stack = dicom_series.order(group.slices, series)
    except ValueError:
        return None  # reading the case will say why
    rows = [labels.get(instance(item), unknown) for item in stack.slices]
    return tuple(_row_at(float(place), rows) for place in stack.source)


def _row_at(place: float, rows: Sequence[SliceRow]) -> SliceRow:
    nearest = rows[round(place)]
    if abs(place - round(place)) <= _CLOSE:
        return nearest
    pair = zip(rows[int(place)], rows[int(place) + 1], strict=True)
    return tuple(one if one == other else -1 for one, other in pair)


def any_bleeding(rows: Sequence[SliceRow | None]) -> bool | None:
    """Of a volume: True if a slice bleeds, False if all are known not to, else None."""
    if any(row is not None and max(row) > 0 for row in rows):
        return True
    clean = all(row is not None and set(row) == {0} for row in rows)
    return False if clean and rows else None

"""Predicting scans one after the other, and the tables that grow with each of them.

While a scan is in the networks the next one is read and prepared, and the label map of the one
before it is brought back to that scan's voxels, measured and written.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.assemble.origins import Origins
from bhsd_jax.assemble.predictor import Predictor, said_of
from bhsd_jax.assemble.underway import Answer, Ready
from bhsd_jax.ct import scan
from bhsd_jax.platform import faults, files, machine, overlap
from bhsd_jax.platform.csv_files import write_records
from bhsd_jax.platform.errors import BROKEN
from bhsd_jax.report.page import notice
from bhsd_jax.train import barrier
from bhsd_jax.train.log import heartbeat
from bhsd_jax.verbs import review
from bhsd_jax.volume import Case

logger = logging.getLogger(__name__)

_PAUSE = 20  # times as long as writing the tables took: until they are written again


@dataclass
class Found:
    """Which scans were predicted and which were not, by their names in the outputs."""

    rows: list[ScanVolumes] = field(default_factory=list)  # of those predicted
    skipped: dict[str, str] = field(default_factory=dict)  # why others were not
    fault: str = ""  # why none was predicted after some scan: the machine said no


@dataclass
class Scans:
    """Scans to predict, and where to."""

    predict: Predictor
    cases: Sequence[Case]
    names: Mapping[str, str]  # of the scans in the outputs, by their ids
    out: Path  # of label maps
    tables: Path
    overwrite: bool  # False: label maps that are there stay
    record: Origins  # of what made them

    def target(self, case: Case) -> Path:
        """The label map's file."""
        return self.out / f"{self.names[case.id]}{scan.ending(case.image)}"

    @property
    def there(self) -> list[str]:
        """Names of the scans that have a label map already."""
        return [self.names[case.id] for case in self.cases if self.target(case).is_file()]


@dataclass
class _Job:
    """A scan and what is known of it after each step."""

    number: int
    case: Case
    ready: Ready | None = None
    answer: Answer | None = None
    row: ScanVolumes | None = None
    error: Exception | None = None


def predict_all(scans: Scans) -> Found:
    """Predicts them in their order; where there is one process, tables grow as it goes.

    With thousands of scans they take seconds to write: then not after every scan, but at the end,
    whatever ends it.
    """
    each = _Steps(scans, Found(), time.monotonic())
    jobs = (_Job(number, case) for number, case in enumerate(scans.cases, start=1))
    memory = machine.memory() // 2  # the other half is the networks'
    steps = (each.prepare, each.infer, each.write)
    with each.signs, suppress(faults.WriteError):  # `write` has said it
        try:
            overlap.run(jobs, *steps, memory=memory, meanwhile=each.compile)
        finally:
            each.catch_up()
    found, names = each.found, [scans.names[case.id] for case in scans.cases]
    told = {row.case for row in found.rows} | found.skipped.keys()
    missed = [name for name in names if name not in told]
    found.skipped |= dict.fromkeys(missed, f"not predicted: {found.fault}")
    return found


@dataclass
class _Steps:
    """The three steps of every scan; an error of one scan goes with it to the last step."""

    scans: Scans
    found: Found
    begun: float  # monotonic seconds
    waited: bool = False  # for memory, at least once
    listed: int = 0  # rows in the tables
    due: float = -math.inf  # when the tables may be written again, monotonic seconds
    signs: ExitStack = field(default_factory=ExitStack)  # of life, while the networks have no scan

    def compile(self) -> None:
        """Compiles the networks if some scan has no label map yet."""
        scans = self.scans
        self._live_on("the first scan is read")
        if sum(map(self._stays, scans.there)) < len(scans.cases):
            scans.predict.compile()

    def prepare(self, job: _Job, claim: overlap.Claim) -> _Job:
        """Reads the scan, or finds that it was predicted before."""
        scans, name = self.scans, self._name(job)
        with _kept(job):
            if self._stays(name):
                job.row = scans.predict.finished(job.case, scans.target(job.case), name)
            if job.row is not None:
                job.row = review.recall(job.row, self._measured(name))
            else:
                job.ready = scans.predict.prepare(job.case, name, partial(self._claim, claim))
        return job

    def infer(self, job: _Job, check: overlap.Check) -> _Job:
        """The networks' answer."""
        self.signs.close()
        if job.row is None:
            with _kept(job), heartbeat(self._place(job)):
                if job.ready is not None:
                    job.answer = self.scans.predict.infer(job.ready, check)
                    job.ready = None
        self._live_on(f"{self._place(job)}: scans are read and written")
        return job

    def write(self, job: _Job) -> None:
        """Writes the label map and the tables, and says how it went.

        Raises:
            faults.WriteError: If the system says no: nothing is predicted after that.
        """
        place, found = self._place(job), self.found
        try:
            row = self._row(job)
            found.rows.append(row)
            if time.monotonic() >= self.due:
                self._write_tables()
        except faults.WriteError as error:
            found.fault = faults.explain(error) or str(error)
            logger.error("%s: %s", place, found.fault)
            raise
        except BROKEN as error:
            name = self._name(job)
            reason = said_of(error, job.case, name)
            found.skipped[name] = reason
            with suppress(OSError):
                self._clear(job, also=(self.scans.target(job.case),))
            logger.error("%s: skipped: %s", place, reason)
            return
        count = len(self.scans.cases)
        left = (time.monotonic() - self.begun) / job.number * (count - job.number)
        took = "there already" if row.seconds is None else f"{row.seconds:.1f} s"
        logger.info("%s: %.1f mL, %s, %.0f s left", place, row.total_ml, took, left)

    def catch_up(self) -> None:
        """Puts into the tables what is not in them; where that fails, those before it stay."""
        if self.listed < len(self.found.rows):
            with suppress(faults.WriteError):  # who concludes tries again, and says it
                self._write_tables()

    def _write_tables(self) -> None:
        if barrier.place() != (0, 1):
            return
        begun = time.monotonic()
        write_tables(self.scans.tables, self.found.rows)
        self.listed, now = len(self.found.rows), time.monotonic()
        self.due = now + _PAUSE * (now - begun)

    def _row(self, job: _Job) -> ScanVolumes:
        if job.error is not None:
            raise job.error
        if job.row is not None:
            return job.row
        assert job.answer is not None  # else there would be an error
        self._clear(job)
        row = self.scans.predict.write(job.answer, self.scans.target(job.case))
        self.scans.record.note(self._name(job), review.measured(row))
        return row

    def _clear(self, job: _Job, also: Sequence[Path] = ()) -> None:
        """Removes what a call before has left under this name, unless that is to stay."""
        scans, name = self.scans, self._name(job)
        if scans.overwrite or not scans.record.keeps(name):
            scans.record.clear(name, scans.target(job.case))
            for path in also:
                files.unlink(path)

    def _live_on(self, what: str) -> None:
        self.signs.enter_context(heartbeat(what, begins=False))

    def _claim(self, claim: overlap.Claim, needed: int) -> None:
        """Says once if memory is too short for scans side by side."""
        if claim(needed) and not self.waited:
            self.waited = True
            logger.warning(
                "there is not enough memory for several scans at a time: the next one is prepared "
                "when the one before it is done with"
            )

    def _stays(self, name: str) -> bool:
        """Whether a label map of that name, if it is there and whole, is not to be made again."""
        if self.scans.overwrite or not self.scans.record.keeps(name):
            return False
        trust = self.scans.predict.trust
        measured = self._measured(name).get("disagreement") is not None
        return measured or trust is None or not trust.views

    def _measured(self, name: str) -> Mapping[str, Any]:
        """What was measured of a label map that is there; older records leave it to the tables."""
        return self.scans.record.measured(name) or self._earlier.get(name, {})

    @cached_property
    def _earlier(self) -> dict[str, Mapping[str, Any]]:
        return review.earlier(self.scans.tables)

    def _name(self, job: _Job) -> str:
        return self.scans.names[job.case.id]

    def _place(self, job: _Job) -> str:
        return f"scan {job.number} of {len(self.scans.cases)}, {self._name(job)}"


@contextmanager
def _kept(job: _Job) -> Iterator[None]:
    """What befalls this scan alone is told when its turn comes, and those before it are written."""
    try:
        yield
    except BROKEN as error:
        job.error = error


def write_tables(out: Path, rows: Sequence[ScanVolumes]) -> None:
    """Writes `volumes.csv`, `lesions.csv` and `volumes.json`.

    Raises:
        faults.WriteError: If the system says no.
    """
    lesions = [lesion for row in rows for lesion in row.lesion_rows()]
    for name, records in (("volumes", [row.flat() for row in rows]), ("lesions", lesions)):
        write_records(out / f"{name}.csv", records, line_end="\n", harmless=True)
    head: dict[str, Any] = {"notice": notice(rows[0].ml if rows else ()), "unit": "mL"}
    if rows:
        head["present_from_ml"] = rows[0].present_ml
    files.write_json(out / "volumes.json", head | {"scans": [row.listed() for row in rows]})

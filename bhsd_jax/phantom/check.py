"""Are the phantoms like real scans? The figures of both side by side.

Source: 36 slices of 25 volumes of BHSD, windowed to HU 0..255. Those slices show far more blood
than BHSD's do on average (a median of 15 mL on 12 slices of 5 mm is 2.5 cm2), so the phantoms are
looked at where each class bleeds most.
"""

from collections.abc import Sequence
from typing import NamedTuple

from bhsd_jax.phantom.bleeds import EDH, IPH, IVH, SAH, SDH
from bhsd_jax.phantom.case import Options, make_case
from bhsd_jax.phantom.figures import Figures
from bhsd_jax.platform import machine
from bhsd_jax.platform.errors import UserError
from bhsd_jax.platform.workers import Workers
from bhsd_jax.volume import HEMORRHAGE

# Taken in turn, so that every class is seen often enough.
_CLASSES = ((EDH,), (SAH, SDH), (IPH, IVH), (SDH,), (IPH, IVH, SAH))
_RATIO = (0.75, 1.25)  # allowed of ours to the real figure
_FEW = 0.01  # allowed of a share that is next to nothing in real scans
SCANS, SIZE, SLICES = 40, 512, 32  # BHSD's size; noise and bone look different in coarse pixels

# By name and class; 0: of no class.
REAL: dict[tuple[str, int], float] = {
    ("share above 100 HU", EDH): 0.002,
    ("share above 100 HU", IPH): 0.0,
    ("share above 100 HU", IVH): 0.002,
    ("share above 100 HU", SAH): 0.0,
    ("share above 100 HU", SDH): 0.008,
    ("share below 20 HU", SDH): 0.39,
    ("pieces per slice", EDH): 1.0,
    ("pieces per slice", IPH): 1.0,
    ("pieces per slice", IVH): 1.0,
    ("pieces per slice", SAH): 2.5,
    ("pieces per slice", SDH): 2.0,
    ("share of pieces of one voxel", IPH): 0.0,
    ("share of pieces of one voxel", IVH): 0.03,
    ("share of pieces of one voxel", SAH): 0.0,
    ("share of pieces of one voxel", SDH): 0.0,
    ("HU", EDH): 66.0,
    ("HU", IPH): 53.0,
    ("HU", IVH): 48.0,
    ("HU", SAH): 46.0,
    ("HU", SDH): 59.0,
    ("HU above its surroundings", EDH): 34.0,
    ("HU above its surroundings", IPH): 24.0,
    ("HU above its surroundings", IVH): 23.0,
    ("HU above its surroundings", SAH): 11.0,
    ("HU above its surroundings", SDH): 18.0,
    ("cm2 per slice", EDH): 1.5,
    ("cm2 per slice", IPH): 7.3,
    ("cm2 per slice", IVH): 3.1,
    ("cm2 per slice", SAH): 1.9,
    ("cm2 per slice", SDH): 8.3,
    ("Dice of the best threshold", 0): 0.281,
    ("noise, HU", 0): 4.6,
    ("noise, correlation at 1 px", 0): 0.69,
    ("noise, correlation at 2 px", 0): 0.30,
    ("noise, correlation at 3 px", 0): 0.08,
    ("brain, HU, 5 %", 0): 16.0,
    ("brain, HU, 25 %", 0): 27.0,
    ("brain, HU, 50 %", 0): 30.0,
    ("brain, HU, 75 %", 0): 34.0,
    ("brain, HU, 95 %", 0): 41.0,
    ("skull, mm, 10 %", 0): 6.1,
    ("skull, mm, 50 %", 0): 7.4,
    ("skull, mm, 90 %", 0): 11.5,
}


class Row(NamedTuple):
    """One figure of the phantoms beside that of real scans."""

    statistic: str
    of: str  # class; empty: of none
    real: float
    ours: float

    @property
    def ratio(self) -> float:
        """Our figure over the real one."""
        return self.ours / self.real if self.real else float("nan")

    @property
    def ok(self) -> bool:
        """Within a quarter of the real figure; a share that is next to nothing stays so."""
        if self.statistic.startswith("share") and self.real < 0.1:
            return self.ours <= max(_FEW, self.real)
        return _RATIO[0] <= self.ratio <= _RATIO[1]


def compare(figures: Figures) -> list[Row]:
    """The figures that both have, in the order of `REAL`."""
    found = figures.table()
    return [
        Row(name, HEMORRHAGE[index] if index else "", real, found[name, index])
        for (name, index), real in REAL.items()
        if (name, index) in found
    ]


def measure(
    scans: int = SCANS,
    size: int = SIZE,
    slices: int = SLICES,
    difficulty: str = "default",
    processes: int = 0,
) -> Figures:
    """Makes phantoms and takes their figures; always the same ones.

    Args:
        scans: How many; half a dozen tell little.
        size: Rows and columns.
        slices: Over 160 mm.
        difficulty: A name in `LEVELS`.
        processes: That work at once; 0: one per core.

    Raises:
        ValueError: If there are no scans.
    """
    if scans < 1:
        raise UserError(f"check: {scans} scans; give at least 1")
    jobs = [(seed, size, slices, difficulty) for seed in range(scans)]
    with Workers(min(processes or machine.cores(), scans)) as workers:
        figures = dict(workers.each(_figures, jobs))
    return _joined([figures[job] for job in jobs])


def text(rows: Sequence[Row]) -> str:
    """The comparison as lines of a table."""
    lines = [f"{'statistic':30} {'class':5} {'real':>7} {'ours':>7} {'ratio':>6} ok"]
    for row in rows:
        ratio = f"{row.ratio:6.2f}" if row.real else f"{'':6}"
        lines.append(
            f"{row.statistic:30} {row.of:5} {row.real:7.3g} {row.ours:7.3g} {ratio} "
            f"{'yes' if row.ok else 'NO'}"
        )
    return "\n".join(lines)


def _figures(job: tuple[int, int, int, str]) -> Figures:
    seed, size, slices, difficulty = job
    options = Options(size, slices, difficulty=difficulty, classes=_CLASSES[seed % len(_CLASSES)])
    hu, label, truth = make_case(seed, options)
    figures = Figures()
    figures.add(hu, label, truth.scan.pixel_mm)
    return figures


def _joined(parts: Sequence[Figures]) -> Figures:
    total = Figures()
    for part in parts:
        total.join(part)
    return total

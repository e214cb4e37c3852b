"""A tree of phantoms in the layout of BHSD.

Every case depends on the seed and on its own place in its list only: however many cases there are
and however many processes make them, the files are the same to the byte.
"""

import csv
import functools
import json
import logging
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from bhsd_jax.phantom.bleeds import class_set
from bhsd_jax.phantom.case import VERSION, Options, make_case
from bhsd_jax.phantom.files import (
    case_id,
    official_lists,
    write_image,
    write_json,
    write_label,
    write_slices,
)
from bhsd_jax.platform import machine
from bhsd_jax.platform.errors import UserError
from bhsd_jax.platform.workers import Progress, Workers
from bhsd_jax.volume import HEMORRHAGE

_log = logging.getLogger(__name__)

_IMAGES, _MASKS = "label_192/images", "label_192/ground truths"
_FOLDER = {  # of a group's images; a group's place here numbers its random streams
    "train": _IMAGES,
    "test": _IMAGES,
    "bleeding": "unlabel_2000/anybleed",
    "nonbleeding": "unlabel_2000/nobleed",
}
SLICE_LABELS = "slice_labels.csv"  # written last: where it is, the tree is whole
_PARAMETERS, _LISTS, _DONE = "synthetic.json", "dataset.json", ".done"
_GOLDEN = (5**0.5 - 1) / 2  # multiples modulo 1 are spread evenly, however many there are
_WORTH_PROCESSES = 2e7  # voxels; below, starting processes takes longer than the work

Rows = list[list[int]]  # per slice: any, then one per foreground class; 0 or 1


@dataclass(frozen=True)
class _Parameters:
    """All that decides the files of a tree."""

    train: int
    test: int
    bleeding: int
    nonbleeding: int
    seed: int
    size: int
    slices: int
    difficulty: str
    scaled: bool
    metal: float = 0.0
    rater_noise: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in _FOLDER:
            if getattr(self, name) < 0:
                raise UserError(
                    f"synthetic: {name} must not be negative; got {getattr(self, name)}"
                )
        if not 0 <= self.metal <= 1:
            raise UserError(f"synthetic: metal is a share of the scans; got {self.metal}")
        Options(size=self.size, slices=self.slices, difficulty=self.difficulty)


@dataclass(frozen=True)
class _Job:
    """One case to make."""

    group: str
    index: int  # in its group
    parameters: _Parameters

    @property
    def id(self) -> str:
        return case_id(self.parameters.seed, list(_FOLDER).index(self.group), self.index)

    def paths(self, root: Path) -> tuple[Path, Path | None]:
        """Where image and mask are written; no mask: None."""
        name = f"{self.id}.nii.gz"
        labeled = _FOLDER[self.group] == _IMAGES
        return root / _FOLDER[self.group] / name, root / _MASKS / name if labeled else None


def generate(
    root: str | Path,
    *,
    train: int,
    test: int,
    bleeding: int,
    nonbleeding: int,
    seed: int = 0,
    size: int = 128,
    slices: int = 24,
    difficulty: str = "default",
    scaled: bool = True,
    metal: float = 0.0,
    rater_noise: bool = False,
    processes: int = 0,
) -> None:
    """Makes a tree like BHSD's under `root`, or what is missing of one begun with equal arguments.

    Beside BHSD's files there are `slice_labels.csv`, for all scans, and `synthetic.json`, with the
    arguments.

    Args:
        root: Folder, empty or begun before.
        train: Scans with masks listed for training in `dataset.json`.
        test: Likewise, for testing.
        bleeding: Scans without masks in `anybleed`.
        nonbleeding: Scans without masks in `nobleed`.
        seed: Another seed gives other heads.
        size: Rows and columns.
        slices: Over 160 mm.
        difficulty: "default"; "large": big, acute, little noise; "easy": bright as well.
        scaled: Store HU with a slope and an intercept per file, as BHSD does.
        metal: Share of scans with a coil in the brain.
        rater_noise: Outlines a pixel off here and there.
        processes: That work at once; 0: one per core, or none beside this for little work.

    Raises:
        ValueError: If the folder was made with other arguments, or holds something else.
    """
    root = Path(root)
    parameters = _Parameters(
        train,
        test,
        bleeding,
        nonbleeding,
        seed,
        size,
        slices,
        difficulty,
        scaled,
        metal,
        rater_noise,
    )
    _claim(root, parameters)
    jobs = [_Job(g, i, parameters) for g in _FOLDER for i in range(getattr(parameters, g))]
    rows = _known_rows(root)
    todo = [job for job in jobs if job.id not in rows or not _written(root, job)]
    if todo:
        rows |= _make_all(root, todo, processes)
    elif (root / SLICE_LABELS).is_file() and (root / _LISTS).is_file():
        _log.info("%s: complete, %d scans", root, len(jobs))
        return
    listed = {g: sorted(job.id for job in jobs if job.group == g) for g in ("train", "test")}
    write_json(root / _LISTS, official_lists(listed["train"], listed["test"], VERSION))
    write_slices(root / SLICE_LABELS, HEMORRHAGE[1:], {job.id: rows[job.id] for job in jobs})
    shutil.rmtree(root / _DONE, ignore_errors=True)


def _claim(root: Path, parameters: _Parameters) -> None:
    """Writes the arguments down, or checks them against those written before."""
    path = root / _PARAMETERS
    # Listed before it is looked for: another process may begin at the same moment.
    there = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    if path.is_file():
        # What came later was at its default before.
        written = {"metal": 0.0, "rater_noise": False} | json.loads(path.read_text())
        if written != asdict(parameters):
            differ = [
                f"{f.name} {written.get(f.name)} instead of {getattr(parameters, f.name)}"
                for f in fields(parameters)
                if written.get(f.name) != getattr(parameters, f.name)
            ]
            raise UserError(
                f"{root}: made with other arguments ({', '.join(differ)}); "
                "delete the folder, or choose another"
            )
        return
    if not all(name.startswith(".") for name in there):
        raise UserError(f"{root}: holds files that were not generated; choose an empty folder")
    write_json(path, asdict(parameters))


def _written(root: Path, job: _Job) -> bool:
    return all(path is None or path.is_file() for path in job.paths(root))


def _known_rows(root: Path) -> dict[str, Rows]:
    """Slice labels of the cases made before, from the final table and from a run that stopped."""
    rows: dict[str, Rows] = {}
    if (root / SLICE_LABELS).is_file():
        with (root / SLICE_LABELS).open(newline="") as file:
            for case, _, *values in list(csv.reader(file))[1:]:
                rows.setdefault(case, []).append([int(v) for v in values])
    for path in sorted((root / _DONE).glob("[!.]*.json")):
        rows[path.stem] = json.loads(path.read_text())
    return rows


def _make_all(root: Path, jobs: list[_Job], processes: int) -> dict[str, Rows]:
    parameters = jobs[0].parameters
    if processes == 0:
        work = len(jobs) * parameters.slices * parameters.size**2
        processes = machine.cores() if work > _WORTH_PROCESSES else 1
    rows: dict[str, Rows] = {}
    with Workers(processes) as pool, Progress("synthetic", len(jobs)) as progress:
        for job, made in pool.each(functools.partial(_make, root), jobs):
            rows[job.id] = made
            progress.advance(1)
    return rows


def _make(root: Path, job: _Job) -> Rows:
    """Writes one case; its slice labels come last and mark it as done."""
    parameters = job.parameters
    group = list(_FOLDER).index(job.group)
    entropy = np.random.SeedSequence((parameters.seed, group, job.index))
    classes: tuple[int, ...] = ()
    if job.group != "nonbleeding":
        start = np.random.default_rng((parameters.seed, group)).random()
        classes = class_set((start + job.index * _GOLDEN) % 1)
    hu, label, truth = make_case(
        int(entropy.generate_state(1, np.uint64)[0]),
        Options(
            parameters.size,
            parameters.slices,
            difficulty=parameters.difficulty,
            classes=classes,
            metal=job.index * _GOLDEN % 1 < parameters.metal,
            rater_noise=parameters.rater_noise,
        ),
    )
    image_path, label_path = job.paths(root)
    affine = truth.scan.stored_affine
    write_image(image_path, hu, affine, scaled=parameters.scaled)
    if label_path is not None:
        write_label(label_path, label, affine)
    present = np.stack(
        [(label == c).any((1, 2)) for c in range(1, len(HEMORRHAGE))], 1
    )  # [D, classes]
    rows = np.concatenate([present.any(1, keepdims=True), present], 1).astype(int).tolist()
    write_json(root / _DONE / f"{job.id}.json", rows)
    return rows

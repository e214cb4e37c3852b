"""`evaluate`: predictions against references, as `cases.csv` and `summary.json`."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhsd_jax.assemble import data, held_out, origins
from bhsd_jax.ct import scan
from bhsd_jax.datasets.image_files import scans
from bhsd_jax.labels import Labels
from bhsd_jax.metrics import also, nnunet_summary, scores, summary, threshold
from bhsd_jax.platform import files, machine
from bhsd_jax.platform.errors import UserError, some
from bhsd_jax.platform.workers import Progress, Workers
from bhsd_jax.settings import Config, Settings
from bhsd_jax.train import barrier
from bhsd_jax.verbs import parts, references
from bhsd_jax.verbs.score_table import HEADLINE, table
from bhsd_jax.verbs.scoring import ANY, Comparison, Scored, score_case
from bhsd_jax.volume import Case, Image, Label, Masks, Plan, labels_of, outlined_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Expected:
    """A case that is to be scored."""

    case: str
    patient: str
    reference: Label
    image: Image | None = None  # None: the reference gives the geometry
    table_feed: bool = False  # as `Case.table_feed`


def run(config: Config, workdir: Path) -> None:
    """Scores every case of a split, or of a folder of masks; all of them or none.

    Of several processes each scores cases of its own, and the first writes. One needs no JAX.

    What `config.evaluate.also` names is in `cases_also.csv` and under "also" in the summary.

    `cases.csv` has a row per case and class, `cases_binary.csv` one per case with all classes
    merged; `summary.json` has the means under every convention, and under "scored" what they are
    of. What is not defined is `nan` in the tables and null in the summary. `summary_nnunet.json`
    has nnU-Net's schema.

    Raises:
        FileNotFoundError: If predictions or references are missing; lists them.
        ValueError: If a file cannot be used, the baseline is asked for without CT scans, or the run
            may have been trained on scans of the split.
        faults.WriteError: If the system says no, such as on a full disk.
    """
    config = Settings.of(config)
    parts.join(config)
    jobs = comparisons(config, workdir)
    files.open_folder(workdir)
    done = _score_together(workdir, jobs, config.preprocess.processes or machine.cores())
    if done is None:
        return
    for text in (text for scored in done for text in scored.warnings):
        logger.warning("%s", text)
    rows = [row for scored in done for row in scored.rows]
    _tell_of_one_value(config, jobs[0].meaning, rows)
    merged = [scored.merged for scored in done]
    classes = (ANY,) if config.split.binary else jobs[0].meaning.names[1:]
    found = _summary(config, rows, merged, classes) | {"scored": _scored(config, workdir)}
    if config.evaluate.baseline:
        histograms = [scored.histogram for scored in done if scored.histogram is not None]
        found["baseline"] = _baseline(threshold.best_band(histograms))
    beside = [row for scored in done for row in scored.beside]
    # Of an evaluation before, which may be of other label maps.
    for name in ("cases_also.csv", "summary_nnunet.json"):
        files.unlink(workdir / name)
    if beside:
        found["also"] = also.summarize(beside)
        also.write_csv(workdir / "cases_also.csv", beside)
    scores.write_csv(workdir / "cases.csv", rows)
    scores.write_csv(workdir / "cases_binary.csv", merged)
    files.write_json(workdir / "summary.json", summary.without_nan(found))
    if not config.split.binary:
        _write_nnunet(workdir / "summary_nnunet.json", jobs, done)
    for line in table(found):
        logger.info("%s", line)


def _tell_of_one_value(config: Settings, labels: Labels, rows: Sequence[scores.ClassScore]) -> None:
    """Says where masks of a folder know one class alone and label maps several.

    Readers often outline any bleeding as 1, which is the first class: by class that scores nothing.
    Of a data set's own masks `preprocess` has told.
    """
    merged = config.split.binary or labels.regions or len(labels.classes) == 2
    if not config.evaluate.references or merged:
        return
    first = labels.classes[1]
    outlined = {row.name for row in rows if row.voxels_ref}
    if outlined == {first} and any(row.voxels_pred for row in rows if row.name != first):
        logger.warning(
            "%s: no mask holds another value than 1, which is taken for %s; if it means any "
            "bleeding, only the line %r is of use: set config.split.binary",
            *(config.evaluate.references, first, ANY),
        )


def _write_nnunet(path: Path, jobs: Sequence[Comparison], done: Sequence[Scored]) -> None:
    """The scores once more, in the schema of nnU-Net's summary.json."""
    cases = []
    for job, scored in zip(jobs, done, strict=True):
        places = str(scan.files(job.reference)[0]), str(job.predicted)
        rows = {row.name: row for row in scored.rows}
        cases.append(nnunet_summary.CaseFiles(*places, scored.voxels, rows))
    nnunet_summary.write(path, cases, jobs[0].meaning)


def comparisons(config: Settings, workdir: Path) -> list[Comparison]:
    """What there is to compare in a run folder, sorted by case.

    Raises:
        FileNotFoundError: If predictions or references are missing; lists them.
        ValueError: If the baseline is asked for without CT scans, or the run may have been trained
            on scans of the split.
    """
    plan = Plan.load(workdir) if (workdir / "plan.json").is_file() else None
    known = plan or data.data_set(config, workdir)
    if config.evaluate.baseline and (known.modality != "ct" or config.evaluate.references):
        raise UserError(
            "config.evaluate.baseline: a threshold in HU needs the CT scans of the data set; "
            f"modality is {known.modality!r}, references {config.evaluate.references!r}"
        )
    folder = _predictions(config, workdir)
    for place, field in ((folder, "predictions"), (config.evaluate.references, "references")):
        if Path(place).is_file():
            text = f"{place}: is a file; name the folder of label maps with evaluate.{field}"
            raise UserError(text)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no predictions; run the verb `predict` first")
    predicted = scans(folder)
    classes = (*known.classes, ANY) if config.split.binary else known.classes
    expected = _expected(config, workdir, folder, predicted, classes)
    cases = [one.case for one in expected]
    answers = _answers(config, cases)
    if "raters" in config.evaluate.also:
        _require_raters({one.case: one.reference for one in expected})
    _require_all(folder, [case for case in cases if case not in predicted])
    origins.require_settled(folder, cases)
    return [
        Comparison(
            case=one.case,
            patient=one.patient,
            predicted=predicted[one.case],
            reference=one.reference,
            image=one.image,
            classes=known.classes,
            labels=known.labels if isinstance(known, Plan) else labels_of(known),
            modality=known.modality,
            binary=config.split.binary,
            nsd_mm=config.evaluate.nsd_mm,
            baseline=config.evaluate.baseline,
            table_feed=one.table_feed,
            wanted=_wanted(config),
            answers=tuple(folder[one.case] for folder in answers),
        )
        for one in expected
    ]


def _predictions(config: Settings, workdir: Path) -> Path:
    return Path(config.evaluate.predictions or workdir / "predictions")


def _scored(config: Settings, workdir: Path) -> dict[str, str | None]:
    """What the scores are of, for `report`: whose split, or else which folder of references.

    Intervals are over patients, or over scans where a folder's masks do not say whose they are.
    Folders are seen from the run's: both may move together, and the file may be handed on.
    """
    own, references = not config.evaluate.predictions, config.evaluate.references
    folder = _predictions(config, workdir)
    return {
        "predictions": "predictions" if own else _from(workdir, folder),
        "references": _from(workdir, Path(references)) if references else None,
        "split": None if references else _split(config, folder),
        "resampled": "scans" if references else "patients",
    }


def _from(workdir: Path, folder: Path) -> str:
    # Resolved, since a step up from a linked folder leads up from where it really lies.
    return Path(os.path.relpath(folder.resolve(), workdir.resolve())).as_posix()


def _wanted(config: Settings) -> also.Also | None:
    names = config.evaluate.also
    if not names:
        return None
    return also.Also(names, config.evaluate.brats_dilation, config.evaluate.brats_least_mm3)


def _answers(config: Settings, cases: Sequence[str]) -> list[Mapping[str, Path]]:
    """Label maps by case of every folder of further answers."""
    found = []
    for name in config.evaluate.answers:
        if not Path(name).is_dir():
            raise FileNotFoundError(f"{name}: no such folder; look at config.evaluate.answers")
        found.append(scans(Path(name)))
        _require_all(Path(name), [case for case in cases if case not in found[-1]])
    return found


def _require_raters(labels: Mapping[str, Label]) -> None:
    # Masks that are not combined are one, whose values or segments are put into classes.
    alone = [c for c, m in labels.items() if not isinstance(m, Masks) or m.combine == "first"]
    if alone:
        raise UserError(
            f"config.evaluate.also: raters compares with several raters' masks, and {len(alone)} "
            f"cases have one mask: {_some(alone)}; use data=mbhseg with rater=majority"
        )


def _expected(
    config: Settings,
    workdir: Path,
    folder: Path,
    predicted: Mapping[str, Path],
    classes: Sequence[str],
) -> list[_Expected]:
    """The cases to score, sorted; every prediction must have a reference somewhere."""
    if config.evaluate.references:
        root = Path(config.evaluate.references)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; look at config.evaluate.references")
        masks = references.masks(root, folder, classes)
        # Whose scans these are is not known, so that each counts as a patient.
        expected = [_Expected(case, case, path) for case, path in masks.items()]
        labeled, source = set(masks), str(root)
    else:
        cases = {case.id: case for case in outlined_of(data.data_set(config, workdir))}
        labeled = {case.id for case in cases.values() if case.label}
        split = _split(config, folder)
        expected = _of_split(cases, _members(config, workdir, cases, split), split)
        source = f"data set {config.data['name']}, split {split!r} (config.evaluate.split)"
    without = [case for case in predicted if case not in labeled]
    if without:
        raise FileNotFoundError(
            f"{folder}: {len(without)} predictions have no reference in {source}: "
            f"{_some(without)}; put them elsewhere, or name the folder of the others with "
            "config.evaluate.predictions"
        )
    if not expected:
        raise FileNotFoundError(f"{source}: no masks to compare with")
    return sorted(expected, key=lambda one: one.case)


def _members(
    config: Settings, workdir: Path, cases: Mapping[str, Case], split: str
) -> tuple[str, ...]:
    """Ids of a split: where scans were prepared, those that `predict` is given as well."""
    marked = tuple(case.id for case in cases.values() if case.split == split)
    prepared = (data.shards_folder(config, workdir) / "index.json").is_file()
    fold = split == "val" and not marked  # of the training cases
    if split == "train" or not (prepared or fold):
        return marked
    roles, _ = data.roles(config, workdir)
    held_out.require(config, workdir, roles, split)
    members: tuple[str, ...] = getattr(roles, split)
    if gone := [case for case in members if case not in cases]:
        raise FileNotFoundError(
            f"split {split!r}: {len(gone)} of the prepared cases are not in the data set: "
            f"{_some(gone)}; look at config.data"
        )
    left = sorted(set(marked) - set(members))
    if left and barrier.place()[0] == 0:
        logger.warning(
            "split %r: %d cases of the data set are not scored, as they were not prepared or have "
            "no mask: %s",
            *(split, len(left), _some(left)),
        )
    return members


def _of_split(cases: Mapping[str, Case], members: Sequence[str], split: str) -> list[_Expected]:
    unlabeled = [case for case in members if cases[case].label is None]
    if unlabeled:
        raise FileNotFoundError(
            f"split {split!r}: {len(unlabeled)} cases have no mask: {_some(unlabeled)}"
        )
    chosen = [cases[case] for case in members]
    return [
        _Expected(c.id, c.patient, c.label, c.image, c.table_feed)
        for c in chosen
        if c.label is not None
    ]


def _split(config: Settings, folder: Path) -> str:
    return config.evaluate.split or _predicted_split(folder) or config.predict.split


def _predicted_split(folder: Path) -> str:
    """What `predict` noted beside its files."""
    noted = folder / "predictions.json"
    if not noted.is_file():
        return ""
    found = files.read_json(noted, remedy="run the verb `predict` again, or set evaluate.split")
    return found.get("split") or ""


def _require_all(folder: Path, missing: Sequence[str]) -> None:
    if missing:
        raise FileNotFoundError(
            f"{folder}: {len(missing)} cases have no prediction <case>.nii.gz: {_some(missing)}; "
            "run `predict` for all of them, or choose others with config.evaluate.split"
        )


def _some(names: Sequence[str]) -> str:
    return some(sorted(names), 10)


def _score_together(
    workdir: Path, jobs: Sequence[Comparison], processes: int
) -> list[Scored] | None:
    """Results of all processes in the order of the jobs; None but in the first process."""
    part: dict[str, Any] = {"scored": {}, "error": ""}
    mine: dict[str, Scored] = {}
    try:
        mine = _score(parts.own(jobs), processes)
    except (UserError, OSError) as error:
        if barrier.place() == (0, 1):
            raise
        part["error"] = str(error)
    if barrier.place() == (0, 1):
        return [mine[job.case] for job in jobs]
    part["scored"] = {case: scored.to_json() for case, scored in mine.items()}
    together = parts.gather(workdir, "evaluate", part)
    if together is None:
        return None
    for one in together:
        if one["error"]:
            raise UserError(one["error"])
    found = {case: Scored.from_json(row) for one in together for case, row in one["scored"].items()}
    return [found[job.case] for job in jobs]


def _score(jobs: Sequence[Comparison], processes: int) -> dict[str, Scored]:
    """Results by case."""
    found: dict[str, Scored] = {}
    with (
        Workers(min(processes, len(jobs))) as workers,
        Progress("evaluate", len(jobs)) as progress,
    ):
        for job, scored in workers.each(score_case, jobs):
            found[job.case] = scored
            progress.advance(1)
    return found


def _summary(
    config: Settings,
    rows: Sequence[scores.ClassScore],
    merged: Sequence[scores.ClassScore],
    classes: Sequence[str],
) -> dict[str, Any]:
    draw = {"resamples": config.evaluate.bootstrap, "seed": config.seed}
    binary = {k: v[ANY] for k, v in summary.summarize(merged, (ANY,), **draw).items()}
    conventions = summary.summarize(rows, classes, **draw)
    return {
        "convention": HEADLINE,
        "nsd_mm": config.evaluate.nsd_mm,
        "bootstrap": config.evaluate.bootstrap,
        "classes": list(classes),
        "n_cases": len(merged),
        "conventions": {
            convention: {name: dataclasses.asdict(mean) for name, mean in means.items()}
            for convention, means in conventions.items()
        },
        "metrics": summary.measures(rows, classes),
        "binary": {
            **dataclasses.asdict(binary[HEADLINE]),
            "conventions": {k: {ANY: dataclasses.asdict(v)} for k, v in binary.items()},
            "metrics": summary.measures(merged, (ANY,))[ANY],
        },
    }


def _baseline(band: threshold.Band) -> dict[str, Any]:
    return {"dice": band.mean_dice, "band_hu": list(band.hu)}

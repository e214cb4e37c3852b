"""Where the second network of a cascade gets the label maps of the first from, in prediction."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bhsd_jax.assemble import ensemble
from bhsd_jax.assemble.origins import Origins, facts_of
from bhsd_jax.assemble.predictor import Predictor
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import scan
from bhsd_jax.datasets import previous
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case, Series

PREVIOUS_STAGE = "previous_stage"  # of a run, that of its first network; and where that predicts to


@dataclass(frozen=True)
class FirstStage:
    """The first network of a cascade, and the folder of its label maps."""

    predict: Predictor
    folder: Path
    overwrite: bool  # False: a label map that is there, whole and of this network stays
    origins: Origins

    def __call__(self, case: Case, name: str) -> tuple[Case, float]:
        """The case with its label map, which is predicted under that name; seconds that took.

        Raises:
            ValueError: As the predictor.
            FileNotFoundError: As the predictor.
        """
        target = self.folder / f"{name}{scan.ending(case.image)}"
        seconds, stays = 0.0, not self.overwrite and self.origins.keeps(name)
        if not stays or self.predict.finished(case, target, name) is None:
            if not stays:
                self.origins.clear(name, target)
            seconds = self.predict(case, target, name).seconds or 0.0
            self.origins.note(name)
        return dataclasses.replace(case, previous=target), seconds


def first_of(run: Run, cases: Sequence[Case]) -> tuple[list[Case], Path | None]:
    """The cases, with label maps of the first network where a folder has them; else its run.

    `predict.previous` names one or the other. Where it is empty, cases of the data set have those
    of `preprocess.previous`, and any others the run that lies in this one's `previous_stage`.

    Raises:
        FileNotFoundError: If there is no such folder, or no label map in it.
        ValueError: If the run is no cascade's and `predict.previous` is given, or the other way
            round; or if a case has no label map.
    """
    given = run.config.predict.previous
    if not run.plan.previous_stage:
        if given:
            raise UserError(
                f"config.predict.previous is for the second network of a cascade, but {run.folder} "
                "is none; leave it out"
            )
        return list(cases), None
    folders, field = (given,) if given else run.config.preprocess.previous, "preprocess.previous"
    if given:
        field = "predict.previous"
        if (Path(given) / "checkpoints").is_dir():
            return list(cases), Path(given)
    elif run.config.predict.images or not folders:
        own = run.folder / PREVIOUS_STAGE
        if not own.is_dir():
            raise UserError(
                f"{run.folder} is the second stage of a 3D cascade: name a folder of label maps "
                f"that {run.plan.previous_stage} has predicted, or the run of that, with "
                "config.predict.previous"
            )
        return list(cases), own
    maps = previous.predicted(folders, f"config.{field}", logits=not given)
    known, missing = previous.attach(cases, maps)
    if missing:
        raise UserError(
            f"config.{field}: no label map of {len(missing)} of {len(cases)} scans: "
            f"{', '.join(missing[:4])}{_about_names(run, cases)}"
        )
    return known, None


def _about_names(run: Run, cases: Sequence[Case]) -> str:
    """What a message adds where label maps of DICOM series are missing."""
    if not run.config.predict.images:
        return previous.about_salt(cases)
    if not any(isinstance(case.image, Series) for case in cases):
        return ""
    return (
        "; those of DICOM series are found by the names of their folders, which are hidden unless "
        "the first stage is predicted with config.predict.show_ids=True"
    )


def open_first(
    run: Run, folder: Path, out: Path, series: Mapping[str, str] | None = None
) -> FirstStage:
    """The first network of a cascade from its run; label maps go to a folder in `out`.

    `series` is as in `Origins`.

    Raises:
        FileNotFoundError: If the folder is not one of a run.
        ValueError: If it is damaged, of other classes, or itself needs a first network.
    """
    first = ensemble.as_asked(run, ensemble.run_of(folder))
    if first.plan.previous_stage:
        raise UserError(
            f"{folder}: is itself the second stage of a cascade; name that of the first"
        )
    if first.labels != run.labels:
        raise UserError(
            f"{folder}: its label maps hold {', '.join(first.labels.names)}, but {run.folder} was "
            f"trained on {', '.join(run.labels.names)}"
        )
    predict, members = ensemble.open_runs(first)
    folder, overwrite = out / PREVIOUS_STAGE, run.config.predict.overwrite
    made_by = Origins(folder, facts_of(first, members), series)
    return FirstStage(predict, folder, overwrite, made_by)

"""Which scans `predict` is to predict, and what their outputs are called."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bhsd_jax.assemble import data, held_out
from bhsd_jax.ct import formats
from bhsd_jax.ct.dicom import slice_file
from bhsd_jax.datasets import archives, image_files
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import DicomSeries, Predict, Settings
from bhsd_jax.volume import Case, Plan, Series, outlined_of

logger = logging.getLogger(__name__)


def find_scans(config: Settings, workdir: Path) -> list[Case]:
    """The scans to predict, sorted: a file's, a folder's, or those of a split of the data set.

    Files of a folder itself, in NIfTI or another format that is read, and every DICOM CT series
    anywhere below it; pictures only where there is neither. nnU-Net's channel suffix `_0000` is not
    part of a case's name.

    Raises:
        FileNotFoundError: If there is no such file or folder, or no scan in it.
        ValueError: If the split is unknown, empty, or names scans the data set does not have; or if
            the run may have been trained on some of it.
    """
    settings = config.predict
    if not settings.images:
        return _split_scans(config, workdir, settings.split)
    path = Path(settings.images)
    series: list[Case] = []
    if path.is_dir():
        files, series = _in_folder(path, settings.dicom)
    elif path.is_file() and slice_file.is_dicom(path):
        files, series = {}, _in_file(path, settings.dicom)
    elif path.is_file() and archives.is_archive(path):
        raise UserError(f"{path}: an archive is not looked into; unpack it and name the folder")
    elif path.is_file():
        files = {formats.stem(path): path}
    else:
        pattern = "a pattern stands for no scans: name their folder, or " * ("*" in settings.images)
        raise FileNotFoundError(
            f"{path}: no such file or folder; {pattern}look at config.predict.images"
        )
    if not files and not series:
        raise FileNotFoundError(
            f"{path}: no NIfTI file and no DICOM CT series in it{image_files.below(path)}; look at "
            f"config.predict.images{archives.about(path)}"
        )
    chosen = image_files.group(files, _channels(workdir))
    found = [Case(name, name, file, None, "test") for name, file in sorted(chosen.items())]
    if {case.id for case in found} & {case.id for case in series}:
        raise UserError(
            f"{path}: a NIfTI file and a DICOM folder have one name; rename or move one of them"
        )
    return found + series


def _channels(workdir: Path) -> int:
    """Files or colors that make one scan for the run's network; 1 where there is no run yet."""
    if not (workdir / "plan.json").is_file():
        return 1
    return max(len(Plan.load(workdir).channels), 1)


def _in_folder(path: Path, how: DicomSeries) -> tuple[dict[str, Path], list[Case]]:
    """Files and DICOM series; beside files, images of no series are but a warning."""
    series, wrong = list[Case](), None
    try:
        series = dicom_cases.scans(path, uneven=how.uneven, unshear=how.unshear)
    except UserError as error:
        wrong = error
    listed = image_files.scans(path, pictures=not series)
    files = {n: f for n, f in listed.items() if not slice_file.is_dicom(f)}
    if wrong and not files:
        raise wrong
    if wrong:
        logger.warning("%s", wrong)
    return files, series


def _in_file(path: Path, how: DicomSeries) -> list[Case]:
    """The volumes of one file of an enhanced CT, called by it: its folder may hold several."""
    if len(slice_file.headers(path)) < 2:
        raise UserError(
            f"{path}: this DICOM file is one slice or less; name the folder of the series"
        )
    cases = dicom_cases.scans(path.parent, uneven=how.uneven, unshear=how.unshear, only=path)
    return [
        replace(case, id=f"{path.stem}_{number}" if number > 1 else path.stem)
        for number, case in enumerate(cases, start=1)
    ]


def output_names(cases: Sequence[Case], workdir: Path, settings: Predict) -> dict[str, str]:
    """What outputs are called; by default DICOM's own names are hidden, NIfTI's are not.

    Of a series that is hidden the UID counts too: a folder may be filled with another study later,
    and no file of the patient before may pass for the new one's.

    Raises:
        ValueError: If two scans would have one name, and one label map.
    """
    hide = settings.show_ids is False, settings.show_ids is not True and bool(settings.images)
    hidden = {c.id: _known_by(c) for c in cases if hide[isinstance(c.image, Series)]}
    out = label_maps(settings, workdir)
    short = data.short_names(sorted(hidden.values()), workdir, False, out) if hidden else {}
    names = [short[hidden[c.id]] if c.id in hidden else c.id for c in cases]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(
            f"{len(twice)} names stand for several scans each ({', '.join(twice[:4])}); their "
            "label maps would replace each other: rename the files or folders"
        )
    return {case.id: name for case, name in zip(cases, names, strict=True)}


def _known_by(case: Case) -> str:
    return f"{case.image.uid}/{case.id}" if isinstance(case.image, Series) else case.id


def label_maps(settings: Predict, workdir: Path) -> Path:
    """The folder that `predict` writes into."""
    return Path(settings.out or workdir / "predictions")


def series_digests(
    cases: Sequence[Case], names: Mapping[str, str], workdir: Path, out: Path | None = None
) -> dict[str, str]:
    """A salted hash of the UID of each series, by its name in the outputs; files have none."""
    uids = {names[c.id]: c.image.uid for c in cases if isinstance(c.image, Series) and c.image.uid}
    if not uids:
        return {}
    short = data.short_names(sorted(set(uids.values())), workdir, False, out)
    return {name: short[uid] for name, uid in uids.items()}


def _split_scans(config: Settings, workdir: Path, split: str) -> list[Case]:
    if split not in ("val", "test"):
        raise UserError(f"config.predict.split is val or test; got {split!r}")
    roles, _ = data.roles(config, workdir)
    held_out.require(config, workdir, roles, split)
    known = {case.id: case for case in outlined_of(data.data_set(config, workdir))}
    wanted = getattr(roles, split)
    if not wanted:
        why = ", as config.split.fold is -1" * (split == "val" and config.split.fold < 0)
        raise UserError(
            f"split {split}: this run has no such scans{why}; name files with "
            "config.predict.images, or the other split with config.predict.split"
        )
    missing = [case for case in wanted if case not in known]
    if missing:
        raise UserError(
            f"split {split}: {len(missing)} of its {len(wanted)} scans are not in the data set; "
            "set config.predict.split, or name files with config.predict.images"
        )
    return [
        Case(case, case, known[case].image, None, split, table_feed=known[case].table_feed)
        for case in wanted
    ]


def part(cases: list[Case], settings: Predict) -> list[Case]:
    """The scans of this job, of several that share the work; none where there are more jobs.

    Raises:
        ValueError: If there is no such job.
    """
    own, parts_in_all = settings.part_id, settings.num_parts
    if own >= parts_in_all:
        raise UserError(f"config.predict.part_id is 0..{parts_in_all - 1}; got {own}")
    return cases[own::parts_in_all]

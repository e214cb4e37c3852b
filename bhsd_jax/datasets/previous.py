"""What the first networks of a cascade have predicted, in folders beside a data set."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from bhsd_jax.ct import saved_logits
from bhsd_jax.datasets import image_files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case, Series

PREDICTIONS = "predictions"  # of a run, its label maps


def predicted(folders: Iterable[str | Path], field: str, *, logits: bool) -> dict[str, Path]:
    """Files by case: label maps, or the logits beside them where those were kept.

    Args:
        folders: Of label maps, or runs, or folders of `launch/folds` with a run for each fold.
        field: Of the config that names them, for messages.
        logits: Whether those are taken where they were kept, which is for training.

    Raises:
        FileNotFoundError: If a folder is not there, or holds none.
        ValueError: If two folders have a label map of one case.
    """
    found: dict[str, Path] = {}
    for folder in (each for given in folders for each in _folders(Path(given))):
        files = image_files.scans(folder) if folder.is_dir() else {}
        if not files:
            raise FileNotFoundError(
                f"{folder}: no label maps in it, nor a run that has predicted; look at {field}"
            )
        twice = sorted(found.keys() & files.keys())
        if twice:
            raise UserError(
                f"{found[twice[0]].parent} and {folder} both have a label map of {twice[0]}; each "
                "case is predicted once, by the network that was not trained on it; look at "
                f"{field}"
            )
        for case, path in files.items():
            kept = saved_logits.beside(path)
            found[case] = kept if logits and kept.is_file() else path
    return found


def _folders(given: Path) -> list[Path]:
    """Of label maps: that itself, or those of the runs that it is or holds."""
    if (given / "config.json").is_file():
        return [given / PREDICTIONS]
    folds = sorted(given.glob("fold*/seed*/config.json"))
    return [config.parent / PREDICTIONS for config in folds] or [given]


def attach(cases: Sequence[Case], maps: dict[str, Path]) -> tuple[list[Case], list[str]]:
    """Cases with the label maps of a first network, and names of those that have none."""
    known = [replace(case, previous=maps[case.id]) for case in cases if case.id in maps]
    return known, [case.id for case in cases if case.id not in maps]


def about_salt(cases: Iterable[Case]) -> str:
    """What a message adds where label maps are missing and cases are called by salted hashes."""
    if not any(isinstance(case.image, Series) for case in cases):
        return ""
    return "; ids of DICOM series are salted: both stages need the same --data.salt"

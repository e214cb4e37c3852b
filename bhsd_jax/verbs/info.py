"""`info`: what a run is, from its files, for a reader or a program. Needs no device."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bhsd_jax import __version__
from bhsd_jax.assemble import calibrated
from bhsd_jax.assemble.run import Run
from bhsd_jax.metrics import summary
from bhsd_jax.platform import files
from bhsd_jax.report.page import notice
from bhsd_jax.settings import Config
from bhsd_jax.train import checkpoint_files
from bhsd_jax.verbs import pages


def text(config: Config, workdir: Path, *, as_json: bool = False) -> str:
    """Lines of names and values, or one JSON object of the same.

    Raises:
        FileNotFoundError: If the run has no plan.
        ValueError: If a file of it is damaged; names it.
    """
    found = facts(Run.of(config, workdir))
    if as_json:
        return json.dumps(summary.without_nan(found), indent=1) + "\n"
    return "".join(f"{line}\n" for line in _lines(found))


def facts(run: Run) -> dict[str, Any]:
    """Everything that `info` says, plain."""
    config, plan = run.config, run.plan
    windows = config.windows
    if windows == "plan" and plan.channels:
        windows = {one.name: one.scheme for one in plan.channels}
    elif windows == "plan":
        low, mean, std, high = plan.foreground
        windows = {"clip": [low, high], "mean": mean, "std": std}
    else:
        windows = [{"level": level, "width": width} for level, width in windows]
    return {
        "name": config.name,
        "notice": notice(run.labels.names),
        "classes": list(run.labels.names),
        "modality": plan.modality,
        "spacing_mm": list(plan.spacing_mm),
        "axes": plan.axes,
        "patch": list(run.patch),
        **({"previous_stage": plan.previous_stage} if plan.previous_stage else {}),
        "windows": windows,
        "objective": config.objective["name"],
        "backbone": config.model["name"],
        "license": plan.license,
        "trained_on": {
            "dataset": plan.dataset,
            "fold": config.split.fold,
            "labeled": config.split.labeled,
            "seed": config.seed,
            "steps": config.train.steps,
            "source_sha256": plan.source_sha256,
        },
        "unfinished": list(pages.unfinished(run)),
        "checkpoints": _checkpoints(run.folder / "checkpoints"),
        **_calibration(run),
        "scores": _scores(run.folder / "summary.json"),
        "version": __version__,
    }


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """The best first, as `predict` would take them."""
    steps, unread = checkpoint_files.by_rank(folder) if folder.is_dir() else ([], {})
    found: list[dict[str, Any]] = [
        {
            "step": step,
            "validation_dice": checkpoint_files.listing(folder, step).dice,
            "weights_sha256": checkpoint_files.digest(folder, step),
        }
        for step in steps
    ]
    return found + [{"step": step, "damaged": reason} for step, reason in unread.items()]


def _calibration(run: Run) -> dict[str, Any]:
    """The temperature of the checkpoint that predicts; of anything else, that it is of that."""
    found = calibrated.read(run.folder)
    if found is None or calibrated.is_of(found, _predicting(run)):
        return {"temperature": found and found["temperature"]}
    told = f"temperature {found['temperature']:.3g} of {calibrated.subject(found)}"
    return {"temperature": None, "calibration": f"{told}, not of the checkpoint that predicts"}


def _predicting(run: Run) -> list[str]:
    """The digest of the checkpoint that predicts, if there is one."""
    folder, which = run.folder / "checkpoints", run.config.predict.checkpoint
    steps, _ = checkpoint_files.by_rank(folder)
    named = [step for step in steps if str(step) == str(which)]
    taken = {"best": steps[:1], "last": sorted(steps)[-1:]}.get(str(which), named)
    return [checkpoint_files.digest(folder, step) for step in taken]


def _scores(path: Path) -> dict[str, Any] | None:
    """Of the evaluation, by class and convention; None where there was none."""
    if not path.is_file():
        return None
    found = files.read_json(path, remedy="run the verb `evaluate` again")
    kept = ("binary", "conventions", "metrics", "n_cases", "nsd_mm")
    return {name: found[name] for name in kept if name in found}


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For a reader: scores as one Dice a class, the rest as it is."""
    short = dict(found)
    scores = short.pop("scores")
    for name, value in short.items():
        told = _value(name, value)
        if told not in ("", "None"):
            yield f"{name:<12} {told}"
    if scores is None:
        yield f"{'scores':<12} none; run the verb `evaluate`"
        return
    binary = scores["binary"]
    dice = binary["dice"]
    told = "n/a" if dice is None else f"{dice:.3f}"
    yield f"{'scores':<12} Dice {told}, all classes merged, {binary['n']} scans"
    for name, one in scores["conventions"]["nnunet"].items():
        if one.get("dice") is not None:
            yield f"{'':<12} Dice {one['dice']:.3f} {name}"


def _value(name: str, value: Any) -> str:
    if name == "checkpoints":
        return ", ".join(map(_checkpoint, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item not in ("", None))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _checkpoint(one: Mapping[str, Any]) -> str:
    if "damaged" in one:
        return f"{one['step']} (damaged)"
    dice = one["validation_dice"]
    return f"{one['step']}" if dice is None else f"{one['step']} (Dice {dice:.3f})"

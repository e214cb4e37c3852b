"""What made the label maps of a folder, so that those of other networks do not pass for ours.

Nor may what lies beside a label map outlive the scan that it was made of. What was measured of the
networks' answer lasts as long as the label map: it cannot be measured again without them.
"""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bhsd_jax import fields
from bhsd_jax.assemble.manifest import Member
from bhsd_jax.assemble.run import Run
from bhsd_jax.ct import probabilities, saved_logits, upright
from bhsd_jax.ct.dicom import segmentation
from bhsd_jax.nnunet import saved_probabilities
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError

logger = logging.getLogger(__name__)

NAME = ".made_with.jsonl"  # beside the label maps


def facts_of(run: Run, members: Sequence[Member], **more: Any) -> dict[str, Any]:
    """All that a label map follows from beside the scan, as plain values without a name of a file.

    `more` is what else there is, such as the rules of postprocessing, or the temperature of the
    probabilities that lie beside it and stay with it.
    """
    infer = dataclasses.asdict(run.config.infer)
    del infer["tiles"]  # how many at a time
    if infer["mirror_axes"] is None:
        infer["mirror_axes"] = members[0].mirror
    dicom = run.config.predict.dicom
    facts = {
        "weights_sha256": [member.weights_sha256 for member in members],
        "networks": [member.networks for member in members],
        "infer": infer,
        "combine": run.config.predict.combine,
        "dicom": {"uneven": dicom.uneven, "unshear": dicom.unshear},
        "precision": run.config.precision,
        **more,
    }
    if len({member.mirror for member in members}) > 1:
        facts["mirrors"] = [member.mirror for member in members]
    return json.loads(json.dumps(facts))


def require_settled(folder: Path, names: Sequence[str]) -> None:
    """Refuses label maps, by their names, that a call was to replace and did not come to.

    They are of a call before it, perhaps of another checkpoint, and lie among those of the last
    one. Where several calls made label maps in different ways, each to its end, as those of folds
    that share a folder, a line says so. Of label maps without a record nothing is known.

    Raises:
        UserError: Says which, and what to do.
    """
    lines = files.read_json_lines(folder / NAME)
    made = {line["case"]: line.get("made_with") for line in lines if "case" in line}
    known = [name for name in names if name in made]
    left = [name for name in known if made[name] is None]
    if left:
        raise UserError(
            f"{folder}: {len(left)} of {len(names)} label maps are of a call before the last one, "
            f"which was stopped before it had replaced them: {', '.join(left[:4])}"
            f"{' ...' if left[4:] else ''}; run `predict` to its end, with "
            "config.predict.overwrite=False to keep what it has made"
        )
    ways = Counter(made[name] for name in known)
    if len(ways) > 1:
        logger.warning(
            "%s: its label maps were made in %d ways (other networks or options): %s of them",
            *(folder, len(ways), ", ".join(map(str, sorted(ways.values(), reverse=True)))),
        )


class Origins:
    """The record of one folder, and what predicts into it now.

    `series` has a digest of each DICOM series by its name: the folder that a series is called for
    may be filled with another one between two calls.

    The last line about a label map says what made it, or that it is to be made again: a call that
    overwrites and is stopped leaves some of the call before it behind. Several processes may write
    one record.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], series: Mapping[str, str] | None = None
    ):
        self._path, self.facts = folder / NAME, facts
        self._series = series or {}
        text = json.dumps(facts, sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        lines = files.read_json_lines(self._path)
        self._known: dict[str, Mapping[str, Any]] = {}
        self._known |= {line["case"]: line for line in lines if "case" in line}
        self._others = {line["digest"]: line.get("facts") for line in lines if "digest" in line}

    def begin(self, there: Sequence[str], *, overwrite: bool) -> None:
        """Settles what happens to label maps that are there, by their names.

        Raises:
            ValueError: If they are to stay and others made some of them; says what differs.
            faults.WriteError: If the system says no.
        """
        if overwrite:
            self._say(*({"case": name, "made_with": None} for name in there))
        else:
            self._require_ours(there)
        if self._digest not in self._others:
            self._write({"digest": self._digest, "facts": self.facts})

    def keeps(self, name: str) -> bool:
        """Whether a label map that is there may stay: ours, or one of which nothing is known."""
        ours = name not in self._known or self._made_with(name) == self._digest
        return ours and not self._is_of_other(name)

    def note(self, name: str, measured: Mapping[str, Any] | None = None) -> None:
        """Ours has been written; `measured` are plain values that `measured` is to give again.

        Raises:
            faults.WriteError: If the system says no.
        """
        series = {"series": self._series[name]} if name in self._series else {}
        found = {"measured": dict(measured)} if measured else {}
        self._say({"case": name, "made_with": self._digest, **series, **found})

    def measured(self, name: str) -> Mapping[str, Any]:
        """What was measured of a label map when it was made; empty where that is not known."""
        return self._known.get(name, {}).get("measured", {})

    def clear(self, name: str, target: Path) -> None:
        """Removes what a call before has left beside the label map at `target`.

        It may be of another scan, and this call may not write all of it.

        Raises:
            faults.WriteError: If the system says no.
        """
        if name not in self._known and not target.is_file():
            return
        for path in (
            *(probabilities.beside(target), saved_logits.beside(target)),
            *(*saved_probabilities.pair(target), *upright.pair(target)),
            segmentation.place(target),
        ):
            files.unlink(path)

    def _is_of_other(self, name: str) -> bool:
        """Whether a label map is known to be of a series other than the one of that name now."""
        now, before = self._series.get(name), self._known.get(name, {}).get("series")
        return None not in (now, before) and now != before

    def _require_ours(self, there: Sequence[str]) -> None:
        made = map(self._made_with, there)
        others = [digest for digest in made if digest not in (None, self._digest)]
        if others:
            theirs = self._others.get(others[0])
            differs = next(fields.differences(theirs, self.facts), "") if theirs else ""
            raise UserError(
                f"{self._path.parent}: {len(others)} of {len(there)} label maps were made otherwise"
                f"{differs and f': {differs}'}; with config.predict.overwrite=False they would "
                "stay among ours. Name another folder with config.predict.out, or overwrite them"
            )
        moved = sum(map(self._is_of_other, there))
        if moved:
            logger.warning("%d label maps are of other series than now have their names", moved)
        unknown = sum(name not in self._known for name in there)
        if unknown:
            logger.warning("%d label maps stay of which it is not known what made them", unknown)

    def _made_with(self, name: str) -> str | None:
        """The digest of what made a label map; None: not known, or it is to be made again."""
        return self._known.get(name, {}).get("made_with")

    def _say(self, *lines: Mapping[str, Any]) -> None:
        """Writes lines about label maps."""
        self._write(*lines)
        self._known |= {line["case"]: line for line in lines}

    def _write(self, *lines: Mapping[str, Any]) -> None:
        if lines:
            files.append(self._path, "".join(json.dumps(line) + "\n" for line in lines))

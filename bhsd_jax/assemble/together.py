"""Whether the processes that train together were started for one and the same run."""

import contextlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

import jax

from bhsd_jax import fields
from bhsd_jax.assemble.run import Run
from bhsd_jax.platform import files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.train.agreement import agree, gather_words

# Fields in which the machines of a run may differ: where scans lie, and how fast they are read.
_OF_A_MACHINE = (
    *("data.root", "preprocess.shards", "preprocess.processes"),
    *("input.threads", "input.buffer", "input.cache_mb"),
)


def require_one_run(run: Run) -> None:
    """Refuses processes of which one has another config, other scans, or another run folder.

    Left alone they train what none of them was told, without a word, or wait for each other's part
    of the first checkpoint for ever. To be called in all of them; where there is one it does
    nothing.

    Raises:
        UserError: In all processes; says which one differs from the first, and in what.
    """
    if jax.process_count() == 1:
        return
    mark = run.folder / f".meeting-{secrets.token_hex(8)}"

    def tell() -> dict[str, Any]:
        files.write_text(mark, "process 0 was here\n")
        return facts(run) | {"folder": str(run.folder.absolute()), "mark": mark.name}

    told = agree(tell)
    try:
        odd = difference(told, run)
        who = f"process {jax.process_index()} of {jax.process_count()}"
        every = gather_words(f"{who} {odd}" if odd else "")
    finally:
        with contextlib.suppress(OSError):
            mark.unlink(missing_ok=True)
    if found := [words for words in every if words]:
        raise UserError(found[0])


def facts(run: Run) -> dict[str, Any]:
    """What must be the same in all processes, as JSON values."""
    return json.loads(json.dumps({"config": run.config.to_dict(), "plan": run.plan.to_json()}))


def difference(told: Mapping[str, Any], run: Run) -> str:
    """In what this process differs from the first one, and what to do; "" if in nothing.

    Args:
        told: Facts of the first process; its run folder, and a file that it has left there.
        run: Of this one.
    """
    own = facts(run)
    odd = [
        field
        for field in fields.differences(told["config"], own["config"])
        if field.partition(" ")[0] not in _OF_A_MACHINE
    ]
    remedy = (
        "give all processes of a run the same command; if each was to train a run of its own, "
        "start them one by one, in jobs of their own or by `srun --ntasks=1`"
    )
    if odd:
        return f"was started with another config than process 0: config.{odd[0]}; {remedy}"
    if not files.appears(run.folder / told["mark"]):
        return (
            f"does not see in {run.folder.absolute()} what process 0 writes into {told['folder']}; "
            "name one run folder, and one that all of them share: not a machine's own disk. Or "
            f"{remedy}"
        )
    if told["plan"] != own["plan"]:
        return "has shards of another plan than process 0; copy the same to all machines"
    return ""

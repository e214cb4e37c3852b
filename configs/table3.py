"""Table 3 of the paper: CPS with scans known to bleed and scans known not to.

Rows are named bleeding-nonbleeding. The paper uses these labels to choose volumes and nothing else.
The rows ending in `-neg` and `-weak` are ours and let the loss see them: `neg` learns background
from slices and volumes without bleeding, `weak` also keeps pseudo-labels off classes that are not
there. Slice labels are read from `slice_labels.csv` beside the scans (tools/label_slices.py writes
it); without it each volume has its own label, which says nothing of single slices where it bleeds:
row 500-0-weak is then refused, and the series ends with exit code 1.
Run:  launch/table3 --root=/data/BHSD --preset=ssl4mis
"""

import ml_collections
from bhsd_jax.configs.tables import PaperTable, TableRow

from bhsd_jax.configs import table2, tables

NEG = {"slice_loss.neg_sup": 1.0}
GATED = NEG | {"slice_loss.gate_pseudo": True}


def _row(
    bleeding: int,
    nonbleeding: int,
    paper: float | None = None,
    spread: float | None = None,
    *,
    experiment: str = "cps",
    title: str = "CPS",
    slice_loss: dict[str, float | bool] | None = None,
) -> TableRow:
    counts = {"split.bleeding": bleeding, "split.nonbleeding": nonbleeding}
    return TableRow(
        f"{title}, {bleeding} / {nonbleeding}",
        experiment,
        fields=counts | (slice_loss or {}),
        paper=table2.figure(paper),
        spread=spread,
    )


TABLE = PaperTable(
    name="table3",
    title="BHSD Table 3: unlabeled scans, bleeding / not bleeding",
    rows={
        "0-0": _row(0, 0, 45.10, 0.21, experiment="suponly", title="SupOnly"),
        "500-0": _row(500, 0, 49.50, 0.19),
        "500-500": _row(500, 500, 48.86, 0.23),
        "500-1000": _row(500, 1000, 49.51, 0.20),
        "500-1500": _row(500, 1500, 48.84, 0.15),
        "0-1500": _row(0, 1500, 48.71, 0.17),
        "500-1500-neg": _row(500, 1500, title="CPS, negatives (ours)", slice_loss=NEG),
        "500-0-weak": _row(500, 0, title="CPS, negatives and gates (ours)", slice_loss=GATED),
        "500-1500-weak": _row(500, 1500, title="CPS, negatives and gates (ours)", slice_loss=GATED),
        "0-1500-weak": _row(0, 1500, title="CPS, negatives and gates (ours)", slice_loss=GATED),
    },
    default="500-1500",
    baseline="0-0",
    fields={"train.steps": table2.STEPS},
    notes=(
        table2.SPREAD_NOTE,
        table2.SPLIT_NOTE,
        "The row without unlabeled scans is Table 2's SupOnly.",
        "Scans are drawn alike from all unlabeled ones: with 1500 others beside them, each "
        "bleeding scan is seen a quarter as often at equal steps.",
        "BHSD ships no slice labels; they are those of slice_labels.csv if it lies beside the "
        "scans. Rows with negatives and gates use them and are not the paper's method.",
        table2.NETWORK_NOTE,
    ),
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The row, seed and words in `arg`; 500/1500 if it names no row."""
    return tables.get_config(TABLE, arg)

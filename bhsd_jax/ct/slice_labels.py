"""What is known of each slice of a prepared scan, class by class."""

import numpy as np

from bhsd_jax.volume import Case, Grid


def of_case(
    case: Case, grid: Grid, label: np.ndarray | None, num_classes: int
) -> tuple[tuple[int, ...], ...] | None:
    """Rows per prepared slice: the case's own; else what its prepared mask shows.

    Without either, a scan known not to bleed shows nothing in any slice; of one known to bleed no
    slice is known.
    """
    given = align(case, grid, num_classes)
    if given is None and label is not None:
        shown = [(label == index).any(axis=(1, 2)) for index in range(1, num_classes)]
        return tuple(zip(*(column.astype(int).tolist() for column in shown), strict=True))
    if given is None and case.bleeding is False:
        return ((0,) * (num_classes - 1),) * grid.shape[0]
    return given


def align(case: Case, grid: Grid, num_classes: int) -> tuple[tuple[int, ...], ...] | None:
    """One row per prepared slice: that of the native slice its center falls into.

    That is the very slice a thick-sliced image is resampled from; where slices are fewer than in
    the file, those between them and their labels are gone. None where the prepared slices do not
    run along the file's.
    """
    if case.slice_labels is None or grid.order[0] != 0:
        return None
    rows, depth = list(case.slice_labels), grid.native_shape[0]
    if len(rows) > depth or any(len(row) != num_classes - 1 for row in rows):
        raise ValueError(
            f"{case.id}: slice labels do not fit: {len(rows)} rows for {depth} slices, "
            f"{len(rows[0])} columns for {num_classes - 1} foreground classes"
        )
    rows += [(-1,) * (num_classes - 1)] * (depth - len(rows))
    if grid.flip[0]:
        rows.reverse()
    rows = rows[grid.crop_start[0] : grid.crop_stop[0]]
    return tuple(rows[(2 * i + 1) * len(rows) // (2 * grid.shape[0])] for i in range(grid.shape[0]))

import numpy as np
import pytest

from bhsd_jax.phantom import check
from bhsd_jax.phantom.figures import Figures
from bhsd_jax.volume import HEMORRHAGE

EDH, IPH, IVH, SAH, SDH = range(1, 6)


@pytest.fixture(scope="module")
def head():
    """A disk of brain of 30 HU in a ring of bone 8 mm thick, pixels of 0.5 mm."""
    rows, columns = np.ogrid[-128:128, -128:128]
    radius = np.hypot(rows, columns) / 2
    hu = np.select([radius < 50, radius < 58], [30.0, 900.0], -1000.0)
    noise = np.random.default_rng(0).normal(0, 4, hu.shape)
    return (hu + np.where(radius < 50, noise, 0)).astype(np.float32)


def test_figures_of_a_drawn_head(head):
    hu, label = np.stack([head, head]), np.zeros((2, 256, 256), np.uint8)
    label[0, 120:140, 120:140] = IPH
    label[1, 120:130, 120:130] = IPH  # smaller: not the slice that is looked at
    label[0, 60, 128] = SDH
    label[0, 64:66, 128] = SDH
    hu[0][label[0] == IPH] = 60
    hu[0][label[0] == SDH] = (10, 15, 150)
    figures = Figures()
    figures.add(hu, label, 0.5)
    found = figures.table()
    assert found["cm2 per slice", IPH] == 1.0
    assert found["pieces per slice", IPH] == 1
    assert found["pieces per slice", SDH] == 2
    assert found["share of pieces of one voxel", SDH] == 0.5
    assert found["share below 20 HU", SDH] == pytest.approx(2 / 3)
    assert found["share above 100 HU", SDH] == pytest.approx(1 / 3)
    assert found["HU", IPH] == 60
    assert found["HU above its surroundings", IPH] == pytest.approx(30, abs=0.5)
    assert found["noise, HU", 0] == pytest.approx(3.9, abs=0.1)  # of the flatter half
    assert found["noise, correlation at 1 px", 0] == pytest.approx(0, abs=0.02)
    assert found["brain, HU, 50 %", 0] == pytest.approx(30, abs=0.2)
    assert found["skull, mm, 50 %", 0] == pytest.approx(8, abs=0.5)
    assert found["Dice of the best threshold", 0] > 0.9


def test_figures_of_two_parts_are_those_of_the_whole(head):
    label = np.zeros((1, 256, 256), np.uint8)
    label[0, 120:140, 120:140] = IPH
    other = np.where(label > 0, SAH, 0)
    whole, first, second = Figures(), Figures(), Figures()
    for figures in (whole, first):
        figures.add(head[None], label, 0.5)
    for figures in (whole, second):
        figures.add(head[None] + 2, other, 0.5)
    first.join(second)
    assert first.table() == whole.table()


def test_a_row_is_in_order_within_a_quarter_or_next_to_nothing():
    assert check.Row("HU", "IPH", 50.0, 62.0).ok
    assert not check.Row("HU", "IPH", 50.0, 63.0).ok
    assert check.Row("share above 100 HU", "SAH", 0.0, 0.009).ok
    assert not check.Row("share above 100 HU", "SAH", 0.0, 0.02).ok
    assert not check.Row("share below 20 HU", "SDH", 0.39, 0.009).ok
    lines = check.text([check.Row("HU", "IPH", 50.0, 63.0)]).splitlines()
    assert lines[0].split() == ["statistic", "class", "real", "ours", "ratio", "ok"]
    assert lines[1].split() == ["HU", "IPH", "50", "63", "1.26", "NO"]


def test_no_scans_are_refused():
    with pytest.raises(ValueError, match="0 scans; give at least 1"):
        check.measure(0)


def test_phantoms_look_like_real_scans():
    """Few scans of half of BHSD's size, to be quick; so the limits are wide.

    Noise and bone look different in pixels twice as large: `--check` looks at those.
    """
    rows = check.compare(check.measure(10, size=256, slices=24, processes=1))
    assert {row.of for row in rows} == {"", *HEMORRHAGE[1:]}
    few = [row for row in rows if row.statistic.startswith("share") and row.real < 0.1]
    assert [row for row in few if not row.ok] == []
    others = [row for row in rows if row not in few and not row.statistic.startswith("noise")]
    assert [row for row in others if not 0.35 < row.ratio < 2] == []

"""What a report shows, and what it never shows."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest

from bhsd_jax.metrics.seeds import OverSeeds
from bhsd_jax.platform import step_log
from bhsd_jax.report import figures, points
from bhsd_jax.report.page import NOTICE, Page, Picture, Section, notice
from bhsd_jax.report.result_tables import Table, cases_table, dice_table, milliliters, number


def mean(dice, **more):
    return {
        "dice": dice,
        "low": 0.1,
        "high": 0.9,
        "n": 3,
        "n_present": 2,
        "n_false_positive": 1,
    } | more


SUMMARY = {
    "classes": ["EDH", "SDH"],
    "conventions": {
        "nnunet": {"EDH": mean(0.25), "SDH": mean(None, low=None), "mean": mean(0.25)},
        "present": {"EDH": mean(0.5), "SDH": mean(math.nan), "mean": mean(0.5)},
    },
}


def test_undefined_numbers_are_words():
    assert number(None) == number(math.nan) == "n/a"
    assert number(math.inf) == "missed"
    assert number(0.12345) == "0.123"
    assert number(7) == "7"


def test_a_small_bleed_never_reads_as_none():
    assert [milliliters(ml) for ml in (0.0, 0.004, 0.05, 12.34)] == ["0.0", "< 0.1", "0.1", "12.3"]
    row = dict.fromkeys(("dice", "nsd"), "0.5") | {"case": "a", "class": "SDH", "hd95_mm": "0.02"}
    row |= {"voxels_ref": "1", "voxels_pred": "1", "volume_ref_ml": "0.04", "volume_pred_ml": "0"}
    assert cases_table([row], {"a": "a"}).rows[0][3:] == ("0.0", "0.500", "< 0.1", "0.0")


def test_points_have_a_sign_where_they_differ_from_nothing():
    assert points.signed(0.0123) == "+1.23"
    assert points.signed(-4e-5) == "+0.00"
    assert points.points(-1e-9) == "0.00"
    close = OverSeeds(mean=0.0, sd=0.0, low=-0.0002, high=0.0311, seeds=3)
    assert points.interval(close, sign=True) == "+0.0 to +3.1"
    assert points.interval(close) == "0.0 to 3.1"


def test_the_dice_table_shows_every_convention_there_is():
    table = dice_table(SUMMARY)
    assert table.columns[1] == "Dice, nnU-Net rule"
    assert "where present" in table.columns
    assert table.rows[0] == ("EDH", "0.250", "0.100 to 0.900", "0.500", "2", "1")
    assert table.rows[1][1:4] == ("n/a", "n/a", "n/a")
    assert table.rows[2] == ("mean of classes", "0.250", "0.100 to 0.900", "0.500", "", "")


def test_cases_are_sorted_and_empty_pairs_left_out():
    row = {
        "class": "SDH",
        "hd95_mm": "inf",
        "nsd": "0.5",
        "volume_ref_ml": "1",
        "volume_pred_ml": "2",
    }
    rows = [
        row | {"case": "a", "dice": "0.2", "voxels_ref": "5", "voxels_pred": "5"},
        row | {"case": "b", "dice": "0.9", "voxels_ref": "5", "voxels_pred": "5"},
        row | {"case": "c", "dice": "nan", "voxels_ref": "0", "voxels_pred": "0"},
        row | {"case": "d", "dice": "0.0", "voxels_ref": "0", "voxels_pred": "5"},
    ]
    table = cases_table(rows, {"a": "one", "b": "two", "c": "three", "d": "four"})
    assert [line[0] for line in table.rows] == ["two", "one", "four"]
    assert [line[3] for line in table.rows] == ["missed", "missed", "made up"]


def test_markdown_has_a_cell_per_column_and_html_escapes():
    table = Table(("a", "b|c"), (("<x>", "1"),))
    lines = table.to_markdown().splitlines()
    assert lines[1] == "| --- | ---: |"
    assert "b\\|c" in lines[0]
    assert "&lt;x&gt;" in table.to_html()


class Reader(HTMLParser):
    """Collects tags and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_weak_spots_are_those_of_networks_that_draw_bleeds():
    assert "thin subdural" in notice(("background", "IPH", "SDH"))
    for classes in (("background", "anterior", "posterior"), ("background", "liver"), ()):
        assert notice(classes) == NOTICE
    page = Page("Title", "", (), notice=notice(("any",)))
    assert all("thin subdural" in text for text in (page.to_html(), page.to_markdown()))


def test_the_page_is_well_formed_and_needs_no_other_file():
    picture = Picture(b"\x89PNG", 'a <caption> & "more"')
    parts = ("words [#19d3f3] reference", Table(("a",), (("1",),)), picture)
    page = Page("Title", "sub", (("0.5", "Dice"),), (Section("One", parts),), "end")
    reader = Reader()
    reader.feed(page.to_html())
    assert reader.open == []
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "<script" not in page.to_html()
    for text in (page.to_html(), page.to_markdown()):
        assert NOTICE in text
        assert "One" in text
    assert 'style="background:#19d3f3"' in page.to_html()


def test_slices_center_on_the_lesion():
    mask = np.zeros((12, 4, 4), bool)
    mask[3:9, 1, 1] = True
    mask[6, 1:3, 1:3] = True
    empty = np.zeros_like(mask)
    assert figures.choose_slices(mask, empty, 3)[1] == 6
    assert figures.choose_slices(empty, mask, 3)[1] == 6
    assert figures.choose_slices(empty, empty, 3)[1] == 6
    edge = np.zeros_like(mask)
    edge[11] = True
    assert max(figures.choose_slices(edge, empty, 3)) == 11
    one = figures.choose_slices(mask[:1], mask[:1], 3)
    assert set(one) == {0}
    assert figures.choose_slices(mask[:2], mask[:2], 3) == [0, 1, 1]


@pytest.mark.parametrize(("most", "chosen"), [(1, [1, 5, 9]), (6, [2, 6, 10]), (15, [7, 11, 15])])
def test_the_slice_with_most_of_the_lesion_is_shown_wherever_it_lies(most, chosen, monkeypatch):
    """At the end of a scan the pictures went past it, from one end to the other."""
    mask = np.zeros((16, 6, 6), bool)
    mask[:, 2, 2] = True
    mask[most, 1:5, 1:5] = True
    assert figures.choose_slices(mask, mask & False, 3) == chosen
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    image = np.full(mask.shape, 40.0)
    figures.overlay_png(figures.Overlay(image, mask, mask, (5.0, 1.0, 1.0), (0, 80)))
    assert drawn[0].axes[0].get_title() == f"slice {most + 1} of 16"


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, "train/loss": 1 / s, "train/lr": 0.1, "time/step_s": 0.5} for s in (1, 2, 3)
    ]
    lines.append({"step": 3, "val/dice/any": None, "val/dice/mean": 0.4})
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "tra')
    return path


def test_a_line_cut_off_by_a_crash_is_left_out(records):
    assert len(step_log.read(records)) == 4
    assert step_log.read(records.with_name("none")) == []


def test_progress_is_drawn_from_what_there_is(records, tmp_path):
    out = tmp_path / "progress.png"
    figures.draw_progress(records, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_many_classes_keep_a_size_that_can_be_read(monkeypatch):
    """Thirteen panels in one line were 70 pixels wide each on the page."""
    drawn = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    names = [f"organ number {index}" for index in range(13)]
    figures.agreement_png({name: ([1.0, 20.0], [2.0, 10.0]) for name in names})
    figures.progress_png([{"step": 1, **{f"val/dice/{name}": 0.5 for name in names}}])
    panels, progress = drawn
    assert panels.get_figwidth() < 16
    assert [axis.get_title() for axis in panels.axes if axis.axison] == names
    progress.canvas.draw()
    (legend,) = progress.legends
    box, page = legend.get_window_extent(), progress.bbox
    assert 0 <= box.x0 < box.x1 <= page.width
    assert box.y0 >= progress.axes[0].get_window_extent().y1, "it covers no curve"
    looks = {(line.get_color(), line.get_linestyle()) for line in progress.axes[-1].lines}
    assert len(looks) == len(names)


def test_an_overlay_shows_both_contours(tmp_path):
    import matplotlib.image

    image = np.full((5, 40, 40), 40.0, np.float32)
    masks = np.zeros((2, 5, 40, 40), bool)
    masks[0, 2, 10:20, 10:20] = True
    masks[1, 2, 15:30, 15:30] = True
    png = tmp_path / "o.png"
    png.write_bytes(figures.overlay_png(figures.Overlay(image, *masks, (5.0, 1.0, 1.0), (0, 80))))
    pixels = matplotlib.image.imread(png)[..., :3]
    for color in ("#19d3f3", "#ff9f1c"):
        rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).max(-1) < 0.12).sum() > 20

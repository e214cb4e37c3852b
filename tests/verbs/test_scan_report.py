"""Reports of scans without references, the way from names to files, and what is unfinished."""

import csv
import dataclasses
import json
import re

import nibabel as nib
import numpy as np
import pytest
import tiny_run
from dicom_files import NAME, PATIENT, write_series

from bhsd_jax.assemble import data, devices, ensemble
from bhsd_jax.assemble.run import Run
from bhsd_jax.platform.errors import UserError
from bhsd_jax.report import niivue, viewer
from bhsd_jax.report.page import Page, Picture, Section, save
from bhsd_jax.report.result_tables import Table
from bhsd_jax.verbs import pages, predict, report, scan_report, shown
from bhsd_jax.volume import Case

needs_niivue = pytest.mark.skipif(not niivue.available(), reason="the extra `viewer` is missing")


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Compiling for eight devices takes longer; `tests/infer` does it."""
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def scans(tmp_path):
    """Two NIfTI files, one of them broken, and a tilted DICOM series with names to hide."""
    images = tmp_path / "images"
    images.mkdir()
    nib.save(nib.Nifti1Image(tiny_run.head(), tiny_run.upright()), images / "ID_1.nii.gz")
    (images / "ID_2.nii.gz").write_bytes(b"no scan")
    voxels = tiny_run.head(3).transpose(2, 1, 0)[:, ::-1, ::-1]
    write_series(images / NAME / "ct", voxels, tilt_deg=14.0, spacing_mm=(5.0, 2.0, 2.0))
    return images


def config_of(run, scans, out, **changes):
    return ensemble.run_of(run, images=str(scans), out=str(out), **changes).config


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@needs_niivue
def test_new_scans_get_a_report_and_a_viewer_without_references(run, scans, tmp_path, caplog):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="1 of 3 scans skipped"):
        predict.run(config_of(run, scans, out, report=True), run)
    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    names = {row["name"]: row["label_map"] for row in rows_of(out / "names.csv")}
    assert len(names) == 2
    assert all((out / place).is_file() for place in names.values())
    for text in (html, markdown):
        assert "1 of 3 scans could not be predicted" in text
        assert "Not predicted" in text
        assert all(name in text for name in names)
        assert not [word for word in (NAME, PATIENT, "ID_1", "ID_2") if word in text]
    assert '<a href="viewer.html">' in html
    assert "[Scroll through the scans](viewer.html)" in markdown
    volumes = [
        sum(row["ml"].values()) for row in json.loads((out / "volumes.json").read_text())["scans"]
    ]
    listed = [float(cell) for cell in re.findall(r"\| ([\d.]+) \| (?:gantry [^|]*)? ?\|", markdown)]
    assert listed == [round(volume, 1) for volume in sorted(volumes, reverse=True)]
    pictures = re.findall(r"!\[.*?\]\((report_pictures/\w+\.png)\)", markdown)
    assert len(pictures) == 2
    assert all((out / place).read_bytes().startswith(b"\x89PNG") for place in pictures)
    page = (out / "viewer.html").read_text()
    facts = json.loads(re.search(r'<script id="page"[^>]*>(.*?)</script>', page)[1])
    assert {case["name"] for case in facts["cases"]} == set(names)
    assert not [case for case in facts["cases"] if case["reference"]]
    tilted = [case for case in facts["cases"] if "shown upright" in case["flags"]]
    assert len(tilted) == 1
    assert not [word for word in (NAME, PATIENT, "ID_1") if word in page]


@needs_niivue
def test_the_verb_report_makes_it_later_and_shows_names_where_it_may(run, scans, tmp_path):
    out = tmp_path / "out"
    (scans / "ID_2.nii.gz").unlink()
    predict.run(config_of(run, scans, out), run)
    assert not (out / "report.html").exists()
    config = config_of(run, "", "")
    chosen = {"images": str(scans), "predictions": str(out), "show_ids": True, "viewer": True}
    asked = dataclasses.replace(config.report, **chosen)
    report.run(dataclasses.replace(config, report=asked), run)
    html = (out / "report.html").read_text()
    assert '<a href="ID_1.nii.gz">ID_1</a>' in html
    assert (out / "viewer.html").is_file()
    assert not (run / "report.html").exists()
    (out / "volumes.json").unlink()
    with pytest.raises(FileNotFoundError, match="run the verb `predict` first"):
        report.run(dataclasses.replace(config, report=asked), run)
    (out / "part_0_of_2").mkdir()
    with pytest.raises(FileNotFoundError, match=r"without num_parts, with .*overwrite=False"):
        report.run(dataclasses.replace(config, report=asked), run)


@needs_niivue
def test_where_no_scan_could_be_predicted_the_page_says_why(run, scans, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    alone.mkdir()
    (scans / "ID_2.nii.gz").rename(alone / "ID_2.nii.gz")
    out.mkdir()
    (out / "viewer.html").write_text("of a call before")
    with pytest.raises(ValueError, match=r"1 of 1 scans skipped, see .*ID_2"):
        predict.run(config_of(run, alone, out, report=True), run)
    text = (out / "report.md").read_text()
    assert "Not predicted" in text
    assert "0 scans without references" in text
    assert not (out / "viewer.html").exists()


def test_ct_that_networks_take_as_it_lies_is_shown_in_the_windows_of_ct(run, scans):
    """Imported nnU-Net models do; what lies in HU is seen as such on their pages, too."""
    opened = ensemble.run_of(run)
    plan = dataclasses.replace(opened.plan, normalize_first=True)
    opened = dataclasses.replace(opened, plan=plan)
    around = shown.around(opened, "", "", "", 1)
    assert around.windows == viewer.CT_WINDOWS
    assert around.auto, "and a scan that is not in HU in its own range"
    label = Case("a", "a", scans / "ID_1.nii.gz", None, "test")
    empty = nib.Nifti1Image(np.zeros(tiny_run.head().shape, np.uint8), tiny_run.upright())
    nib.save(empty, scans / "label.nii.gz")
    one = shown.read(opened, shown.Entry(label, scans / "label.nii.gz", "a", {}))
    assert scan_report._window(opened, one.image) == (0, 80)
    mr = np.random.default_rng(0).normal(400, 100, one.image.shape)
    low, high = scan_report._window(opened, mr)
    assert 100 < low < high < 900


def test_no_hidden_name_is_a_number_that_a_spreadsheet_writes_otherwise(tmp_path):
    (tmp_path / ".salt").write_text("5" * 32)
    names = data.short_names([f"scan {number}" for number in range(4000)], tmp_path, False).values()
    harmed = [name for name in names if re.fullmatch(r"\d+e\d+|0\d+", name)]
    assert not harmed, "some thirty of them would be"
    assert len(set(names)) == 4000


@pytest.mark.parametrize("name", ["ID_1.nii.gz", "ID_1_0000.nii.gz"])
def test_no_label_map_takes_the_place_of_a_scan(run, tmp_path, name):
    """`bhsd predict RUN FOLDER FOLDER`; also where one scan's label map has another's name."""
    nib.save(nib.Nifti1Image(tiny_run.head(), tiny_run.upright()), tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path)
    before = (tmp_path / name).read_bytes()
    config = config_of(run, tmp_path, tmp_path / "link")
    if "_0000" in name:
        predict.run(config, run)
        assert (tmp_path / "ID_1.nii.gz").is_file()
    else:
        with pytest.raises(UserError, match=r"ID_1\.nii\.gz: a scan, which its label map would re"):
            predict.run(config, run)
        assert {path.name for path in tmp_path.iterdir()} == {name, "link"}
    assert (tmp_path / name).read_bytes() == before


def test_a_scan_that_lost_its_intercept_is_shown_in_the_hu_that_the_network_saw(run, tmp_path):
    path, label, hu = tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz", tiny_run.head()
    affine = tiny_run.upright()
    nib.save(nib.Nifti1Image((hu + 1024).astype(np.int16), affine), path)
    nib.save(nib.Nifti1Image((hu > 60).astype(np.uint8), affine), label)
    case = shown.Case("a", "a", path, None, "test")
    found = shown.read(ensemble.run_of(run), shown.Entry(case, label, "a", {"IPH": 1.0}))
    seen = np.sort(found.image.ravel())
    np.testing.assert_array_equal(seen, np.sort(np.maximum(hu, -1024).ravel()))
    assert found.image[found.prediction > 0].min() > 60


@pytest.mark.parametrize("classes", [("lesion",), ("core", "edema")])
def test_voxels_that_are_not_annotated_are_shown_as_no_lesion(run, tmp_path, classes):
    """One voxel is outlined; 27 are to be ignored."""
    names = ("background", *classes)
    plan = dataclasses.replace(tiny_run.PLAN, classes=names, ignore=len(names))
    opened = Run.of(ensemble.run_of(run).config, run, plan)
    label = np.zeros(tiny_run.head().shape, np.uint8)
    label[10:13, 8:11, 3:6] = len(names)
    label[5, 5, 5] = 1
    for name, voxels in (("scan", tiny_run.head()), ("mask", label), ("map", label == 1)):
        image = nib.Nifti1Image(voxels.astype(np.int16), tiny_run.upright())
        nib.save(image, tmp_path / f"{name}.nii.gz")
    case = Case("a", "a", tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz", "test")
    found = shown.read(opened, shown.Entry(case, tmp_path / "map.nii.gz", "a", {}))
    assert found.reference.sum() == 1
    np.testing.assert_array_equal(found.reference, found.prediction)


def test_a_sheared_scan_is_shown_upright_with_its_bleeds_on_it(run, tmp_path):
    """A bar that stands upright in the patient runs askew in the voxels of a tilted stack."""
    voxels = np.full((20, 60, 40), -1000, np.int16)  # D H W
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -2], [0, -2, 0], [5, 0, 0]])
    affine[1, 0] = 2.0  # a slice up lies 2 mm, one row, further to the front
    for index in range(20):
        voxels[index, 25 + index : 30 + index, 15:20] = 60
    path, label = tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"
    ijk = affine[:, [2, 1, 0, 3]]
    nib.save(nib.Nifti1Image(voxels.transpose(2, 1, 0), ijk), path)
    nib.save(nib.Nifti1Image((voxels > 0).astype(np.uint8).transpose(2, 1, 0), ijk), label)
    case = shown.Case("a", "a", path, None, "test")
    opened = ensemble.run_of(run)
    found = shown.read(opened, shown.Entry(case, label, "a", {"IPH": 1.0, "SDH": 0.0}))
    assert found.flags == ("shown upright",)
    rows = [np.flatnonzero((found.image[d] > 0).any(1)).tolist() for d in range(20)]
    assert rows == [rows[0]] * 20
    np.testing.assert_array_equal(found.prediction > 0, found.image > 0)
    distance = abs(np.linalg.det(affine[:3, :3])) / 4  # between the slices
    assert found.spacing_mm == pytest.approx((distance, 2, 2))
    # The bar of 5 x 5 voxels and 10 mm around it, of 60 rows and the 19 that the shear adds.
    assert found.image.shape == found.prediction.shape == (20, 15, 15)


@needs_niivue
def test_slices_at_uneven_steps_are_shown_on_even_planes_with_their_bleeds(run, tmp_path):
    """A block of 60 HU in slices at 4 and 8 mm; its label map has a plane for each of them."""
    places = np.cumsum([0.0, *[4.0] * 6, *[8.0] * 5])
    voxels = np.full((12, 48, 40), -1000)
    voxels[:, 4:-4, 4:-4] = 20
    voxels[3:9, 20:30, 10:20] = 60
    write_series(tmp_path / "in", voxels, tilt_deg=12.0, spacing_mm=(4.0, 2.0, 2.0), places=places)
    out = tmp_path / "out"
    predict.run(config_of(run, tmp_path / "in", out, report=True), run)
    assert "12 slices at uneven steps, shown on 17 even planes" in (out / "viewer.html").read_text()
    (target,) = out.glob("*.nii.gz")
    label = nib.load(target)
    exact = np.asanyarray(label.dataobj)
    drawn = np.zeros_like(exact)
    drawn[10:20, 18:28, 3:9] = 1  # [column, row from below, slice]
    nib.save(nib.Nifti1Image(drawn, label.affine), target)
    (case,) = predict.find_scans(config_of(run, tmp_path / "in", out), run)
    found = shown.read(ensemble.run_of(run), shown.Entry(case, target, "a", {}))
    assert found.image.shape == found.prediction.shape
    planes = np.flatnonzero((found.prediction > 0).any((1, 2)))
    assert planes.tolist() == list(range(3, 12)), "12 to 44 mm, of two as near the lower"
    inside = found.image[found.prediction > 0]
    assert np.median(inside) == 60
    assert (inside >= 40).mean() > 0.9


def test_a_training_that_is_not_at_its_end_says_so(run, tmp_path):
    opened = ensemble.run_of(run)
    assert pages.unfinished(opened) == (), "weights that were imported have no log"
    other = dataclasses.replace(opened, folder=tmp_path)
    lines = [{"step": 50, "train/loss": 1.0}, {"step": 100, "train/loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (banner,) = pages.unfinished(other)
    assert "100 of 250000 steps" in banner
    train = dataclasses.replace(other.config.train, steps=100)
    config = dataclasses.replace(other.config, train=train)
    assert pages.unfinished(dataclasses.replace(other, config=config)) == ()


def test_pictures_of_the_markdown_page_lie_beside_it(tmp_path):
    one, two = Picture(b"\x89PNG1", "first"), Picture(b"\x89PNG2", "second")
    sections = (
        Section("A", ("words", one)),
        Section("B", (Table(("a",), (("x",),), {"x": "b c"}), two)),
    )
    page = Page("Title", "sub", (), sections)
    assert save(page, tmp_path) == tmp_path / "report.html"
    text = (tmp_path / "report.md").read_text()
    assert "![first](report_pictures/picture_01.png)" in text
    assert (tmp_path / "report_pictures" / "picture_02.png").read_bytes() == b"\x89PNG2"
    assert "[x](b%20c)" in text
    assert '<a href="b%20c">x</a>' in (tmp_path / "report.html").read_text()
    save(Page("Title", "sub", (), sections[:1]), tmp_path)
    assert [path.name for path in (tmp_path / "report_pictures").iterdir()] == ["picture_01.png"]

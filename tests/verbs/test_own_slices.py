"""Label maps on the slices that the scanner made, and the pair that ITK opens beside them."""

import dataclasses
import math
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_files import write_series
from enhanced_files import write_enhanced
from pydicom import dcmread
from scipy.interpolate import PchipInterpolator
from test_predict import CLASSES, PLAN, TILE

from bhsd_jax.assemble import predictor
from bhsd_jax.ct import geometry, nifti, own_slices, scan, shear, upright
from bhsd_jax.ct.prepare import prepare_case
from bhsd_jax.datasets import dicom as dicom_cases
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.volume import Case, Volume

POSTERIOR_FOSSA = np.cumsum([0, *[4.0] * 11, 1.1, *[7.0] * 8])  # of a real protocol
EVEN = np.arange(21) * 5.0
SHAPE, SPACING = (21, 96, 80), (5.0, 1.0, 1.2)  # the second: between slices, rows, columns
HALF_AXES = np.array([28.0, 26.0, 33.0])  # of the planted ellipsoid, mm along x, y, z
PLANNED = dataclasses.replace(PLAN, spacing_mm=(3.0, 1.5, 1.5), crop_hu=None)


def head(hu=30):
    """HU [slice, row, column]: a block of tissue in air."""
    made = np.full(SHAPE, -1000)
    made[:, 4:-4, 4:-4] = hu
    return made


def make(folder, kind, places):
    """A series in files; returns the headers of its slices, in order, as pydicom has them."""
    tilt = 18.5 if "tilted" in kind else 0.0
    source = folder.parent / "plain" if "enhanced" in kind else folder
    paths = write_series(source, head(), spacing_mm=SPACING, tilt_deg=tilt, places=places)
    headers = [dcmread(path) for path in paths]
    if "enhanced" in kind:
        write_enhanced(folder / "one.dcm", paths)
    return headers


def inside(points, center):
    """Above 0 inside the planted ellipsoid; about the depth in mm near its surface."""
    x, y, z = np.moveaxis((points - center) / HALF_AXES, -1, 0)
    return (1 - np.sqrt(x**2 + y**2 + z**2)) * HALF_AXES.min()


def on_slices(headers, center):
    """Whether each voxel of the files is in the ellipsoid, by the equation of DICOM PS3.3."""
    masks = []
    for data in headers:
        along = np.asarray(data.ImageOrientationPatient, float).reshape(2, 3)
        rows_mm, columns_mm = map(float, data.PixelSpacing)
        row, column = np.mgrid[: data.Rows, : data.Columns][..., None]
        place = np.asarray(data.ImagePositionPatient, float)
        place = place + column * columns_mm * along[0] + row * rows_mm * along[1]
        masks.append(inside(place * (-1, -1, 1), center) > 0)
    return np.stack(masks)


def integral_ml(masks, headers):
    """Areas over the distance of the slices along their normal, by the trapezoid rule."""
    along = np.asarray(headers[0].ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(*along)
    places = [np.asarray(h.ImagePositionPatient, float) @ normal for h in headers]
    areas = masks.sum((1, 2)) * math.prod(map(float, headers[0].PixelSpacing))
    return np.trapezoid(areas, places) / 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Planted(SlidingWindow):
    """A network that knows where the ellipsoid lies: its logits on the prepared grid."""

    scores: Any = None

    def logits(self, networks, image, *, fill, progress):
        assert image.shape[:3] == self.scores.shape
        return np.stack([np.zeros_like(self.scores), self.scores, self.scores - 99])


def planted(case, plan, center):
    grid = prepare_case(case, plan).grid
    ends = zip(grid.shape, grid.cropped_shape, grid.crop_start, strict=True)
    axes = [(np.arange(n) + 0.5) * old / n - 0.5 + start for n, old, start in ends]
    if grid.law == geometry.CENTERS:  # of a reversed axis it begins one voxel outside
        each = zip(grid.shape, grid.spacing_mm, grid.native_spacing_mm, grid.flip, strict=True)
        axes = [np.arange(n) * new / old - flip for n, new, old, flip in each]
    points = np.stack([*np.meshgrid(*axes, indexing="ij"), np.ones(grid.shape)], -1)
    native = np.ones_like(points)
    for axis, (own, flip) in enumerate(zip(grid.order, grid.flip, strict=True)):
        place = points[..., axis]
        native[..., own] = grid.native_shape[own] - 1 - place if flip else place
    world = (native @ np.asarray(grid.native_affine).T)[..., :3]
    return Planted(lambda params, raw: raw, TILE, scores=inside(world, center).astype(np.float32))


def predict(folder, target, *, center=None, headers=None, plan=PLANNED, unshear=False, **options):
    (case,) = dicom_cases.scans(folder, uneven="refuse", unshear=unshear)
    if center is None:
        volume, _ = scan.read(case.image)
        middle = (np.asarray(volume.voxels.shape) - 1) / 2
        center = (volume.affine @ np.append(middle, 1))[:3]
    run = predictor.Predictor(
        window=planted(case, plan, center),
        networks=[{}],
        fill=-1000.0,
        plan=plan,
        classes=CLASSES,
        **{"probabilities": False} | options,
    )
    return run(case, target, "scan"), run, case, center


@pytest.mark.parametrize("unshear", [False, True])
@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("uneven", POSTERIOR_FOSSA),
        ("tilted", EVEN),
        ("tilted, uneven", POSTERIOR_FOSSA),
        ("enhanced, uneven", POSTERIOR_FOSSA),
        ("enhanced, tilted, uneven", POSTERIOR_FOSSA),
    ],
)
def test_a_planted_bleed_comes_back_on_every_slice_with_its_volume(tmp_path, kind, places, unshear):
    headers = make(tmp_path / "dicom", kind, places)
    target = tmp_path / "out" / "scan.nii.gz"
    row, run, case, center = predict(tmp_path / "dicom", target, unshear=unshear)
    label = nib.load(target)
    assert label.shape == (80, 96, 21)
    found = np.asanyarray(label.dataobj).T[:, ::-1] == 1  # [slice, row, column] of the files
    if unshear and "tilted" in kind:  # the network's volume forgets where the gantry stood
        assert row.ml["IPH"] == pytest.approx(integral_ml(found, headers), rel=1e-6)
        assert row.ml["IPH"] == pytest.approx(4 / 3 * math.pi * HALF_AXES.prod() / 1000, rel=0.01)
    else:
        want = on_slices(headers, center)
        assert row.ml["IPH"] == pytest.approx(integral_ml(want, headers), rel=0.005)
        both = 2 * (found & want).sum() / (found.sum() + want.sum())
        assert both > 0.985, "Dice, of slices up to 7 mm apart"
    assert run.finished(case, target, "scan").ml == pytest.approx(row.ml)

    pair = upright.pair(target)
    image, mask = (sitk.ReadImage(str(path)) for path in pair)
    assert image.GetDirection() == mask.GetDirection()
    assert image.GetSize() == mask.GetSize()
    turn = np.reshape(image.GetDirection(), (3, 3))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    voxels = sitk.GetArrayFromImage(mask) == 1
    assert voxels.sum() * math.prod(mask.GetSpacing()) / 1000 == pytest.approx(
        row.ml["IPH"], rel=0.01
    )
    if not unshear:
        middle = np.argwhere(voxels).mean(0)[::-1]
        lps = mask.TransformContinuousIndexToPhysicalPoint(middle.tolist())
        np.testing.assert_allclose(np.multiply(lps, (-1, -1, 1)), center, atol=0.4)
    if "tilted" in kind:
        with pytest.raises(RuntimeError, match="orthonormal"):
            sitk.ReadImage(str(target))
    pair[1].unlink()
    assert run.finished(case, target, "scan") is None, "the pair belongs to it"


@pytest.mark.parametrize("axes", ["SPL", "IAR"])
def test_where_first_centers_coincide_a_bleed_comes_back_at_its_place_too(tmp_path, axes):
    """BLAST-CT's networks; the axes run with the file's or against them."""
    headers = make(tmp_path / "dicom", "uneven", POSTERIOR_FOSSA)
    spacing_mm = (1.5, 1.0, 1.2)
    plan = dataclasses.replace(PLANNED, spacing_mm=spacing_mm, axes=axes, law=geometry.CENTERS)
    target = tmp_path / "scan.nii.gz"
    row, *_, center = predict(tmp_path / "dicom", target, plan=plan, probabilities=True)
    want = on_slices(headers, center)
    assert row.ml["IPH"] == pytest.approx(integral_ml(want, headers), rel=0.005)
    found = np.asanyarray(nib.load(target).dataobj).T[:, ::-1] == 1
    assert 2 * (found & want).sum() / (found.sum() + want.sum()) > 0.995
    mask = nib.load(upright.pair(target)[1])
    middle = mask.affine @ np.append(np.argwhere(np.asanyarray(mask.dataobj) == 1).mean(0), 1)
    np.testing.assert_allclose(middle[:3], center, atol=0.3)
    chances = np.load(tmp_path / "scan_probabilities.npz")["probabilities"].astype(np.float32)
    sure = np.abs(chances[0] - chances[1]) > 1e-2
    np.testing.assert_array_equal(chances.argmax(0)[sure] == 1, found[:, ::-1][sure])


@pytest.mark.parametrize("kind", ["tilted, uneven", "enhanced, uneven"])
@pytest.mark.parametrize(("step_mm", "sure_mm"), [(5.0, math.inf), (4.0, 2.0), (5.0, 6.0)])
def test_thick_planes_of_the_network_cost_no_volume(tmp_path, monkeypatch, kind, step_mm, sure_mm):
    """Closed form and slices both; with logits that stop to grow where the network is sure."""
    depth = inside
    clipped = lambda *at: np.clip(depth(*at), -sure_mm, sure_mm)  # noqa: E731
    monkeypatch.setitem(globals(), "inside", clipped)
    headers = make(tmp_path / "dicom", kind, POSTERIOR_FOSSA)
    plan = dataclasses.replace(PLANNED, spacing_mm=(step_mm, 1.5, 1.5))
    row, *_, center = predict(tmp_path / "dicom", tmp_path / "out" / "scan.nii.gz", plan=plan)
    want = integral_ml(on_slices(headers, center), headers)
    assert row.ml["IPH"] == pytest.approx(want, rel=0.003)
    assert row.ml["IPH"] == pytest.approx(4 / 3 * math.pi * HALF_AXES.prod() / 1000, rel=0.004)


@pytest.mark.parametrize("kind", ["plain", "tilted", "enhanced, tilted"])
def test_thin_even_slices_get_their_own_answer_not_the_nearest_planes(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(globals(), "HALF_AXES", np.array([28.0, 26.0, 9.5]))
    headers = make(tmp_path / "dicom", kind, np.arange(21) * 2.5)
    plan = dataclasses.replace(PLANNED, spacing_mm=(5.0, 1.5, 1.5))
    target = tmp_path / "scan.nii.gz"
    row, *_, center = predict(tmp_path / "dicom", target, plan=plan, probabilities=True)
    want = on_slices(headers, center)
    assert row.ml["IPH"] == pytest.approx(integral_ml(want, headers), rel=0.005)
    found = np.asanyarray(nib.load(target).dataobj).T[:, ::-1] == 1
    assert 2 * (found & want).sum() / (found.sum() + want.sum()) > 0.98
    chances = np.load(tmp_path / "scan_probabilities.npz")["probabilities"].astype(np.float32)
    label = np.asanyarray(nib.load(target).dataobj).T
    sure = np.abs(chances[0] - chances[1]) > 1e-2
    np.testing.assert_array_equal(chances.argmax(0)[sure], label[sure])


def test_what_lies_between_planes_is_scipys_monotone_cubic_and_never_beyond_them():
    planes = np.random.default_rng(0).normal(size=(9, 5, 6)).astype(np.float32)
    places = np.linspace(1, 7, 50)
    want = PchipInterpolator(np.arange(9), planes)(places)
    np.testing.assert_allclose(own_slices.between(planes, places), want, atol=1e-6)
    places = np.linspace(0, 8, 70)
    found, below = own_slices.between(planes, places), planes[np.floor(places).astype(int)]
    above = planes[np.ceil(places).astype(int)]
    assert (found >= np.minimum(below, above) - 1e-6).all()
    assert (found <= np.maximum(below, above) + 1e-6).all()
    np.testing.assert_array_equal(own_slices.between(planes[:1], np.zeros(2)), planes[[0, 0]])
    lines = (1 - 0.3) * planes[:1] + 0.3 * planes[1:2]
    np.testing.assert_allclose(own_slices.between(planes[:2], np.array([0.3])), lines, atol=1e-6)


def test_what_is_added_to_all_logits_of_a_voxel_changes_nothing(tmp_path):
    make(tmp_path / "dicom", "uneven", POSTERIOR_FOSSA)
    _, run, case, _ = predict(tmp_path / "dicom", tmp_path / "one.nii.gz")
    grid = prepare_case(case, PLANNED).grid
    volume, _ = scan.read(case.image)
    own = own_slices.of(case.image, volume.voxels.shape, volume.affine)
    logits = run.window.logits(None, np.zeros(grid.shape), fill=0, progress=None)
    more = np.random.default_rng(0).normal(0, 9, grid.shape).astype(np.float32)
    np.testing.assert_array_equal(own.label(logits + more, grid), own.label(logits, grid))


def test_the_upright_scan_shows_what_the_scanner_saw_at_its_place(tmp_path):
    """A bead in one slice of a tilted series, of 1000 HU in tissue."""
    paths = write_series(tmp_path / "dicom", head(), spacing_mm=SPACING, tilt_deg=18.5)
    data = dcmread(paths[13])
    stored = data.pixel_array.copy()
    stored[30:33, 50:53] = 2024
    data.PixelData = stored.tobytes()
    data.save_as(paths[13])
    target = tmp_path / "scan.nii.gz"
    predict(tmp_path / "dicom", target)
    image = sitk.ReadImage(str(upright.pair(target)[0]))
    assert image.GetPixelID() == sitk.sitkInt16
    voxels = sitk.GetArrayFromImage(image).astype(float)
    weight = np.where(voxels > 100, voxels - 30, 0)
    assert set(np.flatnonzero(weight.sum((1, 2)))) == {13}, "slices are not blended"
    middle = [float((np.indices(weight.shape)[a] * weight).sum() / weight.sum()) for a in (2, 1, 0)]
    along = np.asarray(data.ImageOrientationPatient, float).reshape(2, 3)
    want = np.asarray(data.ImagePositionPatient, float) + 51 * 1.2 * along[0] + 31 * along[1]
    np.testing.assert_allclose(
        image.TransformContinuousIndexToPhysicalPoint(middle), want, atol=0.05
    )


def test_even_upright_scans_get_no_pair_and_itk_takes_the_label_map_itself(tmp_path):
    make(tmp_path / "dicom", "plain", EVEN)
    target = tmp_path / "scan.nii.gz"
    row, *_, center = predict(tmp_path / "dicom", target)
    assert not (tmp_path / upright.FOLDER).exists()
    mask = sitk.ReadImage(str(target))
    voxels = sitk.GetArrayFromImage(mask) == 1
    assert voxels.sum() * math.prod(mask.GetSpacing()) / 1000 == pytest.approx(row.ml["IPH"])
    middle = np.argwhere(voxels).mean(0)[::-1]
    lps = mask.TransformContinuousIndexToPhysicalPoint(middle.tolist())
    np.testing.assert_allclose(np.multiply(lps, (-1, -1, 1)), center, atol=0.1)


@pytest.mark.parametrize(("degrees", "refused"), [(0.002, False), (0.05, True), (0.4, True)])
def test_a_shear_too_small_to_be_called_tilt_gets_a_pair_where_itk_refuses(
    tmp_path, degrees, refused
):
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 5, 1, 1, 1
    affine[1, 0] = 5 * math.tan(math.radians(degrees))
    image = Volume(head().astype(np.int16), affine, "scan")
    nifti.write_volume(tmp_path / "images" / "scan.nii.gz", image)
    case = Case("scan", "scan", tmp_path / "images" / "scan.nii.gz", None, "test")
    target = tmp_path / "out" / "scan.nii.gz"
    center = (affine @ (10, 48, 40, 1))[:3]
    run = predictor.Predictor(
        window=planted(case, PLANNED, center),
        networks=[{}],
        fill=-1000.0,
        plan=PLANNED,
        classes=CLASSES,
        probabilities=False,
    )
    run(case, target, "scan")
    if not refused:
        sitk.ReadImage(str(target))
        assert not (target.parent / upright.FOLDER).exists()
        return
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(target))
    scanned, mask = (sitk.ReadImage(str(path)) for path in upright.pair(target))
    middle = np.argwhere(sitk.GetArrayFromImage(mask) == 1).mean(0)[::-1]
    lps = scanned.TransformContinuousIndexToPhysicalPoint(middle.tolist())
    np.testing.assert_allclose(np.multiply(lps, (-1, -1, 1)), center, atol=0.3)


def test_rows_and_columns_rounded_off_a_right_angle_are_turned_onto_it():
    affine = np.diag([5.0, -1.0, 1.0, 1.0])
    affine[1, 2] = 4e-4
    affine[:3, 3] = 10, 20, 30
    made = shear.moved_affine(affine, (9, 40, 50))
    unit = made[:3, :3] / np.linalg.norm(made[:3, :3], axis=0)
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-12)
    corners = np.array([(0, 0, 0, 1), (8, 39, 49, 1)]).T
    assert np.abs((made - affine) @ corners).max() < 0.01


def test_probabilities_lie_on_the_slices_and_agree_with_the_label_map(tmp_path):
    make(tmp_path / "dicom", "uneven", POSTERIOR_FOSSA)
    target = tmp_path / "scan.nii.gz"
    predict(tmp_path / "dicom", target, probabilities=True)
    found = np.load(tmp_path / "scan_probabilities.npz")["probabilities"]
    assert found.shape == (3, *SHAPE)
    np.testing.assert_allclose(found.astype(np.float32).sum(0), 1, atol=2e-3)
    label = np.asanyarray(nib.load(target).dataobj).T
    sure = np.abs(found[0].astype(float) - found[1]) > 1e-2
    np.testing.assert_array_equal(found.argmax(0)[sure], label[sure])


def test_missing_and_doubled_slices_are_refused_with_the_flag_that_helps(tmp_path):
    paths = write_series(tmp_path / "missing", head(), spacing_mm=SPACING)
    paths[5].unlink()
    flag = r"--config\.predict\.dicom\.uneven=resample"
    with pytest.raises(ValueError, match=rf"1 slice is missing: 10\.00 mm after slice 5.*{flag}"):
        predict(tmp_path / "missing", tmp_path / "out.nii.gz")
    (case,) = dicom_cases.scans(tmp_path / "missing", uneven="resample", unshear=False)
    volume, _ = scan.read(case.image)
    own = own_slices.of(case.image, volume.voxels.shape, volume.affine)
    assert own.shape == (20, 96, 80), "none for the slice that was filled in"
    np.testing.assert_allclose(own.widths_mm[3:7], (5, 7.5, 7.5, 5))

    second = head()
    second[7] += 9
    write_series(tmp_path / "twice", head(), spacing_mm=SPACING)
    write_series(
        tmp_path / "twice",
        second[7:8],
        spacing_mm=SPACING,
        places=[35.0],
        names=["again"],
    )
    with pytest.raises(ValueError, match="two different slices at one position"):
        predict(tmp_path / "twice", tmp_path / "out.nii.gz")


def test_a_stack_whose_number_of_slices_stays_is_interpolated_too(tmp_path):
    """One slice of an even stack out of its place."""
    places = EVEN.copy()
    places[9] += 2
    ramp = np.broadcast_to(np.rint(10 * places).astype(int)[:, None, None], SHAPE)
    write_series(tmp_path, ramp, spacing_mm=SPACING, places=places)
    (case,) = dicom_cases.scans(tmp_path, uneven="refuse", unshear=False)
    volume, _ = scan.read(case.image)
    np.testing.assert_allclose(volume.voxels[:, 50, 50], 10 * EVEN, atol=1e-3)
    own = own_slices.of(case.image, volume.voxels.shape, volume.affine)
    np.testing.assert_allclose(own.places * 5, places)

import numpy as np
import pytest
from scipy import ndimage

from bhsd_jax.phantom.bleeds import EDH, IPH, IVH, SAH, SDH, class_set, lowest
from bhsd_jax.phantom.case import VERSION, Options, make_case
from bhsd_jax.phantom.flaws import METAL_HU

SMALL = {"size": 48, "slices": 10}


def _gap_to_bone_mm(hu, label, scan):
    to_bone = ndimage.distance_transform_edt(
        hu < 300, sampling=(scan.thick_mm, scan.pixel_mm, scan.pixel_mm)
    )
    return to_bone[label > 0]


def test_a_case_depends_on_its_seed_alone():
    first, again, other = (make_case(s, Options(**SMALL)) for s in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert first[2] == again[2]
    assert (first[0] != other[0]).mean() > 0.05


def test_version_2_is_pinned():
    hu, label, truth = make_case(2030, Options(**SMALL, classes=(1, 2, 3, 4, 5), pad_hu=0))
    assert VERSION == 2
    assert (hu.shape, hu.dtype, label.dtype) == ((10, 48, 48), np.int16, np.uint8)
    assert np.bincount(label.ravel(), minlength=6).tolist() == [22833, 158, 2, 7, 5, 35]
    # Last bits of cos and exp differ between processors.
    np.testing.assert_allclose(hu.mean(), -641.86, atol=0.05)
    np.testing.assert_allclose(np.median(hu[label > 0]), 63.0, atol=1)
    assert truth.scan.tilt_deg == -18.5


@pytest.mark.parametrize("index", range(1, 6))
def test_a_bleed_has_the_volume_asked_for(index):
    options = Options(size=64, slices=16, classes=(index,), volumes_ml={index: 6.0})
    _, label, truth = make_case(11, options)
    assert set(np.unique(label)) == {0, index}
    assert abs((label == index).sum() * truth.scan.voxel_ml - 6) <= truth.scan.voxel_ml


def test_a_bleed_too_big_for_its_place_fills_it():
    labels = [
        make_case(3, Options(**SMALL, classes=(IVH,), volumes_ml={IVH: ml}))[1] for ml in (400, 900)
    ]
    np.testing.assert_array_equal(*labels)
    assert labels[0].any()


@pytest.mark.parametrize("seed", [1, 2, 3, 5])  # whose SDH lie over the convexity
@pytest.mark.parametrize(("index", "median_mm", "largest_mm"), [(EDH, 12, 30), (SDH, 9, 26)])
def test_extra_axial_bleeds_lie_against_the_skull(index, median_mm, largest_mm, seed):
    options = Options(size=96, slices=24, tilt_deg=0.0, classes=(index,), volumes_ml={index: 10.0})
    hu, label, truth = make_case(seed, options)
    gap = _gap_to_bone_mm(hu, label, truth.scan)
    assert np.median(gap) < median_mm
    assert gap.max() < largest_mm
    assert gap.min() < 4


@pytest.mark.parametrize("index", [EDH, SDH])
def test_extra_axial_bleeds_stay_on_one_side(index):
    options = Options(size=96, slices=24, tilt_deg=0.0, classes=(index,), volumes_ml={index: 15.0})
    _, label, truth = make_case(2, options)
    d, h, w = np.nonzero(label)
    x = -(truth.scan.true_affine @ (d, h, w, np.ones(d.size)))[0]
    y = (truth.scan.true_affine @ (d, h, w, np.ones(d.size)))[1]
    yaw = np.deg2rad(truth.scan.yaw_deg)
    left = x * np.cos(yaw) - y * np.sin(yaw) - truth.scan.offset_mm[0]
    assert min((left > 8).sum(), (left < -8).sum()) == 0


@pytest.mark.parametrize(("index", "low", "high"), [(IVH, 0, 24), (SAH, 5, 32), (IPH, 26, 45)])
def test_other_bleeds_replace_the_tissue_they_belong_to(index, low, high):
    # The same head without bleeding shows what was there: CSF, CSF of thin sulci, brain.
    options = {"size": 128, "slices": 24, "pad_hu": 0, "tilt_deg": 0.0}
    for seed in (21, 22, 23):
        before, _, _ = make_case(seed, Options(classes=(), **options))
        hu, label, _ = make_case(
            seed, Options(classes=(index,), volumes_ml={index: 2.0}, **options)
        )
        assert low < np.median(before[label > 0]) < high
        assert np.median(hu[label > 0]) > np.median(before[label > 0]) + 4


def test_bleeds_leave_the_skull_and_all_around_it_as_they_are():
    options = {**SMALL, "sub": 1}  # no voxel is part bone, part brain
    before, _, _ = make_case(9, Options(classes=(), **options))
    hu, label, _ = make_case(9, Options(classes=(1, 2, 3, 4, 5), **options))
    soft = (before > -200) & (before < 200)
    apart = ~ndimage.binary_dilation(soft, np.ones((1, 3, 3)))
    assert label.any()
    assert 0.3 < apart.mean() < 0.9
    np.testing.assert_array_equal(hu[apart], before[apart])


def test_blood_in_the_ventricles_sinks_to_the_back():
    rows = []
    for seed in range(8):
        _, label, _ = make_case(seed, Options(size=64, slices=16, classes=(IVH,), tilt_deg=0.0))
        rows.append(np.nonzero(label)[1].mean())
    assert np.mean(rows) < 31.5 - 3  # rows run anterior


def test_no_classes_give_an_empty_mask():
    _, label, _ = make_case(1, Options(**SMALL, classes=()))
    assert not label.any()


def test_easy_bleeds_stand_out_more():
    contrast = {}
    for level in ("default", "easy"):
        found = []
        for seed in range(6):
            options = Options(size=64, slices=16, classes=(IPH,), difficulty=level)
            hu, label, _ = make_case(seed, options)
            found.append(np.median(hu[label > 0]) - 34)
        contrast[level] = np.mean(found)
    assert contrast["easy"] > 1.7 * contrast["default"]


def test_class_sets_have_the_counts_of_bhsd():
    sets = [class_set(i / 192) for i in range(192)]
    counts = [sum(c in s for s in sets) for c in range(1, 6)]
    assert counts == [23, 127, 104, 109, 70]
    sizes = [len(s) for s in sets]
    assert (sizes.count(1), sizes.count(2)) == (49, 48)
    singles = [sum(s == (c,) for s in sets) for c in range(1, 6)]
    assert singles == [11, 11, 8, 9, 10]
    with pytest.raises(ValueError, match="not in"):
        class_set(1.0)


def test_lowest_agrees_with_a_full_sort():
    values = np.random.default_rng(0).normal(size=50)
    for count in (0, 0.2, 1, 7.4, 50, 80):
        wanted = max(round(count), int(count > 0))
        np.testing.assert_array_equal(lowest(values, count), np.argsort(values)[:wanted])


def test_slices_lie_where_the_true_affine_says():
    options = Options(size=16, slices=5, sub=1, tilt_deg=-20.0, classes=())
    scan = make_case(0, options)[2].scan
    scan = type(scan)(
        **vars(scan) | {"yaw_deg": 0.0, "roll_deg": 0.0, "offset_mm": (0.0, 0.0, 0.0)}
    )
    d, h, w = (g.ravel() for g in np.indices((5, 16, 16)))
    world = scan.true_affine @ np.stack((d, h, w, np.ones(d.size)))
    planes = [scan.plane(k) for k in range(5)]
    for axis, sign in ((0, -1), (1, 1), (2, 1)):  # world x runs right, the patient's left
        points = np.concatenate([plane[axis].ravel() for plane in planes])
        np.testing.assert_allclose(sign * points, world[axis], atol=1e-3)


def test_the_stored_affine_hides_the_shear_as_bhsd_does():
    scan = make_case(0, Options(**SMALL, tilt_deg=-18.5, classes=()))[2].scan
    stored, true = scan.stored_affine[:3, :3], scan.true_affine[:3, :3]
    gram = stored.T @ stored
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9)
    np.testing.assert_allclose(np.diag(gram), np.diag(true.T @ true))
    cos = np.cos(np.deg2rad(18.5))
    np.testing.assert_allclose(abs(np.linalg.det(true)), 1000 * scan.voxel_ml)
    np.testing.assert_allclose(abs(np.linalg.det(stored)) * cos, 1000 * scan.voxel_ml)
    np.testing.assert_allclose(scan.feed_mm * cos, 16.0)  # 160 mm over 10 slices


@pytest.mark.parametrize("pad_hu", [0, -2048, -3024])
def test_padding_fills_what_the_circle_leaves_out(pad_hu):
    hu, _, truth = make_case(4, Options(**SMALL, pad_hu=pad_hu))
    across = (np.arange(48) - 23.5) * truth.scan.pixel_mm
    outside = np.hypot(across[:, None], across) > truth.scan.field_mm / 2
    assert hu[:, ~outside].min() >= -1024
    assert hu.max() <= 3071
    if pad_hu:
        assert (hu[:, outside] == pad_hu).all()
    else:
        assert hu.min() >= -1024


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"size": 0}, "must be > 0"),
        ({"difficulty": "hard"}, "use default, large, easy"),
        ({"classes": (6,)}, "classes 1 to 5"),
        ({"volumes_ml": {0: 1.0}}, "classes 1 to 5"),
    ],
)
def test_bad_options_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        Options(**bad)


def test_metal_is_a_bright_spot_with_streaks_in_its_slice_alone():
    plain, label, _ = make_case(7, Options(size=64, slices=12, pad_hu=-2048))
    hu, same, _ = make_case(7, Options(size=64, slices=12, pad_hu=-2048, metal=True))
    np.testing.assert_array_equal(label, same)
    assert hu.max() == METAL_HU
    spoiled = np.flatnonzero((hu != plain).any((1, 2)))
    assert len(spoiled) == 1
    (plane,) = spoiled
    moved = (hu - plain.astype(int))[plane]
    coil = hu[plane] == METAL_HU
    assert 1 <= coil.sum() <= 20
    assert moved[~coil].min() < -50
    assert moved[~coil].max() > 50
    np.testing.assert_array_equal(hu[plain == -2048], -2048)


def test_another_rater_moves_outlines_by_a_pixel_and_loses_no_class():
    options = {"size": 96, "slices": 12, "classes": (IPH, SDH), "volumes_ml": {IPH: 30.0}}
    hu, label, _ = make_case(5, Options(**options))
    same, drawn, _ = make_case(5, Options(**options, rater_noise=True))
    np.testing.assert_array_equal(hu, same)
    assert (drawn != label).any()
    assert set(np.unique(drawn)) == set(np.unique(label))
    square = np.ones((1, 3, 3), bool)
    grown = ndimage.binary_dilation(label > 0, square)
    shrunk = ndimage.binary_erosion(label > 0, square)
    assert not (drawn[~grown]).any()
    assert (drawn[shrunk] > 0).all()
    kept = (drawn > 0) & (label > 0)
    np.testing.assert_array_equal(drawn[kept], label[kept])  # nothing grows over another class
    assert (drawn > 0).sum() > (label > 0).sum()  # raters tend to draw loosely

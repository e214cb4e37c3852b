import dataclasses
import hashlib

import numpy as np
import pytest
from turned import stored

from bhsd_jax.ct import geometry, hu, nifti, prepare
from bhsd_jax.ct.prepared import Facts
from bhsd_jax.defects import Finding, Kind, Refusal, texts
from bhsd_jax.nnunet.dataset_plan import make_plan
from bhsd_jax.volume import SOME, Case, Channel, Channels, Network, Plan, Volume

CANONICAL = ((0, 0, -1, 10), (0, -1, 0, 20), (1, 0, 0, -5))  # D up, H to the back, W to the left
CLASSES = ("background", "a", "b")


def affine(spacing_mm, rows=CANONICAL):
    made = np.eye(4)
    made[:3] = rows
    made[:3, :3] *= np.asarray(spacing_mm)
    return made


def a_plan(modality, spacing_mm, crop_hu=None):
    return Plan(
        dataset="made up",
        classes=CLASSES,
        modality=modality,
        spacing_mm=spacing_mm,
        transpose=(0, 1, 2),
        crop_hu=crop_hu,
        foreground=(0.0, 0.0, 1.0, 1.0),
        median_shape=(8, 16, 16),
        network=Network((8, 16, 16), 2, (8,), ((1, 1, 1),), ((3, 3, 3),), (2,), (), True),
        source_sha256="",
    )


def store(folder, voxels, label=None, *, matrix, **known):
    nifti.write_volume(folder / "scan.nii.gz", Volume(voxels, matrix, "scan"))
    path = None
    if label is not None:
        path = folder / "mask.nii.gz"
        nifti.write_volume(path, Volume(label, matrix, "scan"))
    return Case("scan", "patient", folder / "scan.nii.gz", path, "train", **known)


@pytest.fixture
def head(tmp_path):
    """A block of brain in air, padded outside the field of view, with two bleeds."""
    voxels = np.full((10, 24, 24), -1000, np.float32)
    voxels[3:9, 4:20, 4:20] = np.random.default_rng(0).normal(40, 5, (6, 16, 16))
    voxels[0, 0] = -3024
    label = np.zeros(voxels.shape, np.uint8)
    label[4, 8:12, 8:10] = 1
    label[5:7, 10:13, 9:14] = 2
    return store(tmp_path, voxels, label, matrix=affine((5.0, 1.0, 1.0)))


@pytest.fixture
def mr(tmp_path):
    random = np.random.default_rng(1)
    voxels = np.zeros((12, 18, 14), np.float32)
    voxels[1:11, 2:17, 1:13] = random.uniform(1, 3e5, (10, 15, 12))
    return store(tmp_path, voxels, matrix=affine((1.0, 1.2, 1.0)))


def test_ct_is_rounded_hu_in_int16_and_untouched_where_the_grid_does_not_change(head):
    made = prepare.prepare_case(head, a_plan("ct", (5.0, 1.0, 1.0), crop_hu=-200.0))
    assert made.image.dtype == np.int16
    native = nifti.read(head.image).voxels
    box = tuple(map(slice, made.grid.crop_start, made.grid.crop_stop))
    expected = np.rint(np.maximum(native, -1024))[box]
    np.testing.assert_array_equal(made.image, expected)
    assert made.image.min() >= -1024
    np.testing.assert_array_equal(made.label, nifti.read(head.label).voxels[box])


def test_ct_is_rounded_not_cut_after_resampling(head):
    made = prepare.prepare_case(head, a_plan("ct", (5.0, 0.7, 0.7), crop_hu=-200.0))
    voxels = np.maximum(nifti.read(head.image).voxels, -1024)
    exact = geometry.to_grid(voxels, made.grid, "image")
    assert np.abs(made.image - exact).max() <= 0.5
    assert made.image.shape == made.label.shape == made.grid.shape


def test_mr_has_mean_zero_and_deviation_one_over_the_cropped_scan_before_resampling(mr):
    same = prepare.prepare_case(mr, a_plan("mr", (1.0, 1.2, 1.0))).image
    assert same.dtype == np.float32
    assert same.shape == (10, 15, 12)  # non-zero voxels
    assert abs(same.astype(np.float64).mean()) < 1e-6
    assert abs(same.astype(np.float64).std() - 1) < 1e-6
    native = nifti.read(mr.image).voxels
    inside = native[native != 0].astype(np.float64)
    plan = a_plan("mr", (2.0, 2.0, 2.0))
    made = prepare.prepare_case(mr, plan)
    standard = ((native - inside.mean()) / inside.std()).astype(np.float32)
    expected = geometry.to_grid(standard, made.grid, "image")
    np.testing.assert_allclose(made.image, expected, atol=1e-5)
    assert abs(made.image.std() - 1) > 0.1  # it has been smoothed since


def test_skull_stripped_mr_is_normalized_inside_the_brain_and_stays_zero_outside(tmp_path):
    """NnU-Net v2.8.1: z-scores of the non-zero voxels and of the holes in them."""
    random = np.random.default_rng(2)
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (16, 24, 20)], indexing="ij"))
    brain = (at**2).sum(0) < 0.6
    voxels = np.where(brain, random.normal(500, 80, brain.shape), 0).astype(np.float32)
    voxels[8, 12, 10] = 0  # a hole, which is brain
    case = store(tmp_path, voxels, matrix=affine((1.0, 1.0, 1.0)))
    fact = prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)
    plan = a_plan("mr", (1.0, 1.0, 1.0))
    whole = prepare.prepare_case(case, plan)
    assert fact.relative_size == pytest.approx(whole.image.size / voxels.size)
    assert fact.relative_size < 0.75
    made = prepare.prepare_case(case, dataclasses.replace(plan, use_mask_for_norm=True))
    mask = geometry.to_grid(brain.astype(np.uint8), made.grid, "label") > 0
    inside = made.image[mask].astype(np.float64)
    assert abs(inside.mean()) < 1e-6
    assert abs(inside.std() - 1) < 1e-6
    np.testing.assert_array_equal(made.image[~mask], 0)
    assert whole.image[~mask].max() < -0.5, "over the whole crop, background is no 0"
    expected = (0 - voxels[brain].mean(dtype=float)) / voxels[brain].std(dtype=float)
    assert made.image.min() == pytest.approx(expected, rel=1e-5), "the hole is no background"


def test_what_resampling_spreads_beyond_the_brain_is_zero_in_training(tmp_path):
    """nnU-Net's segmentation is -1 there, and its augmentation sets such voxels to 0."""
    voxels = np.zeros((10, 20, 18), np.float32)
    voxels[2:9, 4:15, 3:14] = np.random.default_rng(0).uniform(50, 90, (7, 11, 11))
    voxels[4:6, 8:10, 7:9] = 0  # a hole, which is brain
    voxels[0, 0, 0], voxels[-1, -1, -1] = 70, 70  # so that the crop is the whole scan
    case = store(tmp_path, voxels, matrix=affine((1.0, 1.0, 1.0)))
    plan = dataclasses.replace(a_plan("mr", (0.75, 0.6, 1.3)), use_mask_for_norm=True)
    channels = dataclasses.replace(
        plan,
        channels=(
            Channel("a", "NoNormalization", plan.foreground),
            Channel("b", "ZScoreNormalization", plan.foreground, masked=True),
        ),
    )
    seen = prepare.prepare_case(case, plan).image
    made = prepare.prepare_case(case, plan, to_train=True).image
    outside = made != seen
    assert 0.1 < outside.mean() < 0.9
    assert (made[outside] == 0).all()
    whole = np.zeros(voxels.shape, np.uint8)
    whole[2:9, 4:15, 3:14] = whole[0, 0, 0] = whole[-1, -1, -1] = 1
    label = dataclasses.replace(case, label=tmp_path / "mask.nii.gz")
    nifti.write_volume(label.label, Volume(whole, affine((1.0, 1.0, 1.0)), "scan"))
    assert not made[prepare.prepare_case(label, plan).label == 0].any()
    both = dataclasses.replace(case, image=Channels((case.image, case.image), 2))
    made, seen = (prepare.prepare_case(both, channels, to_train=t).image for t in (True, False))
    np.testing.assert_array_equal(made[..., 0], seen[..., 0])
    assert (made[..., 1] != seen[..., 1]).any()


def test_a_mask_of_mr_does_not_say_that_the_scan_bleeds(tmp_path, mr):
    voxels = nifti.read(mr.image).voxels
    label = np.zeros(voxels.shape, np.uint8)
    label[5:7, 5:9, 5:8] = 1
    case = store(tmp_path, voxels, label, matrix=affine((1.0, 1.2, 1.0)))
    facts = prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)
    made = prepare.prepare_case(case, a_plan("mr", (1.0, 1.2, 1.0)))
    assert facts.bleeding is made.bleeding is None
    known = dataclasses.replace(case, bleeding=True)
    facts = prepare.fingerprint_case(known, num_classes=3, modality="mr", crop_hu=None)
    assert facts.bleeding is True, "unless the data set says so"


def test_a_masked_scan_of_zeros_does_not_divide_by_zero(tmp_path):
    empty = store(tmp_path, np.zeros((8, 8, 8), np.float32), matrix=affine((1.0, 1.0, 1.0)))
    plan = dataclasses.replace(a_plan("mr", (1.0, 1.0, 1.0)), use_mask_for_norm=True)
    np.testing.assert_array_equal(prepare.prepare_case(empty, plan).image, np.zeros((8, 8, 8)))


def test_a_scan_of_one_value_does_not_divide_by_zero(tmp_path):
    flat = store(tmp_path, np.full((8, 8, 8), 7, np.float32), matrix=affine((1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(
        prepare.prepare_case(flat, a_plan("mr", (1.0, 1.0, 1.0))).image, np.zeros((8, 8, 8))
    )


def test_a_ct_of_one_value_is_told_to_all_who_use_the_scan(tmp_path):
    """It passed for a scan without a bleed: -1024 everywhere is air."""
    for value in (-1024, 0):
        flat = store(tmp_path, np.full((12, 12, 12), value, np.int16), matrix=affine((1, 1, 1)))
        facts = prepare.fingerprint_case(flat, num_classes=2, modality="ct", crop_hu=-200.0)
        (found,) = (one for one in facts.findings if one.kind is Kind.BLANK)
        assert found.done == "kept"
        assert f"every voxel is {value}" in found.text
        assert prepare.doubts_of([found]) == (found.text,)


@pytest.mark.parametrize("up", [True, False])
def test_slices_of_one_value_between_others_are_told_to_all_who_use_the_scan(tmp_path, up):
    """As files that were cut off and filled up with zeros; at an end they say nothing."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 60, (10, 12, 12)).astype(np.int16)
    voxels[[0, 1, 9]] = -1024
    for blank, said in (([], []), ([3, 4], ["2 of 10 slices", "slice 4 from below"])):
        voxels[blank] = -1024
        turned = voxels if up else voxels[::-1]
        matrix = affine((5.0, 1.0, 1.0))
        matrix[2] *= 1 if up else -1
        case = store(tmp_path, turned, matrix=matrix)
        facts = prepare.fingerprint_case(case, num_classes=2, modality="ct", crop_hu=-200.0)
        found = [one for one in facts.findings if one.kind is Kind.BLANK_SLICES]
        assert all(words in found[0].text for words in said)
        assert len(found) == bool(said)
        assert prepare.doubts_of(found) == tuple(texts(found))


def test_the_file_order_of_axes_does_not_matter(tmp_path, head):
    """One scan stored twice, the second time with other axes and directions."""
    plan = a_plan("ct", (5.0, 1.0, 1.0), crop_hu=-200.0)
    first = prepare.prepare_case(head, plan)
    other = tmp_path / "other"
    other.mkdir()
    image, label = nifti.read(head.image), nifti.read(head.label)
    new = [
        stored(v.voxels, v.affine, order=(2, 0, 1), flips=(False, True, False))
        for v in (image, label)
    ]
    again = prepare.prepare_case(
        store(other, new[0].voxels, new[1].voxels.astype(np.uint8), matrix=new[0].affine), plan
    )
    np.testing.assert_array_equal(again.image, first.image)
    np.testing.assert_array_equal(again.label, first.label)
    np.testing.assert_allclose(again.volume_ml, first.volume_ml)


@pytest.mark.parametrize("feed", [True, False])
def test_volumes_are_native_and_corrected_for_the_tilt_of_such_a_set(tmp_path, head, feed):
    made = prepare.prepare_case(head, a_plan("ct", (5.0, 0.5, 0.5), crop_hu=-200.0))
    np.testing.assert_allclose(made.volume_ml[1:], (8 * 5 / 1000, 30 * 5 / 1000))
    facts = prepare.fingerprint_case(head, num_classes=3, modality="ct", crop_hu=-200.0)
    np.testing.assert_allclose(facts.volume_ml, made.volume_ml)
    angle = np.radians(20.0)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    (tmp_path / "tilted").mkdir()
    volume, label = nifti.read(head.image), nifti.read(head.label)
    tilted = store(
        tmp_path / "tilted",
        volume.voxels,
        label.voxels.astype(np.uint8),
        matrix=turn @ volume.affine,
    )
    tilted = dataclasses.replace(tilted, table_feed=feed)
    facts = prepare.fingerprint_case(tilted, num_classes=3, modality="ct", crop_hu=-200.0)
    assert abs(facts.tilt_deg) == pytest.approx(20.0, abs=1e-3)
    assert facts.tilt_corrected == feed
    kinds = {finding.kind for finding in facts.findings}
    assert (Kind.TILT_AMBIGUOUS in kinds) != feed
    expected = 0.04 * np.cos(angle) if feed else 0.04
    assert facts.volume_ml[1] == pytest.approx(expected, rel=1e-5)
    made = prepare.prepare_case(tilted, a_plan("ct", (5.0, 1.0, 1.0), crop_hu=-200.0))
    assert made.volume_ml[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("total", "kept"), [(0, 0), (37, 37), (10_000, 10_000), (12_345, 10_000)])
def test_foreground_lists_hold_voxels_of_their_class_without_repeats(total, kept):
    label = np.zeros((30, 40, 50), np.uint8)
    label.ravel()[np.random.default_rng(3).choice(label.size, total, replace=False)] = 2
    first, second = prepare.foreground_positions(label, 3)
    assert first.shape == (0, 3)
    assert second.shape == (kept, 3)
    assert second.dtype == np.int32
    assert len(np.unique(second, axis=0)) == kept
    assert (label[tuple(second.T)] == 2).all()


def test_foreground_lists_of_huge_lesions_hold_one_percent_rounded_up():
    label = np.ones((110, 101, 100), np.uint8)
    (positions,) = prepare.foreground_positions(label, 2)
    assert len(positions) == 11_110
    label[0, 0, 0] = 0
    assert len(prepare.foreground_positions(label, 2)[0]) == 11_110  # 1 % of 1 110 999, rounded up


def test_foreground_lists_cover_the_scan_and_repeat_from_call_to_call():
    label = np.zeros((40, 40, 40), np.uint8)
    label[:] = 1
    one, two = (prepare.foreground_positions(label, 2)[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one.mean(axis=0), 19.5, atol=0.6)


def test_without_a_mask_there_are_empty_lists_for_every_class():
    assert [p.shape for p in prepare.foreground_positions(None, 4)] == [(0, 3)] * 3


def test_facts_count_the_crop_and_draw_intensities_inside_the_mask_only(head):
    facts = prepare.fingerprint_case(
        head, num_classes=3, modality="ct", crop_hu=None, samples=5_000
    )
    assert facts.shape == (10, 24, 24)
    assert facts.spacing_mm == pytest.approx((5.0, 1.0, 1.0))
    assert facts.voxels == (10 * 24 * 24 - 38, 8, 30)
    assert facts.foreground.shape == (5_000,)
    voxels, label = nifti.read(head.image).voxels, nifti.read(head.label).voxels
    inside = set(voxels[label > 0].tolist())
    assert set(facts.foreground.tolist()) == inside  # 5000 draws with replacement from 38
    assert facts.intensity == (-3024.0, pytest.approx(float(np.median(voxels))), voxels.max())
    _, repairs = hu.repair(voxels)
    assert repairs
    assert set(texts(repairs)) <= set(facts.warnings)
    assert facts.bleeding is True


def test_facts_warn_of_empty_masks_masks_outside_the_head_and_windowed_scans(tmp_path, head):
    voxels = nifti.read(head.image).voxels
    label = np.zeros(voxels.shape, np.uint8)
    empty = store(tmp_path, voxels, label, matrix=affine((5.0, 1.0, 1.0)))
    facts = prepare.fingerprint_case(empty, num_classes=3, modality="ct", crop_hu=-200.0)
    assert "the mask is empty" in facts.warnings
    assert {finding.case for finding in facts.findings} == {empty.id}
    assert facts.bleeding is False
    assert facts.foreground.size == 0
    label[0, 0, :3] = 1
    outside = store(tmp_path, voxels, label, matrix=affine((5.0, 1.0, 1.0)))
    facts = prepare.fingerprint_case(outside, num_classes=3, modality="ct", crop_hu=-200.0)
    assert any(w.startswith("3 labeled voxels lie outside") for w in facts.warnings)
    windowed = np.clip(voxels, -40, 120)
    case = store(tmp_path, windowed, label, matrix=affine((5.0, 1.0, 1.0)))
    facts = prepare.fingerprint_case(case, num_classes=3, modality="ct", crop_hu=None)
    assert any(w.startswith("no air") for w in facts.warnings)
    case = store(tmp_path, windowed + 40, label, matrix=affine((5.0, 1.0, 1.0)))
    with pytest.raises(Refusal, match="no CT in HU"):  # brain at 80
        prepare.fingerprint_case(case, num_classes=3, modality="ct", crop_hu=None)


def test_slice_labels_follow_flip_crop_and_resampling(tmp_path):
    """Stored from the top down; ten slices, the outermost empty; then half as many."""
    voxels = np.full((10, 12, 12), 100, np.float32)
    voxels[0] = voxels[9] = 0
    matrix = affine((2.0, 1.0, 1.0))
    matrix[:3, 0] *= -1
    rows = tuple((k % 2, k) if k < 2 else (k % 2, -1) for k in range(9))  # none for the last slice
    case = store(tmp_path, voxels, matrix=matrix, slice_labels=rows)
    made = prepare.prepare_case(case, a_plan("mr", (2.0, 1.0, 1.0)))
    assert made.grid.flip[0]
    assert made.slice_labels == tuple(reversed(rows[1:9]))
    halved = prepare.prepare_case(case, a_plan("mr", (4.0, 1.0, 1.0)))
    assert halved.slice_labels == tuple(reversed(rows[1:9]))[1::2]
    long = dataclasses.replace(case, slice_labels=rows[:8])
    made = prepare.prepare_case(long, a_plan("mr", (2.0, 1.0, 1.0)))
    assert made.slice_labels[0] == (-1, -1)  # slice 8, of which nothing is known


def test_a_resampled_slice_lacks_a_class_only_if_all_slices_it_comes_from_do(tmp_path):
    voxels = np.full((8, 12, 12), 100, np.float32)
    rows = ((1, 0), (0, 0), (0, 0), (0, 0), (0, 0), (1, 1), (0, -1), (0, 0))
    case = store(tmp_path, voxels, matrix=affine((1.0, 1.0, 1.0)), slice_labels=rows)
    halved = prepare.prepare_case(case, a_plan("mr", (2.0, 1.0, 1.0)))
    assert halved.slice_labels == ((-1, 0), (0, 0), (1, 1), (0, -1))
    doubled = prepare.prepare_case(case, a_plan("mr", (0.5, 1.0, 1.0)))
    assert [row[0] for row in doubled.slice_labels][:4] == [1, 1, -1, 0]


def test_a_thick_slice_keeps_the_label_of_the_one_it_is_taken_from(tmp_path):
    rows = ((1, 0), (0, 0), (0, 1), (0, -1))
    voxels = np.broadcast_to(np.arange(4.0, dtype=np.float32)[:, None, None], (4, 12, 12)) + 100
    case = store(tmp_path, voxels, matrix=affine((5.0, 1.0, 1.0)), slice_labels=rows)
    doubled = prepare.prepare_case(case, a_plan("mr", (2.5, 1.0, 1.0)))
    assert doubled.slice_labels == tuple(row for row in rows for _ in range(2))
    levels = doubled.image[:, 6, 6]
    np.testing.assert_allclose(levels[::2], levels[1::2], atol=1e-5)


def test_without_slice_labels_the_prepared_mask_gives_them(head):
    made = prepare.prepare_case(head, a_plan("ct", (5.0, 1.0, 1.0), crop_hu=-200.0))
    shown = [tuple(int((plane == index).any()) for index in (1, 2)) for plane in made.label]
    assert made.slice_labels == tuple(shown)
    assert (1, 0) in shown
    assert (0, 1) in shown
    doubled = prepare.prepare_case(head, a_plan("ct", (2.5, 1.0, 1.0)))
    assert len(doubled.slice_labels) == len(doubled.image) == 20


def test_a_scan_known_not_to_bleed_shows_nothing_in_any_slice(head):
    for bleeding, want in ((False, ((0, 0),) * 10), (True, None), (None, None)):
        bare = dataclasses.replace(head, label=None, bleeding=bleeding)
        assert prepare.prepare_case(bare, a_plan("ct", (5.0, 1.0, 1.0))).slice_labels == want


def test_slice_labels_that_do_not_fit_the_scan_are_refused(mr):
    for rows in (((0, 0),) * 13, ((0,),) * 12):
        with pytest.raises(ValueError, match="scan: slice labels do not fit"):
            prepare.fingerprint_case(
                dataclasses.replace(mr, slice_labels=rows),
                num_classes=3,
                modality="mr",
                crop_hu=None,
            )


def test_slice_labels_that_contradict_what_is_known_of_the_scan_are_refused(mr):
    """Only where all slices are labeled is a scan said not to bleed."""
    bare = dataclasses.replace(mr, label=None)
    clean, shown = ((0, 0),) * 12, ((0, 0), (0, SOME), *((0, 0),) * 10)
    for bleeding, rows, message in (
        (False, shown, "known not to bleed, .* slice 1 of it bleeds"),
        (True, clean, "known to bleed, .* none of its slices does"),
    ):
        case = dataclasses.replace(bare, bleeding=bleeding, slice_labels=rows)
        with pytest.raises(ValueError, match=message):
            prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)
    for bleeding, rows in ((True, clean[:11]), (True, shown), (False, clean), (None, clean)):
        case = dataclasses.replace(bare, bleeding=bleeding, slice_labels=rows)
        prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)


def test_what_a_scan_is_known_to_lack_no_slice_shows(mr):
    """Of the other classes nothing is said; a table of slices says more where there is one."""
    plan = a_plan("mr", (1.0, 1.2, 1.0))
    bare = dataclasses.replace(mr, label=None, bleeding=True, absent=(2,))
    assert prepare.prepare_case(bare, plan).slice_labels == ((-1, 0),) * 10
    rows = ((0, 0), (1, -1), (SOME, SOME), *((0, -1),) * 9)
    made = prepare.prepare_case(dataclasses.replace(bare, slice_labels=rows), plan)
    assert made.slice_labels == ((1, 0), (SOME, 0), *((0, 0),) * 8)
    wrong = dataclasses.replace(bare, slice_labels=((0, 0), (0, 1)))
    with pytest.raises(ValueError, match=r"known to lack a class, .* slice 1 of it shows that"):
        prepare.fingerprint_case(wrong, num_classes=3, modality="mr", crop_hu=None)


def test_slice_labels_say_whether_a_scan_bleeds_if_nothing_else_does(mr):
    """A scan of whose slices some are not known may bleed there."""
    plan, bare = a_plan("mr", (1.0, 1.2, 1.0)), dataclasses.replace(mr, label=None)
    for rows, want in (
        (((0, 0),) * 12, False),
        (((0, 0),) * 11, None),
        (((0, 0), (0, -1), *((0, 0),) * 10), None),
        (((0, 0), (0, SOME)), True),
        (((0, 1),), True),
    ):
        case = dataclasses.replace(bare, slice_labels=rows)
        facts = prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)
        assert facts.bleeding is prepare.prepare_case(case, plan).bleeding is want


def test_slice_labels_counted_from_the_other_end_are_noticed_by_the_mask(tmp_path):
    voxels = np.full((10, 12, 12), 100, np.float32)
    label = np.zeros(voxels.shape, np.uint8)
    label[1:4, 5, 5] = 1
    rows = tuple((int(1 <= k < 4), 0) for k in range(10))
    for order, told in ((1, False), (-1, True)):
        matrix = affine((2.0, 1.0, 1.0))
        case = store(tmp_path, voxels, label, matrix=matrix, slice_labels=rows[::order])
        facts = prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)
        assert told == any("turned around in 10: does the table" in w for w in facts.warnings)
    case = store(tmp_path, voxels, label, matrix=np.eye(4), slice_labels=rows)  # sagittal slices
    facts = prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)
    assert any("slice labels are not used" in w for w in facts.warnings)


def test_the_source_digest_is_that_of_the_bytes_and_notices_a_changed_mask(head):
    made = prepare.prepare_case(head, a_plan("ct", (5.0, 1.0, 1.0)))
    digests = b"".join(hashlib.sha256(p.read_bytes()).digest() for p in (head.image, head.label))
    assert made.source_sha256 == hashlib.sha256(digests).hexdigest()
    with head.label.open("ab") as file:
        file.write(b"\0")
    assert prepare.source_digest(head) != made.source_sha256


def facts_of(spacings, shapes, foreground):
    return [
        Facts(
            case=f"c{i}",
            patient=f"c{i}",
            split="train",
            bleeding=True,
            shape=shape,
            spacing_mm=spacing,
            tilt_deg=0.0,
            intensity=(0.0, 0.0, 0.0),
            voxels=(1, 1, 1),
            volume_ml=(1.0, 1.0, 1.0),
            foreground=np.asarray(drawn, np.float32),
            source_sha256="",
            findings=(),
        )
        for i, (spacing, shape, drawn) in enumerate(zip(spacings, shapes, foreground, strict=True))
    ]


MADE = {"dataset": "x", "classes": CLASSES, "modality": "mr", "license": "", "source_sha256": ""}


def test_the_plan_holds_pooled_statistics_and_the_median_shape_after_resampling():
    drawn = np.arange(1000.0)
    facts = facts_of(
        [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0)],
        [(36, 50, 35), (20, 52, 36), (38, 48, 40)],
        [drawn[:500], drawn[500:], []],
    )
    plan = make_plan(facts, **MADE)
    assert plan.spacing_mm == (1.0, 1.0, 1.0)
    assert plan.median_shape == (38, 50, 36)
    expected = (np.percentile(drawn, 0.5), drawn.mean(), drawn.std(), np.percentile(drawn, 99.5))
    np.testing.assert_allclose(plan.foreground, expected)


def test_a_pinned_spacing_is_given_in_canonical_axes_and_planned_coarsest_first():
    facts = facts_of([(1.0, 1.0, 1.0)] * 2, [(40, 48, 56)] * 2, [[1.0], [2.0]])
    plan = make_plan(facts, spacing_mm=(1.0, 2.0, 1.0), **MADE)
    assert plan.transpose == (1, 0, 2)
    assert plan.spacing_mm == (2.0, 1.0, 1.0)
    assert plan.median_shape == (24, 40, 56)


def test_the_plan_is_for_the_gpu_that_is_asked_for():
    facts = facts_of([(5.0, 0.5, 0.5)] * 2, [(32, 512, 512)] * 2, [[1.0], [2.0]])
    own, large = (
        make_plan(facts, planner="resenc_m", memory_gb=gb, **MADE).network for gb in (None, 24)
    )
    assert own.patch == (20, 256, 256)
    assert large.patch == (28, 384, 384)


@pytest.mark.parametrize(
    ("sizes", "modality", "masked"),
    [
        ((0.5, 0.74, 1.0), "mr", True),
        ((0.5, 0.75, 0.75), "mr", False),  # exactly 3/4 is not less
        ((0.5, 0.5, 0.5), "ct", False),
    ],
)
def test_the_plan_says_whether_the_median_scan_was_stripped(sizes, modality, masked):
    facts = facts_of([(1.0, 1.0, 1.0)] * 3, [(36, 50, 35)] * 3, [[1.0, 2.0]] * 3)
    facts = [dataclasses.replace(f, relative_size=s) for f, s in zip(facts, sizes, strict=True)]
    plan = make_plan(facts, **(MADE | {"modality": modality}))
    assert plan.use_mask_for_norm is masked
    assert Plan.from_json(plan.to_json()) == plan
    older = {k: v for k, v in plan.to_json().items() if k != "use_mask_for_norm"}
    assert not Plan.from_json(older).use_mask_for_norm


def test_clipped_ct_does_not_count_for_the_clip_bounds():
    facts = facts_of([(1.0,) * 3] * 2, [(36, 50, 35)] * 2, [[20.0, 90.0], [0.0, 80.0]])
    windowed = (Finding(Kind.NO_AIR, "kept", "no air", "c1"),)
    facts[1] = dataclasses.replace(facts[1], findings=windowed)
    made = make_plan(facts, **(MADE | {"modality": "ct"}))
    assert made.foreground == pytest.approx((20.35, 55.0, 35.0, 89.65))
    alone = make_plan(facts[1:], **(MADE | {"modality": "ct"}))
    assert alone.foreground[1] == 40.0, "there is no other"


def test_nothing_to_plan_from_is_said():
    with pytest.raises(ValueError, match="no training case"):
        make_plan([], **MADE)
    with pytest.raises(ValueError, match="all 2 training cases are empty"):
        make_plan(facts_of([(1.0,) * 3] * 2, [(8, 8, 8)] * 2, [[], []]), **MADE)


def test_nnunets_order_clips_and_scales_before_it_resamples(tmp_path):
    voxels = np.random.default_rng(2).normal(40, 60, (6, 12, 10)).astype(np.float32)
    voxels[0, 0, 0] = -30000  # not repaired: nnU-Net would not
    case = store(tmp_path, voxels, matrix=affine((5.0, 1.0, 1.0)))
    plan = dataclasses.replace(
        a_plan("ct", (5.0, 0.8, 0.8)), foreground=(0.0, 30.0, 20.0, 80.0), normalize_first=True
    )
    prepared = prepare.prepare_case(case, plan)
    scaled = ((np.clip(voxels, 0, 80) - 30) / 20).astype(np.float32)
    want = geometry.to_grid(scaled, prepared.grid, "image")
    assert prepared.image.dtype == np.float32
    np.testing.assert_allclose(prepared.image, want, atol=1e-6)
    afterwards = (np.clip(geometry.to_grid(voxels, prepared.grid, "image"), 0, 80) - 30) / 20
    assert np.abs(prepared.image - afterwards).max() > 0.1


def test_axes_may_be_the_files_own(tmp_path):
    voxels = np.random.default_rng(3).integers(1, 99, (6, 12, 10)).astype(np.int16)
    lying = affine((5.0, 1.0, 1.0), ((0, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0)))
    case = store(tmp_path, voxels, matrix=lying)
    plan = dataclasses.replace(a_plan("ct", (5.0, 1.0, 1.0)), axes="file")
    np.testing.assert_array_equal(prepare.prepare_case(case, plan).image, voxels)
    turned = dataclasses.replace(plan, transpose=(2, 0, 1), spacing_mm=(1.0, 5.0, 1.0))
    want = voxels.transpose(2, 0, 1)
    np.testing.assert_array_equal(prepare.prepare_case(case, turned).image, want)
    other = dataclasses.replace(plan, axes="SPL")
    want = voxels[:, :, ::-1].transpose(0, 2, 1)[:, :, ::-1]
    np.testing.assert_array_equal(prepare.prepare_case(case, other).image, want)


@pytest.mark.parametrize("case", ["thick", "thin"])
def test_ct_that_is_normalized_first_has_nnunets_voxels(tmp_path, golden, case):
    """nnunetv2 2.8.1's `DefaultPreprocessor`, which takes the axes of the file as they lie."""
    with np.load(golden / "ct_order_nnunet.npz") as file:
        image, want = file[f"{case}/image"], file[f"{case}/prepared"]
        spacing, target = (file[f"{case}/{name}_mm"].tolist() for name in ("spacing", "target"))
        transpose, foreground = file[f"{case}/transpose"].tolist(), file["foreground"].tolist()
    plan = dataclasses.replace(
        a_plan("ct", tuple(target)),
        transpose=tuple(transpose),
        foreground=tuple(foreground),
        normalize_first=True,
        repaired=True,
        axes="file",
    )
    found = prepare.prepare_case(store(tmp_path, image, matrix=affine(spacing)), plan).image
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=1e-5)
    later = prepare.prepare_case(
        store(tmp_path, image, matrix=affine(spacing)),
        dataclasses.replace(plan, normalize_first=False),
    ).image
    low, mean, std, high = foreground
    assert abs((np.clip(later, low, high) - mean) / std - want).max() > 0.1, "another order"

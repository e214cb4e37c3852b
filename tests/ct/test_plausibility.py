"""CT that is not in HU: undone where nothing else can be meant, else refused or marked."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import ndimage

from bhsd_jax.ct import nifti, plausibility, prepare
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.volume import Case, Network, Plan, Volume

AIR, FAT, BRAIN, BONE = -1000, -90, 34, 900


def head(seed=0):
    """An egg of brain with ventricles in a skull of bone with a scalp of fat, in air; int32."""
    shape = (12, 64, 64)
    random = np.random.default_rng(seed)
    at = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    radius = np.sqrt((at**2).sum(0))
    hu = np.full(shape, float(AIR))
    hu[radius < 0.86] = FAT
    spread = random.uniform(-500, 700, shape)
    hu = np.where(radius < 0.8, BONE + spread, hu)
    hu[radius < 0.72] = BRAIN
    hu[np.sqrt(at[0] ** 2 + at[1] ** 2 + 4 * at[2] ** 2) < 0.2] = 8
    return np.rint(hu + random.normal(0, 5, shape)).astype(np.int32)


HU = head()
TIGHT = HU[4:8, 20:44, 20:44]
BRAIN_AXES = ((12, np.s_[:, None, None]), (64, np.s_[:, None]), (64, np.s_[:]))
PADDED = np.hypot(*np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))) > 1.1


def padded(voxels, value):
    voxels = voxels.copy()
    voxels[:, PADDED] = value
    return voxels


def mr(seed=0, top=1000):
    """T1: noise around it, skull dark, white and gray matter, no voxel below 0."""
    random = np.random.default_rng(seed)
    signal = np.select([HU < -500, HU > 200, HU < 0], [0, 0.05, 0.9], 0.55)
    signal = np.where((HU > 20) & (random.random(HU.shape) < 0.5), 0.75, signal)
    noise = random.normal(0, 0.03, (2, *HU.shape))
    return (np.hypot(signal + noise[0], noise[1]) * top).astype(np.float32)


def kinds(found):
    return [one.kind for one in found if one.kind in plausibility.KINDS]


@pytest.mark.parametrize("low", [None, -1500, -2000, -2048, -3024, -32768])
def test_a_head_in_hu_is_left_alone_whatever_pads_it(low):
    scan = HU if low is None else padded(HU, low)
    made, found = plausibility.settle(scan)
    assert kinds(found) == []
    np.testing.assert_array_equal(made, np.maximum(scan, -1024))


@pytest.mark.parametrize("kind", ["int16", "uint16", "float32"])
@pytest.mark.parametrize("pad", [None, 0, -1000, -1024, -2000])
def test_a_lost_intercept_is_put_back_where_air_and_brain_agree(kind, pad):
    """Padding below what is stored is none of it: the head is what counts."""
    if pad is not None and pad < 0 and kind == "uint16":
        pytest.skip("unsigned holds no such padding")
    raw = (HU + 1024 if pad is None else padded(HU + 1024, pad)).astype(kind)
    before = raw.copy()
    made, found = plausibility.settle(raw)
    np.testing.assert_array_equal(raw, before)
    seen = np.broadcast_to(~PADDED, HU.shape) if pad is not None else np.ones(HU.shape, bool)
    np.testing.assert_array_equal(made[seen], np.maximum(HU, -1024)[seen])
    assert kinds(found) == [Kind.OFFSET]
    (note,) = (one for one in found if one.kind is Kind.OFFSET)
    assert note.done == "repaired"
    assert "1024 subtracted" in note.text


@pytest.mark.parametrize(
    "raw",
    [
        HU + 1000,  # another intercept: 24 HU off, if 1024 were taken
        np.clip(HU + 1000, 0, None),
        TIGHT + 1024,  # no air says which
        np.where(np.arange(TIGHT.size).reshape(TIGHT.shape) % 50, TIGHT + 1024, 3200),  # metal
    ],
    ids=["1000", "1000 cut off", "no air", "no air, metal"],
)
def test_an_offset_that_is_not_sure_is_refused(raw):
    with pytest.raises(Refusal, match=r"no HU: tissue lies near 10\d\d.*rescale intercept") as said:
        plausibility.settle(raw)
    assert said.value.kind is Kind.OFFSET


SKULL = np.where((HU > -500) & (HU < 200), AIR, HU)  # dry


@pytest.mark.parametrize("offset", [1024, 1000])
@pytest.mark.parametrize("pad", [None, -2000, -2048, -3024])
def test_an_intercept_that_was_applied_twice_is_refused(offset, pad):
    """Air then lies where others have padding, and brain where they have air."""
    raw = HU - offset if pad is None else padded(HU - offset, pad)
    with pytest.raises(Refusal, match=r"no HU: .* tissue near -9\d\d, .*applied twice") as said:
        plausibility.settle(raw)
    assert said.value.kind is Kind.OFFSET
    (doubt,) = plausibility.doubts(raw)
    assert (doubt.kind, doubt.done) == (Kind.OFFSET, "kept")
    # A head without fat, whose bone is nowhere denser than 950 HU: only marked.
    lean = np.where((HU > -300) & (HU < -40), AIR, np.minimum(HU, 950))
    lean = lean - offset if pad is None else padded(lean - offset, pad)
    _, found = plausibility.settle(lean)
    assert kinds(found) == [Kind.OFFSET]
    assert "applied twice: look at the scan" in found[-1].text


@pytest.mark.parametrize("value", [3071, 4095])
def test_padding_at_the_top_is_refused_for_what_it_is(value):
    with pytest.raises(Refusal, match=rf"13 % .* at {value}: padding\? Set .* to -1024") as said:
        plausibility.settle(padded(HU, value))
    assert said.value.kind is Kind.NOT_HU
    with pytest.raises(Refusal, match="an MR, or a CT that was scaled"):
        plausibility.settle(padded(mr(), value))


def scaled(low, high, to):
    return ((np.clip(HU, low, high) - low) / (high - low) * to).astype(np.float32)


@pytest.mark.parametrize(
    "raw",
    [
        *(scaled(-160, 240, 1), scaled(-1024, 3071, 1), scaled(-1000, 1000, 2) - 1),
        *(scaled(-160, 240, 255), scaled(0, 80, 255), scaled(-700, 1300, 255)),
        *(scaled(-1024, 1024, 255), scaled(-1024, 3071, 255), scaled(-1024, 2000, 65535)),
        *(((HU - HU.mean()) / HU.std()), HU / 1000, HU / 10, HU * 10.0),
        *(HU + 2048, padded(HU, -3024) + 3024, HU + 8192, HU + 32768),
        *(mr(top=top) for top in (1, 60, 255, 1000, 4095, 30000)),
    ],
)
def test_scaled_ct_and_mr_are_refused(raw):
    with pytest.raises(Refusal, match="HU") as said:
        plausibility.settle(np.asarray(raw, np.float32))
    assert said.value.kind in (Kind.NOT_HU, Kind.OFFSET)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "raw",
    [TIGHT, TIGHT[:, :, :20], np.clip(HU, 0, 80), np.clip(HU, -160, 240), np.clip(HU, 0, 255)],
    ids=["tight", "tighter", "brain window", "wide window", "8 bits"],
)
def test_what_can_still_be_read_is_taken_as_it_is_and_marked(raw):
    made, found = plausibility.settle(raw)
    np.testing.assert_array_equal(made, raw)
    assert kinds(found) == [Kind.NO_AIR]
    assert [one.done for one in found if one.kind is Kind.NO_AIR] == ["kept"]


@pytest.mark.parametrize("air", [-1000, -900], ids=["noisy air", "air of one value"])
def test_an_overflow_is_undone_only_where_it_makes_air_of_the_edges(air):
    raw = np.maximum(HU, air)
    made, found = plausibility.settle(np.where(raw < 0, raw + 4096, raw))
    np.testing.assert_array_equal(made, raw)
    assert kinds(found) == [Kind.OVERFLOW]
    metal = HU + 1024
    metal[6, 30:34, 30:34] = 3200
    made, found = plausibility.settle(metal)
    assert kinds(found) == [Kind.OFFSET]
    assert made[6, 30, 30] == 3200 - 1024, "metal stays metal"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("scan", ["padded", "wrapped"])
def test_what_is_undone_does_not_depend_on_the_order_of_the_files_axes(scan, order):
    """Sagittal and coronal stacks, and files of tools that turn arrays: axes are not yet turned."""
    raw = padded(HU, -32768)
    raw[6, 30:34, 30:34] = -30_000  # metal that wrapped around
    if scan == "wrapped":
        tight = HU[:, 14:50, 14:50].copy()  # enough air at the edges, and none at the ends
        tight[[0, -1]] = BRAIN
        raw = np.where(tight < 0, np.maximum(tight, AIR) + 4096, tight)
    want, findings = plausibility.settle(raw)
    made, found = plausibility.settle(raw.transpose(order))
    np.testing.assert_array_equal(made, want.transpose(order))
    assert found == findings
    assert {one.kind for one in found} >= {Kind.OVERFLOW if scan == "wrapped" else Kind.PADDING}


@pytest.mark.parametrize("scan", [HU, TIGHT - 12, padded(HU, -3024)], ids=["", "tight", "padded"])
def test_signed_values_read_as_unsigned_are_signed_again(scan):
    made, found = plausibility.settle(scan.astype(np.uint16))
    np.testing.assert_array_equal(made, np.maximum(scan, -1024))
    assert Kind.UNSIGNED in kinds(found)


def test_a_dry_skull_and_contrast_medium_are_no_offset():
    for skull in (SKULL, padded(SKULL, -2000), padded(SKULL, -2048)):
        np.testing.assert_array_equal(plausibility.settle(skull)[0], np.maximum(skull, -1024))
    vessels = HU.copy()
    vessels[:, 28:36, 28:36] = 1060  # dense, and far too much of it
    made, found = plausibility.settle(vessels)
    assert made[6, 30, 30] == 1060
    assert kinds(found) == []


def test_few_voxels_tell_nothing():
    few = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    np.testing.assert_array_equal(plausibility.settle(few)[0], few)


def test_plans_that_take_scans_as_they_lie_are_told_all_the_same():
    assert plausibility.doubts(HU) == []
    (lost,) = plausibility.doubts(HU + 1024)
    (other,) = plausibility.doubts(mr())
    assert (lost.kind, other.kind) == (Kind.OFFSET, Kind.NOT_HU)
    assert {lost.done, other.done} == {"kept"}


@pytest.fixture
def plan():
    network = Network((4, 32, 32), 2, (8,), ((1, 1, 1),), ((3, 3, 3),), (2,), (), True)
    return Plan(
        dataset="x",
        classes=("background", "a"),
        modality="ct",
        spacing_mm=(5.0, 3.0, 3.0),
        transpose=(0, 1, 2),
        crop_hu=-200.0,
        foreground=(20.0, 60.0, 15.0, 90.0),
        median_shape=(12, 64, 64),
        network=network,
        source_sha256="",
    )


def store(folder, voxels):
    affine = np.diag([5.0, 3.0, 3.0, 1.0])[:, [2, 1, 0, 3]]
    path = folder / "scan.nii.gz"
    nifti.write_volume(path, Volume(voxels.astype(np.int16), affine, "scan"))
    return Case("scan", "scan", path, None, "test")


def test_both_verbs_see_the_same_hu_and_say_the_same(tmp_path, plan):
    whole = prepare.prepare_case(store(tmp_path, HU), plan)
    case = store(tmp_path, HU + 1024)
    facts = prepare.fingerprint_case(case, num_classes=2, modality="ct", crop_hu=-200.0)
    made = prepare.prepare_case(case, plan)
    np.testing.assert_array_equal(made.image, whole.image)
    assert whole.doubts == ()
    assert len(made.doubts) == 1
    assert set(made.doubts) <= set(made.warnings) & set(facts.warnings)
    assert made.doubts == prepare.hu_doubts([nifti.read(case.image)], plan)
    tight = store(tmp_path, TIGHT + 1024)
    for look in (
        lambda: prepare.fingerprint_case(tight, num_classes=2, modality="ct", crop_hu=None),
        lambda: prepare.prepare_case(tight, plan),
    ):
        with pytest.raises(Refusal, match=r"scan\.nii\.gz: no HU") as said:
            look()
        assert said.value.kind is Kind.OFFSET


def test_scans_that_are_normalized_first_are_put_right_where_the_plan_says_so(tmp_path, plan):
    plan = dataclasses.replace(
        plan, foreground=(0.0, 40.0, 20.0, 90.0), normalize_first=True, repaired=True
    )
    right = prepare.prepare_case(store(tmp_path, HU), plan).image
    case = store(tmp_path, HU + 1024)
    np.testing.assert_array_equal(prepare.prepare_case(case, plan).image, right)
    as_it_lies = prepare.prepare_case(case, dataclasses.replace(plan, repaired=False)).image
    assert not np.array_equal(as_it_lies, right)


def test_a_brain_that_was_cut_out_of_its_head_is_in_hu_however_tightly_it_is_cropped():
    """The rest is 0, whose share of a crop decided whether it was taken for a scaled CT."""
    radius = np.sqrt(sum(np.linspace(-1, 1, n)[at] ** 2 for n, at in BRAIN_AXES))
    for noise in (3, 6, 15):
        random = np.random.default_rng(noise)
        tissue = np.where(radius < 0.3, 8, BRAIN) + random.normal(0, noise, radius.shape)
        for slices, margin in ((0, 0), (2, 7), (3, 8)):
            brain = np.where(radius < 0.8, np.rint(tissue), 0).astype(np.int16)
            brain = brain[slices : 12 - slices, margin : 64 - margin, margin : 64 - margin]
            made, found = plausibility.settle(brain)
            np.testing.assert_array_equal(made, brain)
            assert kinds(found) == [Kind.NO_AIR]
    stripped = np.where(radius < 0.8, mr(), 0)
    with pytest.raises(Refusal):
        plausibility.settle(stripped.astype(np.float32))


def zoomed(level, noise, order, core):
    """A brain in nothing, on other voxels: its rim lies between, or rings to either side."""
    radius = np.sqrt(sum(np.linspace(-1, 1, n)[at] ** 2 for n, at in BRAIN_AXES))
    tissue = np.where(radius < 0.25, core, level)
    tissue = tissue + np.random.default_rng(0).normal(0, noise, radius.shape)
    return ndimage.zoom(np.where(radius < 0.85, tissue, 0), (1.2, 1.1, 1.1), order=order)


@pytest.mark.parametrize(("level", "noise"), [(40, 8), (40, 15)])
def test_a_brain_that_was_cut_out_and_resampled_is_in_hu(level, noise):
    """Its background belongs to what shows that."""
    brain = zoomed(level, noise, order=1, core=8).astype(np.float32)
    np.testing.assert_array_equal(plausibility.settle(brain)[0], brain)


def test_an_mr_that_was_cut_out_and_resampled_has_no_fat_of_ct():
    """Splines ring below 0 at its rim, which is more of the brain than of the scan."""
    ringing = zoomed(130, 40, order=3, core=52).astype(np.float32)
    ringing[np.abs(ringing) < 0.01] = 0
    with pytest.raises(Refusal):
        plausibility.settle(ringing)

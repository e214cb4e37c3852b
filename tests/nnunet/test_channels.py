"""Scans of several channels: planned, prepared, read, trained on and predicted as by nnU-Net."""

import dataclasses
import json
import re

import nibabel
import numpy as np
import pytest
import tiny_run
from nnunet_raw import Reference, config

from bhsd_jax.ct import channels, geometry, nifti, prepare, scan, unlike
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.defects import Kind, texts
from bhsd_jax.input.pipeline import Batches, Cut, Stream
from bhsd_jax.nnunet import planner
from bhsd_jax.shards import store
from bhsd_jax.verbs import preprocess
from bhsd_jax.volume import Case, Channel, Channels, Plan, Volume


@pytest.fixture(scope="module")
def reference(request):
    return Reference.load(request.path.parents[1] / "golden", "two_channels")


@pytest.fixture(scope="module")
def prepared(reference, tmp_path_factory):
    """The shards, by nnU-Net's plan."""
    folder = tmp_path_factory.mktemp("two")
    root = reference.write(folder / "raw")
    (folder / "plans.json").write_text(json.dumps(reference.plans))
    preprocess.run(config(root, folder / "plans.json"), folder / "run")
    return folder


def test_the_plan_is_nnunets(reference, tmp_path):
    """Every key of plans.json; the statistics rest on draws of their own."""
    root = reference.write(tmp_path / "raw")
    preprocess.run(config(root), tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "shards")
    facts = [
        prepare.fingerprint_case(case, num_classes=3, modality="mr", crop_hu=None)
        for case in MSD(root).cases()
    ]
    made = planner.make_plans(
        [fact.spacing_mm for fact in facts],
        [fact.shape for fact in facts],
        schemes=[channel.scheme for channel in plan.channels],
        num_classes=3,
        relative_size=float(np.median([fact.relative_size for fact in facts])),
    )
    theirs = reference.plans["configurations"]
    assert made["configurations"] == theirs
    assert (plan.network, plan.spacing_mm, plan.transpose) == planner.from_nnunet_plans(
        reference.plans
    )
    assert [(c.name, c.scheme, c.masked) for c in plan.channels] == [
        ("T1", "ZScoreNormalization", True),
        ("CT", "CTNormalization", False),
    ]
    for index, channel in enumerate(plan.channels):
        want = reference.plans["foreground_intensity_properties_per_channel"][str(index)]
        names = ("percentile_00_5", "mean", "std", "percentile_99_5")
        np.testing.assert_allclose(channel.foreground, [want[n] for n in names], rtol=0.02)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_an_empty_mask_counts_for_the_plan_but_not_for_its_intensities(reference, tmp_path):
    root = reference.write(tmp_path / "raw")
    empty = Volume(np.zeros_like(reference.arrays["c1_label"]), reference.affine("c1"), "c1")
    nifti.write_volume(root / "labelsTr" / "c1.nii.gz", empty)
    preprocess.run(config(root), tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "shards")
    assert plan.network == planner.from_nnunet_plans(reference.plans)[0]
    for index, channel in enumerate(plan.channels):
        cases = ("c0", "c2")
        inside = [reference.arrays[f"{case}_label"] > 0 for case in cases]
        voxels = [reference.arrays[f"{case}_image"][index] for case in cases]
        # As many are drawn of each.
        means = [v[m].mean() for v, m in zip(voxels, inside, strict=True)]
        assert channel.foreground[1] == pytest.approx(np.mean(means), rel=0.02)


def test_prepared_voxels_are_nnunets(reference, prepared):
    found = store.Shards(prepared / "run" / "shards").load("c0")
    want = reference.trained_on("c0")
    assert found.image.shape == want.shape
    assert found.image.dtype == np.float32
    told = (prepared / "run" / "integrity.csv").read_text()
    assert "channel 'CT': taken as it lies, though: no CT in HU" in told
    assert "channel 'T1'" not in told
    assert np.abs(found.image - want).max() < 1e-5
    label = np.maximum(reference.arrays["c0_3d_fullres_seg"][0], 0)
    assert (found.label == label).all()


def test_a_patch_of_the_shards_has_every_channel(prepared):
    shards = store.Shards(prepared / "run" / "shards")
    whole = shards.load("c1")
    reader = shards.open("c1")
    image, label = reader.patch((2, 3, 4), (6, 9, 12))
    assert (image == whole.image[2:6, 3:9, 4:12]).all()
    assert label.shape == (4, 6, 8)
    assert reader.patch((0, 0, 0), (0, 4, 4))[0].shape == (0, 4, 4, 2)
    cut = Cut(patch=(20, 40, 40), source=(20, 40, 40), fill=0.0)
    stream = Stream(shards.open, ["c1"], cut, batch=2, length=4, seed=(0, 0), labeled=True)
    batch = next(Batches([stream]))
    assert batch.image.shape == (2, 20, 40, 40, 2)
    assert (batch.image[batch.label < 0] == 0).all()
    assert batch.image[..., 0].std() > 0.1 < batch.image[..., 1].std()


def test_one_file_with_a_fourth_axis_is_the_same_scan(reference, tmp_path):
    """As the Decathlon ships it."""
    two = reference.write(tmp_path / "two")
    one = tmp_path / "one"
    (one / "imagesTr").mkdir(parents=True)
    for case in reference.cases:
        parts = [nibabel.load(two / "imagesTr" / f"{case}_000{c}.nii.gz") for c in (0, 1)]
        joined = np.stack([np.asanyarray(part.dataobj) for part in parts], axis=-1)
        path = one / "imagesTr" / f"{case}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(joined, parts[0].affine), path)
    (two / "labelsTr").rename(one / "labelsTr")
    about = {"modality": {"0": "T1", "1": "CT"}, "labels": {"0": "background", "1": "a", "2": "b"}}
    (one / "dataset.json").write_text(json.dumps(about))
    (case, *_) = MSD(one).cases()
    assert isinstance(case.image, Channels)
    assert case.image.count == 2
    assert len(case.image.files) == 1
    first, second = scan.read_channels(case.image)[0]
    assert (first.voxels == reference.arrays["c0_image"][0]).all()
    assert (second.voxels == reference.arrays["c0_image"][1]).all()
    np.testing.assert_allclose(first.affine, reference.affine("c0"), atol=1e-6)
    label = reference.arrays["c0_label"]
    scan.write(tmp_path / "out.nii.gz", label, like=case.image)
    found, notes = scan.read_label(tmp_path / "out.nii.gz", case.image, first, num_classes=3)
    assert (found.voxels == label).all()
    assert not notes


def volume(seed, shape=(6, 8, 8), low=-50, high=300):
    voxels = np.random.default_rng(seed).integers(low, high, shape).astype(np.int16)
    affine = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1.0]])
    return Volume(voxels, affine, "a")


def test_each_normalization_is_its_formula():
    scans = [volume(seed) for seed in range(4)] + [volume(4, low=0, high=256)]
    grid = geometry.locate(channels.union(scans), spacing_mm=(3.0, 1.0, 1.0))
    assert grid.shape == (6, 8, 8)
    measured = (-10.0, 100.0, 50.0, 200.0)
    how = [Channel(name, name, measured) for name in channels.SCHEMES]
    found = channels.prepare(scans, grid, how)
    ct, z, plain, unit, color = (one.voxels.astype(np.float64) for one in scans)
    want = [
        (np.clip(ct, -10, 200) - 100) / 50,
        (z - z.mean()) / z.std(),
        plain,
        (unit - unit.min()) / (unit.max() - unit.min()),
        color / 255,
    ]
    order = list(channels.SCHEMES)
    assert order[0] == "CTNormalization"
    for index, one in enumerate(want):
        np.testing.assert_allclose(found[..., index], one, atol=2e-5)
    with pytest.raises(ValueError, match="as a color, 0 to 255"):
        channels.prepare([scans[0]], grid, [how[-1]])


def test_a_channel_of_ct_that_is_not_in_hu_is_marked_however_it_is_read(tmp_path):
    """Nothing is undone: nnunetv2 2.8.1 takes it as it lies, and its models know it so."""
    hu = tiny_run.head().transpose(2, 1, 0)
    affine = tiny_run.upright()[:, [2, 1, 0, 3]]
    how = [("PET", "ZScoreNormalization"), ("CT", "CTNormalization")]
    plan = dataclasses.replace(
        tiny_run.PLAN,
        modality="mr",
        crop_hu=None,
        normalize_first=True,
        channels=tuple(Channel(*one, tiny_run.PLAN.foreground) for one in how),
    )
    image = Channels((tmp_path / "c_0000.nii.gz", tmp_path / "c_0001.nii.gz"), 2)
    case = Case("c", "c", image, None, "test")
    for ct, said, unlike_too in (
        (hu, None, False),
        (hu + 1024, Kind.OFFSET, False),  # its air has the values of brain
        (hu.astype(np.uint16), Kind.UNSIGNED, False),
        (np.clip(hu, 0, 80) / 80, "no CT in HU", True),
    ):
        every = [Volume(v.astype(np.float32), affine, "c") for v in (hu * 3 + 5000, ct)]
        for path, one in zip(image.files, every, strict=True):
            nifti.write_volume(path, one)
        made = prepare.prepare_case(case, plan)
        facts = prepare.fingerprint_case(
            case, num_classes=3, modality="mr", crop_hu=None, schemes=how
        )
        _, grid, found = prepare.prepare_volume(every[0], plan, every[1:])
        want = [] if said is None else [f"channel 'CT': taken as it lies, though.*: {said}"]
        assert len(made.doubts) == len(want)
        assert all(map(re.match, want, made.doubts))
        assert made.doubts == prepare.hu_doubts(scan.read_channels(image)[0], plan)
        assert made.doubts == tuple(texts(found)) == tuple(facts.warnings)
        np.testing.assert_array_equal(made.image[..., 1], clipped(ct, plan, made.grid))
        told = unlike.sentences(made.image, grid, plan, None)
        assert [text.startswith("channel 'CT': ") for text in told] == [True] * unlike_too


def clipped(ct, plan, grid):
    low, mean, std, high = plan.foreground
    return geometry.to_grid(
        ((np.clip(ct, low, high) - mean) / std).astype(np.float32), grid, "image"
    )


def test_channels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="channel 1 has"):
        channels.alike([volume(0), volume(1, shape=(6, 8, 9))], placed=True)
    moved = volume(1)
    moved.affine[0, 3] += 0.5
    _, (finding,) = channels.alike([volume(0), moved], placed=True)
    assert "channel 1 lies up to 0.5 mm off" in finding.text

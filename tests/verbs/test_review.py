"""Which scans to look at first: disagreement of networks, and scans unlike the training data."""

import csv
import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest
import tiny_run

from bhsd_jax.assemble import devices, ensemble, trust
from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.ct import unlike
from bhsd_jax.ct.prepare import prepare_volume
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.verbs import predict, review
from bhsd_jax.volume import Volume

SEEN = {"spacing_mm": {"min": [4.0, 1.8, 1.8], "max": [5.0, 2.2, 2.2]}}
SEEN["field_mm"] = {"min": [30.0, 45.0, 35.0], "max": [60.0, 60.0, 60.0]}


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Compiling for eight devices takes longer; `tests/infer` does it."""
    monkeypatch.setattr(devices.jax, "local_device_count", lambda: 1)


def prepared(voxels, spacing_mm):
    affine = tiny_run.upright(spacing_mm)[:, [2, 1, 0, 3]]
    image, grid, _ = prepare_volume(Volume(voxels.transpose(2, 1, 0), affine, "a"), tiny_run.PLAN)
    return image, grid


def seen(tmp_path):
    (tmp_path / "integrity.json").write_text(json.dumps(SEEN))
    return unlike.Seen.load([tmp_path / "nothing", tmp_path])


@pytest.mark.parametrize(
    ("spacing_mm", "words"),
    [
        ((2.0, 2.0, 5.0), ()),
        ((2.0, 2.0, 6.2), ()),
        (
            (2.0, 2.0, 9.0),
            ("spacing of slices 9 mm, seen 4 to 5",),
        ),
        (
            (3.0, 3.0, 5.0),
            (
                *(
                    "spacing of rows 3 mm, seen 1.8 to 2.2",
                    "spacing of columns 3 mm, seen 1.8 to 2.2",
                ),
                "field of view of rows 78 mm, seen 45 to 60",
            ),
        ),
    ],
)
def test_what_was_not_seen_is_told_with_both_figures(tmp_path, spacing_mm, words):
    image, grid = prepared(tiny_run.head(), spacing_mm)
    assert unlike.sentences(image, grid, tiny_run.PLAN, seen(tmp_path)) == words
    assert unlike.sentences(image, grid, tiny_run.PLAN, None) == ()


def test_a_ct_is_unlike_what_a_network_of_mr_has_seen(tmp_path):
    """Brought to zero mean, nothing else tells it from an MR."""
    plan = dataclasses.replace(tiny_run.PLAN, modality="mr", crop_hu=None)
    volume = Volume(tiny_run.head().transpose(2, 1, 0), tiny_run.upright()[:, [2, 1, 0, 3]], "a")
    image, grid, _ = prepare_volume(volume, plan)
    for lowest, count in ((0.0, 1), (-30.0, 1), (-1024.0, 0)):
        ranges = SEEN | {"intensity": {"min": [lowest, 1, 2], "max": [9, 9, 9]}}
        (tmp_path / "integrity.json").write_text(json.dumps(ranges))
        known = unlike.Seen.load([tmp_path])
        told = unlike.sentences(image, grid, plan, known, volume.voxels)
        assert len(told) == count
        assert all("lie below -500, as air of a CT in HU does; lowest seen" in one for one in told)
        assert not unlike.sentences(image, grid, plan, known, np.abs(volume.voxels))
    assert not unlike.sentences(image, grid, plan, seen(tmp_path), volume.voxels), "older files"


def test_a_ct_without_brain_is_unlike_whatever_its_geometry(tmp_path):
    voxels = tiny_run.head()
    voxels[voxels > -500] = 700  # a phantom of bone
    (text,) = unlike.sentences(*prepared(voxels, (2.0, 2.0, 5.0)), tiny_run.PLAN, seen(tmp_path))
    assert text == "0.0 % of the head lie in 10 to 110 HU"


def test_a_ct_that_was_normalized_first_is_looked_at_too():
    """As an imported nnU-Net model's: the scan is clipped, and the air around it stays."""
    plan = dataclasses.replace(tiny_run.PLAN, normalize_first=True, crop_hu=None)

    def told(voxels):
        wide = np.pad(voxels, ((40, 40), (40, 40), (0, 0)), constant_values=-1000)
        affine = tiny_run.upright((1.0, 1.0, 4.0))[:, [2, 1, 0, 3]]
        volume = Volume(wide.transpose(2, 1, 0), affine, "a")
        return unlike.sentences(*prepare_volume(volume, plan)[:2], plan, None)

    voxels = tiny_run.head()
    assert told(voxels) == ()
    voxels[voxels > -500] = 4  # windowed: all of it is below the plan's lower bound
    assert told(voxels) == ("0.0 % of the voxels above 10 HU lie in 10 to 110 HU",)
    (text,) = told(np.full_like(voxels, 700))
    assert text.endswith("% of the voxels above 10 HU lie in 10 to 110 HU")


def test_a_damaged_list_of_what_was_seen_is_no_list(tmp_path):
    (tmp_path / "integrity.json").write_text('{"spacing_mm": {}}')
    assert unlike.Seen.load([tmp_path]) is None


def above(params, raw):
    """Bleeds above a threshold of its own, anywhere; or only in the left half of a tile."""
    import jax.numpy as jnp

    hu = raw[..., 0]
    place = jnp.arange(hu.shape[-1]) >= params["from"]
    bleed = jnp.where(place & (hu > params["hu"]), 9.0, -9.0)
    return (jnp.stack([jnp.zeros_like(hu), bleed, jnp.full_like(hu, -9.0)], -1),)


def views(*networks):
    window = SlidingWindow(above, (8, 32, 32), mirror=True, tiles_per_call=1)
    return trust.make(ensemble.run_of(RUN[0]), [(window, networks, -1000.0)] if networks else ())


RUN = []


@pytest.fixture(scope="module", autouse=True)
def _run(tmp_path_factory):
    RUN[:] = [tiny_run.make(tmp_path_factory.mktemp("runs") / "run")]


def test_disagreement_is_one_less_the_dice_of_the_networks():
    image, grid = prepared(tiny_run.head(), (2.0, 2.0, 5.0))
    low, high = {"hu": 60, "from": 0}, {"hu": 90, "from": 0}
    one, other = image > 60, image > 90
    want = 1 - 2 * (one & other).sum() / (one.sum() + other.sum())
    assert views(low, high).disagreement(image, grid) == pytest.approx(want)
    assert 0.1 < want < 0.9
    assert views(low, low).disagreement(image, grid) == 0
    assert views().disagreement(image, grid) is None


def test_one_network_is_compared_with_its_answer_to_the_mirrored_scan():
    image, grid = prepared(tiny_run.head(), (2.0, 2.0, 5.0))
    assert views({"hu": 60, "from": 0}).disagreement(image, grid) == 0, "blind to sides"
    sided = views({"hu": 60, "from": 16})
    assert sided.disagreement(image, grid) > 0.3
    d, h, w = grid.order
    sagittal = dataclasses.replace(grid, order=(w, d, h))  # of a plan that puts the sides first
    assert sided.disagreement(image, sagittal) == 0, "the network is blind to that axis"


def test_the_verb_lists_them_and_remembers(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    phantom = tiny_run.head(1)
    phantom[phantom > -500] = 700
    phantom[8:12, 8:12, 3] = 40
    for name, voxels in (("a", tiny_run.head()), ("b", phantom), ("c", tiny_run.head(2))):
        nib.save(nib.Nifti1Image(voxels, tiny_run.upright()), images / f"{name}.nii.gz")
    config = ensemble.run_of(RUN[0], images=str(images), out=str(out), confidence=True).config
    plain = dataclasses.replace(config.predict, confidence=False)
    predict.run(dataclasses.replace(config, predict=plain), RUN[0])
    again = dataclasses.replace(config.predict, overwrite=False)
    predict.run(dataclasses.replace(config, predict=again), RUN[0])  # measures what was not
    first = (out / "review.csv").read_bytes()
    with (out / "review.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["case"] == "b"
    assert "of the head lie in 10 to 110 HU" in rows[0]["unlike"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 1 > scores[1]
    with (out / "volumes.csv").open(newline="") as file:
        volumes = {row["case"]: row for row in csv.DictReader(file)}
    assert {row["case"]: row["disagreement"] for row in rows} == {
        case: row["disagreement"] for case, row in volumes.items()
    }
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    for path in (*out.glob("*.csv"), *out.glob("*.json")):
        path.unlink()  # as several processes leave a folder when they are stopped
    predict.run(dataclasses.replace(config, predict=again), RUN[0])
    assert {path: path.stat().st_mtime_ns for path in made} == made, "they stay"
    assert (out / "review.csv").read_bytes() == first


def test_the_score_puts_unlike_scans_before_all_others():
    assert review.score(None, "") is None
    assert review.score(0.2, "") == 0.2
    assert review.score(1.0, "") < review.score(None, "slices of 9 mm") == 1.0
    assert review.score(0.0, "x") < review.score(0.3, "x")


def test_nothing_measured_leaves_no_list(tmp_path):
    review.write(tmp_path, [ScanVolumes("a", 0.0, 1.0, {"IPH": 1.0})])
    assert not list(tmp_path.iterdir())
    assert np.isfinite(review.score(0.5, ""))

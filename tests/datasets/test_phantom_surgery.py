import numpy as np
import pytest
from scipy import ndimage

from bhsd_jax.phantom.anatomy import arc_mm
from bhsd_jax.phantom.bleeds import EDH, IPH, SDH
from bhsd_jax.phantom.case import Options, make_case
from bhsd_jax.phantom.surgery import Surgery, draw_surgery


def _surgery(**changes):
    nothing = {"flap_mm": 0.0, "removed": False, "air_mm": 0.0, "drain": 0, "swollen_mm": 0.0}
    return Surgery(toward=(1.0, 0.0, 0.0), bruise=(-1.0, 0.0, 0.0), **nothing | changes)


def _seeds(wanted, count):
    """Seeds of heads on which `wanted` was done."""
    found = []
    for seed in range(200):
        truth = make_case(seed, Options(size=8, slices=1, sub=1, classes=()))[2]
        if wanted(truth.surgery):
            found.append(seed)
        if len(found) == count:
            return found
    raise AssertionError("too rare")


def test_half_of_the_heads_are_as_they_were():
    drawn = [draw_surgery(np.random.default_rng(seed), 1.0) for seed in range(400)]
    assert 0.16 < np.mean([s.flap_mm > 0 for s in drawn]) < 0.28
    assert 0.10 < np.mean([s.drain != 0 for s in drawn]) < 0.20
    assert 0.19 < np.mean([s.swollen_mm > 0 for s in drawn]) < 0.31
    assert all(s.flap_mm > 0 for s in drawn if s.air_mm > 0)
    none = [draw_surgery(np.random.default_rng(seed), 0.0) for seed in range(50)]
    assert not any(s.flap_mm or s.air_mm or s.drain or s.swollen_mm for s in none)


def test_a_bone_flap_is_cut_around_or_gone():
    angle = np.linspace(0, 1.5, 200, dtype=np.float32)
    rim = (70 * np.cos(angle), 70 * np.sin(angle), np.zeros_like(angle))
    arc = arc_mm(rim, (1.0, 0.0, 0.0))
    kept, gone = _surgery(flap_mm=40.0), _surgery(flap_mm=40.0, removed=True)
    np.testing.assert_array_equal(gone.opened(rim), arc < 40)
    assert (np.abs(arc[kept.opened(rim)] - 40) < 1.1).all()
    assert kept.opened(rim).any()
    assert not _surgery().opened(rim).any()
    assert not _surgery().swelling(rim).any()
    assert kept.swelling(rim)[0] > 3


@pytest.mark.parametrize("index", [EDH, SDH])
def test_air_and_drains_are_no_blood(index):
    for seed in _seeds(lambda s: s.air_mm > 4 or s.drain, 3):
        options = Options(size=128, slices=16, classes=(index,), volumes_ml={index: 40.0}, pad_hu=0)
        hu, label, truth = make_case(seed, options)
        assert label.any()
        assert np.percentile(hu[label > 0], 0.5) > -60
        assert np.percentile(hu[label > 0], 99.5) < 120
        if truth.surgery.air_mm > 4:
            inside = np.asarray(ndimage.binary_fill_holes(np.max(hu, 0) > 300))
            assert ((hu < -300) & inside).any()


def test_a_large_bleed_moves_the_ventricles_to_the_other_side():
    moved = []
    for seed in range(4):
        options = {"size": 96, "slices": 16, "tilt_deg": 0.0, "pad_hu": 0}
        before, _, _ = make_case(seed, Options(classes=(), **options))
        hu, label, truth = make_case(
            seed, Options(classes=(IPH,), volumes_ml={IPH: 60.0}, **options)
        )
        center = np.nonzero(label)[2].mean()
        rows = slice(30, 66)
        # Cerebrospinal fluid of the middle of the brain, but for the bleed.
        dark = [(v[6:10, rows, 33:63] > -5) & (v[6:10, rows, 33:63] < 18) for v in (before, hu)]
        shift = np.nonzero(dark[1])[2].mean() - np.nonzero(dark[0])[2].mean()
        moved.append(shift * np.sign(47.5 - center) * truth.scan.pixel_mm)
    assert np.mean(moved) > 1

"""The threshold baseline on a drawn head."""

import math

import numpy as np
import pytest

from bhsd_jax.metrics import threshold

SPACING = (5.0, 2.0, 2.0)
BLEED_HU = 65.0


def head(blood_mm=14.0, noise=2.0, seed=0):
    """Scalp, skull, brain, and a ball of blood; the scan and the ball."""
    z, y, x = np.ogrid[-6:7, -48:48, -48:48]
    far = np.sqrt((z * 5.0) ** 2 / 4 + (y * 2.0) ** 2 + (x * 2.0) ** 2)
    hu = np.full(far.shape, -1000.0)
    hu[far < 85] = 40.0  # scalp
    hu[far < 80] = 900.0
    hu[far < 72] = 33.0
    ball = np.sqrt((z * 5.0) ** 2 + (y * 2.0 - 20) ** 2 + (x * 2.0) ** 2) < blood_mm
    hu[ball] = BLEED_HU
    return hu + np.random.default_rng(seed).normal(0, noise, hu.shape), ball


def test_the_band_separates_blood_from_brain():
    cases = [threshold.histogram(*head(blood, seed=i), SPACING) for i, blood in enumerate((14, 24))]
    band = threshold.best_band(cases)
    assert 33 < band.hu[0] < BLEED_HU < band.hu[1]
    assert band.mean_dice > 0.9
    assert band.mean_dice == pytest.approx(np.mean(band.dice))


def test_the_inside_is_without_scalp_and_bone():
    hu, ball = head()
    z, y, x = np.ogrid[-6:7, -48:48, -48:48]
    far = np.sqrt((z * 5.0) ** 2 / 4 + (y * 2.0) ** 2 + (x * 2.0) ** 2)
    _, tissue = threshold.smooth(hu, SPACING)
    inside = threshold.brain(tissue, SPACING)
    assert not inside[far > 76].any()
    assert inside[ball].all()
    assert inside[far < 66].mean() > 0.99


def test_a_band_is_scored_by_its_voxels():
    """Bins of one HU from 20: 8 voxels of blood at 30 HU, 2 of brain there, 2 masked outside."""
    bleeding, inside = np.zeros((2, 120), np.int64)
    bleeding[10], inside[10], inside[40] = 8, 10, 500
    band = threshold.best_band([threshold.Histogram(bleeding, inside, mask=10)])
    assert band.dice == (pytest.approx(2 * 8 / (10 + 10)),)
    assert band.hu[0] <= 30 < band.hu[1] <= 60


def test_cases_without_blood_count_only_if_the_band_finds_some():
    bleeding, inside = np.zeros((2, 120), np.int64)
    bleeding[10] = inside[10] = 8
    sick = threshold.Histogram(bleeding, inside, mask=8)
    well = threshold.Histogram(np.zeros(120, int), np.zeros(120, int), mask=0)
    band = threshold.best_band([sick, well])
    assert band.dice[0] == band.mean_dice == 1.0
    assert math.isnan(band.dice[1])
    fooled = threshold.Histogram(np.zeros(120, int), inside, mask=0)
    assert threshold.best_band([sick, fooled]).mean_dice == 0.5


def test_a_scan_without_tissue_has_no_inside():
    air = np.full((2, 8, 8), -1000.0)
    found = threshold.histogram(air, np.zeros(air.shape, bool), SPACING)
    assert (found.inside.sum(), found.mask) == (0, 0)


def test_no_cases_are_refused():
    with pytest.raises(ValueError, match="no cases to choose a band on"):
        threshold.best_band([])

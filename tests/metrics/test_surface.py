"""Surface distances: by hand, by brute force, and against two reference libraries."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.ndimage

from bhsd_jax.metrics import overlap, surface, surface_area

SPACING = (5.0, 0.7, 0.5)


def box(shape, *corners):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(*corners, strict=True))] = True
    return mask


def random_pair(seed, shape=(4, 6, 7)):
    first, second = np.random.default_rng(seed).random((2, *shape)) < 0.3
    return first, second


def of_reference(name, found):
    """Our number for a golden's name; `found` has counts and both kinds of distances."""
    counts, elements, edges = found
    name, _, tolerance = name.partition("@")
    tolerance = float(tolerance or 0)
    return {
        "gt_voxels": lambda: counts.reference,
        "pred_voxels": lambda: counts.predicted,
        "deepmind_dice": lambda: counts.dice,
        "monai_dice_ignore_empty": lambda: counts.dice if counts.reference else math.nan,
        "monai_dice_keep_empty": lambda: 1.0 if math.isnan(counts.dice) else counts.dice,
        "deepmind_hd95": lambda: surface.hausdorff(elements, 95),
        "deepmind_hd100": lambda: surface.hausdorff(elements),
        "deepmind_asd_gt_to_pred": lambda: surface.average_distance(elements)[0],
        "deepmind_asd_pred_to_gt": lambda: surface.average_distance(elements)[1],
        "deepmind_nsd": lambda: surface.surface_dice(elements, tolerance),
        "deepmind_overlap_gt": lambda: surface.surface_overlap(elements, tolerance)[0],
        "deepmind_overlap_pred": lambda: surface.surface_overlap(elements, tolerance)[1],
        "deepmind_surface_area_gt": lambda: elements.reference_weight.sum(),
        "deepmind_surface_area_pred": lambda: elements.predicted_weight.sum(),
        "monai_nsd_subvoxel": lambda: surface.surface_dice(elements, tolerance),
        "monai_hd": lambda: surface.edge_hausdorff(edges),
        "monai_hd95": lambda: surface.edge_hausdorff(edges, 95),
        "monai_hd_directed_pred_to_gt": lambda: surface.edge_hausdorff(edges, directed=True),
        "monai_hd95_directed_pred_to_gt": lambda: surface.edge_hausdorff(edges, 95, directed=True),
        "monai_assd": lambda: surface.average_symmetric_distance(edges),
        "monai_nsd": lambda: surface.surface_dice(edges, tolerance),
    }[name]()


@pytest.mark.parametrize("number", [1, 2])
def test_all_values_of_monai_and_surface_distance_are_reproduced(golden, number):
    facts = json.loads((golden / f"metrics_{number}.json").read_text())
    arrays = np.load(golden / f"metrics_{number}.npz")
    shape, spacing = tuple(facts["shape_DHW"]), tuple(facts["spacing_DHW_mm"])
    names = [key.removeprefix("value/") for key in arrays if key.startswith("value/")]
    assert len(names) == 31
    for index, kind in enumerate(facts["cases"]):
        masks = [
            np.unpackbits(arrays[f"{key}/{index}"])[: math.prod(shape)].reshape(shape)
            for key in ("gt", "pred")
        ]
        pair = [mask.astype(bool) for mask in masks]
        found = (
            overlap.count(*masks, 2)[1],
            surface.element_distances(*pair, spacing),
            surface.edge_distances(*pair, spacing),
        )
        for name in names:
            np.testing.assert_allclose(
                of_reference(name, found),
                arrays[f"value/{name}"][index],
                rtol=1e-5 if name.startswith("monai") else 1e-9,  # MONAI's are single precision
                err_msg=f"{kind}: {name}",
            )


def test_area_of_hand_computed_neighborhoods():
    d, h, w = SPACING
    areas = surface_area.table(SPACING)
    code = {corner: 1 << i for i, corner in enumerate(surface_area.CORNERS)}
    corner = np.linalg.norm([h * w, d * w, d * h]) / 8
    half = code[0, 0, 0] + code[0, 0, 1] + code[0, 1, 0] + code[0, 1, 1]
    edge = code[0, 0, 0] + code[0, 0, 1]  # a ramp along W over half a voxel in D and H
    opposite = code[0, 0, 0] + code[1, 1, 1]
    assert areas[[0, 255]].tolist() == [0, 0]
    assert areas[code[0, 1, 0]] == pytest.approx(corner)
    assert areas[half] == pytest.approx(h * w)
    assert areas[edge] == pytest.approx(w * math.hypot(d / 2, h / 2))
    assert areas[opposite] == pytest.approx(2 * corner)


def test_area_of_a_neighborhood_is_that_of_its_complement():
    areas = surface_area.table(SPACING)
    np.testing.assert_allclose(areas, areas[::-1], rtol=1e-12)


def test_area_is_the_same_from_all_sides():
    areas = surface_area.table((1.0, 1.0, 1.0))
    weights = 1 << np.arange(8).reshape(2, 2, 2)
    for code in range(256):
        cell = (code & weights) > 0
        for axes, flips in itertools.product(
            itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)
        ):
            turned = cell.transpose(axes)[tuple(slice(None, None, f) for f in flips)]
            assert areas[(turned * weights).sum()] == pytest.approx(areas[code], rel=1e-12)


def test_area_of_a_box_by_hand():
    """Six faces of whole cells, twelve beveled edges, eight cut corners."""
    d, h, w = SPACING
    mask = box((6, 7, 8), (1, 1, 1), (4, 6, 5))  # 3 x 5 x 4 voxels
    faces = 2 * (4 * 3 * h * w + 2 * 3 * d * w + 2 * 4 * d * h)
    edges = 4 * (2 * d * math.hypot(h / 2, w / 2) + 4 * h * math.hypot(d / 2, w / 2))
    edges += 4 * 3 * w * math.hypot(d / 2, h / 2)
    corners = np.linalg.norm([h * w, d * w, d * h])
    found = surface.element_distances(mask, mask, SPACING)
    assert found.reference_weight.sum() == pytest.approx(faces + edges + corners, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_edge_distances_are_those_of_all_pairs(seed):
    reference, predicted = random_pair(seed)
    found = surface.edge_distances(reference, predicted, SPACING)

    def edge(mask):
        inside = np.pad(mask, 1)
        near = np.stack([np.roll(inside, s, a) for a in range(3) for s in (1, -1)])
        return np.argwhere(inside & ~near.all(0)) * SPACING

    apart = np.linalg.norm(edge(reference)[:, None] - edge(predicted)[None], axis=2)
    np.testing.assert_allclose(found.to_predicted_mm, np.sort(apart.min(1)), rtol=1e-6)
    np.testing.assert_allclose(found.to_reference_mm, np.sort(apart.min(0)), rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_element_distances_are_those_of_a_distance_transform(seed):
    reference, predicted = random_pair(seed)
    found = surface.element_distances(reference, predicted, SPACING)

    def border(mask):
        cells = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2))
        inside = cells.sum((3, 4, 5))
        return (inside > 0) & (inside < 8)

    far = scipy.ndimage.distance_transform_edt(~border(predicted), sampling=SPACING)
    np.testing.assert_allclose(
        found.to_predicted_mm, np.sort(far[border(reference)]), rtol=1e-12, atol=1e-12
    )


def test_a_plate_moved_by_one_slice():
    """Faces lie one slice apart, rims nearer, so that all of the surface is within 5 mm."""
    one, other = box((5, 9, 9), (1, 1, 1), (2, 8, 8)), box((5, 9, 9), (2, 1, 1), (3, 8, 8))
    distances = surface.element_distances(one, other, SPACING)
    assert surface.hd95_mm(distances) == pytest.approx(5.0)
    assert surface.surface_dice(distances, 5.0) == 1.0
    # The layer of elements between both slices belongs to both surfaces, the outer ones do not.
    assert surface.surface_dice(distances, 4.9) == pytest.approx(0.5)


def test_percentile_of_hand_made_distances():
    distances = surface.Distances(
        to_predicted_mm=np.array([0.0, 1.0, 2.0, 9.0]),
        reference_weight=np.array([10.0, 80.0, 6.0, 4.0]),
        to_reference_mm=np.array([0.0, 3.0]),
        predicted_weight=np.array([1.0, 1.0]),
    )
    assert surface.hausdorff(distances, 90) == 3.0
    assert surface.hausdorff(distances) == 9.0
    assert surface.edge_hausdorff(distances, 50) == pytest.approx(1.5)
    assert surface.average_distance(distances) == pytest.approx((1.28, 1.5))
    assert surface.surface_overlap(distances, 1.0) == pytest.approx((0.9, 0.5))
    assert surface.surface_dice(distances, 1.0) == pytest.approx(91 / 102)


@pytest.mark.parametrize(("far", "want"), [(5.0, 1.0), (5.1, 9.0)])
def test_95_percent_of_the_area_is_enough_and_less_is_not(far, want):
    distances = surface.Distances(
        to_predicted_mm=np.array([1.0, 9.0]),
        reference_weight=np.array([100 - far, far]),
        to_reference_mm=np.array([0.0]),
        predicted_weight=np.array([1.0]),
    )
    assert surface.hausdorff(distances, 95) == want


def headline(reference, predicted, spacing, tolerance_mm=1.0):
    distances = surface.element_distances(reference, predicted, spacing)
    return surface.hd95_mm(distances), surface.surface_dice(distances, tolerance_mm)


def test_exchanging_the_masks_changes_nothing():
    reference, predicted = random_pair(5)
    there, back = headline(reference, predicted, SPACING), headline(predicted, reference, SPACING)
    assert there == pytest.approx(back, rel=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirroring_both_masks_changes_nothing(axis):
    reference, predicted = random_pair(6)
    mirrored = np.flip(reference, axis), np.flip(predicted, axis)
    assert headline(*mirrored, SPACING) == pytest.approx(
        headline(reference, predicted, SPACING), rel=1e-12
    )


def test_empty_space_around_changes_nothing():
    reference, predicted = random_pair(7)
    wide = np.pad(reference, (3, 9)), np.pad(predicted, (3, 9))
    assert headline(*wide, SPACING) == headline(reference, predicted, SPACING)


def test_distances_grow_with_the_spacing():
    reference, predicted = random_pair(8)
    doubled = tuple(2 * s for s in SPACING)
    hd95, nsd = headline(reference, predicted, SPACING)
    assert headline(reference, predicted, doubled, 2.0) == pytest.approx((2 * hd95, nsd), rel=1e-12)


def test_a_mask_agrees_with_itself():
    mask, _ = random_pair(9)
    assert headline(mask, mask, SPACING) == (0.0, 1.0)


def test_rules_for_empty_masks():
    mask, _ = random_pair(10)
    none = np.zeros_like(mask)
    for pair in ((mask, none), (none, mask)):
        assert headline(*pair, SPACING) == (math.inf, 0.0)
    assert all(map(math.isnan, headline(none, none, SPACING)))


def test_a_single_slice_is_a_volume_too():
    mask = box((1, 6, 6), (0, 2, 2), (1, 4, 4))
    assert headline(mask, np.roll(mask, 1, axis=2), SPACING) == (0.5, 1.0)


def test_another_grid_or_a_spacing_of_zero_is_refused():
    mask, _ = random_pair(11)
    with pytest.raises(ValueError, match=r"prediction \(4, 6, 5\); both must lie on the grid"):
        surface.element_distances(mask, mask[..., :5], SPACING)
    with pytest.raises(ValueError, match=r"spacing \(5.0, 0.0, 1.0\) mm .* must be positive"):
        surface.element_distances(mask, mask, (5.0, 0.0, 1.0))

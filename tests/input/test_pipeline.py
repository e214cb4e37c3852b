"""Streams are a function of position: threads, processes and restarts do not change them."""

import dataclasses

import numpy as np
import pytest

from bhsd_jax.input import sampling
from bhsd_jax.input.pipeline import Batches, Cache, Cut, Decoded, Stream

CUT = Cut(patch=(4, 6, 6), source=(4, 8, 8), fill=-7.0)
SCANS = {
    f"case{i}": Decoded(
        image=np.random.default_rng(i).integers(-1000, 1000, (5 + i, 12, 10)).astype(np.int16),
        label=np.random.default_rng(i).integers(0, 3, (5 + i, 12, 10)).astype(np.uint8),
        foreground=(np.array([[1, 2, 3]]), np.array([[4, 11, 9]])),
    )
    for i in range(4)
}


def stream(*, labeled=True, batch=4, length=400, seed=0, cut=CUT, in_turn=False):
    number = 0 if labeled else 1
    return Stream(
        SCANS.__getitem__,
        sorted(SCANS),
        cut,
        batch=batch,
        length=length,
        seed=(seed, number),
        labeled=labeled,
        in_turn=in_turn,
    )


def cases_of(stream, elements):
    """Which case each of the elements was cut from."""
    opened = []
    stream.open_case = lambda case: opened.append(case) or SCANS[case]
    for i in elements:
        stream[i]
    return opened


def both(**kwargs):
    return Batches([stream(), stream(labeled=False, batch=2, length=200)], **kwargs)


def equal(a, b):
    for name in ("image", "label", "unlabeled"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_shapes_types_and_no_end_before_the_length():
    batches = list(both())
    assert len(batches) == 100
    for batch in batches:
        assert batch.image.shape == (4, 4, 8, 8, 1)
        assert batch.image.dtype == np.int16
        assert batch.label.shape == (4, 4, 8, 8)
        assert batch.label.dtype == np.int8
        assert batch.unlabeled.shape == (2, 4, 8, 8, 1)


def test_image_and_label_are_cut_at_the_same_place():
    batch = next(both())
    for image, label in zip(batch.image[..., 0], batch.label, strict=True):
        assert ((image == -7) >= (label == -1)).all()
        where = np.argwhere(label >= 0)
        assert any(_found(scan, image, label, where[0], where[-1]) for scan in SCANS.values()), (
            "the patch is a box of one scan, image and label together"
        )


def _found(scan, image, label, first, last):
    box = tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True))
    size = image[box].shape
    for corner in np.ndindex(*(n - s + 1 for n, s in zip(scan.shape, size, strict=True))):
        place = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
        if (scan.image[place] == image[box]).all() and (scan.label[place] == label[box]).all():
            return True
    return False


def test_a_position_resumes_the_very_next_batch():
    whole = both()
    for _ in range(7):
        next(whole)
    resumed = both(position=whole.state()["batches"])
    for _ in range(3):
        equal(next(whole), next(resumed))


def test_threads_do_not_matter():
    for a, b in zip(both(threads=0), both(threads=8, buffer=3), strict=True):
        equal(a, b)


@pytest.mark.parametrize(
    "shares", [([0, 1, 2, 3],), ([0, 1], [2, 3]), ([0, 3], [1, 2]), ([1, 2, 3], [0, 1])]
)
def test_processes_hold_the_rows_of_one_global_batch(shares):
    parts = [both(rows=[share, [share[0] % 2]]) for share in shares]
    whole = both()
    for _ in range(3):
        want = next(whole)
        for part, share in zip(parts, shares, strict=True):
            rows = next(part)
            np.testing.assert_array_equal(rows.image, want.image[share])
            np.testing.assert_array_equal(rows.label, want.label[share])
            np.testing.assert_array_equal(rows.unlabeled, want.unlabeled[[share[0] % 2]])


def test_the_two_streams_and_two_seeds_draw_differently():
    a, b = stream(), stream(seed=1)
    assert any((a[i]["image"] != b[i]["image"]).any() for i in range(4))
    free = stream(labeled=False)
    assert any((a[i]["image"] != free[i]["image"]).any() for i in range(4))


@pytest.mark.parametrize("labeled", [True, False])
def test_in_turn_every_pass_is_a_permutation_of_the_cases(labeled):
    drawn = stream(labeled=labeled, in_turn=True, batch=3)  # passes end amid batches
    passes = np.reshape(cases_of(drawn, range(40 * len(SCANS))), (40, len(SCANS)))
    assert (np.sort(passes) == sorted(SCANS)).all()
    assert len({tuple(order) for order in passes}) > 12, "of 24 orders; each pass draws its own"
    other = stream(labeled=labeled, in_turn=True, seed=1)
    assert cases_of(other, range(40)) != passes.ravel()[:40].tolist()
    assert cases_of(drawn, [17, 5, 17]) == passes.ravel()[[17, 5, 17]].tolist()


def test_with_replacement_passes_are_no_permutations():
    passes = np.reshape(cases_of(stream(), range(40 * len(SCANS))), (40, len(SCANS)))
    assert not (np.sort(passes) == sorted(SCANS)).all()
    assert set(passes.ravel()) == set(SCANS)


def test_unlabeled_elements_never_look_at_a_mask():
    blind = {name: Decoded(scan.image, None, ()) for name, scan in SCANS.items()}
    free = stream(labeled=False)
    want = [free[i]["image"] for i in range(8)]  # two batches, their last rows among them
    free.open_case = blind.__getitem__
    for i, image in enumerate(want):
        np.testing.assert_array_equal(free[i]["image"], image)
        assert set(free[i]) == {"image"}


def test_only_the_last_third_of_a_labeled_batch_is_centered_on_foreground(monkeypatch):
    centered, corner = [], sampling.corner

    def spy(*arguments):
        centered.append(arguments[-1] is not None)
        return corner(*arguments)

    monkeypatch.setattr(sampling, "corner", spy)
    for elements in (stream(batch=3), stream(batch=3, labeled=False)):
        for i in range(6):
            elements[i]
    assert centered == [False, False, True] * 2 + [False] * 6


def test_a_third_of_the_batches_of_one_patch_are_centered_on_foreground(monkeypatch):
    centered, corner = [], sampling.corner

    def spy(*arguments):
        centered.append(arguments[-1] is not None)
        return corner(*arguments)

    monkeypatch.setattr(sampling, "corner", spy)
    elements = stream(batch=1)
    for i in range(300):
        elements[i]
    assert 70 < sum(centered) < 130
    first = list(centered)
    for i in range(300):
        elements[i]
    assert centered[300:] == first, "an element is a function of its number"


def test_masked_patches_say_which_voxels_lie_in_the_scan():
    full = {
        name: dataclasses.replace(scan, image=np.full_like(scan.image, 5))
        for name, scan in SCANS.items()
    }
    free = stream(labeled=False, cut=dataclasses.replace(CUT, masked=True))
    free.open_case = full.__getitem__
    found = [free[i] for i in range(12)]
    for element in found:
        assert element["inside"].dtype == np.int8
        want = np.where(element["image"][..., 0] == 5, 1, -1)
        np.testing.assert_array_equal(element["inside"], want)
    assert any((element["inside"] < 0).any() for element in found)
    plain = stream(labeled=False)
    plain.open_case = full.__getitem__
    np.testing.assert_array_equal(plain[3]["image"], found[3]["image"])
    labeled = stream(cut=dataclasses.replace(CUT, masked=True))
    assert set(labeled[0]) == {"image", "label"}
    free.open_case = SCANS.__getitem__
    batch = next(Batches([labeled, free]))
    assert batch.inside.shape == (4, 4, 8, 8)
    assert batch.slice_labels is None


def test_binary_merges_the_classes_and_keeps_outside():
    cut = Cut(patch=(4, 6, 6), source=(4, 8, 8), fill=-7.0, binary=True)
    for i in range(8):
        one, many = stream(cut=cut)[i]["label"], stream()[i]["label"]
        np.testing.assert_array_equal(one, np.minimum(many, 1))


def test_a_labeled_case_without_a_mask_is_an_error():
    scan = SCANS["case0"]
    bad = stream()
    bad.open_case = lambda case: Decoded(scan.image, None, ())
    with pytest.raises(ValueError, match="no mask"):
        bad[0]


def test_the_cache_keeps_to_its_budget_and_changes_nothing():
    loads = []

    def load(case):
        loads.append(case)
        return SCANS[case]

    budget = SCANS["case0"].nbytes + 1
    cache = Cache(SCANS.__getitem__, load, budget)
    for case in ("case0", "case1", "case0", "case1", "case2"):
        assert cache(case) is SCANS[case]
    assert loads == ["case0", "case1"], "the budget is spent after the second"

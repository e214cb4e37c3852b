from pathlib import Path

import numpy as np
import pytest

from bhsd_jax.volume import Case, bounding_box


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 7, 5)])
def test_a_box_holds_all_that_is_marked_and_no_plane_more(shape):
    rng = np.random.default_rng(len(shape))
    assert bounding_box(np.zeros(shape, bool)) is None
    for _ in range(50):
        mask = rng.random(shape) < 0.1
        places = np.argwhere(mask)
        box = bounding_box(mask)
        if not len(places):
            assert box is None
            continue
        assert [part.start for part in box] == places.min(0).tolist()
        assert [part.stop for part in box] == (places.max(0) + 1).tolist()
        assert bounding_box(mask * -2) == box
        assert mask[box].sum() == mask.sum()


def test_an_array_without_voxels_has_no_box():
    assert bounding_box(np.zeros((3, 0, 2), bool)) is None


def test_a_case_takes_paths_as_text():
    case = Case("a", "a", "scans/a.nii.gz", "masks/a.nii.gz", "train")  # pyright: ignore
    assert (case.image, case.label) == (Path("scans/a.nii.gz"), Path("masks/a.nii.gz"))
    assert Case("a", "a", Path("a.nii"), None, "test").label is None

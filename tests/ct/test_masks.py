import numpy as np
import pytest

from bhsd_jax.ct import masks, nifti, scan
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.volume import Masks, Volume

# One column per voxel: what four raters say, and what comes of it.
RATERS = np.array(
    [
        [0, 1, 1, 2, 0, 2, 3],
        [0, 1, 2, 2, 0, 1, 0],
        [0, 1, 1, 0, 1, 1, 0],
        [0, 1, 2, 0, 1, 2, 0],
    ],
    np.uint8,
)
WANT = {
    "first": [0, 1, 1, 2, 0, 2, 3],
    "majority": [0, 1, 1, 0, 0, 1, 0],  # ties: the lowest, background before all
    "union": [0, 1, 1, 2, 1, 1, 3],
    "intersection": [0, 1, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("way", masks.WAYS)
def test_raters_are_combined_voxel_by_voxel(way):
    labels = [row.reshape(1, 1, -1) for row in RATERS]
    made = masks.combine(labels, way)
    assert made.dtype == np.uint8
    assert made.ravel().tolist() == WANT[way]
    np.testing.assert_array_equal(masks.combine(labels[:1], way), labels[0])


def test_an_unknown_way_lists_the_known_ones():
    with pytest.raises(ValueError, match="first, majority, union, intersection; got 'staple'"):
        masks.combine([np.zeros((1, 1, 1), np.uint8)], "staple")


def test_values_without_a_class_are_refused():
    label = np.array([[[0, 1, 4]]], np.uint8)
    assert masks.reclass(label, (0, 2, 1, 1, 3), None, "m").ravel().tolist() == [0, 2, 3]
    with pytest.raises(Refusal, match=r"m: label values 4 have no class.*0\.\.2") as caught:
        masks.reclass(label, (0, 1, 2), None, "m")
    assert caught.value.kind is Kind.MASK_VALUES
    with pytest.raises(ValueError, match="label values 4"):
        masks.reclass(label, (), 3, "m")


def test_a_label_map_is_made_from_the_files_of_several_raters(tmp_path):
    affine = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    paths = []
    for index, row in enumerate(RATERS):
        paths.append(tmp_path / f"{index}.nii.gz")
        nifti.write_volume(paths[-1], Volume(row.reshape(1, 1, -1) * 10, affine, ""))
    image = tmp_path / "image.nii.gz"
    nifti.write_volume(image, Volume(np.zeros((1, 1, 7), np.int16), affine, ""))
    values = tuple(value // 10 for value in range(31))
    volume, _ = scan.read(image)
    label, _ = scan.read_label(
        Masks(tuple(paths), "majority", values), image, volume, num_classes=4
    )
    assert label.voxels.ravel().tolist() == WANT["majority"]
    np.testing.assert_array_equal(label.affine, volume.affine)

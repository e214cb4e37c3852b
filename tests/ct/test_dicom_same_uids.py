"""Several scans that share a SeriesInstanceUID: patients, exports, reconstructions."""

import numpy as np
import pytest
import tiny_run
from dicom_files import block, write_series

from bhsd_jax.ct import prepare
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.defects import Kind
from bhsd_jax.volume import Case


def volumes(root):
    """Voxels as in the files, and kinds of findings, of each group."""
    read = (
        dicom_series.read(group.as_series("a", uneven="refuse", unshear=False))
        for group in dicom_series.find(root)
    )
    return [(volume.voxels[:, ::-1], [one.kind for one in found]) for volume, found in read]


def numbered(tag, value):
    def change(index, data):
        data.InstanceNumber = index + 1
        setattr(data, tag, value)

    return change


@pytest.mark.parametrize("off", [0.0, 2.5, 40.0])
@pytest.mark.parametrize("folders", ["ab", "aa"])
def test_patients_that_were_given_one_uid_are_not_mixed(tmp_path, folders, off):
    heads = block(), block(seed=1)
    for number, (folder, head) in enumerate(zip(folders, heads, strict=True)):
        names = [f"{number}_{k}" for k in range(6)]
        places = np.arange(6) * 5.0 + off * number
        who = {"patient": f"anon{number}"}
        write_series(tmp_path / folder, head, places=places, names=names, **who)
    found = volumes(tmp_path)
    assert [kinds for _, kinds in found] == [[], []]
    for (voxels, _), head in zip(found, heads, strict=True):
        np.testing.assert_array_equal(voxels, head)


def test_slices_that_name_no_patient_are_of_the_one_that_others_name(tmp_path):
    def change(index, data):
        data.PatientID = "" if index % 2 else "anon"

    write_series(tmp_path, block(), change=change)
    ((voxels, kinds),) = volumes(tmp_path)
    np.testing.assert_array_equal(voxels, block())
    assert kinds == []


@pytest.mark.parametrize("off", [0.0, 2.5])
def test_folders_that_number_their_images_anew_are_not_mixed(tmp_path, off):
    heads = block(), block(seed=1)
    for number, head in enumerate(heads):
        places = np.arange(6) * 5.0 + off * number
        write_series(tmp_path / f"{number}", head, places=places)
    for (voxels, kinds), head in zip(volumes(tmp_path), heads, strict=True):
        np.testing.assert_array_equal(voxels, head)
        assert kinds == [Kind.ACQUISITIONS]


def test_a_series_that_is_spread_over_folders_and_one_that_lies_there_twice_stay_whole(tmp_path):
    head = block()
    paths = write_series(tmp_path / "a" / "1", head)
    (tmp_path / "a" / "2").mkdir()
    for path in paths[::2]:
        path.rename(tmp_path / "a" / "2" / path.name)
    for path in write_series(tmp_path / "b" / "1", head, series="1.9"):
        copy = tmp_path / "b" / "2" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (spread, none), (twice, kinds) = volumes(tmp_path)
    np.testing.assert_array_equal(spread, head)
    np.testing.assert_array_equal(twice, head)
    assert (none, kinds) == ([], [Kind.SLICES_TWICE])


@pytest.mark.parametrize("off", [0.0, 0.6])
@pytest.mark.parametrize("tag", ["SliceThickness", "SeriesNumber"])
def test_thin_and_thick_slices_of_one_series_are_two_volumes(tmp_path, tag, off):
    thick, thin = block(), block((21, 12, 10), seed=1)
    for name, head, step, value in (("a", thick, 5, 5), ("b", thin, 1.25, 1)):
        places = np.arange(len(head)) * step + (off if name == "a" else 0)
        names = [f"{name}{k:02}" for k in range(len(head))]
        write_series(tmp_path, head, places=places, names=names, change=numbered(tag, value))
    for (voxels, kinds), head in zip(volumes(tmp_path), (thin, thick)[::-1], strict=True):
        np.testing.assert_array_equal(voxels, head)
        assert kinds == [Kind.ACQUISITIONS]


def test_a_thickness_that_is_rounded_slice_by_slice_is_one_series(tmp_path):
    def thick(index, data):
        data.SliceThickness = 0.62 + 0.01 * (index % 2)

    write_series(tmp_path, block((12, 12, 10)), spacing_mm=(0.625, 2, 1.5), change=thick)
    ((voxels, kinds),) = volumes(tmp_path)
    np.testing.assert_array_equal(voxels, block((12, 12, 10)))
    assert kinds == []


@pytest.mark.parametrize(
    "second", [{"tilt_deg": 12.0}, {"spacing_mm": (5.0, 2.5, 2.0)}, {"hu": block((6, 16, 14))}]
)
def test_pieces_of_a_series_that_are_no_one_volume_are_told(tmp_path, second):
    """As where the base of the skull was scanned at another tilt than the rest."""
    write_series(tmp_path, block())
    rest = {"hu": block(), "places": 35 + 5.0 * np.arange(6)} | second
    hu = rest.pop("hu")
    write_series(tmp_path, hu, names=list("abcdef"), **rest)
    found = volumes(tmp_path)
    assert [voxels.shape for voxels, _ in found] == [block().shape, hu.shape]
    assert all(Kind.SERIES_PARTS in kinds for _, kinds in found)
    (group, _) = dicom_series.find(tmp_path)
    image = group.as_series("a", uneven="refuse", unshear=False)
    (doubt,) = prepare.prepare_case(Case("a", "a", image, None, "test"), tiny_run.PLAN).doubts
    assert doubt.startswith("one of 2 volumes of its series")

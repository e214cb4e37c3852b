"""DICOM SEG as masks: by labels and places, as any tool writes them; what is none is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.pixels.utils import pack_bits
from seg_files import SHAPE, UNEVEN, complete, label_of, make, series_of, write
from turned import stored

from bhsd_jax.ct import nifti, scan
from bhsd_jax.ct.dicom import seg_mask
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.volume import HEMORRHAGE, Masks, Volume


def outline_of(*labels):
    segments = {
        n: seg_mask.Segment(label, bleeds=False, automatic=False)
        for n, label in enumerate(labels, start=1)
    }
    return seg_mask.Outline(Path("a"), frozenset(), frozenset(), "", segments)


@pytest.mark.parametrize(
    ("labels", "classes", "values"),
    [
        (("SDH", "edh "), HEMORRHAGE, (0, 5, 1)),
        (("Subdural hematoma", "intraventricular_haemorrhage"), HEMORRHAGE, (0, 5, 3)),
        (("subarachnoid hemorrhage", "Epidural"), HEMORRHAGE, (0, 4, 1)),
        (("oedema", "Extra-axial"), ("background", "extra axial", "edema"), (0, 2, 1)),
        (("a+", "a-"), ("background", "a-", "a+"), (0, 2, 1)),
        (("IPH", "subdural", "ICH", "Bleeding"), ("background", "any"), (0, 1, 1, 1, 1)),
        (("Segment_1",), ("background", "tumor"), (0, 1)),
        (("",), ("background", "tumor"), (0, 1)),
        (("Hematoma", "BLEED"), ("background", "any"), (0, 1, 1)),
        (("x" * 64,), ("background", "y", "x" * 70), (0, 2)),
    ],
)
def test_segments_are_classes_by_their_labels(labels, classes, values):
    assert seg_mask.label(outline_of(*labels), classes) == Masks((Path("a"),), values=values)


@pytest.mark.parametrize(
    ("labels", "classes", "which"),
    [
        (("SDH", "brain"), HEMORRHAGE, "segment 2 is"),
        (("ICH",), HEMORRHAGE, "segment 1 is"),  # in the brain, or anywhere in the skull
        (("Hemorrhage", ""), HEMORRHAGE, "segments 1, 2 are"),
        (("Segment_1", "Segment_2"), ("background", "any"), "segments 1, 2 are"),
        (("Scalp hematoma",), ("background", "any"), "segment 1 is"),  # alone, and none of them
    ],
)
def test_segments_of_no_class_are_refused_by_number(labels, classes, which):
    with pytest.raises(Refusal, match=rf"its {which} labeled as none of the classes") as refused:
        seg_mask.label(outline_of(*labels), classes)
    assert not [label for label in labels if len(label) > 3 and label in str(refused.value)]


def test_a_bleed_is_known_by_its_code_where_all_are_one_class(tmp_path):
    make(tmp_path / "dicom")
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label_of())
    data = dcmread(path)
    for item in data.SegmentSequence:
        item.SegmentLabel = f"Segment_{item.SegmentNumber}"
    data.save_as(path)
    mask = seg_mask.label(seg_mask.outline(path), ("background", "any"))
    assert mask.values == (0, 1, 1, 1, 1, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True)])
def test_frames_are_laid_onto_a_scan_that_is_stored_in_another_order(tmp_path, order, flips):
    """As beside the label map of a tilted series that was reoriented."""
    make(tmp_path / "dicom", "tilted")
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label_of())
    affine = dicom_series.arrange(series_of(tmp_path / "dicom")).affine
    want = stored(label_of()[:, ::-1], affine, order, flips)
    np.testing.assert_array_equal(seg_mask.onto(path, want.voxels.shape, want.affine), want.voxels)


def test_planes_between_slices_have_the_nearest_segment(tmp_path):
    make(tmp_path / "dicom", "uneven")
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label_of())
    series = replace(series_of(tmp_path / "dicom"), own_slices=False, uneven="resample")
    volume, _ = scan.read(series)
    label, said = scan.read_label(path, series, volume, num_classes=6)
    places = np.linspace(UNEVEN[0], UNEVEN[-1], len(volume.voxels))
    nearest = np.abs(places[:, None] - UNEVEN).argmin(1)
    np.testing.assert_array_equal(label.voxels, label_of()[nearest][:, ::-1])
    assert [one.kind for one in said] == [Kind.MASK_UNEVEN]


def test_the_mask_of_a_scan_that_is_set_upright_moves_with_it(tmp_path):
    make(tmp_path / "dicom", "tilted")
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label_of())
    series = replace(series_of(tmp_path / "dicom"), own_slices=False)
    scan.write(tmp_path / "m.nii.gz", label_of()[:, ::-1], like=series)
    upright = replace(series, unshear=True)
    volume, _ = scan.read(upright)
    both = [
        scan.read_label(mask, upright, volume, num_classes=6)[0].voxels
        for mask in (path, tmp_path / "m.nii.gz")
    ]
    np.testing.assert_array_equal(*both)


def overlap(data):
    """The second segment has all that the third has, too."""
    frames = data.pixel_array
    groups = data.PerFrameFunctionalGroupsSequence
    number = [g.SegmentIdentificationSequence[0].ReferencedSegmentNumber for g in groups]
    place = [str(g.PlanePositionSequence[0].ImagePositionPatient) for g in groups]
    for one in range(len(groups)):
        for other in range(len(groups)):
            if (number[one], number[other]) == (2, 3) and place[one] == place[other]:
                frames[one] |= frames[other]
    data.PixelData = pack_bits(frames.ravel())


def set_tag(name, value):
    return lambda data: setattr(data, name, value)


def unlisted(data):
    data.SegmentSequence = data.SegmentSequence[:2]


def moved(data):
    for group in data.PerFrameFunctionalGroupsSequence:
        group.PlanePositionSequence[0].ImagePositionPatient[0] += 0.7


def thicker(data):
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [2.0, 1.6]


SURFACE = "1.2.840.10008.5.1.4.1.1.66.5"


@pytest.mark.parametrize(
    ("change", "words", "kind"),
    [
        (overlap, r"segments overlap in \d+ voxels", Kind.MASK_VALUES),
        (unlisted, "a segment that its header does not list", Kind.MASK_VALUES),
        (moved, "does not lie on the voxels of its scan", Kind.MASK_GEOMETRY),
        (thicker, "does not lie on the voxels of its scan", Kind.MASK_GEOMETRY),
        (set_tag("SegmentationType", "FRACTIONAL"), "save it as BINARY", Kind.MASK_VALUES),
        (set_tag("SOPClassUID", SURFACE), "SEG without voxels, as one of", Kind.MASK_VALUES),
        (set_tag("PixelData", b"\0\0"), r"cannot be read \(ValueError\)", Kind.UNREADABLE),
    ],
)
def test_what_is_no_mask_of_the_series_is_refused(tmp_path, change, words, kind):
    make(tmp_path / "dicom")
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label_of())
    data = dcmread(path)
    change(data)
    data.save_as(path)
    series = series_of(tmp_path / "dicom")
    volume, _ = scan.read(series)
    with pytest.raises(Refusal, match=rf"series 1: .*{words}") as refused:
        scan.read_label(path, series, volume, num_classes=6)
    assert refused.value.kind is kind
    assert str(tmp_path) not in str(refused.value)


def test_empty_slices_need_no_frames_and_an_empty_seg_none_at_all(tmp_path):
    make(tmp_path / "dicom")
    label = np.zeros(SHAPE, np.uint8)
    label[4, 3:9, 4:8] = 2
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label)
    data = dcmread(path)
    assert data.NumberOfFrames == 1
    series = series_of(tmp_path / "dicom")
    volume, _ = scan.read(series)
    found, _ = scan.read_label(path, series, volume, num_classes=6)
    np.testing.assert_array_equal(found.voxels, label[:, ::-1])
    del data.PerFrameFunctionalGroupsSequence, data.PixelData
    data.save_as(path)
    found, _ = scan.read_label(path, series, volume, num_classes=6)
    assert not found.voxels.any()


def test_a_seg_beside_a_label_map_in_nifti_is_laid_onto_it(tmp_path):
    make(tmp_path / "dicom", "tilted", change=complete)
    path = write(tmp_path / "dicom", tmp_path / "a.dcm", label_of())
    scan.write(tmp_path / "m.nii.gz", label_of()[:, ::-1], like=series_of(tmp_path / "dicom"))
    volume = nifti.read(tmp_path / "m.nii.gz")
    found, _ = scan.read_label(path, tmp_path / "m.nii.gz", volume, num_classes=6)
    np.testing.assert_array_equal(found.voxels, volume.voxels)
    shifted = Volume(volume.voxels, volume.affine @ np.diag([1.2, 1, 1, 1]), "")
    with pytest.raises(Refusal, match=r"a\.dcm: .*uneven steps"):
        scan.read_label(path, tmp_path / "m.nii.gz", shifted, num_classes=6)

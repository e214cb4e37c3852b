"""Series written with pydicom: the right volume, or the right refusal."""

import logging
import math
import sys
import threading
import warnings
from pathlib import Path, PurePath

import imagecodecs
import numpy as np
import pytest
import tiny_run
from dicom_files import NAME, PATIENT, block, store, write_series
from enhanced_files import write_enhanced
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from turned import stored

from bhsd_jax.ct import hu, nifti, plausibility, prepare, scan, shear
from bhsd_jax.ct.dicom import series as dicom_series
from bhsd_jax.ct.dicom import slice_file
from bhsd_jax.defects import Kind, kind_of, texts
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case, Masks, Series, Volume

TILT = 18.5


def series_of(root, *, uneven="refuse", unshear=False):
    (group,) = dicom_series.find(root)
    return group.as_series("case", uneven=uneven, unshear=unshear)


def read(root, **options):
    return scan.read(series_of(root, **options))


def kinds(findings):
    assert {finding.case for finding in findings} <= {""}
    return [finding.kind for finding in findings]


def in_file(volume):
    """Voxels as [slice, row, column] of the files."""
    return volume.voxels[:, ::-1]


def world(path, row, column):
    """Where DICOM says a voxel lies (PS3.3 C.7.6.2.1.1), in RAS."""
    data = dcmread(path, stop_before_pixels=True)
    along = np.asarray(data.ImageOrientationPatient, float).reshape(2, 3)
    rows_mm, columns_mm = data.PixelSpacing
    place = np.asarray(data.ImagePositionPatient, float)
    place = place + along[0] * columns_mm * column + along[1] * rows_mm * row
    return place * (-1, -1, 1)


@pytest.mark.parametrize("tilt", [0.0, TILT, -12.0])
def test_every_voxel_has_its_value_and_its_place_in_the_world(tmp_path, tilt):
    head = block()
    paths = write_series(tmp_path, head, tilt_deg=tilt)
    volume, notes = read(tmp_path)
    np.testing.assert_array_equal(in_file(volume), head)
    assert volume.voxels.dtype == np.int16
    d, h, w = head.shape
    for k in range(d):
        for row, column in ((0, 0), (h - 1, 0), (2, w - 1)):
            found = volume.affine @ (k, h - 1 - row, column, 1)
            np.testing.assert_allclose(found[:3], world(paths[k], row, column), atol=1e-6)
    assert volume.spacing_mm == pytest.approx((5 / math.cos(math.radians(tilt)), 2, 1.5), abs=1e-6)
    assert kinds(notes) == ([Kind.TILTED] if tilt else [])
    assert [note for note in texts(notes) if "tilt" in note] == (
        [f"gantry tilt of {abs(tilt)} degrees, kept as shear in the affine"] if tilt else []
    )


def test_a_sheared_affine_gives_the_true_volume_of_a_voxel(tmp_path):
    write_series(tmp_path, block(), tilt_deg=TILT)
    volume, _ = read(tmp_path)
    assert shear.angle_deg(volume.affine) == pytest.approx(TILT, abs=1e-4)
    assert hu.tilt_deg(volume.affine) == 0
    # The files' rows run down to the back, as the GE scanner's do at +18.5: the front points up.
    assert shear.gantry_deg(volume.affine) == pytest.approx(TILT, abs=1e-4)
    turned = volume.affine.copy()
    turned[:3, 0] = np.cross(turned[:3, 1], turned[:3, 2])
    assert shear.gantry_deg(turned) == pytest.approx(hu.tilt_deg(turned)) == pytest.approx(TILT)
    assert hu.voxel_ml(volume.affine, table_feed=False) == pytest.approx(
        5 * 2 * 1.5 / 1000, rel=1e-6
    )


def test_unshearing_straightens_a_rod_across_the_slices_and_leads_back(tmp_path):
    """Each slice of a tilted gantry cuts it in another row."""
    rod = np.full((9, 24, 10), -1000)
    per_slice = 5 * math.tan(math.radians(TILT)) / 2  # rows from slice to slice
    for k, plane in enumerate(rod):
        row = round(4 + k * per_slice)
        plane[row : row + 4, 3:7] = 50
    write_series(tmp_path, rod, tilt_deg=TILT)
    plain, _ = read(tmp_path)
    volume, notes = read(tmp_path, unshear=True)
    assert any("unsheared" in note for note in texts(notes))
    assert kinds(notes) == [Kind.TILTED, Kind.UNSHEARED]
    assert volume.voxels.shape == (9, 24 + math.ceil(8 * per_slice), 10)
    assert volume.spacing_mm == pytest.approx((5, 2, 1.5), abs=1e-6)
    each = [hu.voxel_ml(one.affine, table_feed=False) for one in (volume, plain)]
    assert each[0] == pytest.approx(each[1])
    rows = [np.flatnonzero(plane[:, 4] > -475).mean() for plane in volume.voxels]
    np.testing.assert_allclose(rows, rows[0], atol=0.51)  # the rod itself was rounded to rows
    label = (plain.voxels > 0).astype(np.uint8)
    moved = shear.unshear_label(label, plain.affine)
    assert moved.shape == volume.voxels.shape
    assert ((volume.voxels > 0) & (moved > 0)).sum() > 0.7 * moved.sum()
    np.testing.assert_array_equal(shear.shear_label(moved, plain.affine, label.shape), label)
    for shape, affine in ((volume.voxels.shape, volume.affine), (label.shape, plain.affine)):
        middle = affine @ (*((n - 1) / 2 for n in shape), 1)
        np.testing.assert_allclose(middle[:3], (13.5, 9.6886, 21.2918), atol=1e-3)


def test_a_label_of_the_unsheared_volume_is_written_on_the_series_own_voxels(tmp_path):
    head = block((6, 20, 12))
    write_series(tmp_path / "dicom", head, tilt_deg=TILT)
    series = series_of(tmp_path / "dicom", unshear=True)
    volume, _ = scan.read(series)
    plain, _ = scan.read(scan.native(series))
    want = (plain.voxels > 0).astype(np.uint8)
    nifti.write_volume(tmp_path / "mask.nii.gz", Volume(want, plain.affine, ""))
    label, _ = scan.read_label(tmp_path / "mask.nii.gz", series, volume, num_classes=2)
    assert label.voxels.shape == volume.voxels.shape
    scan.write(tmp_path / "out.nii.gz", label.voxels, like=series)
    back = nifti.read(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(back.voxels, want)
    np.testing.assert_allclose(back.affine, plain.affine, atol=1e-4)


def test_uneven_steps_are_refused_or_interpolated(tmp_path):
    """A value that grows with height stays in place, whatever the steps."""
    places = np.array([0, 4, 8, 9.2, 16, 23])
    ramp = np.broadcast_to(np.rint(10 * places).astype(int)[:, None, None], (6, 8, 8))
    write_series(tmp_path, ramp, places=places)
    with pytest.raises(
        ValueError, match=r"case: slices at uneven steps, 1\.20 to 7\.00 mm, mostly"
    ):
        read(tmp_path)
    volume, notes = read(tmp_path, uneven="resample")
    assert any("interpolated to 7 slices at steps of 3.833 mm" in note for note in texts(notes))
    assert kinds(notes) == [Kind.SLICES_UNEVEN]
    want = 10 * np.linspace(0, 23, 7)
    np.testing.assert_allclose(volume.voxels[:, 3, 3], want, atol=1e-3)
    assert volume.spacing_mm[0] == pytest.approx(23 / 6)
    stack = dicom_series.arrange(series_of(tmp_path, uneven="resample"))
    np.testing.assert_allclose(np.interp(stack.source, np.arange(6), places), want / 10)


def test_a_missing_slice_is_named_and_filled_only_on_request(tmp_path):
    head = block((7, 8, 8))
    places = np.arange(7) * 5.0
    paths = write_series(tmp_path, head, places=places)
    paths[3].unlink()
    with pytest.raises(ValueError, match=r"1 slice is missing: 10\.00 mm after slice 3 of 6"):
        read(tmp_path)
    volume, notes = read(tmp_path, uneven="resample")
    assert kinds(notes) == [Kind.SLICES_MISSING]
    assert volume.voxels.shape == head.shape
    np.testing.assert_allclose(in_file(volume)[3], (head[2] + head[4]) / 2)
    np.testing.assert_array_equal(in_file(volume)[5], head[5])
    paths[4].unlink()
    with pytest.raises(ValueError, match="too much to interpolate"):
        read(tmp_path, uneven="resample")


def test_copies_of_a_slice_are_dropped_and_others_at_its_place_refused(tmp_path):
    head = block()
    paths = write_series(tmp_path, head)
    (tmp_path / "copy").write_bytes(paths[2].read_bytes())
    volume, notes = read(tmp_path)
    np.testing.assert_array_equal(in_file(volume), head)
    assert "copies of slices left out: 1" in texts(notes)
    assert kinds(notes) == [Kind.SLICES_TWICE]
    data = dcmread(tmp_path / "copy")
    store(data, head[1] + 1024, signed=False, intercept=-1024)
    data.save_as(tmp_path / "copy")
    with pytest.raises(ValueError, match="two different slices at one position"):
        read(tmp_path)


def test_slices_shifted_sideways_each_in_its_own_way_are_refused(tmp_path):
    def shift(k, data):
        if k == 3:
            data.ImagePositionPatient[0] += 2.5

    write_series(tmp_path, block(), change=shift)
    with pytest.raises(ValueError, match=r"shifted sideways by up to 2\.50 mm"):
        read(tmp_path)


def test_twelve_bit_overflow_is_undone(tmp_path):
    head = np.clip(block(), -1000, 3095)

    def wrap(k, data):
        store(data, head[k] % 4096, bits=12, signed=False)

    write_series(tmp_path, head, change=wrap)
    volume, notes = read(tmp_path)
    np.testing.assert_array_equal(in_file(volume), head)
    assert "12-bit overflow undone in 6 of 6 slices" in texts(notes)
    assert kinds(notes) == [Kind.OVERFLOW]


def test_metal_of_a_series_that_lost_its_intercept_is_no_overflow(tmp_path):
    """Unsigned 12 bits and no rescale factors, as after an overflow: air at the edges tells."""
    head = block((6, 24, 20))
    head[3, 5:8, 6:9] = 2176  # stored as 3200

    def lose(k, data):
        store(data, head[k] + 1024, bits=12, signed=False)
        del data.RescaleSlope, data.RescaleIntercept

    write_series(tmp_path, head, change=lose)
    volume, notes = read(tmp_path)
    np.testing.assert_array_equal(in_file(volume), head + 1024)
    assert kinds(notes) == [Kind.UNSCALED]
    made, found = plausibility.settle(volume.voxels)
    np.testing.assert_array_equal(made[:, ::-1], head)
    assert [one.kind for one in found] == [Kind.OFFSET]


@pytest.mark.parametrize("value", [-2000, 63536])
def test_padding_becomes_air_however_its_value_is_written(tmp_path, value):
    head = block()

    def pad(k, data):
        stored = head[k].copy()
        stored[0] = -2000
        store(data, stored)
        data.add_new(0x00280120, "SS" if value < 0 else "US", value)

    write_series(tmp_path, head, change=pad)
    volume, notes = read(tmp_path)
    assert (in_file(volume)[:, 0] == -1024).all()
    np.testing.assert_array_equal(in_file(volume)[:, 1:], head[:, 1:])
    assert f"{6 * head.shape[2]} voxels of padding set to -1024 HU" in texts(notes)
    assert kinds(notes) == [Kind.PADDING_VALUE]


def test_a_padding_value_among_tissue_is_not_believed(tmp_path):
    head = block()

    def pad(k, data):
        store(data, head[k])
        data.add_new(0x00280120, "SS", 40)

    write_series(tmp_path, head, change=pad)
    volume, notes = read(tmp_path)
    np.testing.assert_array_equal(in_file(volume), head)
    assert any("not believed" in note for note in texts(notes))
    assert kinds(notes) == [Kind.PADDING_IN_TISSUE]


def test_each_slice_has_its_own_rescale_factors(tmp_path):
    head = block() // 2 * 2

    def scale(k, data):
        slope = 2 if k % 2 else 0.5
        store(data, (head[k] + 1000) / slope, slope=slope, intercept=-1000)

    write_series(tmp_path, head, change=scale)
    volume, _ = read(tmp_path)
    np.testing.assert_array_equal(in_file(volume), head)


def test_a_slice_without_the_rescale_factors_of_the_others_is_refused(tmp_path):
    def lose(k, data):
        if k == 2:
            del data.RescaleIntercept

    write_series(tmp_path, block(), change=lose)
    with pytest.raises(ValueError, match="case: 1 of 6 slices lack the rescale factors") as caught:
        read(tmp_path)
    assert kind_of(caught.value) is Kind.SERIES_DAMAGED


def test_missing_rescale_factors_are_said(tmp_path):
    def strip(k, data):
        del data.RescaleSlope

    write_series(tmp_path, block(), change=strip)
    _, notes = read(tmp_path)
    assert any("no rescale factors in 6 of 6" in note for note in texts(notes))
    assert kinds(notes) == [Kind.UNSCALED]


def test_series_of_a_study_come_apart_and_what_is_no_slice_is_said(tmp_path):
    def localizer(k, data):
        data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def report(k, data):
        data.Modality = "SR"

    def sagittal(k, data):
        data.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        data.ImagePositionPatient = [5.0 * k, 0, 0]

    thick, thin = block(), block((9, 8, 8), seed=1)
    write_series(tmp_path / "a", thick, series="1.1")
    write_series(tmp_path / "a", thin, series="1.2", names=[f"x{k}" for k in range(9)])
    write_series(tmp_path / "a", thin, series="1.2", names=list("stuvwxyzq"), change=sagittal)
    write_series(tmp_path / "a", thick[:2], series="1.3", names=["l1", "l2"], change=localizer)
    write_series(tmp_path / "b", thick[:1], series="1.4", names=["r"], change=report)
    write_series(tmp_path / "b", thick[:1], series="1.5", names=["alone"])
    (tmp_path / "b" / "notes.txt").write_text("not DICOM")
    groups = dicom_series.find(tmp_path)
    assert sorted((g.first.series, len(g.slices)) for g in groups) == [
        *(("1.1", 6), ("1.2", 9), ("1.2", 9)),
    ]
    assert sorted(note for group in groups for note in texts(group.findings)) == [
        "left out: 1 image alone in its series",
        "left out: 1 image of another kind than CT",
        "left out: 2 images a localizer",
    ]
    assert {kind for group in groups for kind in kinds(group.findings)} == {
        *(Kind.LEFT_OUT_ALONE, Kind.LEFT_OUT_MODALITY, Kind.LEFT_OUT_LOCALIZER),
    }
    for group in groups:
        volume, _ = scan.read(group.as_series("case", uneven="refuse", unshear=False))
        assert volume.voxels.shape[0] == len(group.slices)


def test_loops_end_and_hidden_files_are_left_out(tmp_path):
    write_series(tmp_path / "a", block())
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "._IM003").write_bytes((tmp_path / "a" / "IM003").read_bytes())
    (group,) = dicom_series.find(tmp_path)
    assert len(group.slices) == 6


def test_links_to_folders_are_followed_and_each_folder_is_looked_at_once(tmp_path, caplog):
    """As scans of a share are collected in a study; a true folder comes before links to it."""
    study, store = tmp_path / "study", tmp_path / "store"
    places = study / "p1", store / "p2" / "ct", store / "p3", store / "not_ours"
    for number, place in enumerate(places):
        write_series(place, block(), series=f"1.2.{number}")
    (study / "p2").symlink_to(store / "p2")
    (study / "a2").symlink_to(store / "p2" / "ct")  # twice
    (study / "a1").symlink_to("p1")
    (store / "p2" / "ct" / "beside").symlink_to(store / "p3")  # from behind a link
    (store / "p2" / "ct" / "loop").symlink_to(study)
    folders = [group.folder for group in dicom_series.find(study)]
    assert folders == [study / "a2", study / "a2" / "beside", study / "p1"]
    assert "above" not in caplog.text
    (store / "p2" / "up").symlink_to(tmp_path)
    (study / "up").symlink_to(tmp_path)
    assert [group.folder for group in dicom_series.find(study)] == folders
    assert caplog.text.count("a link in it leads to a folder above and is not followed") == 2
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "p3").symlink_to(store / "p3")
    (group,) = dicom_series.find(tmp_path / "none")
    assert len(group.slices) == 6


def test_multi_frame_images_are_refused_with_a_way_out(tmp_path):
    def frames(k, data):
        data.NumberOfFrames = 3

    write_series(tmp_path, block()[:1], change=frames)
    with pytest.raises(ValueError, match=r"multi-frame.*dcm2niix"):
        read(tmp_path)


def test_compressed_files_are_decoded_or_refused_with_a_way_out(tmp_path):
    head = block()
    write_series(tmp_path / "rle", head, change=lambda k, data: data.compress(RLELossless))
    np.testing.assert_array_equal(in_file(read(tmp_path / "rle")[0]), head)

    def claim(syntax):
        def change(k, data):
            data.compress(RLELossless)
            data.file_meta.TransferSyntaxUID = syntax

        return change

    write_series(tmp_path / "video", head, change=claim(MPEG2MPML))
    with pytest.raises(ValueError, match=r"file 1 of 6.*MPEG2.*no decoder.*gdcmconv.*pylibjpeg"):
        read(tmp_path / "video")
    write_series(tmp_path / "jpeg", head, change=claim(JPEGLosslessSV1))
    with pytest.raises(ValueError, match=r"file 1 of 6.*: damaged"):
        read(tmp_path / "jpeg")


@pytest.mark.parametrize(("bits", "signed"), [(16, False), (16, True), (12, False), (12, True)])
def test_lossless_jpeg_is_decoded(tmp_path, bits, signed):
    """The syntax in which most archives keep CT, in each way that scanners store it."""
    head = block()
    offset = 0 if signed else 1024

    def change(k, data):
        store(data, head[k] + offset, bits=bits, signed=signed, intercept=-offset)
        stored = (head[k] + offset).astype(np.int16).view(np.uint16) & (2**bits - 1)
        frame = imagecodecs.ljpeg_encode(np.ascontiguousarray(stored), bitspersample=bits)
        data.PixelData = encapsulate([frame])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = JPEGLosslessSV1

    write_series(tmp_path, head, change=change)
    volume, found = read(tmp_path)
    np.testing.assert_array_equal(in_file(volume), head)
    assert not found


def test_signed_values_keep_their_sign_in_a_codec_of_more_bits(tmp_path):
    head = block()

    def change(k, data):
        store(data, head[k], bits=12)
        frame = imagecodecs.jpegls_encode(head[k].astype(np.int16).view(np.uint16) & 4095)
        data.PixelData = encapsulate([frame])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = JPEGLSLossless

    write_series(tmp_path, head, change=change)
    np.testing.assert_array_equal(in_file(read(tmp_path)[0]), head)


@pytest.mark.parametrize("signed", [False, True])  # by the header
@pytest.mark.parametrize(("kind", "bits"), [("i2", 16), ("i2", 13), ("u2", 16), ("u2", 13)])
@pytest.mark.parametrize("enhanced", [False, True])
def test_jpeg_2000_is_decoded_whichever_sign_its_codestream_has(
    tmp_path, signed, kind, bits, enhanced
):
    head = block()
    offset = 0 if signed else 1024

    def encode(stored):
        values = stored.astype(np.int16)
        if kind == "u2":
            values = values.view(np.uint16) & (2**bits - 1)
        return imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(values), level=0, codecformat="j2k", bitspersample=bits
        )

    def change(k, data):
        store(data, head[k] + offset, bits=bits, signed=signed, intercept=-offset)
        if not enhanced:
            compress(data, [encode(head[k] + offset)])

    def compress(data, frames):
        data.PixelData = encapsulate(frames)
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = JPEG2000Lossless

    paths = write_series(tmp_path / "plain", head, change=change)
    if enhanced:
        frames = [encode(plane + offset) for plane in head]
        write_enhanced(
            tmp_path / "one" / "a.dcm", paths, change=lambda data: compress(data, frames)
        )
    volume, found = read(tmp_path / ("one" if enhanced else "plain"))
    np.testing.assert_array_equal(in_file(volume), head)
    assert not found


def test_jpeg_in_twelve_bits_is_decoded(tmp_path):
    ramp = np.add.outer(np.arange(0, 400, 8), np.arange(64)) - 100
    head = np.stack([ramp, ramp + 30])

    def change(k, data):
        store(data, head[k] + 1024, bits=12, signed=False, intercept=-1024)
        stored = (head[k] + 1024).astype(np.uint16)
        frame = imagecodecs.jpeg_encode(stored, level=100, bitspersample=12)
        data.PixelData = encapsulate([frame])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = JPEGExtended12Bit

    write_series(tmp_path, head, change=change)
    volume, _ = read(tmp_path)
    np.testing.assert_allclose(in_file(volume), head, atol=1)  # lossy


def test_without_pydicom_the_remedy_is_told_and_no_file_is_called_damaged(tmp_path, monkeypatch):
    write_series(tmp_path, block())
    series = series_of(tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for call in (lambda: dicom_series.find(tmp_path), lambda: scan.read(series)):
        with pytest.raises(UserError, match=r"pip install '\.\[dicom\]'") as caught:
            call()
        assert "cannot be read" not in str(caught.value)


def test_a_truncated_file_is_refused_or_left_out(tmp_path):
    head = block((7, 8, 8))
    paths = write_series(tmp_path, head)
    paths[2].write_bytes(paths[2].read_bytes()[:-10])
    place = sorted(paths).index(paths[2]) + 1
    with pytest.raises(ValueError, match=f"1 of 7 files are damaged, the first is file {place}"):
        read(tmp_path)
    volume, notes = read(tmp_path, uneven="resample")
    assert volume.voxels.shape == head.shape
    assert any("left out" in note for note in texts(notes))
    assert kinds(notes) == [Kind.FILES_DAMAGED, Kind.SLICES_MISSING]


def test_messages_name_no_patient_and_no_path(tmp_path):
    folder = tmp_path / NAME
    paths = write_series(folder, block(), series="1.9")
    paths[1].write_bytes(paths[1].read_bytes()[:-10])
    series = series_of(folder)
    paths[2].unlink()
    said = [repr(series), str(series), repr(slice_file.headers(paths[0]))]
    for uneven in ("refuse", "resample"):
        with pytest.raises(ValueError, match="case: ") as caught:
            scan.read(Series(series.files, "case", uneven))
        said.append(str(caught.value))
        assert caught.value.__cause__ is None or NAME not in str(caught.value.__cause__)
    assert not [text for text in said if NAME in text or PATIENT in text or str(tmp_path) in text]


@pytest.mark.parametrize("tilt", [0.0, TILT])
@pytest.mark.parametrize(
    ("order", "flips"),
    [
        ((0, 1, 2), (False, False, False)),
        ((0, 1, 2), (False, True, False)),
        ((2, 0, 1), (True, False, True)),
    ],
)
def test_a_mask_is_turned_to_the_series_by_its_affine(tmp_path, tilt, order, flips):
    head = block()
    write_series(tmp_path / "dicom", head, tilt_deg=tilt)
    series = series_of(tmp_path / "dicom")
    volume, _ = scan.read(series)
    want = (volume.voxels > 40).astype(np.uint8)
    nifti.write_volume(tmp_path / "m.nii.gz", stored(want, volume.affine, order, flips))
    label, notes = scan.read_label(tmp_path / "m.nii.gz", series, volume, num_classes=2)
    np.testing.assert_array_equal(label.voxels, want)
    assert not notes


def test_a_mask_of_a_converter_that_hides_the_tilt_is_known_and_others_are_refused(tmp_path):
    write_series(tmp_path / "dicom", block(), tilt_deg=TILT)
    series = series_of(tmp_path / "dicom")
    volume, _ = scan.read(series)
    want = (volume.voxels > 40).astype(np.uint8)
    upright = volume.affine.copy()
    across = np.cross(upright[:3, 1], upright[:3, 2])
    upright[:3, 0] = -across / np.linalg.norm(across) * np.linalg.norm(upright[:3, 0])
    if upright[2, 0] < 0:
        upright[:3, 0] *= -1
    nifti.write_volume(tmp_path / "m.nii.gz", Volume(want, upright, ""))
    label, notes = scan.read_label(tmp_path / "m.nii.gz", series, volume, num_classes=2)
    np.testing.assert_array_equal(label.voxels, want)
    assert any("hides the gantry's tilt" in note for note in texts(notes))
    assert kinds(notes) == [Kind.MASK_UPRIGHT]
    upright[:3, 3] += 3
    nifti.write_volume(tmp_path / "off.nii.gz", Volume(want, upright, ""))
    with pytest.raises(ValueError, match=r"case: its mask has shape .* does not lie on the voxels"):
        scan.read_label(tmp_path / "off.nii.gz", series, volume, num_classes=2)


def test_a_refused_mask_of_a_series_keeps_its_kind(tmp_path):
    write_series(tmp_path / "dicom", block())
    series = series_of(tmp_path / "dicom")
    volume, _ = scan.read(series)
    path = tmp_path / "m.nii.gz"
    nifti.write_volume(path, Volume(np.full((6, 8, 8), 9, np.uint8), volume.affine, ""))
    said = {}
    for case in (Kind.MASK_VALUES, Kind.FILE_EMPTY, Kind.FILE_MISSING):
        if case is Kind.FILE_EMPTY:
            path.write_bytes(b"")
        if case is Kind.FILE_MISSING:
            path.unlink()
        with pytest.raises(ValueError, match="case: its mask: ") as caught:
            scan.read_label(path, series, volume, num_classes=2)
        said[case] = kind_of(caught.value)
    assert said == {kind: kind for kind in said}


def test_a_digest_follows_files_and_options(tmp_path):
    paths = write_series(tmp_path, block())
    series = series_of(tmp_path)
    digests = {scan.digest(series), scan.digest(series_of(tmp_path, unshear=True))}
    digests.add(scan.digest(series_of(tmp_path, uneven="resample")))
    paths[0].write_bytes(paths[0].read_bytes() + b"\0\0")
    digests.add(scan.digest(series))
    assert len(digests) == 4
    mask = Path(paths[0])
    assert scan.digest(Masks((mask,))) != scan.digest(Masks((mask,), values=(0, 1)))


def bare(path):
    """Neither preamble nor file meta group."""
    data = path.read_bytes()
    length = int.from_bytes(data[140:144], "little")  # of the file meta group
    path.write_bytes(data[144 + length :])


def without_preamble(path):
    path.write_bytes(path.read_bytes()[132:])


def without_syntax(path):
    """As some anonymizers leave it."""
    data = dcmread(path)
    del data.file_meta.TransferSyntaxUID
    data.save_as(path, implicit_vr=False, little_endian=True)
    assert path.read_bytes()[128:132] == b"DICM"


def bare_big_endian(path):
    data = Dataset()
    for element in dcmread(path):
        data.add(element)
    data.PixelData = np.frombuffer(data.PixelData, "<u2").astype(">u2").tobytes()
    dcmwrite(path, data, implicit_vr=False, little_endian=False)
    assert path.read_bytes()[:2] == b"\0\x08"


@pytest.mark.parametrize("spoil", [bare, without_preamble, without_syntax, bare_big_endian])
@pytest.mark.parametrize("which", [range(6), (4, 5)], ids=["all", "the last two"])
def test_files_without_preamble_or_transfer_syntax_are_slices_like_others(tmp_path, spoil, which):
    """pydicom reads all; dcm2niix and SimpleITK 2.5 bare ones, dcm2niix those without a syntax."""
    hu = block()
    paths = write_series(tmp_path / "a", hu)
    (whole,) = dicom_series.find(tmp_path / "a")
    want, _ = dicom_series.read(whole.as_series("a", uneven="refuse", unshear=False))
    for index in which:
        spoil(paths[index])
        assert slice_file.is_dicom(paths[index])
    (group,) = dicom_series.find(tmp_path / "a")
    volume, found = dicom_series.read(group.as_series("a", uneven="refuse", unshear=False))
    np.testing.assert_array_equal(volume.voxels, want.voxels)
    np.testing.assert_array_equal(volume.affine, want.affine)
    assert not found


@pytest.mark.parametrize("start", [b"", b"\x08\x00", b"\x08\x00\x05\x00 not one" + b"x" * 200])
def test_other_files_are_no_slices(tmp_path, start):
    (tmp_path / "a").write_bytes(start)
    assert not slice_file.is_dicom(tmp_path / "a")


@pytest.mark.parametrize("delta", [5e-5, 2e-4, 1e-3])
def test_a_pixel_size_that_is_rounded_slice_by_slice_is_one_series(tmp_path, delta):
    """As dcm2niix, SimpleITK and dicom2nifti read it: one volume."""

    def rounded(index, data):
        data.PixelSpacing = [0.488 + delta * (index % 2)] * 2

    write_series(tmp_path, block(), change=rounded)
    (group,) = dicom_series.find(tmp_path)
    volume, _ = dicom_series.read(group.as_series("a", uneven="refuse", unshear=False))
    assert volume.voxels.shape == block().shape
    assert volume.spacing_mm[0] == pytest.approx(5)


def test_another_pixel_size_is_another_series(tmp_path):
    write_series(tmp_path, block(), spacing_mm=(5.0, 0.5, 0.5))
    write_series(tmp_path / "zoomed", block(), spacing_mm=(5.0, 0.45, 0.45))
    assert len(dicom_series.find(tmp_path)) == 2


@pytest.mark.parametrize(
    ("tag", "value", "reason"),
    [
        ("ImagePositionPatient", None, "6 images without a usable position"),
        ("PixelSpacing", None, "6 images without a pixel spacing"),
        ("PixelSpacing", [0, 0], "6 images of a pixel spacing of 0 or less"),
        ("Modality", "MR", "6 images of another kind than CT"),
    ],
)
def test_where_no_image_is_of_a_volume_the_reason_is_given(tmp_path, tag, value, reason):
    write_series(tmp_path, block(), change=lambda index, data: setattr(data, tag, value))
    with pytest.raises(ValueError, match=f"no CT volume in its DICOM files; left out: {reason}"):
        dicom_series.find(tmp_path)


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 20])
def test_a_slice_at_an_end_that_is_no_dicom_any_more_is_told(tmp_path, at, content):
    names = [f"IM{k:03}" for k in range(6)]
    paths = write_series(tmp_path, block(), names=names)
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "Thumbs.db").write_bytes(b"nothing")
    (group,) = dicom_series.find(tmp_path)
    assert not group.findings
    paths[at].write_bytes(content)
    (group,) = dicom_series.find(tmp_path)
    (found,) = group.findings
    assert found.kind is Kind.NO_DICOM
    assert f"1 named like slices but no DICOM, the first is file {at + 1} in the" in found.text
    assert read(tmp_path)[0].voxels.shape[0] == 5
    case = Case("a", "a", series_of(tmp_path), None, "test")
    assert prepare.prepare_case(case, tiny_run.PLAN).doubts == (found.text,)


def test_a_slice_of_a_broken_header_is_told_of_the_series_beside_it(tmp_path):
    paths = write_series(tmp_path, block())
    paths[0].write_bytes(b"\0" * 128 + b"DICM" + b"\7" * 900)
    (group,) = dicom_series.find(tmp_path)
    assert texts(group.findings) == ["left out: 1 image of a header that cannot be read"]


def test_a_scan_that_was_read_on_its_own_voxels_is_not_read_again(tmp_path):
    write_series(tmp_path, block(), tilt_deg=TILT)
    volume, _ = read(tmp_path)
    assert scan.read_native(series_of(tmp_path), volume) is volume
    upright, _ = read(tmp_path, unshear=True)
    own = scan.read_native(series_of(tmp_path, unshear=True), upright)
    assert upright.voxels.shape != volume.voxels.shape
    np.testing.assert_array_equal(own.voxels, volume.voxels)


def test_a_folder_without_dicom_has_no_series_and_no_reason(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    assert dicom_series.find(tmp_path) == []


def along(start, normal, steps):
    """A change that puts slices along a normal, all coordinates to a tenth of a millimeter."""

    def change(index, data):
        place = np.asarray(start) + steps[index] * np.asarray(normal)
        data.ImagePositionPatient = np.round(place, 1).tolist()
        row = np.cross([0, 1, 0], normal)
        row = row / np.linalg.norm(row)
        data.ImageOrientationPatient = np.round([*row, *np.cross(normal, row)], 6).tolist()

    return change


def oblique():
    a, b = np.radians([20, 15])
    return np.array([np.sin(b), -np.sin(a) * np.cos(b), np.cos(a) * np.cos(b)])


@pytest.mark.parametrize("step", [0.625, 1.25, 5 / 3, 4.8, 5])
def test_positions_rounded_to_a_tenth_are_even(tmp_path, step):
    """As dcm2niix, SimpleITK and dicom2nifti read them."""

    def rounded(index, data):
        data.ImagePositionPatient = [-124.755859375, -285.75, round(10 + index * step, 1)]

    turned = along((-119.38, -99.18, 10.262), oblique(), np.arange(30) * step)
    for name, depth, change in (("axial", 24, rounded), ("oblique", 30, turned)):
        write_series(tmp_path / name, block((depth, 12, 10)), change=change)
        volume, found = read(tmp_path / name)
        assert volume.voxels.shape[0] == depth
        assert volume.spacing_mm[0] == pytest.approx(step, abs=0.2 / 23)
        assert not found


@pytest.mark.parametrize("places", [[0, 3, 6, 9.1, *range(12, 72, 3)], 10 + 3.0022 * np.arange(24)])
def test_a_slice_a_tenth_off_the_line_is_rounding(tmp_path, places):
    write_series(tmp_path, block((24, 8, 8)), places=np.round(places, 1))
    _, found = read(tmp_path)
    assert not found


@pytest.mark.parametrize("step", [0.625, 1.25])
@pytest.mark.parametrize("normal", [(0, 0, 1), oblique()], ids=["axial", "oblique"])
def test_a_missing_slice_is_missed_however_positions_were_rounded(tmp_path, step, normal):
    steps = [step * k for k in range(24) if k != 9]
    write_series(
        tmp_path, block((23, 8, 8)), change=along((-119.38, -99.18, 10.262), normal, steps)
    )
    with pytest.raises(ValueError, match=r"1 slice is missing: .* after slice 9 of 23") as caught:
        read(tmp_path)
    assert kind_of(caught.value) is Kind.MISSING
    volume, found = read(tmp_path, uneven="resample")
    assert volume.voxels.shape[0] == 24
    assert kinds(found) == [Kind.SLICES_MISSING]


def test_whole_millimeters_are_rounding_and_a_slice_a_millimeter_off_is_none(tmp_path):
    def at(places):
        def change(index, data):
            data.ImagePositionPatient = [-124.75, -285.75, places[index]]

        return change

    write_series(tmp_path / "a", block((12, 8, 8)), change=at([round(2.5 * k) for k in range(12)]))
    volume, found = read(tmp_path / "a")
    assert volume.voxels.shape[0] == 12
    assert not found
    off = [5 * k + (k == 4) for k in range(12)]
    write_series(tmp_path / "b", block((12, 8, 8)), change=at(off))
    with pytest.raises(ValueError, match="uneven steps"):
        read(tmp_path / "b")


@pytest.mark.parametrize(("step", "turn"), [(5, 5e-4), (0.625, 5e-5), (0.625, 1e-3)])
def test_cosines_that_differ_from_slice_to_slice_do_not_move_the_slices(tmp_path, step, turn):
    """Far from the scanner's center each slice's own normal would."""

    def jitter(index, data):
        data.ImagePositionPatient = [-125, -285, step * index]
        angle = turn * (index % 2)
        data.ImageOrientationPatient = [1, 0, 0, 0, math.cos(angle), round(math.sin(angle), 9)]

    write_series(tmp_path, block((12, 8, 8)), change=jitter)
    volume, found = read(tmp_path)
    assert volume.spacing_mm[0] == pytest.approx(step)
    np.testing.assert_array_equal(in_file(volume), block((12, 8, 8)))
    assert not found


@pytest.mark.parametrize("decimals", [2, 3, 4])
def test_rounded_cosines_are_directions(tmp_path, decimals):
    """GDCM brings them to unit length too; what is no direction at all is still left out."""
    angle = math.radians(15)

    def rounded(index, data, other=0.0):
        cosines = [round(math.cos(angle), decimals), round(-math.sin(angle), decimals)]
        data.ImageOrientationPatient = [1, other, 0, 0, *cosines]

    write_series(tmp_path / "a", block(), tilt_deg=15, change=rounded)
    volume, found = read(tmp_path / "a")
    assert volume.spacing_mm[1:] == pytest.approx((2, 1.5))
    assert shear.angle_deg(volume.affine) == pytest.approx(15, abs=0.3)
    assert kinds(found) == [Kind.TILTED]
    write_series(tmp_path / "b", block(), change=lambda k, data: rounded(k, data, other=0.1))
    with pytest.raises(ValueError, match="6 images without a usable orientation"):
        dicom_series.find(tmp_path / "b")


def two_passes(root, tags, off=2.5, per_rotation=6):
    """Two passes of six slices; each of the tags has a value for each pass, or its rotations."""
    heads = block(), block(seed=1)
    for number, voxels in enumerate(heads):

        def change(index, data, number=number):
            data.InstanceNumber = 1 + index + 6 * number
            for tag, values in tags.items():
                value = values[number]
                setattr(data, tag, value(index // per_rotation) if callable(value) else value)

        places = np.arange(6) * 5.0 + off * number
        write_series(root / str(number), voxels, places=places, change=change)
    return heads


@pytest.mark.parametrize("off", [2.5, 0.0])
@pytest.mark.parametrize(
    ("tags", "per_rotation"),
    [
        ({"AcquisitionNumber": (0, 1)}, 6),
        ({"AcquisitionNumber": (lambda n: 9 + n, lambda n: 12 + n)}, 2),  # 10 comes after 9
        ({"AcquisitionNumber": (1, 1), "AcquisitionTime": ("120000", "120500")}, 6),
        ({"AcquisitionTime": (lambda n: f"12000{n}.5", lambda n: f"12050{n}")}, 3),
        ({"AcquisitionNumber": (1, 1), "ConvolutionKernel": ("H31s", "H60s")}, 6),
        ({"KVP": (80, 140)}, 6),  # of dual energy
        ({"ImageType": (["ORIGINAL", "PRIMARY", "SPI"], ["ORIGINAL", "PRIMARY", "SPI VNC"])}, 6),
        ({"TemporalPositionIdentifier": (1, 2), "SliceThickness": (2.5, 2.5)}, 6),
        ({"FrameOfReferenceUID": ("1.2.3.7", "1.2.3.8"), "SliceThickness": (2.5, 2.5)}, 6),
    ],
)
def test_two_passes_over_the_same_stretch_are_two_volumes(tmp_path, off, tags, per_rotation):
    heads = two_passes(tmp_path, tags, off, per_rotation)
    groups = dicom_series.find(tmp_path)
    assert len(groups) == 2
    for group, voxels in zip(groups, heads, strict=True):
        volume, found = dicom_series.read(group.as_series("a", uneven="refuse", unshear=False))
        np.testing.assert_array_equal(volume.voxels, voxels[:, ::-1])
        assert kinds(found) == [Kind.ACQUISITIONS]


def test_numbered_passes_that_share_a_few_slices_are_two_volumes(tmp_path):
    heads = two_passes(tmp_path, {"AcquisitionNumber": (1, 2)}, off=15.0)
    for group, voxels in zip(dicom_series.find(tmp_path), heads, strict=True):
        volume, found = dicom_series.read(group.as_series("a", uneven="refuse", unshear=False))
        np.testing.assert_array_equal(volume.voxels, voxels[:, ::-1])
        assert kinds(found) == [Kind.ACQUISITIONS]


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"AcquisitionTime": (lambda n: f"1200{n:02}", lambda n: f"1205{n:02}")},  # a time per slice
        {"AcquisitionNumber": (1, 2), "SliceThickness": (2.5, 2.5)},  # the second fills the gaps
        {"AcquisitionNumber": (lambda n: 1 + n // 4, lambda n: 1 + n // 4)},  # one after another
        {"AcquisitionNumber": (lambda n: 1 + n // 2 % 2,) * 2},  # pieces by turns
        {"FrameOfReferenceUID": (lambda n: f"1.2.3.{n}", lambda n: f"1.2.3.1{n}")},
        {"ConvolutionKernel": (lambda n: "H31s" if n < 4 else "H60s",) * 2},
        {"ImageType": (["ORIGINAL", "PRIMARY", "AXIAL"], ["ORIGINAL", "PRIMARY", "HELIX"])}
        | {"SliceThickness": (2.5, 2.5)},  # each slice next to ones of the other kind, no gaps
        {
            "ImageType": tuple(  # of the first and the last slice
                lambda n, end=end: ["DERIVED" if n == end else "ORIGINAL", "PRIMARY"]
                for end in (0, 5)
            )
        },
        {"KVP": (100, 120), "SliceThickness": (2.5, 2.5)},
    ],
)
def test_what_is_not_surely_several_passes_stays_together(tmp_path, tags):
    two_passes(tmp_path, tags, per_rotation=1)
    (group,) = dicom_series.find(tmp_path)
    volume, found = read(tmp_path)
    assert len(group.slices) == volume.voxels.shape[0] == 12
    assert not found


def test_a_repeated_rotation_is_a_volume_beside_the_whole(tmp_path):
    """And a single slice of a number of its own, in the midst of both passes, is left out."""

    def rotation(index, data):
        data.AcquisitionNumber = 7 - index // 4 if index < 20 else 9

    places = np.array([*np.arange(20) * 5.0, *np.arange(8, 12) * 5.0])
    write_series(tmp_path / "a", block((24, 8, 8)), places=places, change=rotation)
    groups = dicom_series.find(tmp_path / "a")
    assert sorted(len(group.slices) for group in groups) == [4, 20]
    for group in groups:
        _, found = dicom_series.read(group.as_series("a", uneven="refuse", unshear=False))
        assert kinds(found) == [Kind.ACQUISITIONS]
    two_passes(tmp_path / "b", {"AcquisitionNumber": (1, 2)})

    def third(index, data):
        data.AcquisitionNumber = 3

    one = block((1, 12, 10))
    write_series(tmp_path / "b", one, places=[11.0], names=["stray"], change=third)
    groups = dicom_series.find(tmp_path / "b")
    assert [len(group.slices) for group in groups] == [6, 6]
    assert "left out: 1 image alone in its series" in texts(groups[0].findings)


def test_acquisitions_one_after_another_are_one_volume(tmp_path):
    def numbered(index, data):
        data.AcquisitionNumber = 1 + index // 2  # step and shoot

    write_series(tmp_path, block(), change=numbered)
    (group,) = dicom_series.find(tmp_path)
    volume, found = dicom_series.read(group.as_series("a", uneven="refuse", unshear=False))
    assert volume.voxels.shape == block().shape
    assert not found


@pytest.fixture
def archive(tmp_path):
    """Makes studies, each of two slices, a localizer, a broken header and two files besides."""

    def made(studies):
        for number in range(studies):

            def localizer(index, data):
                if index == 2:
                    data.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

            ids = {"study": f"1.2.{number}", "series": f"1.2.{number}.1"}
            root = tmp_path / f"{studies}"
            paths = write_series(root / f"{number}", block((4, 12, 10)), change=localizer, **ids)
            paths[3].write_bytes(b"\0" * 128 + b"DICM" + b"\7" * 900)
            for name in ("IM000", "notes.txt"):
                (paths[0].parent / name).write_text("nothing")
        return root

    return made


def test_headers_are_read_side_by_side_and_files_keep_their_order(archive, monkeypatch, caplog):
    root = archive(3)
    alone = dicom_series.survey(root)
    assert [group.first.study for group in alone.groups] == ["1.2.0", "1.2.1", "1.2.2"]
    for group in alone.groups:
        assert len(group.slices) == 2
        told = [Kind.NO_DICOM, Kind.LEFT_OUT_LOCALIZER, Kind.LEFT_OUT_HEADER]
        assert sorted(kinds(group.findings)) == sorted(told)
    both, is_dicom = threading.Barrier(2, timeout=30), slice_file.is_dicom

    def met(path):
        both.wait()
        return is_dicom(path)

    monkeypatch.setattr(slice_file, "is_dicom", met)
    monkeypatch.setattr(dicom_series, "_AT_ONCE", 4)
    monkeypatch.setattr(dicom_series.machine, "log_every_s", lambda: 0.0)
    with caplog.at_level(logging.INFO):
        assert dicom_series.survey(root) == alone
    assert caplog.messages == [f"{root}: {n} files looked at for DICOM" for n in range(1, 19)]


def test_work_grows_with_the_files_and_not_with_their_square(archive, monkeypatch):
    asked, parent, study = [], PurePath.parent.fget, dicom_series.grouping.study
    roots = [archive(studies) for studies in (2, 12)]
    monkeypatch.setattr(PurePath, "parent", property(lambda p: asked.append(p) or parent(p)))
    monkeypatch.setattr(dicom_series.grouping, "study", lambda s: asked.append(s) or study(s))
    counts = []
    for root in roots:
        asked.clear()
        dicom_series.survey(root)
        counts.append(len(asked))
    assert counts[1] == 6 * counts[0]


def test_threads_that_read_at_once_are_all_quiet_and_give_the_levels_back(caplog):
    """Whoever comes first restores what was; in between nobody does."""
    log, before = logging.getLogger("pydicom"), list(warnings.filters)
    level = log.level
    both, inside = threading.Barrier(2, timeout=30), threading.Event()

    def first():
        with slice_file.quiet():
            both.wait()
            assert inside.wait(30)
        both.wait()

    thread = threading.Thread(target=first)
    thread.start()
    both.wait()
    with slice_file.quiet():
        inside.set()
        both.wait()  # the first has left
        log.warning("Invalid value for VR DA: '19500101'")
        warnings.warn("Invalid value for VR UI: 'DOE^JANE'", stacklevel=1)
        assert log.level > logging.CRITICAL
    thread.join()
    assert log.level == level
    assert list(warnings.filters) == before
    assert caplog.text == ""

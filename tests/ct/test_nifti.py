import gzip
import re
import struct

import nibabel as nib
import numpy as np
import pytest

from bhsd_jax.ct import nifti, prepare, scan
from bhsd_jax.defects import Kind, Refusal, texts
from bhsd_jax.volume import Channels, Volume

NAN, INF = np.nan, np.inf
AFFINE = np.array([[-0.5, 0, 0, 90], [0, 0.48, -1.3, -70], [0, 0.13, 4.8, 12], [0, 0, 0, 1.0]])


def save(path, voxels, affine=AFFINE, slope=None, inter=0.0, kind=nib.Nifti1Image, **fields):
    """A scan in the file's own i, j, k order, header fields set by hand."""
    image = kind(voxels, affine)
    data = bytearray(image.to_bytes())
    header = image.header.copy()
    block = type(header)(bytes(data[: header.sizeof_hdr]), check=False)
    if slope is not None:
        block["scl_slope"], block["scl_inter"] = slope, inter
    for field, value in fields.items():
        block[field] = value
    data[: header.sizeof_hdr] = block.binaryblock
    path.write_bytes(gzip.compress(bytes(data)) if path.suffix == ".gz" else bytes(data))
    return path


@pytest.fixture
def stored():
    return np.arange(3 * 4 * 5, dtype=np.int16).reshape(3, 4, 5) - 20


def test_axes_are_reversed_and_the_affine_follows(tmp_path, stored):
    volume = nifti.read(save(tmp_path / "a.nii.gz", stored))
    assert (volume.case, volume.voxels.shape, volume.voxels.dtype) == ("a", (5, 4, 3), np.int16)
    assert volume.voxels[4, 1, 2] == stored[2, 1, 4]
    np.testing.assert_allclose(
        volume.affine @ [4, 1, 2, 1], AFFINE @ [2, 1, 4, 1], rtol=1e-6, atol=1e-5
    )
    assert volume.affine.dtype == np.float64


def test_scale_factors_give_what_nibabel_gives(tmp_path, stored):
    raw = stored.astype(np.uint16)
    path = save(tmp_path / "a.nii", raw, slope=0.0623, inter=-1024.0)
    volume = nifti.read(path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, nib.load(path).get_fdata().astype("f4").T)
    assert float(volume.voxels.max()) == pytest.approx(raw.max() * 0.0623 - 1024, abs=1e-2)


def test_scale_factors_that_mean_none_are_ignored(tmp_path, stored):
    for slope in (0.0, np.nan, np.inf):
        volume = nifti.read(save(tmp_path / "a.nii", stored, slope=slope))
        np.testing.assert_array_equal(volume.voxels, stored.T)
        assert volume.voxels.dtype == np.int16


def test_gzip_is_known_by_content_not_by_suffix(tmp_path, stored):
    save(tmp_path / "a.nii.gz", stored).rename(tmp_path / "ID_1_ID_2")
    save(tmp_path / "b.nii", stored).rename(tmp_path / "b.nii.gz")
    for name in ("ID_1_ID_2", "b.nii.gz"):
        np.testing.assert_array_equal(nifti.read(tmp_path / name).voxels, stored.T)


def test_a_trailing_axis_of_one_is_dropped(tmp_path, stored):
    volume = nifti.read(save(tmp_path / "a.nii", stored[..., None]))
    np.testing.assert_array_equal(volume.voxels, stored.T)


def test_big_endian_and_nifti_2_are_read(tmp_path, stored):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.Nifti1Image(stored, AFFINE, header).to_filename(tmp_path / "big.nii")
    save(tmp_path / "two.nii.gz", stored, kind=nib.Nifti2Image)
    for name in ("big.nii", "two.nii.gz"):
        volume = nifti.read(tmp_path / name)
        np.testing.assert_array_equal(volume.voxels, stored.T)
        assert volume.voxels.dtype.isnative


@pytest.mark.parametrize("spacing", [(1, 1, 0), (1, -4, 1), (0, 0, 0), (1, NAN, 1), (INF, 1, 1)])
def test_a_sform_needs_no_spacing_beside_it(tmp_path, stored, spacing):
    """As nibabel 5.3 and ITK read it: method 3 of the standard uses the sform alone."""
    path = save(tmp_path / "a.nii", stored, pixdim=[1, *spacing, 1, 1, 1, 1])
    volume = nifti.read(path)
    assert nifti.repairs(path) == []
    np.testing.assert_array_equal(volume.voxels, stored.T)
    np.testing.assert_array_equal(
        volume.affine, nifti.read(save(tmp_path / "b.nii", stored)).affine
    )


def test_a_sform_that_pixdim_contradicts_is_taken_and_told_to_all_who_use_the_scan(
    tmp_path, stored
):
    """nnunetv2 2.8.1 goes by pixdim, nibabel by the sform; files of registrations have both."""
    upright = np.diag([0.5, 0.5, 5.0, 1.0])
    sheared = upright.copy()
    sheared[1, 2] = 1.5  # a step of 5.22 mm between slices 5 mm apart
    for affine, spacing, told in (
        (upright, (0.503, 0.5, 4.96), False),
        (upright, (0.5, 0.5, 5.6), True),
        (upright, (0.55, 0.5, 5.0), True),
        (upright, (5.0, 0.5, 0.5), True),
        (sheared, (0.5, 0.5, 5.0), False),
        (sheared, (0.5, 0.5, 5.22), False),
        (sheared, (0.5, 0.5, 5.6), True),
    ):
        path = save(tmp_path / "a.nii", stored, affine, pixdim=[1, *spacing, 1, 1, 1, 1])
        found = scan.read(path)[1]
        assert [one.kind for one in found] == [Kind.TWO_SPACINGS] * told
        assert prepare.doubts_of(found) == tuple(texts(found))
    assert str(found[0]) == (
        "sform has steps of 0.5 x 0.5 x 5.22 mm, pixdim 0.5 x 0.5 x 5.6: the sform is taken, and "
        "volumes in mL follow it"
    )
    assert nifti.read(path).spacing_mm == pytest.approx((5.22, 0.5, 0.5), abs=1e-3)
    both = save(
        tmp_path / "b.nii",
        np.stack([stored, stored], -1),
        1e-3 * upright,
        pixdim=[1, 5e-4, 5e-4, 6e-3, 1, 1, 1, 1],
        xyzt_units=1,  # meters
    )
    (text,) = texts(scan.read_channels(Channels((both,), 2))[1])
    assert text.startswith("sform has steps of 0.5 x 0.5 x 5 mm, pixdim 0.5 x 0.5 x 6:")
    only = save(
        tmp_path / "c.nii",
        stored,
        upright,
        pixdim=[1, 1, 1, 9, 1, 1, 1, 1],
        sform_code=0,
        qform_code=1,
    )
    assert scan.read(only)[1] == []


@pytest.mark.parametrize(("codes", "known"), [((0, 0), False), ((1, 0), True), ((0, 2), True)])
def test_a_header_that_states_no_position_is_told_to_all_who_use_the_scan(
    tmp_path, stored, codes, known
):
    """nibabel then takes x to run to the left and y to the front, ITK to the left and the back."""
    path = save(tmp_path / "a.nii.gz", stored, qform_code=codes[0], sform_code=codes[1])
    found = scan.read(path)[1]
    assert [(one.kind, one.done) for one in found] == [(Kind.NO_POSITION, "kept")] * (not known)
    assert prepare.doubts_of(found) == tuple(texts(found))
    assert scan.has_sides(path) is known
    assert scan.has_sides(Channels((path, tmp_path / "b.nii"), 2)) is known
    if not known:
        runs = np.sign(nifti.read(path).affine[[2, 1, 0], [0, 1, 2]])
        assert runs.tolist() == [1, 1, -1], "D up, H to the front, W to the left"
        assert "right and left may be exchanged" in str(found[0])


def test_a_qform_that_runs_elsewhere_than_the_sform_is_told_and_leaves_no_side(tmp_path, stored):
    """nibabel goes by the sform; ITK by the qform unless sform_code is 1, and so Slicer."""
    sform = np.diag([-0.5, 0.5, 5.0, 1.0])
    mirrored, upside_down, moved = (sform.copy() for _ in range(3))
    mirrored[0, 0], upside_down[2, 2], moved[:3, 3] = 0.5, -5.0, 40.0
    for qform, told, sides in (
        (sform, "", True),
        (moved, "", True),
        (mirrored, "sform runs to LAS, qform to RAS.*right and left may be exchanged", False),
        (upside_down, "sform runs to LAS, qform to LAI.*sform_code is 1$", True),
    ):
        made = nib.Nifti1Image(stored, sform)
        made.set_sform(sform, 2)
        made.set_qform(qform, 1)
        nib.save(made, tmp_path / "a.nii.gz")
        volume, found = scan.read(tmp_path / "a.nii.gz")
        np.testing.assert_array_equal(volume.affine[:, [2, 1, 0, 3]], sform)
        assert [one.kind for one in found] == [Kind.TWO_DIRECTIONS] * bool(told)
        assert prepare.doubts_of(found) == tuple(texts(found))
        assert all(re.match(told, str(one)) for one in found)
        assert scan.has_sides(tmp_path / "a.nii.gz") is sides


def test_meters_become_millimeters(tmp_path, stored):
    in_mm = nifti.read(save(tmp_path / "a.nii", stored))
    in_m = nifti.read(save(tmp_path / "b.nii", stored, np.diag([1e-3] * 3 + [1]) @ AFFINE))
    assert in_m.spacing_mm[0] == pytest.approx(in_mm.spacing_mm[0] / 1000)
    units = save(tmp_path / "c.nii", stored, np.diag([1e-3] * 3 + [1]) @ AFFINE, xyzt_units=1)
    np.testing.assert_allclose(nifti.read(units).affine, in_mm.affine, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "limit"),
        ({"dim": [3, 30, 40, 50, 1, 1, 1, 1]}, "truncated"),
        ({"dim": [3, 3, 0, 5, 1, 1, 1, 1]}, "positive"),
        ({"dim": [3, 3, -4, 5, 1, 1, 1, 1]}, "positive"),
        ({"dim": [2, 3, 4, 1, 1, 1, 1, 1]}, r"not a 3D scan: .*a third axis of size 1, or .*\.mha"),
        ({"dim": [4, 3, 2, 2, 5, 1, 1, 1]}, "not a 3D scan"),
        ({"dim": [9, 3, 4, 5, 1, 1, 1, 1]}, "not a 3D scan"),
        ({"datatype": 128}, "datatype is 128"),
        ({"datatype": 32}, "datatype is 32"),
        ({"datatype": 7777}, "datatype is 7777"),
        ({"pixdim": [1, 0, 1, 1, 1, 1, 1, 1], "sform_code": 0}, "spacing"),
        ({"pixdim": [1, 1, NAN, 1, 1, 1, 1, 1], "sform_code": 0}, "spacing"),
        ({"pixdim": [1, 1, 1, INF, 1, 1, 1, 1], "sform_code": 0}, "spacing"),
        ({"pixdim": [1, 1, 1, -2, 1, 1, 1, 1], "sform_code": 0}, "spacing"),
        ({"srow_y": [np.nan] * 4}, "not finite"),
        ({"srow_y": [0, 0, np.inf, 0]}, "not finite"),
        ({"srow_x": [0] * 4, "srow_y": [0] * 4, "srow_z": [0] * 4}, "zero axis"),
        ({"srow_x": [1, 1, 0, 0], "srow_y": [1, 1, 0, 0]}, "singular"),
        ({"vox_offset": -100}, "vox_offset"),
        ({"vox_offset": 1e30}, "limit"),
        ({"vox_offset": np.nan}, "vox_offset"),
        ({"vox_offset": 400}, "truncated"),
        ({"magic": b"ni1"}, "single-file"),
        ({"scl_slope": 1.0, "scl_inter": np.nan}, "intercept"),
        ({"scl_slope": 3e38, "scl_inter": 0}, "not finite numbers"),
    ],
)
def test_impossible_headers_are_refused_by_name(tmp_path, stored, fields, words):
    for name in ("bad.nii", "bad.nii.gz"):
        path = save(tmp_path / name, stored, **fields)
        with pytest.raises(ValueError, match=words) as caught:
            nifti.read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 100, 347, 350, 380, -1])
def test_cut_files_are_refused(tmp_path, stored, keep):
    whole = save(tmp_path / "whole.nii", stored).read_bytes()
    packed = gzip.compress(whole)
    (tmp_path / "cut.nii").write_bytes(whole[:keep])
    (tmp_path / "cut.nii.gz").write_bytes(packed[: keep if keep < 100 else len(packed) // 2])
    for name in ("cut.nii", "cut.nii.gz"):
        with pytest.raises(ValueError, match=name):
            nifti.read(tmp_path / name)


def test_every_flipped_bit_of_the_packed_voxels_is_noticed(tmp_path, stored):
    packed = bytearray(save(tmp_path / "a.nii.gz", stored).read_bytes())
    for place in range(10, len(packed), 7):
        damaged = bytearray(packed)
        damaged[place] ^= 4
        (tmp_path / "b.nii.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.nii\.gz"):
            nifti.read(tmp_path / "b.nii.gz")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.nii").write_bytes(b"not a scan" * 100)
    (tmp_path / "zip.nii.gz").write_bytes(gzip.compress(b"not a scan" * 100))
    (tmp_path / "folder.nii").mkdir()
    for name in ("text.nii", "zip.nii.gz", "folder.nii"):
        with pytest.raises(ValueError, match=name):
            nifti.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none"):
        nifti.read(tmp_path / "none.nii")


def test_a_stream_longer_than_its_header_says_is_refused(tmp_path, stored):
    whole = save(tmp_path / "a.nii", stored).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(whole + bytes(100)))
    np.testing.assert_array_equal(nifti.read(tmp_path / "b.nii.gz").voxels, stored.T)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(whole + bytes(2**21)))
    with pytest.raises(ValueError, match="goes on"):
        nifti.read(tmp_path / "c.nii.gz")


def test_the_size_limit_is_the_callers(tmp_path, stored):
    path = save(tmp_path / "a.nii.gz", stored)
    assert nifti.read(path, max_bytes=352 + 120).voxels.size == 60
    with pytest.raises(ValueError, match="limit is 471"):
        nifti.read(path, max_bytes=352 + 119)


def test_voxels_that_are_no_numbers_are_refused(tmp_path):
    voxels = np.ones((3, 4, 5), np.float32)
    voxels[1, 2, 3], voxels[0, 0, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 60 voxels .* Set them to air"):
        nifti.read(save(tmp_path / "a.nii", voxels))


def test_a_label_takes_the_geometry_of_its_image(tmp_path, stored):
    image = nifti.read(save(tmp_path / "scan_0000.nii.gz", stored))
    label = (np.abs(stored) % 6).astype(np.uint16)
    same, none = nifti.read_label(save(tmp_path / "l.nii", label), image, num_classes=6)
    assert (same.case, same.voxels.dtype, none) == ("scan_0000", np.uint8, [])
    np.testing.assert_array_equal(same.voxels, label.T)
    moved = AFFINE.copy()
    moved[0, 3] += 3
    path = save(tmp_path / "l.nii", label.astype(np.float64), moved)
    other, warnings = nifti.read_label(path, image, num_classes=6)
    np.testing.assert_array_equal(other.affine, image.affine)
    np.testing.assert_array_equal(other.voxels, label.T)
    assert [finding.kind for finding in warnings] == [Kind.MASK_MOVED]
    assert "3 mm" in warnings[0].text


def test_a_label_without_usable_geometry_only_warns(tmp_path, stored):
    image = nifti.read(save(tmp_path / "scan.nii", stored))
    path = save(tmp_path / "l.nii", np.ones((3, 4, 5), np.uint8), srow_x=[np.nan] * 4)
    label, warnings = nifti.read_label(path, image, num_classes=None)
    assert label.voxels.all()
    assert [finding.kind for finding in warnings] == [Kind.MASK_GEOMETRY]
    assert "unusable" in warnings[0].text


@pytest.mark.parametrize("top", [2, 5, 11, 60])
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16])
def test_whole_numbers_behind_a_scale_factor_are_whole_again(tmp_path, stored, top, kind):
    """As nibabel saves a mask of floating point under a header of integers: 11 / 255 per step."""
    image = nifti.read(save(tmp_path / "image.nii", stored))
    truth = (np.arange(60).reshape(3, 4, 5) % (top + 1)).astype(np.float64)
    made = nib.Nifti1Image(truth, AFFINE)
    made.header.set_data_dtype(kind)
    nib.save(made, tmp_path / "mask.nii.gz")
    back = np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    label, found = nifti.read_label(tmp_path / "mask.nii.gz", image, num_classes=top + 1)
    np.testing.assert_array_equal(label.voxels, truth.T)
    apart = float(np.abs(back - truth).max())
    assert ([f.kind for f in found] == [Kind.MASK_ROUNDED]) == (apart > 1e-4)


@pytest.mark.parametrize(
    ("voxels", "slope", "value"),
    [
        (np.float32(1.02), None, "1.02"),  # nothing was rounded
        (np.uint8(25), 0.0431, "1.07"),  # further off than half a step, 1 is 23 of them
        (np.uint8(24), 0.0431, "1.03"),
        (np.uint8(50), 0.01, "0.5"),
        (np.uint8(3), 1.5, "4.5"),
    ],
)
def test_values_off_by_more_than_half_a_step_are_refused(tmp_path, stored, voxels, slope, value):
    image = nifti.read(save(tmp_path / "image.nii", stored))
    mask = save(tmp_path / "mask.nii", np.full((3, 4, 5), voxels), slope=slope)
    with pytest.raises(ValueError, match=rf"integers in 0\.\.5; got {value}") as caught:
        nifti.read_label(mask, image, num_classes=6)
    assert caught.value.kind is Kind.MASK_VALUES


def test_wrong_labels_are_refused_with_their_values(tmp_path, stored):
    image = nifti.read(save(tmp_path / "scan.nii", stored))
    label = np.zeros((3, 4, 5))
    label[0, 0, :3] = -1, 2.5, 6
    with pytest.raises(ValueError, match=r"0\.\.5; got -1, 2\.5, 6"):
        nifti.read_label(save(tmp_path / "l.nii", label), image, num_classes=6)
    label[0, 0, :3] = 0.3, 1, 2
    with pytest.raises(ValueError, match=r"got 0\.3; interpolated\? .* nearest neighbor$"):
        nifti.read_label(save(tmp_path / "l.nii", label), image, num_classes=6)
    label[0, 0, :3] = 0, 255, 255
    with pytest.raises(ValueError, match=r"got 255; where 255 stands for 1, .*labels=binary"):
        nifti.read_label(save(tmp_path / "l.nii", label), image, num_classes=6)
    label = np.full((3, 4, 5), 300, np.int16)
    with pytest.raises(ValueError, match=r"0\.\.255; got 300$"):
        nifti.read_label(save(tmp_path / "l.nii", label), image, num_classes=None)
    with pytest.raises(ValueError, match=r"\(5, 4, 2\).*\(5, 4, 3\)"):
        nifti.read_label(save(tmp_path / "l.nii", label[:2]), image, num_classes=None)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 2), (0, 0)])
def test_geometry_is_carried_over_bit_for_bit(tmp_path, stored, codes, kind):
    turned = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([-0.4, 0.5, 5]), [1, 2, 3]
    )
    like = save(
        tmp_path / "like.nii.gz", stored, turned, kind=kind,
        qform_code=codes[0], sform_code=codes[1], descrip=b"Jane Doe", xyzt_units=10,
    )  # fmt: skip
    label = (stored.T > 0).astype(np.uint8)
    nifti.write(tmp_path / "new" / "out.nii.gz", label, like)
    one, other = nib.load(like), nib.load(tmp_path / "new" / "out.nii.gz")
    np.testing.assert_array_equal(one.affine, other.affine)
    for field in ("pixdim", "qform_code", "sform_code", "quatern_b", "srow_x", "xyzt_units"):
        np.testing.assert_array_equal(one.header[field], other.header[field])
    assert other.header["descrip"].item() == b""
    assert other.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(other.dataobj), label.T)
    np.testing.assert_array_equal(nifti.read(like).affine, nifti.read(other.get_filename()).affine)


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(tmp_path, stored):
    like = save(tmp_path / "like.nii", stored)
    nifti.write(tmp_path / "a.nii.gz", stored.T, like)
    first = (tmp_path / "a.nii.gz").read_bytes()
    nifti.write(tmp_path / "a.nii.gz", stored.T, like)
    assert (tmp_path / "a.nii.gz").read_bytes() == first
    assert struct.unpack("<I", first[4:8]) == (0,)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "like.nii"]


def test_a_refused_write_leaves_the_old_file(tmp_path, stored):
    like = save(tmp_path / "like.nii", stored)
    with pytest.raises(ValueError, match=r"\(3, 4, 5\)"):
        nifti.write(like, stored, like)
    with pytest.raises(ValueError, match="float16"):
        nifti.write(like, stored.T.astype(np.float16), like)
    np.testing.assert_array_equal(nifti.read(like).voxels, stored.T)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32, np.int64])
def test_a_volume_survives_writing_and_reading(tmp_path, stored, kind):
    volume = Volume(stored.T.astype(kind), AFFINE[:, [2, 1, 0, 3]], "x")
    nifti.write_volume(tmp_path / "x.nii", volume)
    again = nifti.read(tmp_path / "x.nii")
    np.testing.assert_array_equal(again.voxels, volume.voxels)
    assert again.voxels.dtype == kind
    np.testing.assert_allclose(again.affine, volume.affine, rtol=1e-6)
    np.testing.assert_array_equal(
        nib.load(tmp_path / "x.nii").affine[:, [2, 1, 0, 3]], again.affine
    )


def test_a_mask_whose_axes_run_the_other_way_is_doubted_and_taken_as_it_lies(tmp_path, stored):
    image = nifti.read(save(tmp_path / "scan.nii", stored))
    mirrored = AFFINE @ np.diag([-1.0, 1, 1, 1])
    path = save(tmp_path / "l.nii", (stored > 0).astype(np.uint8), mirrored)
    label, warnings = nifti.read_label(path, image, num_classes=2)
    np.testing.assert_array_equal(label.voxels, (stored > 0).T)
    assert [finding.kind for finding in warnings] == [Kind.MASK_MIRRORED]
    assert "other way" in warnings[0].text


def test_odd_headers_are_remarked_on(tmp_path, stored):
    plain = save(tmp_path / "plain.nii", stored)
    mask = save(tmp_path / "mask.nii", stored.astype(np.uint8))
    assert nifti.remarks(plain, mask) == []
    odd = save(tmp_path / "odd.nii", stored, slope=0.5, inter=-3, sform_code=0, qform_code=1)
    wide = save(tmp_path / "wide.nii", stored.astype(np.uint16))
    found = nifti.remarks(odd, wide)
    assert [finding.kind for finding in found] == [Kind.SCALED, Kind.QFORM_ONLY, Kind.MASK_TYPE]
    assert texts(found) == [
        "scale factors applied: 0.5 x + -3",
        "position from the qform, no sform",
        "mask stored as uint16, not uint8",
    ]
    lost = save(tmp_path / "lost.nii", stored, slope=np.nan, sform_code=0, qform_code=0)
    found = nifti.remarks(lost, None)
    assert [finding.kind for finding in found] == [Kind.SCALE_IGNORED]
    assert texts(found) == ["scale factor nan ignored"]
    (tmp_path / "text.nii").write_text("no scan")
    assert nifti.remarks(tmp_path / "text.nii", tmp_path / "none.nii") == []
    assert nifti.remarks(object(), object()) == []  # scans that are no file


def turns(affine, voxels):
    """A file's voxels, and the same in the orders that other tools write them in."""
    whole = nib.Nifti1Image(voxels, affine)
    native = nib.io_orientation(affine)
    for letters in ("RAS", "LPS", "SRA", "PIL"):
        how = nib.orientations.ornt_transform(native, nib.orientations.axcodes2ornt(letters))
        yield whole.as_reoriented(how)


def test_a_mask_of_the_same_voxels_in_another_order_is_turned(tmp_path, stored):
    """As MONAI, FSL or nibabel have sorted its axes; and channels of one scan likewise."""
    place = save(tmp_path / "scan.nii", stored)
    image, truth = nifti.read(place), (stored > 0).astype(np.uint8)
    for turned in turns(AFFINE, truth):
        nib.save(turned, tmp_path / "l.nii.gz")
        label, found = scan.read_label(tmp_path / "l.nii.gz", place, image, num_classes=2)
        np.testing.assert_array_equal(label.voxels, truth.T)
        assert {finding.kind for finding in found} <= {Kind.TURNED}
    for turned in turns(AFFINE, stored):
        nib.save(turned, tmp_path / "other.nii.gz")
        both = Channels((place, tmp_path / "other.nii.gz"), 2)
        (first, second), found = scan.read_channels(both)
        np.testing.assert_array_equal(second.voxels, first.voxels)
        assert {finding.kind for finding in found} <= {Kind.TURNED}


def test_a_mask_that_states_no_place_is_not_turned(tmp_path, stored):
    """Its affine is nibabel's custom, though it may hit the voxels of a scan about the origin."""
    center = np.diag([1.0, 1, 1, 1])
    center[:3, 3] = -1, -1.5, -2
    image = nifti.read(save(tmp_path / "scan.nii", stored, center))
    truth = (stored > 0).astype(np.uint8)
    path = save(tmp_path / "l.nii", truth, center, sform_code=0, qform_code=0)
    label, found = nifti.read_label(path, image, num_classes=2)
    np.testing.assert_array_equal(label.voxels, truth.T)
    assert [finding.kind for finding in found] == [Kind.MASK_MIRRORED]


def test_channels_that_itk_has_written_as_vectors_are_read(tmp_path, stored):
    """SimpleITK stores the components of a voxel along the fifth axis; a label map fits them."""
    both = np.stack([stored, stored + 7], -1)[:, :, :, None]
    place = save(tmp_path / "a.nii.gz", both)
    (first, second), _ = scan.read_channels(Channels((place,), 2))
    np.testing.assert_array_equal(first.voxels, stored.T)
    np.testing.assert_array_equal(second.voxels, stored.T + 7)
    label = (stored > 0).T.astype(np.uint8)
    scan.write(tmp_path / "l.nii.gz", label, Channels((place,), 2))
    np.testing.assert_array_equal(nifti.read(tmp_path / "l.nii.gz").voxels, label)
    with pytest.raises(ValueError, match=r"expected 3 channels .* sizes are \(3, 4, 5, 2\)"):
        scan.read_channels(Channels((place,), 3))
    with pytest.raises(ValueError, match=r"not a 3D scan: .* \(3, 4, 5, 1, 2\)"):
        nifti.read(place)


def test_an_identity_for_an_affine_states_no_place(tmp_path, stored):
    """As `nibabel.Nifti1Image(voxels, np.eye(4))` writes it, which many do who have lost theirs."""
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(stored, np.eye(4)), path)
    volume, found = scan.read(path)
    np.testing.assert_array_equal(volume.affine[:, [2, 1, 0, 3]], np.eye(4))
    assert [(one.kind, one.done) for one in found] == [(Kind.NO_POSITION, "kept")]
    assert prepare.doubts_of(found) == tuple(texts(found))
    assert not scan.has_sides(path)
    template = np.eye(4)
    template[:3, 3] = -90, -126, -72
    nib.save(nib.Nifti1Image(stored, template), path)
    assert scan.read(path)[1] == []
    assert scan.has_sides(path)


def test_a_sform_that_is_none_gives_way_to_the_qform(tmp_path, stored):
    """ITK reads such files by the qform; nibabel finds all voxels at one place."""
    qform = np.diag([-0.5, 0.5, 5.0, 1.0])
    qform[:3, 3] = 8, -8, -20
    made = nib.Nifti1Image(stored, qform)
    made.set_qform(qform, 1)
    codes = {"qform_code": 1, "sform_code": 1}
    rows = {f"srow_{axis}": 0 for axis in "xyz"}
    fields = {name: made.header[name] for name in ("pixdim", "quatern_b", "quatern_c", "quatern_d")}
    fields |= {f"qoffset_{axis}": made.header[f"qoffset_{axis}"] for axis in "xyz"}
    path = save(tmp_path / "a.nii.gz", stored, **fields, **rows, **codes)
    volume, found = scan.read(path)
    np.testing.assert_allclose(volume.affine[:, [2, 1, 0, 3]], qform, atol=1e-6)
    assert [(one.kind, one.done) for one in found] == [(Kind.NO_SFORM, "repaired")]
    assert scan.has_sides(path)


def test_a_quaternion_that_is_too_long_by_rounding_is_a_rotation(tmp_path, stored):
    """As for ITK; nibabel says that w2 should be positive."""
    fields = {"quatern_b": 0, "quatern_c": 0, "quatern_d": 1.0001, "qform_code": 1, "sform_code": 0}
    path = save(tmp_path / "a.nii.gz", stored, np.diag([0.5, 0.5, 5.0, 1.0]), **fields)
    volume, found = scan.read(path)
    columns = volume.affine[:3, [2, 1, 0]]
    np.testing.assert_allclose(columns, np.diag([-0.5, -0.5, 5.0]), atol=1e-3)
    assert found == []


def test_a_name_ends_before_its_suffix_in_capitals_too():
    names = ["a.nii.gz", "a.nii", "A.NII.GZ", "a.1.Nii", "a.gz", "a"]
    assert list(map(nifti.case_name, names)) == ["a", "a", "A", "a.1", "a", "a"]


def test_a_file_of_several_volumes_is_refused_with_a_way_out(tmp_path, stored):
    path = save(tmp_path / "a.nii.gz", np.stack([stored, stored], axis=3))
    with pytest.raises(Refusal, match="several volumes: save the one that is meant"):
        nifti.read(path)


def test_a_mask_of_another_spacing_is_to_be_looked_at(tmp_path, stored):
    """As if drawn on another reconstruction, with as many voxels; nnU-Net refuses it."""
    image = nifti.read(save(tmp_path / "a.nii.gz", stored))
    wider = AFFINE @ np.diag([1.1, 1.1, 1, 1])
    found = {}
    for name, affine in (("wider", wider), ("lost", np.eye(4)), ("same", AFFINE)):
        path = save(tmp_path / f"{name}.nii.gz", np.zeros(stored.shape, np.uint8), affine)
        _, findings = nifti.read_label(path, image, num_classes=2)
        found[name] = [(one.kind, one.done) for one in findings]
    assert found["wider"] == [(Kind.MASK_SPACING, "kept")]
    assert found["same"] == []
    assert Kind.MASK_SPACING not in [kind for kind, _ in found["lost"]]


@pytest.mark.parametrize(
    ("begins", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>log in</body></html>" * 9, "web page in place"),
        (gzip.compress(gzip.compress(bytes(999))), "packed twice by gzip; unpack it once"),
    ],
    ids=["pointer", "page", "twice"],  # gzip writes the time, and workers must agree on names
)
def test_what_a_download_has_left_in_the_place_of_a_scan_is_called_that(tmp_path, begins, words):
    (tmp_path / "a.nii.gz").write_bytes(begins)
    with pytest.raises(Refusal, match=words) as caught:
        nifti.read(tmp_path / "a.nii.gz")
    assert caught.value.kind is Kind.NO_NIFTI


def test_further_axes_of_size_0_are_none(tmp_path, stored):
    """As ITK reads them; nibabel makes an array of no voxels."""
    path = save(tmp_path / "a.nii.gz", stored, dim=[5, 3, 4, 5, 0, 0, 0, 0])
    np.testing.assert_array_equal(nifti.read(path).voxels, stored.T)

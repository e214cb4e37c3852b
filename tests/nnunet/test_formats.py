"""Scans in other formats than NIfTI: read, planned and prepared as by nnU-Net, and written back."""

import contextlib
import importlib
import json
import sys

import numpy as np
import pytest
from dicom_files import block, write_series
from nnunet_raw import Reference, config

from bhsd_jax import api
from bhsd_jax.ct import formats, nifti, prepare, scan
from bhsd_jax.datasets import image_files
from bhsd_jax.datasets.dicom import DICOM
from bhsd_jax.datasets.msd import MSD
from bhsd_jax.defects import Kind, Refusal, texts
from bhsd_jax.nnunet import planner
from bhsd_jax.shards import store
from bhsd_jax.verbs import chosen_scans, preprocess
from bhsd_jax.volume import Channels, Plan, Volume

itk = pytest.importorskip("SimpleITK", reason="the extra `formats` is not installed")
tifffile = pytest.importorskip("tifffile", reason="the extra `formats` is not installed")


def write(reference, folder, ending):
    """The raw data set in the files that nnU-Net has read."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in reference.cases:
        image, label = reference.arrays[f"{case}_image"], reference.arrays[f"{case}_label"]
        spacing = reference.arrays[f"{case}_spacing"].tolist()
        if ending == ".png":
            colors = itk.GetImageFromArray(np.moveaxis(image[:, 0], 0, -1), isVector=True)
            itk.WriteImage(colors, str(folder / "imagesTr" / f"{case}_0000.png"))
            itk.WriteImage(
                itk.GetImageFromArray(label[0]), str(folder / "labelsTr" / f"{case}.png")
            )
            continue
        parts = {f"imagesTr/{case}_{c:04d}{ending}": one for c, one in enumerate(image)}
        for name, voxels in (parts | {f"labelsTr/{case}{ending}": label}).items():
            if ending == ".tif":
                tifffile.imwrite(folder / name, voxels)
                beside = (folder / name).with_name(f"{case}.json")
                beside.write_text(json.dumps({"spacing": spacing}))
            else:
                made = itk.GetImageFromArray(voxels)
                made.SetSpacing(spacing[::-1])
                made.SetOrigin((5.0, -7.0, 3.0))
                made.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
                itk.WriteImage(made, str(folder / name), True)
    (folder / "dataset.json").write_text(json.dumps(reference.dataset))
    return folder


@pytest.fixture(scope="module", params=["png", "mha", "tif"])
def prepared(request, tmp_path_factory):
    reference = Reference.load(request.path.parents[1] / "golden", request.param)
    folder = tmp_path_factory.mktemp(request.param)
    root = write(reference, folder / "raw", f".{request.param}")
    (folder / "plans.json").write_text(json.dumps(reference.plans))
    configuration = "2d" if request.param == "png" else "3d_fullres"
    preprocess.run(config(root, folder / "plans.json", configuration), folder / "run")
    return request.param, configuration, reference, folder


def test_voxels_are_nnunets(prepared):
    _, configuration, reference, folder = prepared
    found = store.Shards(folder / "run" / "shards").load("c0")
    image, label = found.channels_last, found.label
    want = reference.trained_on("c0", configuration)
    seg = np.maximum(reference.arrays[f"c0_{configuration}_seg"][0], 0)
    # nnU-Net leaves axes as they lie in the file, ours run as a radiologist looks at slices.
    turned = tuple(axis for axis in range(3) if found.grid.flip[axis])
    assert np.abs(np.flip(image, turned) - want).max() < 1e-5
    assert (np.flip(label, turned) == seg).all()


def test_the_plan_is_nnunets(prepared):
    _, configuration, reference, folder = prepared
    own = config(folder / "raw")
    own.preprocess.configuration = configuration
    preprocess.run(own, folder / "own")
    plan = Plan.load(folder / "own" / "shards")
    assert (plan.network, plan.spacing_mm, plan.transpose) == planner.from_nnunet_plans(
        reference.plans, configuration
    )


def test_a_label_map_comes_back_as_it_was_written(prepared, tmp_path):
    kind, _, reference, folder = prepared
    (case, *_) = MSD(folder / "raw").cases()
    volume, _ = scan.read(case.image)
    label = reference.arrays["c0_label"]
    target = tmp_path / f"c0{scan.ending(case.image)}"
    assert target.suffix == f".{kind}"
    scan.write(target, label, like=case.image)
    found, notes = scan.read_label(target, case.image, volume, num_classes=3)
    assert (found.voxels == label).all()
    assert not notes
    np.testing.assert_allclose(formats.read(target).affine, volume.affine, atol=1e-9)
    assert image_files.scans(tmp_path) == {"c0": target}
    scan.write(tmp_path / "c0.nii.gz", label, like=case.image)
    np.testing.assert_allclose(nifti.read(tmp_path / "c0.nii.gz").affine, volume.affine, atol=1e-4)
    with pytest.raises(ValueError, match=r"label values must be integers in 0\.\.1"):
        scan.read_label(target, case.image, volume, num_classes=2)
    with pytest.raises(ValueError, match="label has shape"):
        scan.read_label(target, case.image, Volume(volume.voxels[:, 1:], volume.affine, ""),
                        num_classes=3)  # fmt: skip


def test_single_slices_need_a_2d_plan(golden, tmp_path):
    root = write(Reference.load(golden, "png"), tmp_path / "raw", ".png")
    with pytest.raises(ValueError, match=r"preprocess\.configuration=2d"):
        preprocess.run(config(root), tmp_path / "run")


def test_an_image_is_where_itk_says(tmp_path):
    """Any direction cosines: each voxel's place in the patient."""
    made = itk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    made.SetSpacing((0.5, 0.75, 3.0))
    made.SetOrigin((-20.0, 11.0, 4.0))
    made.SetDirection((0, 0, 1, 0.6, -0.8, 0, 0.8, 0.6, 0))
    for ending in (".mha", ".nrrd"):
        itk.WriteImage(made, str(tmp_path / f"a{ending}"))
        found = formats.read(tmp_path / f"a{ending}")
        assert found.voxels.dtype == np.int16
        for d, h, w in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
            x, y, z = made.TransformIndexToPhysicalPoint((w, h, d))
            np.testing.assert_allclose((found.affine @ (d, h, w, 1))[:3], (-x, -y, z), atol=1e-6)


def test_a_scan_is_read_from_python_as_by_predict(tmp_path):
    made = itk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    made.SetSpacing((0.5, 0.75, 3.0))
    for ending in (".mha", ".nrrd"):
        itk.WriteImage(made, str(tmp_path / f"a{ending}"))
        voxels, affine = api.read_scan(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(voxels, itk.GetArrayFromImage(made).T)
        np.testing.assert_allclose(affine, np.diag([-0.5, -0.75, 3.0, 1.0]))


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".gipl"])
def test_a_label_map_that_lies_elsewhere_than_its_scan_is_told(tmp_path, ending):
    """As of NIfTI: taken as it lies, but for the very voxels of the scan in another order."""
    voxels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    image = tmp_path / "a.nii.gz"
    nifti.write_volume(image, Volume(voxels, np.diag([-1.0, -2.0, 5.0, 1.0])[:, [2, 1, 0, 3]], ""))
    volume = nifti.read(image)
    made = itk.GetImageFromArray(voxels)
    made.SetSpacing((1, 2, 5))
    lies = {}
    for name, origin, direction in (
        ("as the scan", (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1)),
        ("elsewhere", (0, 4, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1)),
        ("turned", (3, 0, 0), (-1, 0, 0, 0, 1, 0, 0, 0, 1)),
        ("mirrored", (0, 0, 0), (-1, 0, 0, 0, 1, 0, 0, 0, 1)),
    ):
        made.SetOrigin(origin)
        made.SetDirection(direction)
        itk.WriteImage(made, str(tmp_path / f"m{ending}"))
        label, found = scan.read_label(tmp_path / f"m{ending}", image, volume, num_classes=None)
        lies[name] = [one.kind for one in found]
        turned = lies[name] == [Kind.TURNED]
        np.testing.assert_array_equal(label.voxels, voxels[..., ::-1] if turned else voxels)
        np.testing.assert_array_equal(label.affine, volume.affine)
    moved, mirrored = [Kind.MASK_MOVED], [Kind.MASK_MIRRORED]
    same = [Kind.TURNED]
    if ending == ".gipl":  # it states no direction
        mirrored, same = [], moved
    assert lies == {"as the scan": [], "elsewhere": moved, "turned": same, "mirrored": mirrored}


def test_spacings_of_tiff_are_compared_where_both_are_stated(tmp_path):
    kinds = []
    for name in ("a", "m"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((2, 3, 5), np.uint8))
    for spacing in ([5, 2, 1], [5, 2, 1.5], None):
        (tmp_path / "a.json").write_text('{"spacing": [5, 2, 1]}')
        if spacing:
            (tmp_path / "m.json").write_text(json.dumps({"spacing": spacing}))
        else:
            (tmp_path / "m.json").unlink()
        volume = formats.read(tmp_path / "a.tif")
        _, found = scan.read_label(tmp_path / "m.tif", tmp_path / "a.tif", volume, num_classes=None)
        kinds.append([one.kind for one in found])
    assert kinds == [[], [Kind.MASK_MOVED], []]


def test_a_label_map_of_a_series_is_turned_to_it_by_its_affine(tmp_path):
    """DICOM files lie in ITK's order, our rows run the other way."""
    write_series(tmp_path / "dicom", block())
    names = itk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "dicom"))
    drawn = itk.ReadImage(names)
    mask = itk.Cast(drawn > 40, itk.sitkUInt8)
    (case,) = DICOM(tmp_path / "dicom").cases()
    volume, _ = scan.read(case.image)
    want = volume.voxels > 40
    assert not np.array_equal(itk.GetArrayFromImage(mask), want)
    for ending in (".nrrd", ".mha"):
        itk.WriteImage(mask, str(tmp_path / f"m{ending}"))
        label, found = scan.read_label(tmp_path / f"m{ending}", case.image, volume, num_classes=2)
        np.testing.assert_array_equal(label.voxels, want)
        assert not found
    mask.SetOrigin((500, 0, 0))
    itk.WriteImage(mask, str(tmp_path / "m.nrrd"))
    tifffile.imwrite(tmp_path / "m.tif", want.astype(np.uint8))
    for name, message in (("m.nrrd", "does not lie on"), ("m.tif", "states no place in space")):
        with pytest.raises(ValueError, match=f"its mask.* {message}") as caught:
            scan.read_label(tmp_path / name, case.image, volume, num_classes=2)
        assert name not in str(caught.value)


def test_a_mask_without_directions_is_laid_as_itk_reads_it(tmp_path):
    """As of writers that leave them out; where its voxels lie on those of the scan, it fits."""
    write_series(tmp_path / "dicom", block())
    names = itk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "dicom"))
    drawn = itk.ReadImage(names)
    (case,) = DICOM(tmp_path / "dicom").cases()
    itk.WriteImage(drawn[:, ::-1], str(tmp_path / "turned.nii.gz"))
    for name, stated, instead in (
        ("m.nrrd", b"space: left-posterior-superior\n", b"space dimension: 3\n"),
        ("m.mha", b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b""),
    ):
        path = tmp_path / name
        itk.WriteImage(itk.Cast(drawn > 40, itk.sitkUInt8), str(path))
        assert stated in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(stated, instead))
        for image in (case.image, tmp_path / "turned.nii.gz"):
            volume, _ = scan.read(image)
            label, _ = scan.read_label(path, image, volume, num_classes=2)
            np.testing.assert_array_equal(label.voxels, volume.voxels > 40)


NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nendian: little\nencoding: raw\n"
MHA = "ObjectType = Image\nNDims = 3\nDimSize = 4 3 2\nElementType = MET_SHORT\n"
DIRECTIONS = "space directions: (1,0,0) (0,2,0) (0,0,5)\nspace origin: (0,0,0)\n"
NOWHERE = [Kind.NO_POSITION, Kind.NO_SPACING]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.nrrd", f"{NRRD}\n", NOWHERE),  # as pynrrd writes an array alone
        ("a.nrrd", f"{NRRD}spacings: 1 2 5\n\n", NOWHERE[:1]),
        ("a.nrrd", f"{NRRD}space dimension: 3\n{DIRECTIONS}\n", NOWHERE[:1]),
        ("a.nrrd", f"{NRRD}space: scanner-xyz\n{DIRECTIONS}\n", NOWHERE[:1]),
        ("a.nrrd", f"{NRRD}space: RAS\n{DIRECTIONS}\n", []),
        ("a.nrrd", f"{NRRD}space: left-posterior-superior\n{DIRECTIONS}\n", []),
        ("a.mha", f"{MHA}ElementDataFile = LOCAL\n", NOWHERE),
        ("a.mha", f"{MHA}ElementSpacing = 1 2 5\nElementDataFile = LOCAL\n", NOWHERE[:1]),
        ("a.mha", f"{MHA}TransformMatrix = 1 0 0 0 1 0 0 0 1\nElementDataFile = LOCAL\n", []),
    ],
)
def test_a_volume_that_states_no_place_is_told_to_all_who_use_it(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_bytes(text.encode() + np.arange(24, dtype="<i2").tobytes())
    volume, found = scan.read(path)
    np.testing.assert_array_equal(volume.voxels.ravel(), np.arange(24))
    assert [one.kind for one in found] == said
    assert prepare.doubts_of(found) == tuple(texts(found))
    assert scan.has_sides(path) is (not said)


def test_formats_without_directions_state_no_side(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 3, 5), np.uint8))
    itk.WriteImage(itk.GetImageFromArray(np.zeros((2, 3, 5), np.uint8)), str(tmp_path / "b.gipl"))
    itk.WriteImage(itk.GetImageFromArray(np.zeros((3, 5), np.uint8)), str(tmp_path / "c.png"))
    found = {p.name: scan.read(p)[1] for p in sorted(tmp_path.iterdir())}
    assert [[one.kind for one in each] for each in found.values()] == [NOWHERE, NOWHERE[:1], []]
    assert not any(scan.has_sides(tmp_path / name) for name in found)


def test_grays_of_a_bitmap_are_one_channel_and_its_colors_three(tmp_path):
    # ITK reads three equal colors; nnunetv2 2.8.1 one channel, by imageio.
    gray = np.arange(12, dtype=np.uint8).reshape(3, 4)
    itk.WriteImage(itk.GetImageFromArray(gray), str(tmp_path / "a.bmp"))
    np.testing.assert_array_equal(formats.read(tmp_path / "a.bmp").voxels, gray[None])
    colors = np.stack([gray, gray, gray + 1], -1)
    itk.WriteImage(itk.GetImageFromArray(colors, isVector=True), str(tmp_path / "b.bmp"))
    found = formats.read_channels(tmp_path / "b.bmp", 3)
    np.testing.assert_array_equal([one.voxels[0] for one in found], np.moveaxis(colors, -1, 0))
    with pytest.raises(ValueError, match="expected 1 channel"):
        formats.read(tmp_path / "b.bmp")


def test_masks_of_one_bit_hold_what_their_files_hold(tmp_path):
    """0 and 1, as skimage and tifffile give nnunetv2 2.8.1; ITK makes 0 and 255 of such a PNG."""
    pictures = pytest.importorskip("PIL.Image", reason="writes a PNG of one bit")
    mask = np.arange(24).reshape(4, 6) % 5 == 0
    pictures.fromarray(mask).save(tmp_path / "m.png")
    pictures.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "gray.png")
    tifffile.imwrite(tmp_path / "m.tif", mask)
    tifffile.imwrite(tmp_path / "gray.tif", mask.astype(np.uint8))
    assert formats.read(tmp_path / "gray.png").voxels.max() == 255
    for name in ("m.png", "m.tif"):
        image = tmp_path / f"gray{name[1:]}"
        volume = formats.read(image)
        label, found = scan.read_label(tmp_path / name, image, volume, num_classes=2)
        np.testing.assert_array_equal(label.voxels, mask[None])
        assert not found
    tifffile.imwrite(tmp_path / "m3.tif", np.stack([mask, ~mask]))
    np.testing.assert_array_equal(formats.read(tmp_path / "m3.tif").voxels, [mask, ~mask])


def test_a_compression_without_a_decoder_is_called_that_and_not_damage(tmp_path, monkeypatch):
    voxels = np.arange(128, dtype=np.uint8).reshape(2, 8, 8)
    with contextlib.suppress(ImportError):
        importlib.import_module("imagecodecs")
        tifffile.imwrite(tmp_path / "lzw.tif", voxels, compression="lzw")
        np.testing.assert_array_equal(formats.read(tmp_path / "lzw.tif").voxels, voxels)
    # What tifffile falls back to where there is no imagecodecs.
    without = importlib.import_module("tifffile._imagecodecs")
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", without)
    monkeypatch.setattr(tifffile.TIFF.DECOMPRESSORS, "_codecs", {})
    for number, words in (
        (5, "needs imagecodecs; install the extra `formats`, in the repository"),
        (12345, "is not read .*12345.*; save it without"),
    ):
        tifffile.imwrite(tmp_path / "a.tif", voxels)
        with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
            for page in file.pages:
                page.tags["Compression"].overwrite(number)
        with pytest.raises(Refusal, match=rf"a\.tif: its compression {words}") as refused:
            formats.read(tmp_path / "a.tif")
        assert refused.value.kind is Kind.COMPRESSED


@pytest.mark.parametrize(("ending", "alone"), [(".mhd", ".mha"), (".nhdr", ".nrrd")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_header_is_read_with_the_voxels_beside_it(tmp_path, ending, alone, packed):
    made = itk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    made.SetSpacing((1.0, 2.0, 5.0))
    made.SetOrigin((3.0, -4.0, 7.5))
    (tmp_path / "one").mkdir()
    path, one = tmp_path / f"a{ending}", tmp_path / "one" / f"a{alone}"
    for target in (path, one):
        itk.WriteImage(made, str(target), packed)
    assert image_files.scans(tmp_path) == {"a": path}
    (volume, found), (same, none) = scan.read(path), scan.read(one)
    np.testing.assert_array_equal(volume.voxels, same.voxels)
    np.testing.assert_array_equal(volume.affine, same.affine)
    assert found == none == []
    assert scan.has_sides(path)
    assert scan.ending(path) == alone
    label = (volume.voxels > 5).astype(np.uint8)
    target = tmp_path / "out" / f"a{alone}"
    scan.write(target, label, like=path)
    again, said = scan.read_label(target, path, volume, num_classes=2)
    np.testing.assert_array_equal(again.voxels, label)
    assert said == []
    header, voxels = scan.files(path)
    before = scan.digest(path)
    voxels.write_bytes(voxels.read_bytes()[::-1])
    assert header == path
    assert scan.digest(path) != before, "or shards would be kept of voxels that have changed"


@pytest.mark.parametrize(
    ("named", "words", "kind"),
    [
        ("b.raw", r"lie in b\.raw, which is not beside it; fetch", Kind.FILE_MISSING),
        ("../b.raw", "no file of its folder", Kind.LIST_OUTSIDE),
        ("in/../../b.raw", "no file of its folder", Kind.LIST_OUTSIDE),
        ("/tmp/b.raw", "no file of its folder", Kind.LIST_OUTSIDE),
        (r"C:\scans\b.raw", "no file of its folder", Kind.LIST_OUTSIDE),
        ("LIST", r"several files; save it as \.(mha|nrrd), in one", Kind.UNREADABLE),
        ("b%03d.raw 1 2 1", "several files", Kind.UNREADABLE),
    ],
)
def test_voxels_that_are_not_beside_their_header_are_refused(tmp_path, named, words, kind):
    (tmp_path / "x" / "in").mkdir(parents=True)
    (tmp_path / "b.raw").write_bytes(bytes(48))
    for name, text in (
        ("a.mhd", f"{MHA}ElementDataFile = {named}\n"),
        ("a.nhdr", f"{NRRD}data file: {named}\n\n"),
    ):
        path = tmp_path / "x" / name
        path.write_text(text)
        with pytest.raises(Refusal, match=words) as refused:
            scan.read(path)
        assert refused.value.kind is kind
        assert scan.files(path)[0] == path


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("packed", [False, True])
def test_voxels_that_were_cut_off_are_refused_as_such(tmp_path, ending, packed):
    path = tmp_path / f"a{ending}"
    itk.WriteImage(itk.GetImageFromArray(block().astype(np.int16)), str(path), packed)
    last = scan.files(path)[-1]
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.raises(Refusal, match=r"cannot be read \(") as refused:
        scan.read(path)
    assert "No such file" not in str(refused.value)


def test_what_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image\nNDims = 3\n")
    with pytest.raises(ValueError, match=r"a\.mha: cannot be read"):
        formats.read(tmp_path / "a.mha")
    (tmp_path / "a.tif").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match=r"a\.tif: damaged"):
        formats.read(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "b.json").write_text('{"spacing": [1, 0, 1]}')
    with pytest.raises(ValueError, match=r"b\.json: expected .*all positive"):
        formats.read(tmp_path / "b.tif")
    (tmp_path / "b.json").unlink()
    with pytest.raises(ValueError, match="expected 3 channels"):
        formats.read_channels(tmp_path / "b.tif", 3)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match="needs tifffile; install the extra `formats`"):
        formats.read(tmp_path / "b.tif")


def test_a_folder_to_predict_is_grouped_by_channel(tmp_path):
    for name in ("a_0000.nrrd", "a_0001.nrrd", "b_0000.mha", "b_0001.mha", "notes.txt"):
        (tmp_path / name).touch()
    files = image_files.scans(tmp_path)
    assert list(files) == ["a_0000", "a_0001", "b_0000", "b_0001"]
    assert image_files.group(files, 2) == {
        "a": Channels((files["a_0000"], files["a_0001"]), 2),
        "b": Channels((files["b_0000"], files["b_0001"]), 2),
    }
    with pytest.raises(ValueError, match="a: the network takes 3 channels"):
        image_files.group(files, 3)
    assert list(image_files.group({"a_0000": tmp_path / "x"}, 1)) == ["a"]
    numbered = {f"scan_{n:04d}": tmp_path / f"{n}" for n in range(3)} | {"b_0000": tmp_path / "b"}
    assert list(image_files.group(numbered, 1)) == ["scan_0000", "scan_0001", "scan_0002", "b"]
    assert chosen_scans._channels(tmp_path) == 1
    for ending, voxels in ((".hdr", ".img"), (".mgz", "")):
        for path in (tmp_path / f"c{ending}", tmp_path / f"c{voxels or ending}"):
            path.touch()
        with pytest.raises(ValueError, match=rf"c\{ending}: \{ending} is not read here; convert"):
            image_files.scans(tmp_path)
        (tmp_path / f"c{ending}").unlink()


def test_pictures_beside_volumes_are_previews_and_alone_they_are_scans(tmp_path, caplog):
    pictures = {name[0]: tmp_path / name for name in ("a.png", "b.bmp", "c.tif")}
    for path in pictures.values():
        path.touch()
    (tmp_path / "c.json").write_text('{"EchoTime": 1}')  # of a converter
    assert image_files.scans(tmp_path) == pictures
    assert not caplog.text
    assert image_files.scans(tmp_path, pictures=False) == {}
    for volume in ("a.nii.gz", "a.mha", "c.json"):
        caplog.clear()
        (tmp_path / volume).touch()
        if volume == "c.json":  # which says that c.tif is a volume
            (tmp_path / volume).write_text('{"spacing": [5, 1, 1]}')
        want = tmp_path / ("c.tif" if volume == "c.json" else volume)
        assert image_files.scans(tmp_path) == {want.name[0]: want}
        (line,) = caplog.messages
        passed = 2 if volume == "c.json" else 3
        assert line.endswith(f"beside volumes are no scans; passed over: {passed}")
        (tmp_path / volume).unlink()

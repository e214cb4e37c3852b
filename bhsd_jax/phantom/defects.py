"""Gives a generated tree every defect known from real copies of BHSD, each to a scan of its own.

What the integrity table must find; a tree to show, and to try a reader on.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from bhsd_jax.phantom.files import write, write_image, write_json
from bhsd_jax.platform.errors import UserError

DEFECTS = "defects.json"  # what was done to which scan; where it is, the tree is spoiled already
_IMAGES, _MASKS = "label_192/images", "label_192/ground truths"
_BLEEDING, _OTHERS = "unlabel_2000/anybleed", "unlabel_2000/nobleed"
_LISTS = "dataset.json"
_WRAPPED_HU = 32536 - 65536  # metal of 32536 HU in 16 bits


@dataclass(frozen=True)
class _Tree:
    root: Path

    def image(self, id: str, folder: str = _IMAGES) -> Path:
        return self.root / folder / f"{id}.nii.gz"

    def mask(self, id: str) -> Path:
        return self.root / _MASKS / f"{id}.nii.gz"


def spoil(root: str | Path) -> dict[str, str]:
    """Spoils a tree made by `generate`; the same tree always in the same way.

    Gives the scan by defect, as `defects.json` has it. Done before, nothing is done.

    Raises:
        ValueError: If the tree has too few scans.
    """
    tree = _Tree(Path(root))
    if (tree.root / DEFECTS).is_file():
        return json.loads((tree.root / DEFECTS).read_text())
    lists = json.loads((tree.root / _LISTS).read_text())
    train = [Path(item["image"]).name.removesuffix(".nii.gz") for item in lists["training"]]
    test = [Path(name).name.removesuffix(".nii.gz") for name in lists["test"]]
    pool = sorted(p.name.removesuffix(".nii.gz") for p in (tree.root / _BLEEDING).iterdir())
    wanted = (len(_OF_TRAINING) + 1, 2, 3)  # one stays as it is
    if any(len(ids) < n for ids, n in zip((train, test, pool), wanted, strict=True)):
        raise UserError(
            f"{root}: needs {wanted[0]} training scans, {wanted[1]} for testing and {wanted[2]} "
            "that bleed without a mask, to give each a defect"
        )
    done = {}
    for id, (name, change) in zip(train[1:], _OF_TRAINING.items(), strict=False):
        change(tree, id)
        done[name] = id
    done |= _spoil_test(tree, test) | _spoil_pool(tree, test, pool, train[0])
    done |= _spoil_lists(tree, lists, train)
    write_json(tree.root / DEFECTS, done)
    return done


def _spoil_test(tree: _Tree, test: list[str]) -> dict[str, str]:
    """As in BHSD, the scan stored in unsigned 12 bits is one of the test set."""
    _change_hu(tree.image(test[0]), lambda hu: np.where(hu < 0, np.maximum(hu, -1000) + 4096, hu))
    return {"12-bit overflow": test[0]}


def _spoil_pool(tree: _Tree, test: list[str], pool: list[str], labeled: str) -> dict[str, str]:
    patient, study = test[1][:11], pool[0][11:]
    tree.image(pool[0], _BLEEDING).rename(tree.image(patient + study, _BLEEDING))
    shutil.copy(tree.image(test[1]), tree.image(pool[1], _BLEEDING))
    shutil.copy(tree.image(pool[2], _BLEEDING), tree.image(pool[2], _OTHERS))
    shutil.copy(tree.image(labeled), tree.image(labeled, _BLEEDING))
    circle = "ID_0000c1c1_ID_0000000000"
    tree.image(circle, _OTHERS).symlink_to(tree.image(circle, _OTHERS).name)
    (tree.root / _IMAGES / f"._{labeled}.nii.gz").write_bytes(b"\0\5\26\7")
    return {
        "unlabeled scan of a test patient": patient + study,
        "copy of a test scan": pool[1],
        "scan that bleeds and does not": pool[2],
        "labeled scan in the pool": labeled,
        "link in a circle": circle,
    }


def _spoil_lists(tree: _Tree, lists: dict, train: list[str]) -> dict[str, str]:
    """Gives the first patient a second scan, and puts another into both lists."""
    spare = {name: id for id, name in zip(train[1:], _OF_TRAINING, strict=False)}
    twin, both = spare["patient scanned twice"], spare["in both official lists"]
    again = train[0][:11] + twin[11:]
    for path in (tree.image(twin), tree.mask(twin)):
        path.rename(path.with_name(f"{again}.nii.gz"))
    text = json.dumps(lists).replace(twin, again)
    lists = json.loads(text)
    lists["test"].append(f"../imagesTs/{both}.nii.gz")
    write_json(tree.root / _LISTS, lists)
    stray = f"{train[0]} (1)"
    for path in (tree.image(train[0]), tree.mask(train[0])):
        shutil.copy(path, path.with_name(f"{stray}.nii.gz"))
    return {"patient scanned twice": again, "in no official list": stray}


def _drop_suffix(tree: _Tree, id: str) -> None:
    for path in (tree.image(id), tree.mask(id)):
        path.rename(path.with_name(id))


def _pad(value: int) -> Callable[[_Tree, str], None]:
    def change(hu: np.ndarray) -> np.ndarray:
        across = np.arange(hu.shape[1]) - (hu.shape[1] - 1) / 2
        outside = np.hypot(across[:, None], across[None, :]) > hu.shape[1] / 2
        return np.where(outside, value, hu)

    return lambda tree, id: _change_hu(tree.image(id), change)


def _put_metal(value: int) -> Callable[[_Tree, str], None]:
    def change(hu: np.ndarray) -> np.ndarray:
        d, h, w = (n // 2 for n in hu.shape)
        hu[d, h - 1 : h + 1, w - 1 : w + 1] = value
        return hu

    return lambda tree, id: _change_hu(tree.image(id), change)


def _move_mask(matrix: np.ndarray) -> Callable[[_Tree, str], None]:
    def change(tree: _Tree, id: str) -> None:
        path = tree.mask(id)
        raw, affine = _read(path)
        write(path, raw.astype(np.uint16), affine @ matrix, 1.0, 0.0)

    return change


def _change_mask(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[_Tree, str], None]:
    def changed(tree: _Tree, id: str) -> None:
        raw, affine = _read(tree.mask(id))
        write(tree.mask(id), change(raw).astype(np.uint16), affine, 1.0, 0.0)

    return changed


def _flatten(tree: _Tree, id: str) -> None:
    """A slice step of 0.5 mm, as the header of one real scan has it."""
    for path in (tree.image(id), tree.mask(id)):
        raw, affine = _read(path)
        affine[:3, 0] *= 0.5 / np.linalg.norm(affine[:3, 0])
        if path.parent.name == "images":
            write_image(path, raw, affine, scaled=True)
        else:
            write(path, raw.astype(np.uint16), affine, 1.0, 0.0)


def _cut(tree: _Tree, id: str) -> None:
    path = tree.image(id)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_bit(tree: _Tree, id: str) -> None:
    path = tree.image(id)
    content = bytearray(path.read_bytes())
    content[-6] ^= 4  # in the checksum at the end of the stream
    path.write_bytes(content)


def _remove(tree: _Tree, id: str) -> None:
    tree.image(id).unlink()
    tree.mask(id).unlink()


def _change_hu(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    hu, affine = _read(path)
    write_image(path, change(hu), affine, scaled=True)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values [D H W] with scale factors applied and rounded; affine of voxel (d, h, w, 1)."""
    image = nib.Nifti1Image.from_filename(path)
    values = np.rint(image.get_fdata()).transpose(2, 1, 0)
    return values, np.asarray(image.affine)[:, [2, 1, 0, 3]]


_MIRROR = np.diag([1.0, 1.0, -1.0, 1.0])
_ASIDE = np.eye(4)
_ASIDE[2, 3] = 3.0  # voxels
_OF_TRAINING: dict[str, Callable[[_Tree, str], None]] = {
    "file without .nii.gz": _drop_suffix,
    "padding of -2048": _pad(-2048),
    "padding of -3024": _pad(-3024),
    "metal": _put_metal(31000),
    "16-bit wrap": _put_metal(_WRAPPED_HU),
    "mask elsewhere": _move_mask(_ASIDE),
    "mask mirrored": _move_mask(_MIRROR),
    "empty mask": _change_mask(np.zeros_like),
    "label values out of range": _change_mask(lambda label: np.where(label > 0, label + 7, 0)),
    "slice step of 0.5 mm": _flatten,
    "truncated file": _cut,
    "flipped bit": _flip_bit,
    "scan that is not there": _remove,
    "mask that is not there": lambda tree, id: tree.mask(id).unlink(),
    "patient scanned twice": lambda tree, id: None,  # these two by their lists
    "in both official lists": lambda tree, id: None,
}

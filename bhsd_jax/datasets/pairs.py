"""Folders of NIfTI images and of their masks, matched by base name."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bhsd_jax.datasets import image_files
from bhsd_jax.datasets.bhsd import scans
from bhsd_jax.datasets.bhsd_files import unnumbered
from bhsd_jax.platform.errors import UserError, some


def _word(names: str) -> re.Pattern[str]:
    """One of these at the beginning or the end of a name, with what separates it."""
    return re.compile(rf"^({names})[-_. ]*(?=.)|(?<=.)[-_. ]+({names})$", re.IGNORECASE)


_IMAGE_WORD = _word("images?|img|imaging|volume|vol|scan|ct|ncct")
_MASK_WORD = _word("masks?|msk|labels?|segmentation|seg|gt|annotation|annot")


def first_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first of these folders that exists below `root`."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def pairs(images: Path, masks: Path | None) -> dict[str, tuple[Path, Path | None]]:
    """Image and mask (None if it has none) by base name, sorted.

    Where masks lack nnU-Net's number of the one channel, `_0000`, it is no part of a name. Where no
    mask is called as an image, names may say which is which: `a_ct` and `a_seg`, as `volume-1` and
    `segmentation-1` of LiTS. A case is called as its image.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If a mask has no image.
    """
    paths = scans(images) if images.is_dir() else {}
    if not paths:
        raise FileNotFoundError(_without_images(images))
    outlined = scans(masks) if masks is not None and masks.is_dir() else {}
    paths = unnumbered(paths, outlined)
    outlined = _as_images(paths, outlined)
    lonely = sorted(set(outlined) - set(paths))
    if lonely:
        raise UserError(f"{masks}: no image for {some(lonely)}; image and mask have one name")
    return {name: (path, outlined.get(name)) for name, path in paths.items()}


def _as_images(images: Mapping[str, Path], masks: dict[str, Path]) -> dict[str, Path]:
    """Masks by the names of their images, where all differ by a word that says which is which."""
    if masks.keys() & images.keys():
        return masks
    of_images = {_IMAGE_WORD.sub("", name): name for name in images}
    of_masks = {_MASK_WORD.sub("", name): path for name, path in masks.items()}
    sure = len(of_images) == len(images) and len(of_masks) == len(masks)
    if not sure or not of_masks.keys() <= of_images.keys():
        return masks
    return {of_images[name]: path for name, path in of_masks.items()}


def _without_images(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder of NIfTI images; look at config.data"
    return f"{folder}: no NIfTI images in it{image_files.below(folder)}; look at config.data"

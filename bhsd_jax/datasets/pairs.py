"""Folders of NIfTI images and of their masks, matched by base name."""

from collections.abc import Sequence
from pathlib import Path

from bhsd_jax.datasets import image_files
from bhsd_jax.datasets.bhsd import scans
from bhsd_jax.datasets.bhsd_files import unnumbered
from bhsd_jax.platform.errors import UserError


def first_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first of these folders that exists below `root`."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def pairs(images: Path, masks: Path | None) -> dict[str, tuple[Path, Path | None]]:
    """Image and mask (None if it has none) by base name, sorted.

    Where masks lack nnU-Net's number of the one channel, `_0000`, it is no part of a name.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If a mask has no image.
    """
    paths = scans(images) if images.is_dir() else {}
    if not paths:
        raise FileNotFoundError(_without_images(images))
    outlined = scans(masks) if masks is not None and masks.is_dir() else {}
    paths = unnumbered(paths, outlined)
    lonely = sorted(set(outlined) - set(paths))
    if lonely:
        more = f" and {len(lonely) - 3} more" if len(lonely) > 3 else ""
        raise UserError(
            f"{masks}: no image for {', '.join(lonely[:3])}{more}; image and mask have one name"
        )
    return {name: (path, outlined.get(name)) for name, path in paths.items()}


def _without_images(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder of NIfTI images; look at config.data"
    return f"{folder}: no NIfTI images in it{image_files.below(folder)}; look at config.data"

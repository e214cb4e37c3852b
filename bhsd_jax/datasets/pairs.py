"""Folders of NIfTI images and of their masks, matched by base name."""

from collections.abc import Sequence
from pathlib import Path

from bhsd_jax.datasets.bhsd import scans
from bhsd_jax.platform.errors import UserError


def first_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first of these folders that exists below `root`."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def pairs(images: Path, masks: Path | None) -> dict[str, tuple[Path, Path | None]]:
    """Image and mask (None if it has none) by base name, sorted.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If a mask has no image.
    """
    paths = scans(images) if images.is_dir() else {}
    if not paths:
        raise FileNotFoundError(f"{images}: no NIfTI images; look at config.data")
    outlined = scans(masks) if masks is not None and masks.is_dir() else {}
    lonely = sorted(set(outlined) - set(paths))
    if lonely:
        more = f" and {len(lonely) - 3} more" if len(lonely) > 3 else ""
        raise UserError(
            f"{masks}: no image for {', '.join(lonely[:3])}{more}; image and mask have one name"
        )
    return {name: (path, outlined.get(name)) for name, path in paths.items()}

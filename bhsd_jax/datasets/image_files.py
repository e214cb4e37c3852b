"""Scans and label maps of a folder by case, in any format, with a file per channel or one for all.

nnU-Net calls channel 1 of a case `<case>_0001` and the file's ending.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from bhsd_jax.ct import formats
from bhsd_jax.datasets import bhsd
from bhsd_jax.defects import Kind, Refusal
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Channels

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")


def scans(folder: Path, *, pictures: bool = True) -> dict[str, Path]:
    """Files by name without ending, sorted.

    Pictures (PNG, BMP, TIFF without a spacing) are passed over beside volumes, whose previews they
    are: a line in the log says so.

    Args:
        folder: Where they lie.
        pictures: Whether a folder of pictures alone has scans; not where there are DICOM series.

    Raises:
        Refusal: If one cannot be used, such as two files of one name, or a format that is not read.
    """
    found = dict(bhsd.scans(folder, formats.ENDINGS))
    others = [
        path
        for path in sorted(folder.iterdir())
        if formats.ending(path) and not path.name.startswith(".") and path.is_file()
    ]
    volumes = [path for path in others if not formats.is_picture(path)]
    if (found or volumes or not pictures) and len(volumes) < len(others):
        passed = len(others) - len(volumes)
        text = "%s: pictures (.png, .bmp, .tif) beside volumes are no scans; passed over: %d"
        logger.warning(text, folder, passed)
        others = volumes
    for path in others:
        name = formats.case_name(path)
        if name in found:
            text = f"{folder}: {found[name].name} and {path.name} are one case; keep one"
            raise Refusal(Kind.NAME_TWICE, text)
        found[name] = path
    return dict(sorted(found.items()))


def group(files: Mapping[str, Path], channels: int) -> dict[str, Path | Channels]:
    """Scans by case: the number of a channel is no part of a case's name.

    For one channel `_0000` is such a number unless `_0001` or another is there too: then the files
    are scans that somebody has numbered.

    Raises:
        UserError: If a case has another number of files than one or `channels`; names it.
    """
    if channels == 1:
        counts = Counter(match["case"] for name in files if (match := _NUMBERED.fullmatch(name)))
        alone = {f"{case}_0000" for case, count in counts.items() if count == 1}
        short = {n.removesuffix("_0000") if n in alone else n: path for n, path in files.items()}
        return dict(short if len(short) == len(files) else files)
    parts: dict[str, list[Path]] = {}
    for name, path in sorted(files.items()):
        match = _NUMBERED.fullmatch(name)
        parts.setdefault(match["case"] if match else name, []).append(path)
    for case, paths in parts.items():
        if len(paths) not in (1, channels):
            names = ", ".join(path.name for path in paths)
            raise UserError(
                f"{case}: the network takes {channels} channels, <case>_0000 to "
                f"_{channels - 1:04d}; got {names}"
            )
    return {case: Channels(tuple(paths), channels) for case, paths in parts.items()}


def below(folder: Path) -> str:
    """What a message adds where a folder has no scans, but folders in it do; "" if they have none.

    Such are those of TotalSegmentator and BraTS, with a folder for each case.
    """
    found = sorted(path for path in folder.glob("*/**/*.nii*") if path.is_file())
    if not found:
        return ""
    return (
        f", but {len(found)} NIfTI files in folders below it, such as "
        f"{found[0].relative_to(folder)}: put the scans, or links to them, into one folder, each "
        "called as its case"
    )

"""Hemorica: 372 head CTs of one hospital with five types of bleeding outlined."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bhsd_jax.datasets.bhsd import scans
from bhsd_jax.datasets.pairs import first_folder, pairs
from bhsd_jax.platform.errors import UserError, some
from bhsd_jax.volume import HEMORRHAGE, Case, Masks

_IMAGES = ("images", "image", "imagesTr")
_MASKS = ("masks", "mask", "labels", "labelsTr")
_NAMES = {  # by the words found in papers and files, in small letters
    **dict.fromkeys(("eph", "edh", "epidural"), "EDH"),
    **dict.fromkeys(("iph", "ich", "intraparenchymal"), "IPH"),
    **dict.fromkeys(("ivh", "intraventricular"), "IVH"),
    **dict.fromkeys(("sah", "subarachnoid"), "SAH"),
    **dict.fromkeys(("sdh", "subdural"), "SDH"),
}


@dataclass(frozen=True)
class Hemorica:
    """A folder of NIfTI scans, and one of masks with the same names and a value for each type.

    The paper says what is outlined, but neither how files lie nor which value a type has. Assumed
    is what follows; what differs is refused by name. Scans are single NIfTI files in `images`,
    masks in `masks`, every scan has a mask (an empty one if it does not bleed), no mask is of one
    type alone, and each scan is a patient. Which value means which type is read from the `labels`
    of a `dataset.json`, as nnU-Net writes them, or from the setting `values`, and never guessed:
    the types by value from 1, such as "EDH,SDH,SAH,IPH,IVH". All cases train; a fold validates.

    Source: Davoodi et al. 2025, arXiv:2509.22993.
    """

    root: str | Path
    images: str = ""  # in `root`; "": images, image or imagesTr
    masks: str = ""  # in `root`; "": masks, mask, labels or labelsTr
    values: str = ""  # types by mask value from 1, separated by commas; "": those of dataset.json
    name: str = field(default="Hemorica", init=False)
    classes: tuple[str, ...] = field(default=HEMORRHAGE, init=False)
    modality: str = field(default="ct", init=False)
    license: str = field(default="", init=False)

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If there is no folder of scans or of masks, or no scan.
            ValueError: If scans and masks do not pair, or it is not known what their values mean.
        """
        root = Path(self.root)
        images = _folder(root, self.images, _IMAGES, "images")
        masks = _folder(root, self.masks, _MASKS, "masks")
        values = _by_value(root, self.values)
        _require_whole(masks)
        for id, (image, mask) in _paired(images, masks).items():
            yield Case(id, id, image, Masks((mask,), values=values), "train")


def _folder(root: Path, wanted: str, usual: Sequence[str], setting: str) -> Path:
    found = first_folder(root, [wanted] if wanted else usual)
    if found is None:
        raise FileNotFoundError(
            f"{root}: no folder {wanted or ', '.join(usual)} in it; Hemorica is taken to be a "
            f"folder of NIfTI scans and one of masks: set config.data.{setting}"
        )
    return found


def _paired(images: Path, masks: Path) -> dict[str, tuple[Path, Path]]:
    found = pairs(images, masks)
    bare = [name for name, (_, mask) in found.items() if mask is None]
    if bare:
        raise UserError(
            f"{masks}: no mask for {some(sorted(bare))}; every scan is taken to have one, empty "
            "where nothing bleeds"
        )
    return {name: (image, mask) for name, (image, mask) in found.items() if mask is not None}


def _require_whole(masks: Path) -> None:
    """Refuses masks of one type each: their classes would have to be put together first."""
    alone = [name for name in scans(masks) if name.lower().rpartition("_")[2] in _NAMES]
    if alone:
        raise UserError(
            f"{masks}: {some(sorted(alone))} seem to be masks of one type each; a mask is taken to "
            "have all types, each with a value of its own: put them together first"
        )


def _by_value(root: Path, setting: str) -> tuple[int, ...]:
    """Class by mask value, the background first."""
    place = root / "dataset.json"
    if setting:
        words, source = [word.strip() for word in setting.split(",")], "config.data.values"
    elif place.is_file():
        words, source = _listed(place), str(place)
    else:
        raise UserError(
            f"{root}: which value of a mask means which type is not known; look it up where "
            'Hemorica was fetched, and set config.data.values="EDH,SDH,SAH,IPH,IVH" in the '
            "right order, from value 1"
        )
    types = [_NAMES.get(word.lower(), "") for word in words]
    if sorted(types) != sorted(HEMORRHAGE[1:]):
        raise UserError(
            f"{source}: want {', '.join(HEMORRHAGE[1:])}, each once, by mask value from 1; got "
            f"{', '.join(words)}"
        )
    return (0, *(HEMORRHAGE.index(name) for name in types))


def _listed(path: Path) -> list[str]:
    """Names by value from 1; nnU-Net has {name: value}, its first version {value: name}."""
    try:
        labels = json.loads(path.read_text(encoding="utf-8-sig"))["labels"]
        listed = [(b, a) if a.isdigit() else (a, b) for a, b in labels.items()]
        by_value = {int(value): str(name) for name, value in listed}
        return [by_value[value] for value in range(1, max(by_value) + 1)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no labels as nnU-Net has them, {{name: value}}; set config.data.values"
        ) from error

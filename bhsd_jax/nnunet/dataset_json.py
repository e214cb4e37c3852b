"""What a dataset.json of nnU-Net or of the Decathlon says of labels and channels."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bhsd_jax.labels import Labels, Region
from bhsd_jax.platform.errors import UserError

BACKGROUND, IGNORE = "background", "ignore"
MOST_VALUE = 255  # masks are held in 8 bits
Z_SCORES = "ZScoreNormalization"
_SCHEMES = {  # by name of the channel, in any case; all others get z-scores
    "ct": "CTNormalization",
    "nonorm": "NoNormalization",
    "zscore": Z_SCORES,
    "rescale_to_0_1": "RescaleTo01Normalization",
    "rgb_to_0_1": "RGBTo01Normalization",
}

_READERS = {  # by file ending; all others SimpleITK
    ".png": "NaturalImage2DIO",
    ".bmp": "NaturalImage2DIO",
    ".tiff": "Tiff3DIO",
    ".nii": "NibabelIO",
}


def channels(
    facts: Mapping[str, Any], place: str = "nnU-Net dataset.json"
) -> tuple[tuple[str, str], ...]:
    """Name and normalization of every channel, by number, or as listed where keys are no numbers.

    Written the other way about, as labels are, {"CT": 0}, they are meant all the same.

    Raises:
        UserError: If it names them otherwise; says `place`.

    Source: nnU-Net v2.8.1, `get_normalization_scheme` and its map of channel names.
    """
    named = facts.get("channel_names") or facts.get("modality") or {}
    if not isinstance(named, Mapping):
        raise UserError(f'{place}: channel_names is {{"0": "<name>", ...}}; got {named!r:.60}')
    values = [str(value) for value in named.values()]
    numbered = all(str(key).isdecimal() for key in named)
    if not numbered and sorted(values) == [str(number) for number in range(len(named))]:
        named = {number: name for name, number in zip(named, values, strict=True)}
        numbered = True
    names = [str(named[key]) for key in (sorted(named, key=int) if numbered else named)]
    return tuple((name, _SCHEMES.get(name.casefold(), Z_SCORES)) for name in names)


def reader(facts: Mapping[str, Any], *, slices: bool = False) -> str:
    """The class with which nnU-Net reads a data set's files, as its plans.json names it.

    Args:
        facts: The dataset.json.
        slices: Whether a scan is a single slice, which tells the readers of TIFF apart.

    Source: nnU-Net v2.8.1, `determine_reader_writer_from_dataset_json`.
    """
    wanted = str(facts.get("overwrite_image_reader_writer") or "None")
    if wanted != "None":
        return wanted
    ending = str(facts.get("file_ending", "")).casefold()
    if ending == ".tif":
        return "NaturalImage2DIO" if slices else "Tiff3DIO"
    return _READERS.get(ending, "SimpleITKIO")


def labels(facts: Mapping[str, Any], place: str) -> Labels:
    """Classes, or regions and their order, and the value that is ignored.

    Args:
        facts: A dataset.json, of nnU-Net (name -> value or values) or the Decathlon (value ->
            name).
        place: What errors call it.

    Raises:
        ValueError: If values are not 0, 1, 2, ... up to 255, or regions or `ignore` are not as
            nnU-Net wants them.

    Source: nnU-Net v2.8.1, `LabelManager`.
    """
    given = facts.get("labels") or {}
    if not isinstance(given, Mapping):
        raise UserError(f'{place}: labels is {{"<name>": <value>, ...}}; got {given!r:.60}')
    if given and all(str(key).isdigit() for key in given):
        given = {name: value for value, name in given.items()}
    named = {str(name): _values(value, given, place) for name, value in given.items()}
    ignore = named.pop(IGNORE, None)
    known = sorted({value for values in named.values() for value in values})
    several = any(len(values) > 1 for values in named.values())
    if not several and (known != list(range(len(named))) or not named):
        raise UserError(
            f"{place}: label values must be 0 (background), 1, 2, ... without gaps, but for "
            f"regions; got {given}"
        )
    top = known[-1]
    if ignore is not None and ignore != (top + 1,):
        raise UserError(
            f"{place}: the label to ignore is the value after the highest, {top + 1}; got {given}"
        )
    last = None if ignore is None else ignore[0]
    if max(top, last or 0) > MOST_VALUE:
        raise UserError(f"{place}: label values go up to {MOST_VALUE}; got {max(top, last or 0)}")
    if not several:
        by_value = {values[0]: name for name, values in named.items()}
        return Labels(tuple(by_value[value] for value in known), ignore=last)
    found = _with_regions(named, top, last, facts.get("regions_class_order"), place)
    one = [name for name, values in found.regions if len(values) == 1]
    return replace(found, listed=tuple(name for name in one if isinstance(given[name], list)))


def planned_labels(found: Labels) -> int:
    """How many labels nnU-Net plans a network's head for: all that dataset.json names.

    Source: nnU-Net v2.8.1, `ExperimentPlanner`, which counts `ignore` and regions alike.
    """
    named = 1 + len(found.regions) if found.regions else len(found.classes)
    return named + (found.ignore is not None)


def _with_regions(
    named: Mapping[str, tuple[int, ...]], top: int, ignore: int | None, order: Any, place: str
) -> Labels:
    regions: tuple[Region, ...] = tuple(
        (name, values) for name, values in named.items() if set(values) != {0}
    )
    if named.get(BACKGROUND) != (0,):
        raise UserError(f"{place}: beside regions, {BACKGROUND!r} must be 0; got {dict(named)}")
    if (
        not isinstance(order, list | tuple)
        or len(order) != len(regions)
        or not all(type(value) is int and 0 <= value <= MOST_VALUE for value in order)
    ):
        raise UserError(
            f"{place}: labels are regions, so that regions_class_order must say which value each "
            f"of the {len(regions)} writes; got {order}"
        )
    if max(order) > top:
        raise UserError(
            f"{place}: regions_class_order writes the value {max(order)}, which no region has"
        )
    alone = {values[0]: name for name, values in regions if len(values) == 1}
    classes = tuple(alone.get(value, f"value_{value}") for value in range(1, top + 1))
    return Labels((BACKGROUND, *classes), regions, tuple(order), ignore)


def _values(value: Any, given: Any, place: str) -> tuple[int, ...]:
    listed = value if isinstance(value, list | tuple) else (value,)
    try:
        values = tuple(int(one) for one in listed)
    except (TypeError, ValueError):
        values = ()
    if not values or min(values) < 0:
        raise UserError(
            f"{place}: labels must be values 0, 1, 2, ..., or lists of them; got {given}"
        )
    return values

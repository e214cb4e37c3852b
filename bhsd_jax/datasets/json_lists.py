"""Cases as a dataset.json lists them: the Decathlon's and MONAI's lists, and nnU-Net's key."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from bhsd_jax.datasets.splits_file import Folds
from bhsd_jax.platform.errors import UserError, some

logger = logging.getLogger(__name__)

SPLITS = {  # by key; Auto3DSeg calls the last list "testing"
    "training": "train",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
KEY = "dataset"  # nnU-Net's own
_ITEM = 'is {"<case>": {"images": ["<file>"], "label": "<file>"}, ...}'


@dataclass(frozen=True)
class Listed:
    """What a list says of one case."""

    images: tuple[str, ...]  # paths as the list has them
    label: str  # "": it names none
    split: str
    fold: int | None = None  # in which it validates, where MONAI's Auto3DSeg says so


def are_lists(facts: Mapping[str, Any]) -> bool:
    """Whether those that cases are trained or validated by are such, if they are there."""
    return all(isinstance(facts.get(key, []), list) for key in ("training", "validation"))


def lists(
    facts: Mapping[str, Any],
    place: object,
    case_of: Callable[[str], str],
    is_used: Callable[[Listed], bool],
) -> dict[str, Listed]:
    """The lists "training", "validation" and "test" by case; nothing where nnU-Net's key is there.

    Cases are called as their images. Where those of folders of their own all have one name, as
    `s0001/ct.nii.gz`, the folders that tell them apart are part of it. A test case that is in
    another list too, as where Auto3DSeg is to predict a fold, is of that one.

    Args:
        facts: The dataset.json.
        place: What errors call it.
        case_of: A case's name by that of an image's file, without folders.
        is_used: Whether an item of "test" is to be taken.

    Raises:
        UserError: If an item names no image, or two are one case.

    Source: MONAI 1.6, `load_decathlon_datalist`, `datafold_read`, `nnUNetV2Runner`.
    """
    used: list[tuple[str, Listed]] = []
    for key, item in () if KEY in facts else _items(facts):
        one = _listed(key, item)
        # Nobody reads "test" but MONAI, so that it may be anything.
        if SPLITS[key] == "test" and (one is None or not is_used(one)):
            continue
        if one is None:
            raise UserError(f"{place}: an item of `{key}` names its image; got {item!r:.60}")
        used.append((key, one))
    used = _without_repeated(used, place)
    found: dict[str, Listed] = {}
    for case, (key, one) in zip(_names([one for _, one in used], case_of), used, strict=True):
        if case in found:
            raise UserError(
                f"{place}: `{key}` lists two images called {case}, or a list before it has one; "
                "cases are called as their files, and by folders too where each name comes again"
            )
        found[case] = one
    return found


def _without_repeated(
    used: Sequence[tuple[str, Listed]], place: object
) -> list[tuple[str, Listed]]:
    """Without test cases whose images another list, or "test" beside "testing", has."""
    kept = [(key, one) for key, one in used if one.split != "test"]
    taken, repeated = {one.images for _, one in kept}, list[str]()
    for key, one in used:
        if one.split != "test":
            continue
        if one.images in taken:
            repeated.append(one.images[0])
        else:
            kept.append((key, one))
            taken.add(one.images)
    if repeated:
        text = "%s: %s of the list of test cases are in another list too, and not tested"
        logger.warning(text, place, some(repeated))
    return kept


def images(facts: Mapping[str, Any]) -> list[str]:
    """The images that the lists name, as they name them."""
    items = (_listed(key, item) for key, item in _items(facts))
    return [name for one in items if one is not None for name in one.images]


def _names(listed: Sequence[Listed], case_of: Callable[[str], str]) -> list[str]:
    """What the cases are called, in their order."""
    paths = [PurePath(one.images[0]) for one in listed]
    names = [case_of(path.name) for path in paths]
    folders = [path.parent.parts for path in paths]
    depth = min(map(len, folders), default=0)
    shared = next((i for i in range(depth) if len({own[i] for own in folders}) > 1), depth)
    longer = ["_".join((*own[shared:], name)) for own, name in zip(folders, names, strict=True)]
    each_again = min(Counter(names).values(), default=0) > 1
    return longer if each_again and len(set(longer)) == len(longer) else names


def described(
    facts: Mapping[str, Any], place: object, channels: int, ignore: Collection[str]
) -> dict[str, Listed]:
    """nnU-Net's key "dataset" by case: `{case: {"images": [...], "label": ...}}`.

    Args:
        facts: The dataset.json.
        place: What errors call it.
        channels: How many images a case may have, if not one.
        ignore: Cases that are left out, whatever they are.

    Raises:
        UserError: If it has another shape, or a case another number of images.

    Source: nnU-Net v2.8.1, `get_filenames_of_train_images_and_targets`.
    """
    given = facts[KEY]
    if not isinstance(given, dict) or not given:
        raise UserError(f"{place}: `dataset` {_ITEM}; got {given!r:.60}")
    return {
        case: _described(case, item, place, channels)
        for case, item in given.items()
        if case not in ignore
    }


def folds(listed: Mapping[str, Listed]) -> Folds:
    """Training and validation cases by fold, where items say in which one they validate."""
    train = {case: item.fold for case, item in listed.items() if item.split == "train"}
    numbers = {number for number in train.values() if number is not None}
    if len(numbers) < 2:
        return ()
    return tuple(
        (
            tuple(sorted(case for case, own in train.items() if own != number)),
            tuple(sorted(case for case, own in train.items() if own == number)),
        )
        for number in range(max(numbers) + 1)
    )


def _described(case: str, item: Any, place: object, channels: int) -> Listed:
    if (
        not isinstance(item, dict)
        or not isinstance(item.get("images"), list)
        or not isinstance(item.get("label"), str)
    ):
        raise UserError(f"{place}: case {case!r} of `dataset`: it {_ITEM}; got {item!r:.60}")
    count = len(item["images"])
    if count not in (1, channels) or "/" in case:
        raise UserError(
            f"{place}: case {case!r} of `dataset` has {count} images; it needs one or {channels}, "
            "as many as there are channels, and a name without slashes"
        )
    return Listed(tuple(item["images"]), item["label"], "train")


def _items(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in SPLITS:
        found = facts.get(key)
        yield from ((key, item) for item in (found if isinstance(found, list) else ()))


def _listed(key: str, given: Any) -> Listed | None:
    """None if an item names no image."""
    item = given if isinstance(given, dict) else {"image": given}
    image: Any = item.get("image")
    names: list[Any] = image if isinstance(image, list) else [image]  # MONAI's channels
    if not names or not all(isinstance(name, str) for name in names):
        return None
    label = item.get("label")
    if isinstance(label, list) and len(label) == 1:
        label = label[0]
    named = label if isinstance(label, str) else ""
    return Listed(tuple(names), named, SPLITS[key], _fold(item.get("fold")))


def _fold(given: Any) -> int | None:
    """A number of a fold, which tables of other programs have as 1.0 or "1"; None: it is none."""
    try:
        number = int(str(given).removesuffix(".0"))
    except ValueError:
        return None
    return number if number >= 0 else None

"""Which file is the mask of which DICOM series.

NIfTI by names and by folders; a DICOM SEG by the series that it refers to.
"""

import filecmp
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bhsd_jax.ct.dicom import seg_mask
from bhsd_jax.ct.dicom.grouping import Group
from bhsd_jax.ct.dicom.seg_mask import Outline
from bhsd_jax.datasets.bhsd_files import find
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Label, Masks

_NIFTI = (".nii", ".nii.gz")
_CLASSES = "with --data.classes (=any: bleeding of any kind)"


def is_nifti(path: Path) -> bool:
    """Whether a file's name says that it is NIfTI."""
    return path.name.lower().endswith(_NIFTI)


def match(
    root: Path,
    folder: Path,
    groups: Sequence[Group],
    names: Sequence[str],
    there: Iterable[Path],
) -> tuple[list[Path | None], list[Finding]]:
    """The mask of each series or None, and what is said of NIfTI files that are no mask of any.

    Args:
        root: Below which the series lie.
        folder: Of masks that are named for their series; need not be there.
        groups: The series.
        names: Of the series, of their folders.
        there: NIfTI files below `root`.

    Raises:
        UserError: If a mask of `folder`, or one beside several series, belongs to none; or a series
            has two.
        Refusal: If a mask is in another format.
    """
    apart = _nifti_files(folder, str(folder)) if folder.is_dir() else {}
    apart = {name: path for name, path in apart.items() if path.suffix}
    alone = _own_uids(groups)
    homes = _homes(root, groups)
    masks: list[Path | None] = []
    used, named = set[Path](), set[str]()
    for group, own in zip(groups, called(groups, names), strict=True):
        this = f"series {len(masks) + 1} of {len(groups)} in the order of paths"
        keys = own & set(apart)
        named |= keys
        uid = group.first.series if group.first.series in alone else ""
        paths = [apart[key] for key in sorted(keys)]
        paths += [path for path in _beside(group, homes, uid, this) if path not in paths]
        if len(paths) > 1:
            raise UserError(f"{this} has {len(paths)} masks; keep one")
        used.update(paths)
        masks.append(paths[0] if paths else None)
    if lonely := len(set(apart) - named):
        raise UserError(
            f"{folder}: {lonely} of {len(apart)} masks belong to no series; name each for its "
            "SeriesInstanceUID or for the folder of its series"
        )
    return masks, list(_unused([path for path in there if path not in used], groups))


def called(groups: Sequence[Group], names: Sequence[str]) -> list[set[str]]:
    """What each series may be called: by its folder, or its UID if no other has that.

    Args:
        groups: The series.
        names: Of the series, of their folders' paths.
    """
    alone = _own_uids(groups)
    alike = Counter(group.folder.name for group in groups)
    found = []
    for group, name in zip(groups, names, strict=True):
        keys = {name}
        if group.first.series in alone:
            keys.add(group.first.series)
        if alike[group.folder.name] == 1:
            keys.add(group.folder.name)
        found.append(keys)
    return found


def _own_uids(groups: Sequence[Group]) -> set[str]:
    """SeriesInstanceUIDs that one series alone has: others would give one mask to several."""
    count = Counter(group.first.series for group in groups)
    return {uid for uid, series in count.items() if uid and series == 1}


def match_segs(
    segs: Sequence[Path],
    groups: Sequence[Group],
    masks: Sequence[Path | None],
    classes: Sequence[str],
) -> tuple[list[Label | Refusal | None], list[Finding]]:
    """The mask of each series with those of DICOM SEG, and what is said of these.

    A SEG is of the series whose UID it refers to; of several with that UID, of those whose slices
    it refers to; and where it does not refer to any, of the only one in its coordinates.
    Series that have a mask in NIfTI keep that, for it may be a SEG that was converted. A SEG that
    shows none of the classes, such as one of other organs, is no mask; and of several that do, one
    that was drawn by hand goes before those of an algorithm. Equal files count once. In the place
    of a mask that may not be used, as one with segments that are no classes, stands the reason.
    Nothing names a file, which may be called as a patient.

    Args:
        segs: Files of DICOM SEG.
        groups: The series.
        masks: Of the series, in NIfTI.
        classes: Background first.
    """
    drawn, unused = _by_series(segs, groups, masks, classes)
    found: list[Label | Refusal | None] = [*masks]
    automatic = 0
    for place, every in drawn.items():
        several = _without_copies(every)
        if len(several) < len(every):
            unused["they are copies of others"] += len(every) - len(several)
        own = [seg for seg in several if not seg.is_automatic] or several
        if len(own) == 1 and len(several) > 1:
            text = "an algorithm drew them, and somebody has drawn another on the same series"
            unused[text] += len(several) - 1
        this = f"series {place + 1} of {len(groups)} in the order of paths"
        mask = _only_mask(own, this, classes)
        automatic += isinstance(mask, Masks) and own[0].is_automatic
        found[place] = mask
    told = [
        Finding(Kind.MASK_UNUSED, "kept", f"{count} DICOM SEG are not used: {why}")
        for why, count in unused.items()
    ]
    if automatic:
        text = (
            f"{automatic} masks are DICOM SEG that an algorithm drew (SegmentAlgorithmType "
            "AUTOMATIC): move them away if they are no reference"
        )
        told.append(Finding(Kind.MASK_AUTOMATIC, "kept", text))
    return found, told


def _by_series(
    segs: Sequence[Path],
    groups: Sequence[Group],
    masks: Sequence[Path | None],
    classes: Sequence[str],
) -> tuple[dict[int, list[Outline]], Counter[str]]:
    """DICOM SEG that may be masks by the place of their series, and how many are not, by reason."""
    places = defaultdict[str, list[int]](list)
    for place, group in enumerate(groups):
        places[group.first.series].append(place)
    found, unused = defaultdict[int, list[Outline]](list), Counter[str]()
    for path in segs:
        try:
            seg = seg_mask.outline(path)
        except Refusal as error:
            unused[str(error)] += 1
            continue
        mine = _drawn_on(seg, groups, places)
        if seg.flaw:
            unused[seg.flaw] += 1
        elif not seg_mask.shows(seg, classes):
            unused[
                f"no segment of theirs is labeled as one of the classes {', '.join(classes[1:])}; "
                "if they are masks, label segments as the classes, or name the classes as they are "
                f"{_CLASSES}"
            ] += 1
        elif len(mine) != 1 or masks[mine[0]] is not None:
            unused[
                "they refer to no series that is here, or to several, or to one that has a mask in "
                "NIfTI"
            ] += 1
        else:
            found[mine[0]].append(seg)
    return found, unused


def _without_copies(segs: Sequence[Outline]) -> list[Outline]:
    """Each once, of files that are equal byte by byte."""
    kept: list[Outline] = []
    for seg in segs:
        if not any(filecmp.cmp(seg.path, one.path, shallow=False) for one in kept):
            kept.append(seg)
    return kept


def _only_mask(segs: Sequence[Outline], this: str, classes: Sequence[str]) -> Masks | Refusal:
    """The mask that the only SEG of a series is, or why there is none."""
    if len(segs) > 1:
        text = f"{this} has several masks (DICOM SEG): {len(segs)}; keep one, or give it in NIfTI"
        return Refusal(Kind.MASK_VALUES, text)
    try:
        return seg_mask.label(segs[0], classes)
    except Refusal as error:
        return Refusal(error.kind, f"the DICOM SEG of {this}: {error} {_CLASSES}, or move it away")


def _drawn_on(
    seg: Outline, groups: Sequence[Group], places: Mapping[str, Sequence[int]]
) -> list[int]:
    """Which series a SEG may be of; `places` are those of the series by UID."""
    referred = [place for uid in sorted(seg.series) for place in places.get(uid, ())]
    if len(referred) > 1:
        shown = [seg.instances & {item.instance for item in groups[n].slices} for n in referred]
        referred = [n for n, some in zip(referred, shown, strict=True) if some]
    if seg.series or not seg.space:
        return referred
    return [n for n, group in enumerate(groups) if group.first.space == seg.space]


def _unused(paths: Sequence[Path], groups: Sequence[Group]) -> Iterator[Finding]:
    """Says that files are no masks; raises where some lie beside the slices of several series."""
    crowded = Counter(group.folder for group in groups)
    for folder in dict.fromkeys(path.parent for path in paths):
        if crowded[folder]:
            count = sum(path.parent == folder for path in paths)
            place = [group.folder for group in groups].index(folder) + 1
            raise UserError(
                f"the folder of series {place} of {len(groups)} in the order of paths holds "
                f"{crowded[folder]} series and {count} NIfTI files, and nothing says which is the "
                "mask of which; name each mask for its SeriesInstanceUID, put it into data.masks "
                "under the name of its series, or move the files away"
            )
    if paths:
        text = (
            f"{len(paths)} NIfTI files belong to no series and are not used; a mask lies in the "
            "folder of its only series or around it, or in data.masks under the name of its series"
        )
        yield Finding(Kind.MASK_UNUSED, "kept", text)


def _homes(root: Path, groups: Sequence[Group]) -> dict[Path, int]:
    """How many series lie in a folder or below it, for all that hold some."""
    homes = Counter[Path]()
    for group in groups:
        inside = [folder for folder in group.folder.parents if folder.is_relative_to(root)]
        homes.update([group.folder, *inside])
    return homes


def _beside(group: Group, homes: dict[Path, int], uid: str, this: str) -> list[Path]:
    """NIfTI files around a series: in folders that hold no other, and those that have its UID."""
    found = []
    for folder in (group.folder, *group.folder.parents):
        if folder not in homes:
            break
        if homes[folder] == 1:
            where = "the folder of" if folder == group.folder else "a folder around"
            found += _nifti_files(folder, f"{where} {this}").values()
    if uid and homes[group.folder] > 1:
        found += [group.folder / f"{uid}{ending}" for ending in _NIFTI]
    return [path for path in found if is_nifti(path) and path.is_file()]


def _nifti_files(folder: Path, place: str) -> dict[str, Path]:
    """NIfTI files of a folder; what is refused is not named, since names may be a patient's."""
    paths, findings = find(folder)
    refused = [finding.kind for finding in findings if finding.done == "refused"]
    if refused:
        raise Refusal(
            refused[0],
            f"{place}: files that cannot be used as masks: {len(refused)} ({refused[0]}); masks "
            "are .nii.gz, each once: convert the others, or move them away",
        )
    return paths

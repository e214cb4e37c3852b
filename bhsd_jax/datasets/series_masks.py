"""Which file is the mask of which DICOM series.

NIfTI by names and by folders; a DICOM SEG by the series that it refers to.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bhsd_jax.ct.dicom.grouping import Group
from bhsd_jax.ct.dicom.seg_mask import Outline
from bhsd_jax.datasets.bhsd_files import find
from bhsd_jax.defects import Finding, Kind, Refusal
from bhsd_jax.platform.errors import UserError

_NIFTI = (".nii", ".nii.gz")


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
    shared = Counter(group.first.series for group in groups)
    homes = _homes(root, groups)
    masks: list[Path | None] = []
    used, named = set[Path](), set[str]()
    for group, own in zip(groups, called(groups, names), strict=True):
        this = f"series {len(masks) + 1} of {len(groups)} in the order of paths"
        keys = own & set(apart)
        named |= keys
        uid = group.first.series if shared[group.first.series] == 1 else ""
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
    shared = Counter(group.first.series for group in groups)
    alike = Counter(group.folder.name for group in groups)
    found = []
    for group, name in zip(groups, names, strict=True):
        keys = {name}
        # A UID that several have would give one mask to each of them.
        if group.first.series and shared[group.first.series] == 1:
            keys.add(group.first.series)
        if alike[group.folder.name] == 1:
            keys.add(group.folder.name)
        found.append(keys)
    return found


def match_segs(
    segs: Sequence[Outline], groups: Sequence[Group], masks: Sequence[Path | None]
) -> tuple[list[Outline | None], list[Finding]]:
    """The DICOM SEG of each series or None, and what is said of those that are of none.

    A SEG is of the series whose UID it refers to; of several with that UID, of those whose slices
    it refers to; and where it does not refer to any, of the only one in its coordinates.
    Series that have a mask in NIfTI keep that, for it may be a SEG that was converted.

    Raises:
        UserError: If a series has two.
    """
    found: list[Outline | None] = [None] * len(groups)
    unused = 0
    for seg in segs:
        places = _drawn_on(seg, groups)
        if len(places) != 1 or masks[places[0]] is not None:
            unused += 1
            continue
        if found[places[0]] is not None:
            this = f"series {places[0] + 1} of {len(groups)} in the order of paths"
            raise UserError(f"{this} has several masks (DICOM SEG); keep one, or give it in NIfTI")
        found[places[0]] = seg
    if not unused:
        return found, []
    text = (
        f"{unused} DICOM SEG refer to no series that is here, or to one that has a mask in NIfTI, "
        "and are not used"
    )
    return found, [Finding(Kind.MASK_UNUSED, "kept", text)]


def _drawn_on(seg: Outline, groups: Sequence[Group]) -> list[int]:
    """Which series a SEG may be of."""
    referred = [n for n, group in enumerate(groups) if group.first.series in seg.series]
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

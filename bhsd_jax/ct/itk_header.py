"""The text that .mha, .mhd, .nrrd and .nhdr begin with: place in space, and file of the voxels."""

import re
from pathlib import Path

from bhsd_jax.defects import Kind, Refusal

_META, _NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
ENDINGS = (*_META, *_NRRD)
_HEADER = 2**16  # bytes in which the text at the start of a file ends
# Fields that state directions, and those that state the spacing alone.
_STATED: dict[tuple[str, ...], tuple[set[str], set[str]]] = {
    _META: ({"transformmatrix", "rotation", "orientation"}, {"elementspacing", "elementsize"}),
    _NRRD: ({"space directions"}, {"spacings"}),
}
_DATA: dict[tuple[str, ...], tuple[str, ...]] = {
    _META: ("elementdatafile",),
    _NRRD: ("data file", "datafile"),
}
_SEVERAL = re.compile(r"list(\s+\w+)?$|.*%", re.IGNORECASE)  # a list follows, or names are numbered
_ROOTED = re.compile(r"[/\\]|[a-z]:", re.IGNORECASE)


def frame(path: Path) -> str:
    """What a file states of its place: "space", "spacing" alone, or "" (nothing).

    Raises:
        FileNotFoundError: If there is no such file.
    """
    found = _fields(path)
    directions, spacings = _STATED[_family(path)]
    sides = _family(path) is not _NRRD or _of_patient(found.get("space", ""))
    if sides and not directions.isdisjoint(found):
        return "space"
    return "" if (directions | spacings).isdisjoint(found) else "spacing"


def voxel_file(path: Path) -> Path | None:
    """The file that the voxels lie in, if that is another; it need not be there.

    Raises:
        Refusal: If they lie in several files, or in another folder than the header or one in it.
        FileNotFoundError: If there is no such file.

    Source: MetaImage, field ElementDataFile; the NRRD format, field "data file".
    """
    found = _fields(path)
    name = next((found[key] for key in _DATA[_family(path)] if found.get(key)), "")
    if not name or name.upper() == "LOCAL":
        return None
    single = ".mha" if _family(path) is _META else ".nrrd"
    if _SEVERAL.match(name):
        text = f"{path}: its voxels lie in several files; save it as {single}, in one"
        raise Refusal(Kind.UNREADABLE, text)
    # Whoever packed the folder meant a file in it; a header from elsewhere may name any file.
    if _ROOTED.match(name) or ".." in re.split(r"[/\\]", name):
        text = (
            f"{path}: its voxels lie in {name!r}, which is no file of its folder; put that file "
            f"beside it and correct the name in the header, or save it as {single}"
        )
        raise Refusal(Kind.LIST_OUTSIDE, text)
    return path.parent / name


def _family(path: Path) -> tuple[str, ...]:
    return _META if path.name.casefold().endswith(_META) else _NRRD


def _fields(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        start = file.read(_HEADER)
    try:
        text = start.decode()
    except UnicodeDecodeError:  # voxels follow, or an older writer
        text = start.decode("latin-1")
    found = {}
    for line in text.splitlines():
        if not line.strip():
            break  # of NRRD; a MetaImage ends with the field below
        name, mark, value = line.partition("=" if _family(path) is _META else ":")
        if mark:
            found[name.strip().casefold()] = value.strip()
        if name.strip() == "ElementDataFile":
            break
    return found


def _of_patient(space: str) -> bool:
    """Whether a NRRD's space has axes to the sides of a patient, such as LPS; no scanner's does.

    Source: the NRRD format, field "space".
    """
    words = re.split(r"[^a-z]+", space.casefold())
    return bool({"left", "right", "las", "lps", "ras", "last", "lpst", "rast"} & set(words))

"""Files of BHSD in all the copies that go round: scans by base name, and official lists.

Nothing here stops at the first defect: each is a `Finding`, and the rest is read.
"""

import filecmp
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from bhsd_jax.defects import Finding, Kind
from bhsd_jax.platform.errors import UserError

_PATIENT = re.compile(r"ID_[0-9a-f]{8}(?=_|$)|sub-[A-Za-z0-9]+(?=_|$)")  # RSNA's, and BIDS'
_SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_OTHERS = (  # no .npz, which `predict` writes beside label maps; no previews, such as .tif
    *(".hdr", ".hdr.gz", ".mhd", ".nhdr", ".nrrd", ".mha", ".mgz", ".mgh", ".mnc", ".mnc.gz"),
    *(".gipl", ".gipl.gz", ".head"),
    *(".nii.bz2", ".nii.lz4", ".nii.xz", ".nii.zip", ".nii.zst"),
)
_MAGIC = (b"\x1f\x8b", b"\x5c\x01", b"\x00\x00")  # gzip; 348, the first field of NIfTI, either way
_SPLITS = {"training": "train", "test": "test"}
_KINDS = {"epidural": "1", "intraparenchymal": "2", "intraventricular": "3"}
_KINDS |= {"subarachnoid": "4", "subdural": "5"}
WORDS = _KINDS | {"edh": "1", "iph": "2", "ivh": "3", "sah": "4", "sdh": "5"}
_CHUNK = 2**20
_CHANNEL = "_0000"
_KEEP_ONE = "keep one and delete the other"

Scans = dict[str, Path]


def base_name(name: str) -> str:
    """The last part of a path without .nii or .nii.gz."""
    return _SUFFIX.sub("", Path(name).name)


def patient(name: str) -> str:
    """Whose scan a base name is of, as RSNA and BIDS write it; others are patients of their own."""
    match = _PATIENT.match(name)
    return match.group() if match else name


def find(folder: Path, read_too: tuple[str, ...] = ()) -> tuple[Scans, list[Finding]]:
    """NIfTI files of a folder by base name, with or without a suffix; sorted.

    Volumes in other formats are refused by name, but for endings that the caller can `read_too`.
    """
    scans: Scans = {}
    findings: list[Finding] = []
    for path in sorted(folder.iterdir()):
        name = base_name(path.name)
        usable, finding = _examine(path, name, read_too)
        if usable and name in scans:
            finding = _twice(scans[name], path, name)
        elif usable:
            scans[name] = path
        findings += [finding] if finding else []
    refused = {finding.case for finding in findings if finding.done == "refused"}
    return {name: path for name, path in scans.items() if name not in refused}, findings


def unnumbered(images: Scans, masks: Collection[str]) -> Scans:
    """Images without nnU-Net's number of the one channel, `_0000`, where masks lack it.

    Two images that would then have one name keep theirs, and so do those of several channels.
    """
    short = {name.removesuffix(_CHANNEL): path for name, path in images.items()}
    numbered = (set(masks) - images.keys()) & short.keys()
    several = any(f"{name}_0001" in images for name in numbered)
    return short if numbered and not several and len(short) == len(images) else images


def official_split(path: Path) -> tuple[dict[str, str], list[Finding]]:
    """Split by base name from `dataset.json`, whose folders exist nowhere.

    Raises:
        ValueError: If it is no such file, or numbers the classes otherwise than BHSD.
    """
    lists = _read_lists(path)
    split: dict[str, str] = {}
    findings, dead, twice = [], [], set()
    for named, value in _named(path, lists):
        if Path(named).is_absolute() or ".." in Path(named).parts:
            text = f"{path}: {named!r} leads out of the data set; only its base name is used"
            findings.append(Finding(Kind.LIST_OUTSIDE, "repaired", text))
        elif not (path.parent / named).exists():
            dead.append(named)
        id = base_name(named)
        if split.setdefault(id, value) != value:
            twice.add(id)
    if dead:
        text = f"{path}: {len(dead)} paths such as {dead[0]} do not exist; matched by base name"
        findings.append(Finding(Kind.LIST_DEAD_PATHS, "repaired", text))
    for id in sorted(twice):
        text = f"{path}: {id} is in 'training' and in 'test'; {_KEEP_ONE}"
        findings.append(Finding(Kind.LIST_BOTH, "refused", text, id))
        del split[id]
    return split, findings


def _examine(path: Path, name: str, read_too: tuple[str, ...]) -> tuple[bool, Finding | None]:
    """Whether a folder's entry is a scan to be read, and what is wrong with it."""
    if path.name.startswith("._"):
        text = f"{path}: made by macOS when it packs an archive; ignored"
        return False, Finding(Kind.MACOS, "repaired", text)
    if path.name.startswith("."):
        return False, None
    if unusable := _unusable(path):
        kind, text = unusable
        return False, Finding(kind, "refused", f"{_printable(path)}: {text}", _printable(name))
    if _SUFFIX.search(path.name):
        return True, None
    if path.is_file() and (ending := _other_ending(path)) and ending not in read_too:
        text = f"{path}: {ending} is not read here; convert it to .nii.gz, or move it away"
        return False, Finding(Kind.NO_NIFTI, "refused", text, name[: -len(ending)])
    if path.is_dir() or path.suffix or not _looks_like_nifti(path):
        return False, None  # notes, tables, archives
    text = f"{path}: known for a scan by its first bytes"
    return True, Finding(Kind.NO_SUFFIX, "repaired", text, name)


def _other_ending(path: Path) -> str:
    """Of a volume in another format than NIfTI, the longest that fits; "" of anything else."""
    name = path.name.casefold()
    return max((ending for ending in _OTHERS if name.endswith(ending)), key=len, default="")


def _twice(first: Path, second: Path, name: str) -> Finding:
    pair = f"{first.parent}: {first.name} and {second.name} are one case"
    if filecmp.cmp(first, second, shallow=False) or _unpacked(first) == _unpacked(second):
        text = f"{pair} and equal; the first is taken"
        return Finding(Kind.FILE_TWICE, "repaired", text, name)
    return Finding(Kind.NAME_TWICE, "refused", f"{pair} but differ; {_KEEP_ONE}", name)


def _unpacked(path: Path) -> bytes:
    """Digest of what a file holds, packed or not: `gunzip --keep` leaves it twice."""
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _MAGIC[0]
            file.seek(0)
            with gzip.GzipFile(fileobj=file) if packed else file as stream:
                while part := stream.read(_CHUNK):
                    total.update(part)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        total.update(str(path).encode())  # damaged: equal to nothing
    return total.digest()


def _unusable(path: Path) -> tuple[Kind, str] | None:
    """Kind and advice for an entry that carries a scan's name but is none to be read."""
    if not path.name.isprintable():
        return Kind.NAME_UNSAFE, "its name holds control characters; rename it"
    if path.is_symlink() and not path.exists():
        return Kind.LINK, "a link in a circle or to a file that is gone; fetch it"
    if not _SUFFIX.search(path.name) or path.is_file():
        return None
    if path.is_dir():
        return Kind.FOLDER_AS_SCAN, "expected a file; move what is in it up"
    return Kind.NOT_REGULAR, "a pipe, socket or device; replace it by the scan"


def _looks_like_nifti(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) in _MAGIC
    except OSError:
        return False


def _printable(name: str | Path) -> str:
    text = str(name)
    return text if text.isprintable() else ascii(text)[1:-1]


def _named(path: Path, lists: dict) -> Iterator[tuple[str, str]]:
    """File names as the lists have them, each with its split."""
    for key, value in _SPLITS.items():
        for item in lists.get(key, []):
            named = item.get("image") if isinstance(item, dict) else item
            if not isinstance(named, str):
                raise UserError(f"{path}: in {key!r}: expected a file name; got {item!r}")
            yield named, value


def _read_lists(path: Path) -> dict:
    try:
        lists = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(lists, dict) or not all(isinstance(lists.get(k, []), list) for k in _SPLITS):
        raise UserError(f"{path}: expected {{'training': [file names], 'test': [file names]}}")
    _check_labels(path, lists.get("labels"))
    return lists


def _check_labels(path: Path, labels: object) -> None:
    """Refuses other numbers for the classes: masks drawn with them would train, and wrongly."""
    if not isinstance(labels, dict):
        return
    by_name = {str(v).lower(): str(k) for k, v in labels.items()}
    by_name |= {str(k).lower(): str(v) for k, v in labels.items()}  # nnU-Net v2: name to number
    wrong = {}
    for name, number in by_name.items():
        meant = {WORDS[word] for word in re.findall("[a-z]+", name) if word in WORDS}
        if len(meant) == 1 and number not in meant:
            wrong[name] = number
    if wrong:
        raise UserError(
            f"{path}: numbers the classes {wrong}; BHSD has {_KINDS}: "
            "renumber the masks, or correct the file if they are BHSD's own"
        )

"""From a config to the shards, the data set, its roles, and the names of scans. Needs no JAX."""

import errno
import hashlib
import inspect
import re
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bhsd_jax.build import build, find, require_members
from bhsd_jax.datasets import splits, splits_file
from bhsd_jax.platform import faults, files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Settings
from bhsd_jax.shards.store import Shards
from bhsd_jax.volume import Dataset

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_NUMBER = re.compile(r"\d+e\d+|0\d+")  # of hexadecimal digits, what spreadsheets write otherwise


def shards_folder(config: Settings, workdir: Path) -> Path:
    """Folder of the shards and their `plan.json`."""
    return Path(config.preprocess.shards or workdir / "shards")


def data_set(config: Settings, workdir: Path) -> Dataset:
    """The data set as downloaded; the synthetic one lies in the run folder by default.

    Raises:
        ValueError: If the config names an unknown class or argument, no root of a class that takes
            one, or a class that lacks a part.
    """
    spec = dict(config.data)
    takes = inspect.signature(find("bhsd_jax.datasets", spec["name"])).parameters
    if not spec.get("root"):
        spec.pop("root", None)
        if spec["name"].startswith("synthetic."):
            spec["root"] = str(workdir / "synthetic")
        elif "root" in takes:
            raise UserError(f"config.data.root is empty; say where {spec['name']} lies")
    if "salt" in takes and not spec.get("salt"):
        spec["salt"] = _salt(shards_folder(config, workdir))  # its names are those in the shards
    found = build("bhsd_jax.datasets", spec)
    require_members(found, Dataset, "")
    return found


def on_other_scans(config: Settings, workdir: Path, dataset: str) -> list[str]:
    """A note where the shards are of another data set than the config's: a word was left out."""
    own = getattr(find("bhsd_jax.datasets", config.data["name"]), "name", "")
    if not isinstance(own, str) or own in ("", dataset):  # some ask their files
        return []
    return [
        f"config.data is {own}, but the scans in {shards_folder(config, workdir)}, on which this "
        f"trains, are of {dataset}. What the word data= sets beside them is that of {own}, and "
        "`predict` and `evaluate` would look for the scans there; give `train` the same --config "
        "and --data.root as `preprocess`"
    ]


def roles(config: Settings, workdir: Path) -> tuple[splits.Roles, list[str]]:
    """Case ids for training, validation and test; and a note on each wish that was adjusted."""
    folder = shards_folder(config, workdir)
    asked = {k: v for k, v in vars(config.split).items() if k != "binary"}
    folds = splits_file.load(folder / splits_file.NAME)
    shards = Shards(folder)
    found, notes = splits.roles(shards.entries, folds=folds, **asked)
    return found, [*notes, *_unseen(shards, found, binary=config.split.binary)]


def _unseen(shards: Shards, found: splits.Roles, *, binary: bool) -> list[str]:
    """Says which classes are in no mask that trains, as where few masks were drawn."""
    train = set(found.train)
    voxels = [entry.voxels for entry in shards.entries if entry.id in train and entry.voxels]
    names = shards.plan.classes[1:]
    seen = {name for row in voxels for name, count in zip(names, row[1:], strict=False) if count}
    lacking = [name for name in names if name not in seen]
    if not voxels or not lacking or (binary and seen):
        return []
    return [
        f"none of the {len(train)} masks that train has {', '.join(lacking)}: a network cannot "
        "learn what it never sees; draw other masks with split.seed, or more with split.labeled"
    ]


def short_names(
    cases: Sequence[str], workdir: Path, show_ids: bool, out: Path | None = None
) -> dict[str, str]:
    """Name of each scan in outputs: a salted hash, or its own id with `show_ids`.

    Of 20,000 scans two have the same eight digits once in twenty times; such get more of them. The
    salt stays in the run folder: a plain hash of a public list of ids can be reversed. A run that
    many share may be one that they can only read: if it has none, it is kept with the outputs.
    """
    if show_ids:
        return {case: case for case in cases}
    salt = _salt(workdir, out)
    digests = {c: _unharmed(hashlib.sha256((salt + c).encode()).hexdigest()) for c in cases}
    alike = Counter(digest[:8] for digest in digests.values())
    return {c: d[: 8 if alike[d[:8]] == 1 else 16] for c, d in digests.items()}


def _unharmed(digest: str) -> str:
    """The digest without what precedes the first eight digits that a spreadsheet leaves alone.

    It takes 83921e45 for a number that it writes otherwise, and the zero off 00412907.
    """
    starts = range(len(digest) - 16)
    kept = (at for at in starts if not _NUMBER.fullmatch(digest[at : at + 8]))
    return digest[next(kept, 0) :]


def _salt(folder: Path, instead: Path | None = None) -> str:
    """Drawn once; processes that ask for it at once are given the same.

    It goes into the folder `instead` where nothing may be written into the first.
    """
    path = folder / ".salt"
    drawn = secrets.token_hex(16)
    salt = path.read_text(errors="replace") if path.is_file() else ""
    try:
        salt = salt or files.write_first(path, drawn)  # empty: another process may be writing it
    except faults.WriteError as error:
        if instead is None or error.errno not in _READ_ONLY:
            raise
        return _salt(instead)
    if len(salt) != len(drawn):
        raise UserError(
            f"{path}: damaged ({len(salt)} characters, not {len(drawn)}); restore it from a copy, "
            "or remove it: then all scans it has given names to are called otherwise"
        )
    return salt

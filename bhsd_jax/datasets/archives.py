"""Archives, in which scans come from a PACS or a download, and which nothing here unpacks."""

from pathlib import Path

_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


def is_archive(path: Path) -> bool:
    """Whether a file's name says that it is one."""
    return path.name.lower().endswith(_ENDINGS)


def about(folder: Path) -> str:
    """What a message adds that no scan was found in a folder; "" if it has no archive."""
    there = folder.iterdir() if folder.is_dir() else ()
    count = sum(is_archive(path) for path in there if path.is_file())
    return f"; unpack the archives in it: {count}" if count else ""

"""Trees of files that are NIfTI by name only."""

import gzip

import pytest

STUDIES = {
    "train": ("ID_0a000001_ID_00000000a1", "ID_0a000002_ID_00000000a2"),
    "test": ("ID_0b000001_ID_00000000b1",),
    "any": ("ID_0c000001_ID_00000000c1", "ID_0c000001_ID_00000000c2"),
    "no": ("ID_0d000001_ID_00000000d1",),
}


@pytest.fixture
def studies():
    return STUDIES


@pytest.fixture
def touch():
    """Writes one small gzip file, making its folders."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"voxels"))

    return write

"""DICOM files without preamble, known by their first element."""

_META, _IDENTIFYING = 0x0002, 0x0008  # groups: of the file, and of what identifies an image
_LAST = {_META: 0x0010, _IDENTIFYING: 0x0018}  # elements that may be the first of their group
_LONGEST = 64  # bytes of their values: UIDs, dates and times


def begins(start: bytes) -> bool:
    """Whether a file meta group or a data set begins here, in any way to write it.

    Some treatment planning systems and old archives export so. dcm2niix 1.0 and SimpleITK 2.5 read
    data sets in little endian, pydicom with `force` all of it. `start`: the first 132 bytes.
    """
    if len(start) < 132:
        return False
    explicit = start[4:6].isalpha() and start[4:6].isupper()
    short = explicit or int.from_bytes(start[4:8], "little") <= _LONGEST
    little, big = (
        [int.from_bytes(start[at : at + 2], order) for at in (0, 2)] for order in ("little", "big")
    )
    if big[0] == _IDENTIFYING:  # big endian is always explicit, and a file meta group never big
        return explicit and big[1] <= _LAST[_IDENTIFYING]
    return little[0] in _LAST and short and little[1] <= _LAST[little[0]]

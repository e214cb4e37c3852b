"""What a segment of a DICOM SEG is, in the codes of SNOMED CT; by the name of its class.

A bleed is a Hemorrhage, as in TotalSegmentator's table, at the place that its name says. The places
are those of DICOM's own context groups. These have no code for the spaces above and below the dura,
so that epidural and subdural bleeds share a place, and label and description tell them apart.

Source: TotalSegmentator 2.18.0, `totalsegmentator_snomed_mapping.csv`, row
`intracerebral_hemorrhage`; DICOM PS3.16, CID 5, 7140, 7150, 7151 and 7159, as in pydicom 3.0.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

Code = tuple[str, str]  # value in SNOMED CT, meaning

ABNORMAL: Code = ("49755003", "Morphologically Altered Structure")
HEMORRHAGE: Code = ("50960005", "Hemorrhage")
_EDEMA: Code = ("79654002", "Edema")
_LESION: Code = ("52988006", "Lesion")
_BRAIN: Code = ("12738006", "Brain")
_VENTRICLE: Code = ("35764002", "Brain ventricle")
_SUBARACHNOID: Code = ("33930006", "Cranial Subarachnoid Space")
_DURA: Code = ("18545000", "Dura mater")
_HEAD: Code = ("69536005", "Head")


@dataclass(frozen=True)
class Meaning:
    """What the voxels of a class show."""

    description: str
    kind: Code
    place: Code
    rgb: tuple[int, int, int]  # in which viewers draw it


_KNOWN = {
    "EDH": Meaning("epidural hemorrhage", HEMORRHAGE, _DURA, (255, 159, 28)),
    "IPH": Meaning("intraparenchymal hemorrhage", HEMORRHAGE, _BRAIN, (220, 0, 0)),
    "IVH": Meaning("intraventricular hemorrhage", HEMORRHAGE, _VENTRICLE, (25, 211, 243)),
    "SAH": Meaning("subarachnoid hemorrhage", HEMORRHAGE, _SUBARACHNOID, (171, 99, 250)),
    "SDH": Meaning("subdural hemorrhage", HEMORRHAGE, _DURA, (0, 204, 150)),
    "EAH": Meaning("extra-axial hemorrhage", HEMORRHAGE, _DURA, (255, 159, 28)),
    "EDEMA": Meaning("edema", _EDEMA, _BRAIN, (255, 236, 130)),
    "ANY": Meaning("intracranial hemorrhage", HEMORRHAGE, _BRAIN, (220, 0, 0)),
}
_BLOOD = {"HEMORRHAGE", "HAEMORRHAGE", "HEMATOMA", "HAEMATOMA", "BLEED", "BLEEDING"}
_SYNONYMS = {  # words joined by _
    "OEDEMA": "EDEMA",
    "EXTRA_AXIAL": "EAH",  # BLAST-CT's
    "ICH": "IPH",
    **dict.fromkeys(_BLOOD, "ANY"),
    "INTRACEREBRAL_HEMORRHAGE": "ANY",
    "INTRACRANIAL": "ANY",
    "EPIDURAL": "EDH",  # this and the last four as RSNA 2019 calls them
    "EXTRADURAL": "EDH",
    "INTRAPARENCHYMAL": "IPH",
    "INTRAVENTRICULAR": "IVH",
    "SUBARACHNOID": "SAH",
    "SUBDURAL": "SDH",
}
_AMBIGUOUS = "ICH"  # to some what lies in the brain, to others any bleed in the skull


def of(name: str) -> Meaning:
    """The meaning of a class; of a name that is not known, a lesion in the head."""
    return _KNOWN.get(_key(name)) or Meaning(name, _LESION, _HEAD, (200, 200, 200))


def is_named(label: str, name: str) -> bool:
    """Whether the label of a segment is that of a class: its name or a synonym, in any spelling."""
    one, other = _words(label), _words(name)
    same = one == other or (_AMBIGUOUS not in (one, other) and _key(label) == _key(name))
    return bool(one) and same


def is_any(name: str) -> bool:
    """Whether a class is of bleeding wherever it is."""
    return _key(name) == "ANY"


def is_any_bleed(names: Iterable[str]) -> bool:
    """Whether one of these classes is a known bleed."""
    return any(of(name).kind == HEMORRHAGE for name in names)


def are_bleeds(names: Iterable[str]) -> bool:
    """Whether all of these classes are known bleeds, or what goes with them (edema)."""
    kinds = {of(name).kind for name in names}
    return HEMORRHAGE in kinds and kinds <= {HEMORRHAGE, _EDEMA}


def _words(name: str) -> str:
    return "_".join(re.findall(r"[^\W_]+", name.upper()))


def _key(name: str) -> str:
    """The key of what is known, of a name with or without a word for blood; else its words."""
    whole = _words(name)
    rest = "_".join(word for word in whole.split("_") if word not in _BLOOD)
    found = (_SYNONYMS.get(words, words) for words in (whole, rest))
    return next((key for key in found if key in _KNOWN), whole)

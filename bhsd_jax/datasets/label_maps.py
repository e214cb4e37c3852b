"""Which value of a mask means which class: presets, and reading one from names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import HEMORRHAGE, Label, Masks

PRESETS = {  # names by value in the file; values with one name are one class
    "bhsd": HEMORRHAGE,
    "binary": ("background", *("any",) * 255),  # INSTANCE2022, CT-ICH, HemSeg: 1 or 255
    "blast-ct": ("background", "IPH", "extra-axial", "edema", "IVH"),
    "bhsd-to-blast-ct": ("background", "extra-axial", "IPH", "IVH", "extra-axial", "extra-axial"),
}


def own_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Names of classes by mask value, as someone types them: "a,b", with the background or not.

    Names in a text may have spaces, quotes or brackets around them, as Python writes a tuple.
    """
    names = given.split(",") if isinstance(given, str) else given
    names = [name.strip(" ()[]'\"") for name in names]
    return tuple(names) if names[0] == HEMORRHAGE[0] else (HEMORRHAGE[0], *names)


@dataclass(frozen=True)
class LabelMap:
    """Names of the classes, and the class of each value in a file."""

    classes: tuple[str, ...]  # background first, then as they first appear
    values: tuple[int, ...]

    @classmethod
    def of(cls, names: str | Sequence[str]) -> "LabelMap":
        """From a preset's name, or from names by value.

        Raises:
            ValueError: If there is no such preset, or names do not begin with the background.
        """
        if isinstance(names, str):
            if names not in PRESETS:
                raise UserError(
                    f"label map {names!r} is not known; choose from {', '.join(PRESETS)}, or list "
                    "the classes by value, background first"
                )
            names = PRESETS[names]
        classes = tuple(dict.fromkeys(names))
        if len(classes) < 2 or names[0] in names[1:] or "" in names or len(names) > 256:
            raise UserError(
                f"label map: want the background and 1 to 255 further names; got {tuple(names)}"
            )
        return cls(classes, tuple(classes.index(name) for name in names))

    def label(self, path: Path) -> Label:
        """What a case holds of a mask with these values."""
        if self.values == tuple(range(len(self.values))):
            return path
        return Masks((path,), values=self.values)

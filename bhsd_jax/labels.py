"""What the values of a label map mean, and what a network is asked for: classes, or regions.

A class is one value. A region is a set of values, and regions may overlap: the whole tumor holds
its core. Voxels of the value `ignore` are not annotated, and count in nothing.

Source: nnU-Net v2.8.1, `LabelManager`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8

Region = tuple[str, tuple[int, ...]]  # name, values


@dataclass(frozen=True)
class Labels:
    """Meaning of the values 0 (background), 1, 2, ... of a label map."""

    classes: tuple[str, ...]  # name by value, background first; without `ignore`
    regions: tuple[Region, ...] = ()  # in the order of the network's outputs; (): classes
    region_order: tuple[int, ...] = ()  # value that each region writes, later ones over earlier
    ignore: int | None = None  # the value after the last class
    listed: tuple[str, ...] = ()  # regions of one value that dataset.json has as a list, [3]

    @property
    def values(self) -> int:
        """How many values a mask may hold, `ignore` included."""
        return len(self.classes) + (self.ignore is not None)

    @property
    def outputs(self) -> int:
        """Channels of the network's answer: classes with the background, or regions."""
        return len(self.regions) or len(self.classes)

    @property
    def targets(self) -> tuple[Region, ...]:
        """What is scored and measured, with its values: foreground classes, or regions."""
        own = ((name, (value,)) for value, name in enumerate(self.classes) if value)
        return self.regions or tuple(own)

    @property
    def names(self) -> tuple[str, ...]:
        """Background, then the targets."""
        return (self.classes[0], *(name for name, _ in self.targets))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the channels of the network's answer."""
        return tuple(name for name, _ in self.regions) or self.classes

    @property
    def plain(self) -> bool:
        """Whether every value is a class of its own and every voxel is annotated."""
        return not self.regions and self.ignore is None

    def values_of(self, targets: Iterable[int]) -> tuple[int, ...]:
        """The values of these of `names`, by number."""
        own = ((0,), *(values for _, values in self.targets))
        return tuple(sorted({value for index in targets for value in own[index]}))

    def annotated(self, label: UInt8[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
        """True where the label map says what is there."""
        if self.ignore is None:
            return np.ones(label.shape, bool)
        return label != self.ignore

    def masks(self, label: UInt8[np.ndarray, "..."]) -> Iterable[Bool[np.ndarray, "..."]]:
        """The mask of each target, one after the other."""
        for _, values in self.targets:
            yield label == values[0] if len(values) == 1 else np.isin(label, values)

    def assemble(self, inside: Iterable[Bool[np.ndarray, "..."]]) -> UInt8[np.ndarray, "..."]:
        """A label map of where each region is: a later one is written over an earlier."""
        label = None
        for mask, value in zip(inside, self.region_order, strict=True):
            label = np.zeros(mask.shape, np.uint8) if label is None else label
            label[mask] = value
        assert label is not None, "there is a region"
        return label

    def of_probabilities(self, prob: Float[np.ndarray, "K ..."]) -> UInt8[np.ndarray, "..."]:
        """The class of the highest probability, the first of equals; or the regions above half."""
        if self.regions:
            return self.assemble(one > 0.5 for one in prob)
        return np.argmax(prob, axis=0).astype(np.uint8)

    def of_logits(self, logits: Float[np.ndarray, "K ..."]) -> UInt8[np.ndarray, "..."]:
        """The likeliest class, or the regions whose probability is above one half."""
        if not self.regions:
            return logits.argmax(0).astype(np.uint8)
        return self.assemble(one > 0 for one in logits)

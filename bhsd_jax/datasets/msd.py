"""Folders as the Medical Segmentation Decathlon and nnU-Net lay them out: imagesTr, labelsTr."""

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhsd_jax.platform.errors import UserError
from bhsd_jax.volume import Case

# Names of channels to which nnU-Net gives neither z-scores nor the statistics of CT.
_OTHERWISE = ("nonorm", "rescale_to_0_1", "rgb_to_0_1")


@dataclass(frozen=True)
class MSD:
    """One task folder with a `dataset.json`, of the Decathlon (v1) or of nnU-Net (v2).

    One channel only. Cases of `imagesTs` are "test", with masks where `labelsTs` has them. Every
    case counts as its own patient, since the format knows none. Where `dataset.json` lists its
    training cases, only those are taken.

    Source: nnU-Net v2, documentation/dataset_format.md.
    """

    root: str | Path
    modality: str = "auto"  # "ct", "mr" (any z-scores), or "auto": by the channel's name
    ignore: tuple[str, ...] = ()  # case ids to leave out, such as images that lost their mask

    def __post_init__(self):
        if self.modality not in ("auto", "ct", "mr"):
            raise UserError(f"MSD: modality is auto, ct or mr; got {self.modality!r}")
        if self.modality == "auto":
            object.__setattr__(self, "modality", self._named_modality())

    @property
    def name(self) -> str:
        """As `dataset.json` has it; else the folder's."""
        return str(self._facts.get("name") or Path(self.root).resolve().name)

    @property
    def license(self) -> str:
        """As `dataset.json` has it, in either spelling; empty if it says nothing."""
        return str(self._facts.get("licence") or self._facts.get("license") or "")

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names by label value.

        Raises:
            ValueError: If values are not 0, 1, 2, ... or a label is a region.
        """
        labels = self._facts.get("labels", {})
        if all(str(key).isdigit() for key in labels):
            labels = {name: value for value, name in labels.items()}  # v1: value -> name
        try:
            by_value = {int(value): str(name) for name, value in labels.items()}
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._json}: labels must be single values; got {labels}") from error
        if "ignore" in labels or sorted(by_value) != list(range(len(labels))) or not labels:
            raise UserError(
                f"{self._json}: label values must be 0 (background), 1, 2, ... without gaps and "
                f"without an ignore label; got {labels}"
            )
        return tuple(by_value[value] for value in range(len(by_value)))

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: If `dataset.json` or `imagesTr` is not there.
            ValueError: If an image has no mask or a mask no image, or there are several channels.
        """
        train = self._training()
        test = self._pairs("imagesTs", "labelsTs") if self._folder("imagesTs").is_dir() else {}
        self._check(train, test)
        listed = self._listed
        cases = [
            Case(id, id, image, label, split)
            for split, pairs in (("train", train), ("test", test))
            for id, (image, label) in pairs.items()
            if image is not None and (split == "test" or not listed or id in listed)
        ]
        yield from sorted(cases, key=lambda case: case.id)

    def _training(self) -> dict[str, tuple[Path | None, Path | None]]:
        """Image and mask by case, where `dataset.json` says they lie; else by folder and name.

        Source: nnU-Net v2.8.1, `get_filenames_of_train_images_and_targets` (key "dataset"); the
        Decathlon's list "training", as MONAI's `load_decathlon_datalist` takes it.
        """
        if "dataset" in self._facts:
            return self._described(self._facts["dataset"])
        pairs = self._pairs("imagesTr", "labelsTr")
        for item in self._facts.get("training", []):
            if isinstance(item, dict) and item.get("label"):
                id = self._id(Path(item["image"]).name, image=True)
                if id in pairs:
                    pairs[id] = (pairs[id][0], self._at(item["label"]))
        return pairs

    def _described(self, listed: Any) -> dict[str, tuple[Path | None, Path | None]]:
        """The cases of nnU-Net's key "dataset": `{case: {"images": [...], "label": ...}}`."""
        pairs: dict[str, tuple[Path | None, Path | None]] = {}
        for id, item in listed.items():
            if id in self.ignore:
                continue
            if len(item["images"]) != 1 or "/" in id:
                raise UserError(
                    f"{self._json}: case {id!r} of `dataset` has {len(item['images'])} images; one "
                    "channel is supported, and a name without slashes"
                )
            pairs[id] = (self._at(item["images"][0]), self._at(item["label"]))
        return pairs

    def _at(self, name: str) -> Path:
        """A path of `dataset.json`: relative to it, with variables of the environment.

        Raises:
            ValueError: If there is no such file.
        """
        path = Path(self.root) / os.path.expandvars(name)
        if not path.is_file():
            raise UserError(f"{self._json}: lists {name}, which is not there; fetch it")
        return path

    def _named_modality(self) -> str:
        """What the channel's name means to nnU-Net: CT, or z-scores of every scan.

        Raises:
            ValueError: If the name asks for a normalization that is not supported.

        Source: nnU-Net v2.8.1, `get_normalization_scheme` and its map of channel names.
        """
        name = self._channel
        if name.casefold() in _OTHERWISE:
            raise UserError(
                f"{self._json}: channel {name!r} asks for a normalization that is not supported "
                f"(nor are others of {', '.join(_OTHERWISE)}); rename it for z-scores, or set "
                "data.modality"
            )
        return "ct" if name.casefold() == "ct" else "mr"

    @property
    def _json(self) -> Path:
        return Path(self.root) / "dataset.json"

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        if not self._json.is_file():
            raise FileNotFoundError(
                f"{self._json}: not there; set data.root to the folder that holds dataset.json, "
                "imagesTr and labelsTr"
            )
        return json.loads(self._json.read_text(encoding="utf-8-sig"))

    @property
    def _is_v2(self) -> bool:
        return "channel_names" in self._facts

    @property
    def _ending(self) -> str:
        return str(self._facts.get("file_ending", ".nii.gz"))

    @property
    def _channel(self) -> str:
        channels = self._facts.get("channel_names") or self._facts.get("modality") or {}
        if len(channels) != 1:
            raise UserError(
                f"{self._json}: one channel is supported, got {channels or 'none'}; split the "
                "channels into data sets of their own"
            )
        return str(next(iter(channels.values())))

    @functools.cached_property
    def _listed(self) -> frozenset[str]:
        items = self._facts.get("training", [])
        return frozenset(
            self._id(Path(item["image"] if isinstance(item, dict) else item).name, image=True)
            for item in items
        ) - set(self.ignore)

    def _folder(self, name: str) -> Path:
        return Path(self.root) / name

    def _id(self, file: str, *, image: bool) -> str:
        stem = file.removesuffix(self._ending)
        return stem.removesuffix("_0000") if image and self._is_v2 else stem

    def _scans(self, folder: Path, *, image: bool) -> dict[str, Path]:
        if not folder.is_dir():
            return {}
        files = [
            path
            for path in sorted(folder.iterdir())
            if path.name.endswith(self._ending) and not path.name.startswith(".")
        ]
        if image and self._is_v2:
            wrong = [p.name for p in files if not p.name.endswith(f"_0000{self._ending}")]
            if wrong:
                raise UserError(
                    f"{folder}: {_some(wrong)}: expected <case>_0000{self._ending}, the one channel"
                )
        paths = {self._id(path.name, image=image): path for path in files}
        return {id: path for id, path in paths.items() if id not in self.ignore}

    def _pairs(self, images: str, labels: str) -> dict[str, tuple[Path | None, Path | None]]:
        image = self._scans(self._folder(images), image=True)
        label = self._scans(self._folder(labels), image=False)
        return {id: (image.get(id), label.get(id)) for id in sorted({*image, *label})}

    def _check(self, train: dict, test: dict) -> None:
        """Refuses what a silent choice would hide."""
        if self._ending not in (".nii.gz", ".nii"):
            raise UserError(f"{self._json}: file_ending {self._ending!r}; only NIfTI is read")
        if not any(image for image, _ in train.values()):
            raise FileNotFoundError(
                f"{self._folder('imagesTr')}: no images that end in {self._ending}"
            )
        lonely = [f"{id} (no image)" for id, (image, _) in {**train, **test}.items() if not image]
        lonely += [f"{id} (no mask)" for id, (_, label) in train.items() if not label]
        if lonely:
            raise UserError(
                f"{self.root}: {_some(lonely)}; put the missing file there, or name the case in "
                "`ignore` of config.data"
            )
        absent = sorted(self._listed - set(train))
        if absent:
            raise UserError(
                f"{self._json}: lists {_some(absent)}, not in imagesTr; fetch it, or take it off "
                "the list"
            )
        double = sorted(set(train) & set(test))
        if double:
            raise UserError(f"{self.root}: {_some(double)} in imagesTr and imagesTs; keep one")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

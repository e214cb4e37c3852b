"""Folders as the Medical Segmentation Decathlon and nnU-Net lay them out: imagesTr, labelsTr."""

import functools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bhsd_jax.ct import formats
from bhsd_jax.datasets import json_lists, splits_file
from bhsd_jax.datasets.bhsd_files import patient
from bhsd_jax.datasets.splits_file import Folds
from bhsd_jax.defects import Finding, Kind
from bhsd_jax.labels import Labels
from bhsd_jax.nnunet import dataset_json
from bhsd_jax.platform.errors import UserError, some
from bhsd_jax.volume import Case, Channels, Survey

Pairs = dict[str, tuple[Path | Channels | None, Path | None]]  # image and mask by case

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})")  # nnU-Net's names of images
_OF_MODALITY = (["CTNormalization"], [dataset_json.Z_SCORES])  # one channel, usual normalization


@dataclass(frozen=True)
class MSD:
    """One task folder with a `dataset.json`, of the Decathlon or of nnU-Net (v2, or v1's files).

    Cases of `imagesTs` are "test", with masks where `labelsTs` has them. Every case counts as its
    own patient, since the format knows none, but for names that say whose it is (`Folder`). Where
    `dataset.json` lists its training cases, only those are taken; those of MONAI's list
    "validation" are "val". A `splits_final.json` beside it holds the folds, else the list may
    number them, as MONAI's Auto3DSeg does. Every one of several channels has a file (`<case>_0000`,
    `<case>_0001`, ...); or one file has all, along a fourth axis.

    Source: nnU-Net v2, documentation/dataset_format.md.
    """

    root: str | Path
    modality: str = "auto"  # "ct", "mr" (any z-scores), or "auto": by the channel's name
    ignore: str | tuple[str, ...] = ()
    """Case ids to leave out, such as images that lost their mask; as text "a,b"."""
    channels: tuple[tuple[str, str], ...] = field(default=(), init=False)
    """Name and normalization of each, where there are several, or one has another than usual."""

    def __post_init__(self):
        if isinstance(self.ignore, str):
            ids = tuple(filter(None, map(str.strip, self.ignore.split(","))))
            object.__setattr__(self, "ignore", ids)
        if self.modality not in ("auto", "ct", "mr"):
            raise UserError(f"MSD: modality is auto, ct or mr; got {self.modality!r}")
        if self.modality == "ct" and len(self._channels) > 1:
            raise UserError(
                f"{self._json}: scans of {len(self._channels)} channels are normalized by the names"
                " of the channels; leave data.modality out"
            )
        if self.modality == "auto":
            one_of_ct = [scheme for _, scheme in self._channels] == ["CTNormalization"]
            object.__setattr__(self, "modality", "ct" if one_of_ct else "mr")
            if [scheme for _, scheme in self._channels] not in _OF_MODALITY:
                object.__setattr__(self, "channels", self._channels)
        elif len(self._channels) > 1:
            object.__setattr__(self, "channels", self._channels)

    @property
    def name(self) -> str:
        """As `dataset.json` has it; else the folder's."""
        return str(self._facts.get("name") or Path(self.root).resolve().name)

    @property
    def license(self) -> str:
        """As `dataset.json` has it, in either spelling; empty if it says nothing."""
        return str(self._facts.get("licence") or self._facts.get("license") or "")

    @property
    def splits_file(self) -> Path:
        """Where nnU-Net's folds lie, if a user has given any."""
        return Path(self.root) / splits_file.NAME

    @property
    def folds(self) -> Folds:
        """Those of MONAI's Auto3DSeg, whose list "training" has a number for each case; or ()."""
        return json_lists.folds(self._listed)

    @functools.cached_property
    def labels(self) -> Labels:
        """What the values of its masks mean.

        Raises:
            ValueError: If they are not as nnU-Net wants them.
        """
        return dataset_json.labels(self._facts, str(self._json))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label value."""
        return self.labels.classes

    def cases(self) -> Iterator[Case]:
        """All cases, sorted by id.

        Raises:
            FileNotFoundError: As by `survey`.
            ValueError: Likewise.
        """
        yield from self.survey().cases

    def survey(self) -> Survey:
        """All cases, and whether `dataset.json` counts as many for training.

        Raises:
            FileNotFoundError: If `dataset.json` or `imagesTr` is not there.
            ValueError: If an image has no mask or a mask no image, or channels are missing.
        """
        train, test = self._training(), self._testing()
        self._check(train, test)
        lists = {id: item.split for id, item in self._listed.items()}
        others = None if set(lists.values()) - {"test"} else "train"  # of cases in no list
        split_of = {id: lists.get(id, others) for id in train} | dict.fromkeys(test, "test")
        cases = [
            Case(id, patient(id), image, label, split)
            for id, (image, label) in (train | test).items()
            if image is not None and (split := split_of[id])
        ]
        taken = sum(case.split == "train" for case in cases)
        findings = [*self._counted(taken, len(train)), *splits_file.unread(self.splits_file)]
        return Survey(tuple(sorted(cases, key=lambda case: case.id)), tuple(findings))

    def _counted(self, taken: int, there: int) -> list[Finding]:
        """What is to be said of `numTraining`, which may count cases not listed, or ignored, too.

        Source: nnU-Net v2.8.1, `verify_dataset_integrity`, which refuses another number.
        """
        stated = self._facts.get("numTraining")
        if type(stated) is not int or taken <= stated <= there + len(self.ignore):
            return []
        text = (
            f"{self._json}: numTraining is {stated}, and there are {taken} training cases, of "
            "which folds are drawn: complete the copy, or correct the number"
        )
        return [Finding(Kind.LIST_COUNT, "kept", text)]

    def _training(self) -> Pairs:
        """Image and mask by case, where `dataset.json` says they lie; else by folder and name.

        Source: nnU-Net v2.8.1, `get_filenames_of_train_images_and_targets` (key "dataset"); the
        Decathlon's list "training", as MONAI's `load_decathlon_datalist` takes it.
        """
        if "dataset" in self._facts:
            return self._described()
        pairs = self._pairs("imagesTr", "labelsTr")
        for id, item in self._of("train", "val").items():
            self._put(pairs, id, item)
        tested = self._of("test")  # of imagesTr too, by MONAI's lists
        return self._paired({id: pair for id, pair in pairs.items() if id not in tested})

    def _testing(self) -> Pairs:
        """Those of `imagesTs`, and those that the list "test" names elsewhere."""
        pairs = self._pairs("imagesTs", "labelsTs") if self._folder("imagesTs").is_dir() else {}
        for id, item in self._of("test").items():
            self._put(pairs, id, item)
        return self._paired(pairs)

    def _paired(self, pairs: Pairs) -> Pairs:
        """Without masks that a list pairs with images of other names, img0035 and label0035."""
        listed = (item.label for item in self._listed.values() if item.label)
        masks = {self._place(name).resolve() for name in listed}
        return {
            id: (image, label)
            for id, (image, label) in pairs.items()
            if image or (label and label.resolve() not in masks)
        }

    def _put(self, pairs: Pairs, id: str, item: json_lists.Listed) -> None:
        """Image and mask of a listed case, where the list says that they lie."""
        image, label = pairs.get(id, (None, None))
        # Lists made for other tools name images without the suffix of the channel.
        # One channel of a case stands for all of them.
        own = image.files if isinstance(image, Channels) else filter(None, [image])
        files = [self._place(name) for name in item.images]
        known = {path.resolve() for path in own}.issuperset(path.resolve() for path in files)
        if not known and all(path.is_file() for path in files):
            image = self._image(id, files)
        if item.label:
            label = self._at(item.label)
        if image is not None:
            pairs[id] = (image, label)

    def _described(self) -> Pairs:
        """The cases of nnU-Net's key "dataset"."""
        count = len(self._channels)
        listed = json_lists.described(self._facts, self._json, count, self.ignore)
        return {
            id: (self._image(id, [self._at(name) for name in item.images]), self._at(item.label))
            for id, item in listed.items()
        }

    def _at(self, name: str) -> Path:
        """A path of `dataset.json`: relative to it, with variables of the environment.

        Raises:
            ValueError: If there is no such file.
        """
        path = self._place(name)
        if not path.is_file():
            raise UserError(f"{self._json}: lists {name}, which is not there; fetch it")
        return path

    def _place(self, name: str) -> Path:
        return Path(self.root) / os.path.expandvars(name)

    def _image(self, id: str, files: list[Path]) -> Path | Channels:
        """One scan in its files."""
        if len(files) not in (1, len(self._channels)):
            raise UserError(
                f"{self.root}: {id} has {len(files)} files "
                f"({some([path.name for path in files])}), and dataset.json names the channels "
                f"{some([name for name, _ in self._channels])}; put missing files there, or name "
                "all channels"
            )
        if len(self._channels) == 1:
            return files[0]
        return Channels(tuple(files), len(self._channels))

    @property
    def _json(self) -> Path:
        return Path(self.root) / "dataset.json"

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        if not self._json.is_file():
            others = sorted(path.name for path in Path(self.root).glob("*.json"))
            list_of = (
                f"; MONAI's list of cases ({some(others)}?) is to be called so" if others else ""
            )
            raise FileNotFoundError(
                f"{self._json}: not there; set data.root to the folder that holds dataset.json, "
                f"imagesTr and labelsTr{list_of}"
            )
        try:
            found = json.loads(self._json.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise UserError(
                f"{self._json}: is no JSON ({error}); correct it, or copy it again"
            ) from error
        if not isinstance(found, dict) or not json_lists.are_lists(found):
            raise UserError(
                f'{self._json}: expected {{"channel_names": ..., "labels": ...}}, where `training` '
                f"is a list if it is there, and so is `validation`; got {found!r:.60}"
            )
        return found

    @functools.cached_property
    def _numbered(self) -> bool:
        """Whether names of images end in the number of a channel, as in nnU-Net, v1 included.

        What v1 says of a data set is the Decathlon's: it is known by masks without the number.
        """
        if not {"channel_names", "file_ending"}.isdisjoint(self._facts):
            return True
        images, masks = (
            {path.name.removesuffix(self._ending) for path in self._files(self._folder(name))}
            for name in ("imagesTr", "labelsTr")
        )
        return images.isdisjoint(masks) and any(f"{mask}_0000" in images for mask in masks)

    @functools.cached_property
    def _ending(self) -> str:
        """As nnU-Net v2 states it; else .nii.gz, or what all files of the folder or list have."""
        usual = ".nii.gz"
        if "file_ending" in self._facts:
            return str(self._facts["file_ending"])
        folder = self._folder("imagesTr")
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        names = names or json_lists.images(self._facts)
        seen = {end for end in (usual, ".nii", *formats.ENDINGS) for n in names if n.endswith(end)}
        return seen.pop() if len(seen) == 1 else usual

    @functools.cached_property
    def _channels(self) -> tuple[tuple[str, str], ...]:
        found = dataset_json.channels(self._facts, str(self._json))
        if not found:
            raise UserError(f"{self._json}: names no channel; add channel_names, as nnU-Net has it")
        return found

    @functools.cached_property
    def _listed(self) -> dict[str, json_lists.Listed]:
        """The Decathlon's and MONAI's lists by case; nothing where nnU-Net's own list is there.

        Of "test" those whose images are there: copies often come without. Those of `imagesTs` are
        known by their folder, but for masks of other names.
        """
        tests = self._folder("imagesTs").resolve()

        def is_used(item: json_lists.Listed) -> bool:
            places, mask = [*map(self._place, item.images)], self._place(item.label)
            renamed = mask.is_file() and mask.name != places[0].name
            there = all(place.is_file() for place in places)
            return there and (renamed or all(p.resolve().parent != tests for p in places))

        named = functools.partial(self._id, image=True)
        found = json_lists.lists(self._facts, self._json, named, is_used)
        return {id: item for id, item in found.items() if id not in self.ignore}

    def _of(self, *splits: str) -> dict[str, json_lists.Listed]:
        return {id: item for id, item in self._listed.items() if item.split in splits}

    def _folder(self, name: str) -> Path:
        return Path(self.root) / name

    def _id(self, file: str, *, image: bool) -> str:
        stem = file.removesuffix(self._ending)
        first = self._folder("imagesTr") / f"{stem}_0000{self._ending}"
        # Lists of nnU-Net v1 leave out the number of the channel, and a case may be called c_0000.
        if not image or not self._numbered or first.is_file():
            return stem
        return stem.removesuffix("_0000")

    def _files(self, folder: Path) -> list[Path]:
        if not folder.is_dir():
            return []
        return [
            path
            for path in sorted(folder.iterdir())
            if path.name.endswith(self._ending) and not path.name.startswith(".")
        ]

    def _images(self, folder: Path) -> dict[str, Path | Channels]:
        """Scans by case: of nnU-Net by names that end in the number of a channel."""
        parts: dict[str, list[Path]] = {}
        wrong = []
        for path in self._files(folder):
            stem = path.name.removesuffix(self._ending)
            match = _CHANNEL.fullmatch(stem) if self._numbered else None
            if self._numbered and (not match or int(match["number"]) >= len(self._channels)):
                wrong.append(path.name)
            else:
                parts.setdefault(match["case"] if match else stem, []).append(path)
        if wrong:
            last = len(self._channels) - 1
            which = f"to _{last:04d}, the channels" if last else "the one channel"
            raise UserError(f"{folder}: {some(wrong)}: expected <case>_0000{self._ending}, {which}")
        kept = {id: files for id, files in parts.items() if id not in self.ignore}
        return {id: self._image(id, files) for id, files in kept.items()}

    def _pairs(self, images: str, labels: str) -> Pairs:
        image = self._images(self._folder(images))
        masks = {self._id(p.name, image=False): p for p in self._files(self._folder(labels))}
        label = {id: path for id, path in masks.items() if id not in self.ignore}
        return {id: (image.get(id), label.get(id)) for id in sorted({*image, *label})}

    def _check(self, train: Pairs, test: Pairs) -> None:
        """Refuses what a silent choice would hide."""
        if self._ending not in (".nii.gz", ".nii") and not formats.ending(self._ending):
            raise UserError(
                f"{self._json}: file_ending {self._ending!r}; only NIfTI is read, and "
                f"{', '.join(formats.ENDINGS)}"
            )
        if not any(image for image, _ in train.values()):
            raise FileNotFoundError(
                f"{self._folder('imagesTr')}: no images that end in {self._ending}; "
                + self._about_images()
            )
        lonely = [f"{id} (no image)" for id, (image, _) in {**train, **test}.items() if not image]
        lonely += [f"{id} (no mask)" for id, (_, label) in train.items() if not label]
        if lonely:
            raise UserError(
                f"{self.root}: {some(lonely)}; put the missing file there, or name the case in "
                "config.data.ignore"
            )
        absent = sorted(set(self._of("train", "val")) - set(train))
        if absent:
            raise UserError(
                f"{self._json}: lists {some(absent)}, not in imagesTr; fetch it, or take it off "
                "the list"
            )
        double = sorted(set(train) & set(test))
        if double:
            raise UserError(
                f"{self.root}: {some(double)} in imagesTr and imagesTs; keep one of equal scans, "
                "and give different ones different names"
            )

    def _about_images(self) -> str:
        """What to do where there are none."""
        if not self._folder("imagesTr").is_dir() and self._folder("gt_segmentations").is_dir():
            return "this is a folder of nnUNet_preprocessed: name that of nnUNet_raw"
        return "another ending is said as `file_ending` in dataset.json"

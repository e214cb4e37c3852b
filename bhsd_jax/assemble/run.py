"""A run: its folder and config, and all that follows from config and plan, resolved once.

Needs no JAX.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bhsd_jax.assemble import data
from bhsd_jax.datasets.splits import Roles
from bhsd_jax.labels import Labels
from bhsd_jax.platform.errors import UserError
from bhsd_jax.settings import Config, Settings
from bhsd_jax.shards.store import Shards
from bhsd_jax.volume import Dataset, Plan, Shape
from bhsd_jax.windows import CascadeInput, Normalization


@dataclass(frozen=True)
class Run:
    """What the verbs that need a plan start from; `Run.of` makes it at their first line."""

    folder: Path
    config: Settings
    plan: Plan
    classes: tuple[str, ...]  # by index, background first; in binary tasks "any" for all
    patch: Shape  # D H W, what the network is trained on and applied to
    labeled: int  # patches per step, all devices together
    unlabeled: int

    @classmethod
    def of(cls, config: Config, folder: Path, plan: Plan | None = None) -> "Run":
        """Everything that config and plan say together.

        Args:
            config: Settings, or the ConfigDict they are read from.
            folder: Of the run.
            plan: None: the run's own if it has one, else the shards'.

        Raises:
            FileNotFoundError: If no plan is given and there is none.
            ValueError: If a field of the config is not valid, or does not go with the plan.
        """
        config = Settings.of(config)
        if plan is None:
            own = folder / "plan.json"
            plan = Plan.load(own if own.is_file() else data.shards_folder(config, folder))
        d, h, w = config.input.patch or plan.network.patch
        _require_plain_labels(config, plan)
        _require_no_cascade(config, plan)
        return cls(
            folder=folder,
            config=config,
            plan=plan,
            classes=(plan.classes[0], "any") if config.split.binary else plan.classes,
            patch=(d, h, w),
            labeled=config.input.labeled or plan.network.batch,
            unlabeled=config.input.unlabeled,
        )

    @property
    def labels(self) -> Labels:
        """What the values of label maps mean, and what the network is asked for."""
        plain = self.plan.labels
        return Labels(self.classes) if self.config.split.binary else plain

    @cached_property
    def normalization(self) -> Normalization:
        """The normalization of intensities in the shards: the plan's, or CT windows.

        Raises:
            ValueError: If windows are wanted of scans that the plan normalizes beforehand.
        """
        windows, plan = self.config.windows, self.plan
        if windows == "plan" and plan.repaired:
            low, mean, std, high = plan.foreground
            bounds = ((low - mean) / max(std, 1e-8),), ((high - mean) / max(std, 1e-8),)
            return Normalization(*bounds, (0.0,), (1.0,))
        if windows == "plan":
            modality = "mr" if plan.normalize_first else plan.modality
            return Normalization.from_plan(modality, plan.foreground, plan.scan_channels)
        if plan.normalize_first or plan.channels:
            raise UserError(
                "config.windows: this plan normalizes first, nothing is left in HU; 'plan'"
            )
        return Normalization.from_windows(windows)

    @cached_property
    def network_input(self) -> Normalization | CascadeInput:
        """The function from a scan as it lies in the shards to all channels of the network."""
        if not self.plan.previous_stage:
            return self.normalization
        labels = len(self.plan.classes) - 1
        return CascadeInput(self.normalization, self.plan.raw_channels, labels)

    @cached_property
    def shards(self) -> Shards:
        """The prepared cases on disk."""
        return Shards(data.shards_folder(self.config, self.folder))

    @cached_property
    def data_set(self) -> Dataset:
        """The data set as downloaded."""
        return data.data_set(self.config, self.folder)

    @cached_property
    def roles(self) -> tuple[Roles, list[str]]:
        """Case ids for training, validation and test; and a note on each wish that was adjusted."""
        return data.roles(self.config, self.folder)


def _require_plain_labels(config: Settings, plan: Plan) -> None:
    """Refuses what is not defined for regions, nor where masks leave voxels out.

    Raises:
        ValueError: Names the field.
    """
    if plan.labels.plain:
        return
    what = "regions" if plan.regions else f"a label to ignore, {plan.ignore}"
    if config.split.binary:
        raise UserError(
            f"config.split.binary merges classes, but the masks of this data set have {what}; "
            "set split.binary=False, or give it plain labels"
        )
    if config.input.unlabeled:
        raise UserError(
            f"config.input.unlabeled is {config.input.unlabeled}, but the masks of this data set "
            f"have {what}: only supervised training is defined for them; set input.unlabeled=0 and "
            "objective.name=supervised.Supervised"
        )


def _require_no_cascade(config: Settings, plan: Plan) -> None:
    """Refuses what is not defined for the second network of a cascade.

    Raises:
        ValueError: Names the field.
    """
    if not plan.previous_stage:
        return
    if config.split.binary:
        raise UserError(
            "config.split.binary merges classes, but the second network of a cascade is given the "
            "label maps of a first one with all of them; set split.binary=False"
        )
    if config.input.unlabeled:
        raise UserError(
            f"config.input.unlabeled is {config.input.unlabeled}, but only supervised training is "
            "defined for the second network of a cascade; set input.unlabeled=0 and "
            "objective.name=supervised.Supervised"
        )

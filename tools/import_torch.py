"""Imports weights trained with PyTorch as a run for `predict`.

    python tools/import_torch.py fold_0/checkpoint_final.pth runs/imported
    python tools/import_torch.py nnUNetTrainer__nnUNetPlans__3d_fullres runs/folds --folds 0 1 2
    python tools/import_torch.py nnUNetTrainer__nnUNetPlans__3d_fullres runs/all --folds all
    python tools/import_torch.py blast-ct/blast_ct/data runs/blast
    python tools/import_torch.py swin.safetensors runs/swin --reference SwinUNETR \
        --constructor '{"in_channels": 1, "out_channels": 2, "downsample": "legacy"}' \
        --patch 96 96 96 --spacing-mm 1 1 1 --axes RAS --window -100 200 --classes background IPH

A checkpoint of nnU-Net v2, the folder of a fold, or that of a model with its numbered folds needs
nothing more: network, plan and normalization come from it, and `predict` gives nnU-Net's own label
maps; of a cascade, the first stage is imported with it from the folder beside it. `--axes` alone
may be given, where a program turns scans before its network sees them. Nor does a folder of
BLAST-CT's networks with its config.json, but for a `--patch`. UNETR and SwinUNETR of MONAI,
CoTr and nnFormer (as nnFormer/synapse, /acdc, /tumor) need the rest of the options, and so
do weights of nnU-Net's networks in safetensors or npz files. A bundle of MONAI's, named by its
folder, says itself what its network is; so does its config as --constructor. .pth and its kin need
the extra `torch-import`; no pickle is executed.

    bhsd predict --config=configs/from_run.py:runs/imported --workdir=runs/imported \
        --config.predict.images=/new/scans
"""

import argparse
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_OF_MONAI = ("UNETR", "SwinUNETR")  # whose programs mirror nothing
_DESCRIPTION = (  # options that say what weights alone do not
    *("reference", "constructor", "classes", "patch", "spacing_mm", "axes", "window", "range"),
    *("clip", "mean_std", "zscore", "pad", "crop_hu", "mirror_axes", "dataset", "license"),
)


def main() -> None:
    """Reads, converts, writes; says what is wrong and exits 2 where it cannot."""
    sys.path.insert(0, str(ROOT))
    from bhsd_jax.assemble.cascade import PREVIOUS_STAGE
    from bhsd_jax.configs import common
    from bhsd_jax.verbs import import_folders, import_weights

    options = parse()
    first = None
    try:
        source, members = found(options)
        if source.plan.previous_stage:
            first = import_folders.first_stage(options.checkpoint, source, options.folds)
            first = first and replace(first, source=turned(first.source, options.axes))
        import_weights.write_run(common.get_config(), source, members, options.out)
        if first is not None:
            place = options.out / PREVIOUS_STAGE
            import_weights.write_run(common.get_config(), first.source, first.members, place)
    except (OSError, ValueError) as error:
        sys.exit(f"import: {error}")
    plan = source.plan
    patch = " x ".join(map(str, plan.network.patch))
    several = f", {len(members)} networks, mean of {source.combine}" if len(members) > 1 else ""
    print(f"{options.out}: {source.reference}{several}, patch {patch}, {', '.join(plan.classes)}")
    if plan.previous_stage and first is None:
        print(
            f"There is no {plan.previous_stage} beside it: name its label maps, or its run, with "
            "predict --previous"
        )
    elif plan.previous_stage:
        print(f"{options.out / PREVIOUS_STAGE}: {plan.previous_stage}, its first stage")
    if plan.license:
        print(f"License of these weights: {plan.license}")
    print("Research use only. Not a medical device; not for diagnosis, triage or treatment.")


def found(options: argparse.Namespace) -> tuple[Any, Any]:
    """What the network is, and weights by the name of each member.

    Raises:
        ValueError: If the path holds nothing that is known, or options are missing, or not read.
    """
    from bhsd_jax.torch_weights import bundle
    from bhsd_jax.verbs import import_folders, import_weights

    path = options.checkpoint
    if path.is_dir() and import_folders.folds(path):
        require_read(options, ("axes",), "nnU-Net's folder of a model")
        model = import_folders.from_nnunet(path, options.folds)
        return turned(model.source, options.axes), model.members
    if options.folds:
        raise ValueError(f"{path}: --folds is for nnU-Net's folder of a model; no fold_* is in it")
    config = None if options.reference else import_folders.blast_config(path)
    if config is not None:
        require_read(options, ("patch",), "BLAST-CT's networks")
        tile = options.patch and tuple(options.patch)
        model = import_folders.from_blast_ct(path, config, tile)
        return model.source, model.members
    path = import_weights.find(path)
    import_weights.require_no_v1(path)
    weights = bundle.read(path)
    if import_weights.is_nnunet(weights):
        require_read(options, ("axes",), "a checkpoint of nnU-Net")
        source = turned(import_weights.from_nnunet(weights, path), options.axes)
        import_weights.require_named_network(source, weights, path)
    else:
        source = described(options, path, weights.beside)
    return source, {"network": weights.state}


def require_read(options: argparse.Namespace, read: Collection[str], kind: str) -> None:
    """Refuses options that would change nothing.

    Raises:
        ValueError: If one is given that is not in `read`; lists all such.
    """
    given = [name for name in _DESCRIPTION if getattr(options, name) is not None]
    unread = [f"--{name.replace('_', '-')}" for name in given if name not in read]
    if unread:
        hint = "; bhsd predict has --infer.mirror_axes" * ("--mirror-axes" in unread)
        raise ValueError(
            f"{options.checkpoint}: {', '.join(unread)} given, but {kind} says that itself: leave "
            f"it out{hint}"
        )


def turned(source: Any, axes: str | None) -> Any:
    """The network with scans turned as is said, whatever its own program's reader does.

    Raises:
        ValueError: If the letters do not name three axes.
    """
    import numpy as np

    from bhsd_jax.ct import geometry

    if axes is None:
        return source
    geometry.canonical(np.eye(4), axes)
    return replace(source, plan=replace(source.plan, axes=axes))


def described(options: argparse.Namespace, path: Path, header: Any) -> Any:
    """Network and plan from the options.

    `tools/export.py` leaves the network in the header, a bundle of MONAI's in a config.

    Raises:
        ValueError: Lists the options that are missing.
    """
    from bhsd_jax.torch_weights import bundle, weights_file
    from bhsd_jax.torch_weights.recipe import recipe_of
    from bhsd_jax.verbs import import_weights

    text = options.constructor or header.get("constructor") or bundle.config_of(path)
    target, constructor = bundle.network_of(weights_file.json_of(str(text)) if text else {})
    reference = options.reference or header.get("reference") or target
    needed = {
        "--reference": reference,
        "--constructor": text,
        "--classes": options.classes,
        "--spacing-mm": options.spacing_mm,
        "--window, --clip or --zscore": options.window or options.clip or options.zscore,
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise ValueError(f"{path}: does not say it all itself; give {', '.join(missing)}")
    recipe_of(reference, constructor)  # what it lacks is said first
    foreground, windows = normalization(options)
    plan = import_weights.plan_for(
        constructor,
        classes=options.classes,
        spacing_mm=tuple(options.spacing_mm),
        axes=options.axes or "SPL",
        foreground=foreground,
        source_sha256=import_weights.digest(path),
        patch=options.patch and tuple(options.patch),
        crop_hu=options.crop_hu,
        dataset=options.dataset or "imported",
        license=options.license or "",
    )
    usual = () if reference.partition("/")[0] in _OF_MONAI else (0, 1, 2)
    axes = usual if options.mirror_axes is None else tuple(options.mirror_axes)
    return import_weights.Source(reference, constructor, plan, axes, options.pad or "air", windows)


def normalization(options: argparse.Namespace) -> tuple[Any, Any]:
    """Clip from, subtract, divide by, clip to (None: z-scores); and `config.windows`.

    Raises:
        ValueError: If a window is none, or options exclude one another.
    """
    require_one_normalization(options)
    if options.zscore:
        return None, "plan"
    if options.clip:
        (low, high), (mean, std) = options.clip, options.mean_std or (0, 1)
        return (low, mean, std, high), "plan"
    pairs = [((low + high) / 2, high - low) for low, high in options.window]
    if min(width for _, width in pairs) <= 0:
        raise ValueError(f"--window goes from low to high; got {options.window}")
    low, high = options.window[0]
    first, last = options.range or (0, 1)
    if first >= last:
        raise ValueError(f"--range goes from low to high; got {options.range}")
    if len(pairs) > 1:
        if (first, last) != (-1, 1):
            raise ValueError("several windows become -1 to 1 each: say so with --range -1 1")
        return (0.0, 0.0, 1.0, 1.0), tuple(pairs)
    scale = (high - low) / (last - first)
    return (low, low - first * scale, scale, high), "plan"


def require_one_normalization(options: argparse.Namespace) -> None:
    """Refuses options of which one would not count.

    Raises:
        ValueError: Names them.
    """
    if sum(map(bool, (options.window, options.clip, options.zscore))) > 1:
        raise ValueError("--window, --clip and --zscore exclude one another; give one")
    if options.range and not options.window:
        raise ValueError("--range is what a --window becomes; give one, or leave it out")
    if options.mean_std and not options.clip:
        raise ValueError("--mean-std goes with --clip; give both, or leave it out")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="file of weights, or folder of a fold or a model")
    add("out", type=Path, help="folder of the run to write")
    folds = "of nnU-Net's model, or `all` for fold_all; default: those with a number"
    add("--folds", nargs="+", default=(), metavar="N", help=folds)
    add(
        "--reference", help="PlainConvUNet, ResidualEncoderUNet, UNETR, SwinUNETR, CoTr, nnFormer/*"
    )
    add("--constructor", metavar="JSON", help="arguments of that class: a file, or written out")
    add("--classes", nargs="+", help="background first")
    add("--patch", type=int, nargs=3, metavar="N", help="voxels of a tile, along --axes")
    add("--spacing-mm", type=float, nargs=3, metavar="MM", help="along --axes")
    axes = "where array axes run, as RAS (MONAI), or file; default SPL, of nnU-Net its reader's"
    add("--axes", help=axes)
    two = {"type": float, "nargs": 2}
    add("--window", **two, action="append", metavar=("LOW", "HIGH"), help="HU; one per channel")
    add("--range", **two, metavar=("A", "B"), help="what one window becomes; 0 1")
    add("--clip", **two, metavar=("LOW", "HIGH"), help="HU to clip to, with --mean-std")
    add("--mean-std", **two, metavar=("MEAN", "STD"), help="subtracted, divided by; 0 1")
    scores = "every scan to zero mean and unit variance (MR)"
    add("--zscore", action="store_true", default=None, help=scores)
    add("--pad", choices=("air", "nnunet"), help="outside the scan; default air")
    add("--crop-hu", type=float, help="crop to the largest component above; default: non-zero")
    mirrored = "mirrored along in prediction; 0 1 2, none of UNETR and SwinUNETR"
    which = {"type": int, "choices": range(3), "nargs": "*"}
    add("--mirror-axes", **which, help=mirrored)
    add("--dataset", help="what it was trained on")
    add("--license", help="of the data it was trained on")
    return parser.parse_args()


if __name__ == "__main__":
    main()

"""Exports the network of a run, trained here or imported.

    python tools/export.py runs/task1 exported --to stablehlo
    python tools/export.py runs/task1 task1.safetensors --to safetensors
    python tools/export.py runs/task1 nnUNet_results/Dataset001_Head --to nnunet

StableHLO runs wherever JAX does, without this package: `exported/model.stablehlo` is one function
for CPU and CUDA, from raw intensities of a tile (with --normalized: from normalized ones) to
logits, with the weights inside (with --weights-apart: as its first argument). `exported/model.json`
says classes, in the order of the logits' channels, and whether softmax or sigmoid makes
probabilities of them (of regions also which value of a label map each writes), spacing, axes,
normalization and license.

safetensors holds the weights under the names PyTorch has, for nnU-Net's two networks and for runs
that were imported from PyTorch: `network.load_state_dict(safetensors.torch.load_file(...))`. Of
others than nnU-Net's, tensors without influence and indices that follow from the constructor are
not in it: `load_state_dict(..., strict=False)`.

nnunet writes `nnUNetTrainer__nnUNetPlans__3d_fullres`, the folder of a model with which nnU-Net v2
predicts the label maps that `predict` does, of a run that prepares scans as nnU-Net does; what
is otherwise is said, and --nearly exports such a run, too. Folds of several runs join in one
folder, by a call each. Needs the extra `torch-import`.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_READ = {  # options by what is written
    "stablehlo": ("normalized", "weights_apart"),
    "safetensors": (),
    "nnunet": ("nearly",),
}


def main() -> None:
    """Loads, converts, writes; says what is wrong and exits where it cannot."""
    sys.path.insert(0, str(ROOT))
    from bhsd_jax.configs import from_run
    from bhsd_jax.verbs import export, export_nnunet

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="folder to write; of safetensors the file")
    parser.add_argument("--to", choices=tuple(_READ), required=True)
    parser.add_argument("--checkpoint", help="best, last, or a step; default: as `predict` has it")
    parser.add_argument("--network", help="of several, such as twins or folds")
    parser.add_argument("--normalized", action="store_true", help="the input is normalized already")
    parser.add_argument("--weights-apart", action="store_true", help="weights.npz as an argument")
    nearly = "also where nnU-Net prepares scans otherwise, and labels some voxels otherwise"
    parser.add_argument("--nearly", action="store_true", help=nearly)
    options = parser.parse_args()
    for name in {name for names in _READ.values() for name in names} - {*_READ[options.to]}:
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')} changes nothing of --to {options.to}")
    try:
        config = from_run.get_config(str(options.run))
        if options.checkpoint:
            config.predict.checkpoint = options.checkpoint
        if options.network:
            config.predict.networks = (options.network,)
        if options.to == "safetensors":
            export.safetensors(config, options.run, options.out)
        elif options.to == "nnunet":
            given = config, options.run, options.out
            options.out, told = export_nnunet.folder(*given, nearly=options.nearly)
            print(told)
        else:
            export.stablehlo(
                config,
                options.run,
                options.out,
                normalize=not options.normalized,
                weights_apart=options.weights_apart,
            )
    except (OSError, ValueError) as error:
        sys.exit(f"export: {error}")
    print(f"{options.out}: written. Research use only. Not a medical device.")


if __name__ == "__main__":
    main()

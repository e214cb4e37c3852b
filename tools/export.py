"""Exports the network of a run, trained here or imported.

    python tools/export.py runs/task1 exported --to stablehlo
    python tools/export.py runs/task1 task1.safetensors --to safetensors

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
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Loads, converts, writes; says what is wrong and exits where it cannot."""
    sys.path.insert(0, str(ROOT))
    from bhsd_jax.configs import from_run
    from bhsd_jax.verbs import export

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="folder to write; safetensors: file to write")
    parser.add_argument("--to", choices=("stablehlo", "safetensors"), required=True)
    parser.add_argument("--checkpoint", help="best, last, or a step; default: as `predict` has it")
    parser.add_argument("--network", help="of several, such as twins or folds")
    parser.add_argument("--normalized", action="store_true", help="the input is normalized already")
    parser.add_argument("--weights-apart", action="store_true", help="weights.npz as an argument")
    options = parser.parse_args()
    try:
        config = from_run.get_config(str(options.run))
        if options.checkpoint:
            config.predict.checkpoint = options.checkpoint
        if options.network:
            config.predict.networks = (options.network,)
        if options.to == "safetensors":
            export.safetensors(config, options.run, options.out)
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

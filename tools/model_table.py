"""Prints what the networks of the benchmark cost on the head CT patch, as a Markdown table.

python tools/model_table.py [backbone ...] [--patch 20 320 256]

Nothing is trained, compiled or allocated; it takes half a minute. Every network is the one that
`--config=configs/supervised.py:data=bhsd,backbone=...` trains, with all its heads.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATCH = (20, 320, 256)  # what nnU-Net plans for BHSD
SPACING_MM = (5.0, 0.48828125, 0.48828125)
HEAD = """\
| backbone | patch | parameters | forward GMAC | heads | activations, GB | `remat=blocks` |
|---|---|---:|---:|---:|---:|---:|"""
NOTES = """
One patch, one channel, six classes. GMAC: multiply-adds of convolutions and matrix products, all
heads included; norms, activations and gathers are not counted. Activations: what the backward
pass keeps of one float32 patch."""


def main() -> None:
    """Reads the command line and prints the table."""
    sys.path.insert(0, str(ROOT))
    from bhsd_jax.configs.backbones import BACKBONES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbones", nargs="*", metavar="backbone", help=", ".join(BACKBONES))
    parser.add_argument("--patch", type=int, nargs=3, default=PATCH, metavar=("D", "H", "W"))
    options = parser.parse_args()
    print(HEAD)
    for name in options.backbones or BACKBONES:
        try:
            print(row(name, tuple(options.patch)), flush=True)
        except ValueError as error:
            parser.exit(2, f"{name}: {error}\n")
    print(NOTES)


def row(backbone: str, patch: tuple[int, int, int]) -> str:
    """One backbone's line.

    Raises:
        ValueError: If the backbone is not known or does not take the patch.
    """
    from bhsd_jax.assemble import wiring
    from bhsd_jax.assemble.run import Run
    from bhsd_jax.configs import supervised
    from bhsd_jax.models.cost import cost

    config = supervised.get_config(f"data=bhsd,backbone={backbone}")
    config.input.patch, config.precision = patch, "float32"
    found, planned = [], head_ct_plan()
    for config.train.remat in ("none", "blocks"):
        found.append(cost(wiring.model(Run.of(config, Path(), planned)), (1, *patch, 1)))
    plain, recomputed = found
    size = " x ".join(map(str, patch))
    kept = " | ".join(f"{one.activation_bytes / 1e9:.1f}" for one in (plain, recomputed))
    return (
        f"| `{backbone}` | {size} | {plain.parameters:,} | {plain.multiply_adds / 1e9:.3f} "
        f"| {plain.heads} | {kept} |"
    )


def head_ct_plan() -> Any:
    """BHSD's plan as far as it shapes a network."""
    from bhsd_jax.datasets.bhsd import BHSD
    from bhsd_jax.nnunet import planner
    from bhsd_jax.volume import Plan

    return Plan(
        dataset="bhsd",
        classes=BHSD(root="").classes,
        modality="ct",
        spacing_mm=SPACING_MM,
        transpose=(0, 1, 2),
        crop_hu=None,
        foreground=(0.0, 0.0, 1.0, 0.0),
        median_shape=PATCH,
        network=planner.topology(SPACING_MM, PATCH),
        source_sha256="",
    )


if __name__ == "__main__":
    main()

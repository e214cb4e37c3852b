"""The demonstration of `tools/demo`: CPS on a small, easy synthetic set, five minutes on two cores.

Easier than the paper's task in three ways, all said in the report: heads of 96 x 96 x 16 voxels
instead of 512 x 512 x 32, the generator's easy level (fresh blood at 72 HU throughout), one
foreground class.
"""

import ml_collections

from configs import common, cps


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """CPS at a size a laptop trains while one waits."""
    config = cps.get_config(arg)
    config.name = "demo"
    config.data.update(
        size=96, slices=16, easy=True, labeled=24, test=12, bleeding=16, nonbleeding=8
    )
    config.preprocess.update(spacing_mm=(10.0, 2.4, 2.4), cases_per_shard=4)
    config.split.labeled = 16
    config.input.update(patch=(8, 64, 64), labeled=2, unlabeled=2, threads=1)
    config.model.features = (8, 16, 32, 64)
    config.train.update(
        steps=300, log_every=20, validate_every=100, validate_cases=4, save_every=100
    )
    config.infer.mirror = False
    config.evaluate.update(baseline=True, bootstrap=1000)
    config.report.title = "Demonstration: hemorrhage on synthetic head CT"
    config.report.note = (
        "All scans are computer-generated, at 96 x 96 x 16 voxels instead of 512 x 512 x 32, and "
        "the network is small and was trained for minutes: the numbers show that the pipeline "
        "works, not what it reaches on patients."
    )
    if common.parse_arg(arg)["smoke"]:
        common.smoke(config)
    return config

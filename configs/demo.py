"""The demonstration of `tools/demo`: CPS on a small synthetic set, minutes on two cores.

Easier than the paper's task in three ways, all said in the report: heads of 96 x 96 x 16 voxels
instead of 512 x 512 x 32, the generator's level "large" (acute blood, 10 mL or more, outlined
exactly, little noise), one foreground class.
"""

import ml_collections

from bhsd_jax.configs import common, cps
from bhsd_jax.platform.errors import UserError


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """CPS at a size a laptop trains while one waits.

    Raises:
        ValueError: If `arg` names another optimizer and length by `recipe=fast`.
    """
    words = common.parse_arg(arg)
    if words["recipe"] == "fast":
        raise UserError("demo: it has an optimizer and a length of its own; leave out recipe=fast")
    config = cps.get_config(arg)
    config.name = "demo"
    config.data.update(
        size=96,
        slices=16,
        difficulty="large",
        labeled=100,
        test=12,
        bleeding=24,
        nonbleeding=8,
    )
    config.preprocess.update(spacing_mm=(10.0, 2.4, 2.4), cases_per_shard=8)
    config.split.labeled = 60
    config.input.update(patch=(8, 64, 64), labeled=2, unlabeled=2)
    # At 2.4 mm bone bleeds into the masks and stretches the plan's range. Instead the windows a
    # radiologist steps through: brain, subdural, bone.
    config.windows = ((40.0, 80.0), (80.0, 200.0), (600.0, 2800.0))
    # Minutes are too short to learn what all of nnU-Net's augmentation varies.
    config.augment.spatial = (
        {"name": "spatial.Affine", "rotation_p": 0.2, "scale_p": 0.2, "rotation_deg": 15.0},
        {"name": "spatial.Mirror", "p": 0.5, "axes": (2,)},
    )
    config.augment.intensity = ({"name": "intensity.GaussianNoise", "p": 0.1},)
    if config.model.name.startswith("nnunet."):
        config.model.features = (8, 16, 32, 64)
    # In a few hundred steps Adam gets further than SGD with momentum 0.99.
    config.optimizer.update(name="adam", lr=0.003, momentum=0.9)
    config.loss.update(batch_dice=True, ce_weight=0.5)
    config.objective.weight = 0.2
    config.train.update(
        steps=700, log_every=25, validate_every=350, validate_cases=8, save_every=350
    )
    config.infer.mirror = False
    config.predict.update(networks=("a", "b"), checkpoint="best")
    config.evaluate.update(baseline=True, bootstrap=1000)
    config.report.title = "Demonstration: hemorrhage on synthetic head CT"
    config.report.note = (
        "All scans are computer-generated, at 96 x 96 x 16 voxels instead of 512 x 512 x 32, with "
        "no bleed smaller than 10 mL and little noise, and the network is small and was trained "
        "for minutes: the numbers show that the pipeline works, not what it reaches on patients."
    )
    if words["smoke"]:
        common.smoke(config)
    return config

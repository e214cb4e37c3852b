"""Scores random masks with MONAI, medpy, panoptica, BraTS' and MBH-Seg's own code, for the tests.

python tools/record_published_metrics.py brats FOLDER
python tools/record_published_metrics.py others FOLDER
python tools/record_published_metrics.py medpy_0_4 .

Each in an environment of its own. `brats`: a checkout of github.com/rachitsaluja/BraTS-2023-Metrics
at 43c9052, with numpy 1.24.3, pandas 1.5.3, scipy 1.11.1, nibabel 5.1.0 and connected-components-3d
3.12.1. `others`: one of github.com/codecat0/MBH-Seg-25 at 69f3f0c, with torch, monai 1.6.1, medpy
0.5.2 and panoptica 2.1.7. `medpy_0_4`: medpy 0.4.0 with numpy 1.23.5 and scipy 1.10.1.
"""

import importlib.util
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

OUT = Path(__file__).parents[1] / "tests" / "golden"
PAIRS = 30
SHAPE = (9, 22, 24)  # D H W
SPACINGS = ((5.0, 0.5, 0.5), (1.0, 1.0, 1.0), (2.5, 0.75, 1.25), (0.8, 3.0, 0.9))  # mm
CHALLENGES = {"gli": "BraTS-GLI", "met": "BraTS-MET"}
CLASSES = 3  # of the raters' label maps, background included
LABELS = (4, 12, 10)  # D H W of them


def balls(rng, count, shape):
    """A mask of some ellipsoids."""
    mask = np.zeros(shape, bool)
    grid = np.indices(shape)
    for _ in range(count):
        center = rng.uniform(0, shape).reshape(3, 1, 1, 1)
        radius = rng.uniform(0.6, 4.5) * np.array([0.5, 1, 1]).reshape(3, 1, 1, 1)
        mask |= (((grid - center) / radius) ** 2).sum(0) < 1
    return mask


def pair(number):
    """Reference, prediction and spacing; the first three are empty on both sides or on one."""
    rng = np.random.default_rng(number)
    reference = balls(rng, int(rng.integers(1, 7)), SHAPE)
    moved = np.roll(reference, tuple(rng.integers(-1, 2, 3)), (0, 1, 2))
    kept = balls(rng, 8, SHAPE)
    predicted = (moved & ~kept) | balls(rng, int(rng.integers(0, 4)), SHAPE)
    if number in (0, 1):
        reference = np.zeros(SHAPE, bool)
    if number in (0, 2):
        predicted = np.zeros(SHAPE, bool)
    return reference, predicted, SPACINGS[number % len(SPACINGS)]


def of_medpy(reference, predicted, spacing):
    """HD95, ASD, ASSD; NaN where it refuses."""
    from medpy.metric import binary

    try:
        return [
            f(predicted, reference, voxelspacing=spacing)
            for f in (binary.hd95, binary.asd, binary.assd)
        ]
    except RuntimeError:
        return [np.nan] * 3


def of_monai(reference, predicted, spacing):
    """HD95."""
    import torch
    from monai.metrics import compute_hausdorff_distance

    y, y_pred = (torch.from_numpy(mask[None, None]) for mask in (reference, predicted))
    found = compute_hausdorff_distance(
        y_pred, y, include_background=True, percentile=95, spacing=spacing
    )
    return [float(found[0, 0])]


def of_panoptica(reference, predicted, _):
    """PQ, SQ, RQ, TP, FP, FN."""
    from panoptica import (
        ConnectedComponentsInstanceApproximator,
        InputType,
        NaiveThresholdMatching,
        Panoptica_Evaluator,
    )

    evaluator = Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=NaiveThresholdMatching(),
    )
    found = evaluator.evaluate(predicted.astype(np.uint8), reference.astype(np.uint8))
    found = found["ungrouped"]
    return [float(getattr(found, name)) for name in ("pq", "sq", "rq", "tp", "fp", "fn")]


def of_brats(module, reference, predicted, spacing):
    """Lesion-wise Dice and HD95, TP, FN, FP of the whole tumor, by challenge."""
    import nibabel

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        names = [str(Path(folder) / f"{name}.nii.gz") for name in ("pred", "gt")]
        for name, mask in zip(names, (predicted, reference), strict=True):
            affine = np.diag([*spacing[::-1], 1.0])
            image = nibabel.Nifti1Image(mask.T.astype(np.uint8) * 3, affine)
            nibabel.save(image, name)
        for challenge in CHALLENGES.values():
            found = module.get_LesionWiseResults(*names, challenge).iloc[0]
            columns = ("LesionWise_Score_Dice", "LesionWise_Score_HD95", "Num_TP", "Num_FN")
            rows.append([float(found[name]) for name in (*columns, "Num_FP")])
    return rows


def sets(number):
    """Label maps [N D H W] of raters and of answers."""
    rng = np.random.default_rng(1000 + number)

    def draw(count):
        labels = np.zeros((count, *LABELS), np.uint8)
        for label in labels:
            for index in range(1, CLASSES):
                spots = balls(rng, 2, LABELS) if rng.random() < 0.8 else np.zeros(LABELS, bool)
                label[seed[index] & ~spots] = index
                label[spots & (rng.random(LABELS) < 0.3)] = index
        return labels

    seed = [balls(rng, 3, LABELS) for _ in range(CLASSES)]
    raters, answers = draw(int(rng.integers(2, 5))), draw(int(rng.integers(1, 5)))
    if number in (0, 1):
        raters[:] = 0
    if number in (0, 2):
        answers[:] = 0
    if number == 3:
        raters[0] = 0
    return raters, answers


def of_mbhseg(module, raters, answers, multiclass):
    """GED, soft, matched, maximal and reverse maximal Dice, mean Dice over raters."""
    import torch

    masks, preds = (torch.from_numpy(side[None].astype(np.float32)) for side in (raters, answers))
    classes = int(raters.max()) + 1
    largest, reverse, match, each = module.dice_at_all(
        masks, preds, multiclass=multiclass, num_classes=classes, exclude_background=True
    )
    distance = module.generalized_energy_distance(masks, preds, num_classes=classes)
    soft = module.dice_at_thresh(masks, preds)
    return [float(v) for v in (distance, soft, match, largest, reverse, np.mean(each))]


def load(path):
    """A module from its file."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_others", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record_brats(folder):
    """Scores of every pair and challenge."""
    import pandas

    def replace(frame, old, new, inplace=False):
        """Of numbers alone: newer pandas fails on the column that holds arrays."""
        changed = frame if inplace else frame.copy()
        for name in frame.select_dtypes("number"):
            changed[name] = changed[name].where(changed[name] != old, new)
        return changed

    pandas.DataFrame.replace = replace
    module = load(folder / "metrics.py")
    return {"brats": np.array([of_brats(module, *pair(number)) for number in range(PAIRS)])}


def record_others(folder):
    """The masks, and every other score of them."""
    pairs = [pair(number) for number in range(PAIRS)]
    found = {"spacing": np.array([spacing for *_, spacing in pairs])}
    for name, side in (("reference", 0), ("predicted", 1)):
        found[name] = np.packbits(np.stack([masks[side] for masks in pairs]), axis=None)
    found["shape"] = np.array([PAIRS, *SHAPE])
    for name, score in (("medpy", of_medpy), ("monai", of_monai), ("panoptica", of_panoptica)):
        found[name] = np.array([score(*masks) for masks in pairs])
    module = load(folder / "utils" / "metrics_set.py")
    for number in range(PAIRS):
        raters, answers = sets(number)
        found[f"raters/{number}"], found[f"answers/{number}"] = raters, answers
        masks = [(side > 0).astype(np.uint8) for side in (raters, answers)]
        found[f"mbhseg/{number}"] = np.array(
            [of_mbhseg(module, *masks, False), of_mbhseg(module, raters, answers, True)]
        )
    return found


def record_medpy_0_4(_):
    """The older ASSD of every pair."""
    return {"medpy_0_4": np.array([of_medpy(*pair(number))[2:] for number in range(PAIRS)])}


def main() -> None:
    """Writes tests/golden/published_*.npz."""
    warnings.simplefilter("ignore")
    which, folder = sys.argv[1], Path(sys.argv[2])
    found = {
        "brats": record_brats,
        "others": record_others,
        "medpy_0_4": record_medpy_0_4,
    }[which](folder)
    np.savez_compressed(OUT / f"published_{which}.npz", **found)
    print({name: value.shape for name, value in found.items() if "/" not in name})
    print((OUT / f"published_{which}.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()

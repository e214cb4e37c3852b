"""`evaluate` with scores that others define, on scans whose scores are known by hand."""

import csv
import json

import numpy as np
import pytest

from bhsd_jax.configs import common
from bhsd_jax.ct import nifti
from bhsd_jax.settings import Settings
from bhsd_jax.verbs import evaluate
from bhsd_jax.verbs.scoring import Scored
from bhsd_jax.volume import Volume

CASE = "ID_aaaaaaaa_ID_0000000001"
AFFINE = np.array([[0, 0, -10, 0], [0, -10, 0, 0], [10, 0, 0, 0], [0, 0, 0, 1.0]])  # 1 mL a voxel
SHAPE = (4, 24, 24)
EDH, SAH = 1, 4


def write(path, voxels):
    nifti.write_volume(path, Volume(voxels, AFFINE, ""))


def row(value, columns, d=1):
    label = np.zeros(SHAPE, np.uint8)
    label[d, 5, columns] = value
    return label


@pytest.fixture
def tree(tmp_path):
    """A scan outlined by three raters, and the answers of two networks."""
    data, run = tmp_path / "data", tmp_path / "run"
    folder = data / "test" / CASE
    write(folder / "image.nii.gz", np.full(SHAPE, 35, np.int16))
    for number, columns in enumerate((slice(4, 8), slice(4, 8), slice(5, 8)), start=1):
        write(folder / f"label_annot_{number}.nii.gz", row(EDH, columns).astype(np.uint16))
    write(run / "predictions" / f"{CASE}.nii.gz", row(EDH, slice(6, 10)))
    write(run / "second" / f"{CASE}.nii.gz", row(EDH, slice(5, 8)) + row(SAH, slice(9, 10), 3))
    return data, run


def configure(data, *, word="mbhseg", **settings):
    config = common.get_config(f"data={word}")
    config.data.root = str(data)
    config.preprocess.processes = 1
    config.evaluate.update({"bootstrap": 20} | settings)
    return config


def table(run):
    with (run / "cases_also.csv").open(newline="") as file:
        return {line["class"]: line for line in csv.DictReader(file)}


def test_every_score_stands_under_its_name(tree):
    data, run = tree
    also = ("medpy", "monai", "brats", "panoptica", "raters")
    evaluate.run(configure(data, also=also, answers=(str(run / "second"),)), run)
    rows = table(run)
    assert set(rows) == {"EDH", "IPH", "IVH", "SAH", "SDH", "any", "all"}
    edh = {name: float(value) for name, value in rows["EDH"].items() if "_" in name}
    del edh["brats_lesion_hd95_mm"]
    # Columns 4 to 7 of the majority against 6 to 9, each voxel 10 mm: distances 20 10 0 0 twice.
    assert edh["medpy_hd95_mm"] == pytest.approx(np.percentile([20, 10, 0, 0] * 2, 95))
    assert edh["monai_hd95_mm"] == pytest.approx(np.percentile([20, 10, 0, 0], 95))
    assert edh["medpy_asd_mm"] == edh["medpy_assd_mm"] == edh["medpy_assd_0_4_mm"] == 7.5
    assert edh["brats_lesion_dice"] == pytest.approx(0.5)
    assert (edh["panoptica_pq"], edh["panoptica_fp"]) == (0.0, 1.0), "an IoU of 1/3 is no match"
    # Dice of raters 1 and 2, and of 3, with both answers: 1/2 and 6/7, and 4/7 and 1.
    assert edh["mbhseg_dice_max"] == pytest.approx((4 / 7 + 1) / 2)
    assert edh["mbhseg_dice_max_reverse"] == pytest.approx((6 / 7 * 2 + 1) / 3)
    assert rows["IVH"]["medpy_hd95_mm"] == "nan"
    assert rows["all"]["medpy_hd95_mm"] == "nan", "only raters have a row of all classes"
    found = json.loads((run / "summary.json").read_text())["also"]
    assert found["EDH"]["medpy_asd_mm"] == {"mean": pytest.approx(7.5), "n": 1}
    assert found["IVH"]["medpy_hd95_mm"] == {"mean": None, "n": 0}
    assert any("medpy_asd_mm" in line for line in evaluate.table(without_none(run)))


def without_none(run):
    def back(value):
        if isinstance(value, dict):
            return {key: back(part) for key, part in value.items()}
        return float("nan") if value is None else value

    return back(json.loads((run / "summary.json").read_text()))


def test_the_headline_does_not_change(tree):
    data, run = tree
    evaluate.run(configure(data), run)
    names = ("cases.csv", "cases_binary.csv", "summary.json")
    alone = [(run / name).read_bytes() for name in names]
    assert not (run / "cases_also.csv").exists()
    evaluate.run(configure(data, also="medpy,raters"), run)
    assert [(run / name).read_bytes() for name in names[:2]] == alone[:2]
    without = json.loads((run / "summary.json").read_text())
    assert list(without.pop("also"))[-2:] == ["any", "all"]
    assert without == json.loads(alone[2])


def test_a_binary_run_has_one_row_a_case(tree):
    data, run = tree
    config = configure(data, also=("panoptica", "raters"))
    config.split.binary = True
    evaluate.run(config, run)
    assert set(table(run)) == {"any"}


def test_tables_of_the_evaluation_before_do_not_stay_beside_the_new_ones(tree):
    data, run = tree
    evaluate.run(configure(data, also=("medpy",)), run)
    old = {"cases_also.csv", "summary_nnunet.json"}
    assert old <= {path.name for path in run.iterdir()}
    config = configure(data)
    config.split.binary = True
    evaluate.run(config, run)
    assert not old & {path.name for path in run.iterdir()}


def test_raters_need_several_masks(tree):
    data, run = tree
    config = configure(data, also=("raters",))
    config.data.rater = "1"
    with pytest.raises(ValueError, match=r"1 cases have one mask: ID_aaaaaaaa.*rater=majority"):
        evaluate.run(config, run)


def test_answers_that_are_not_there_are_named(tree):
    data, run = tree
    with pytest.raises(FileNotFoundError, match=r"config\.evaluate\.answers"):
        evaluate.run(configure(data, also=("raters",), answers=("nowhere",)), run)
    (run / "second" / f"{CASE}.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="1 cases have no prediction"):
        evaluate.run(configure(data, also=("raters",), answers=(str(run / "second"),)), run)


def test_an_unknown_name_lists_the_known_ones(tree):
    with pytest.raises(ValueError, match=r"evaluate\.also.*monai or medpy or brats"):
        Settings.of(configure(tree[0], also=("medpie",)))


def test_scores_survive_a_trip_through_a_file(tree):
    data, run = tree
    jobs = evaluate.comparisons(Settings.of(configure(data, also=("medpy", "monai"))), run)
    (scored,) = evaluate._score(jobs, 1).values()
    back = Scored.from_json(json.loads(json.dumps(scored.to_json())))
    assert repr(back.beside) == repr(scored.beside)

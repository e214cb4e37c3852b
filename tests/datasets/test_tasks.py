"""The paper's three tasks on the counts of BHSD as released."""

import dataclasses
import itertools
import json

import pytest

from bhsd_jax.configs import common, cps, supervised
from bhsd_jax.datasets import splits


@dataclasses.dataclass(frozen=True)
class Row:
    id: str
    patient: str
    split: str
    has_label: bool
    bleeding: bool | None


@pytest.fixture
def released(golden):
    return json.loads((golden / "bhsd_splits.json").read_text())


@pytest.fixture
def rows(released):
    """Every scan under a made-up name, in the order of the real ones."""
    first, second = released["same_patient"]
    made = [
        Row(f"t{i:03d}", f"t{first if i == second else i:03d}", "train", True, True)
        for i in range(released["training"])
    ]
    made += [Row(f"e{i:03d}", f"e{i:03d}", "test", True, True) for i in range(released["test"])]
    for word, bleeds in (("bleeding", True), ("nonbleeding", False)):
        made += [
            Row(f"{word[0]}{i:04d}", f"{word[0]}{i}", "unlabeled", False, bleeds)
            for i in range(released[word])
        ]
    return made


def roles(rows, word, fold=-1, **changes):
    """Roles as the verbs give them under a config's word."""
    config = common.get_config(word)
    config.split.update(fold=fold, **changes)
    return splits.roles(rows, **{k: v for k, v in config.split.items() if k != "binary"})


def letters(names):
    return {letter: sum(name[0] == letter for name in names) for letter in "tbn"}


def test_folds_of_the_official_training_scans_are_nnunets(released):
    ids = [f"t{i:03d}" for i in range(released["training"])]
    found = [[int(name[1:]) for name in val] for _, val in splits.kfold(ids)]
    assert found == released["validation"]


def test_task_1_is_nnunets_fold_but_for_the_second_scan_of_a_patient(rows, released):
    """nnU-Net validates on one scan of that patient while it trains on the other."""
    first, second = released["same_patient"]
    home = {i: fold for fold, val in enumerate(released["validation"]) for i in val}
    assert home[first] != home[second]
    home[second] = home[first]
    patient = {row.id: row.patient for row in rows}
    for fold in range(5):
        found, notes = roles(rows, "task=1", fold)
        assert [int(name[1:]) for name in found.val] == [i for i in range(96) if home[i] == fold]
        assert sorted({*found.train, *found.val}) == [f"t{i:03d}" for i in range(96)]
        assert (found.unlabeled, notes) == ((), [])
        assert len(found.test) == 96
        sides = [{patient[name] for name in part} for part in (found.train, found.val, found.test)]
        assert not any(a & b for a, b in itertools.combinations(sides, 2))


def test_task_2_adds_500_scans_that_bleed(rows):
    found, notes = roles(rows, "task=2")
    assert (len(found.train), len(found.val), len(found.test)) == (96, 0, 96)
    assert letters(found.unlabeled) == {"t": 0, "b": 500, "n": 0}
    assert notes == []


def test_task_3_asks_for_more_than_was_released_and_says_so(rows):
    found, notes = roles(rows, "task=3")
    assert letters(found.unlabeled) == {"t": 0, "b": 500, "n": 1418}
    assert notes == ["asked for 1500 unlabeled non-bleeding cases, took all 1418 there are"]


def test_the_rows_of_task_3_are_nested(rows):
    """Each row of the paper's table adds scans to the row above."""
    taken = []
    for n in (0, 500, 1000, 1418):
        found, _ = roles(rows, "task=3", nonbleeding=n)
        assert letters(found.unlabeled) == {"t": 0, "b": 500, "n": n}
        taken.append(set(found.unlabeled))
    assert all(a < b for a, b in itertools.pairwise(taken))
    assert taken[0] == set(roles(rows, "task=2")[0].unlabeled)
    alone, _ = roles(rows, "task=3", bleeding=0)
    assert set(alone.unlabeled) == taken[-1] - taken[0]


@pytest.mark.parametrize(("fewer", "more"), [(8, 16), (0.1, 0.2), (7, 0.1), (0.5, 48)])
def test_fewer_masks_are_a_subset_and_the_rest_join_the_unlabeled(rows, fewer, more):
    few, many = (roles(rows, "task=2", labeled=amount)[0] for amount in (fewer, more))
    assert set(few.train) <= set(many.train)
    assert letters(few.unlabeled) == {"t": 96 - len(few.train), "b": 500, "n": 0}
    assert few.test == many.test
    other = roles(rows, "task=2", labeled=fewer, seed=1)[0]
    assert len(other.train) == len(few.train)
    assert other.train != few.train


def test_the_word_sets_the_classes_too():
    binary = {word: cps.get_config(word).split.binary for word in ("task=1", "task=2", "task=3")}
    assert binary == {"task=1": False, "task=2": True, "task=3": True}
    assert cps.get_config().split.binary  # an experiment's own task
    assert not supervised.get_config().split.binary
    assert supervised.get_config("task=2").split.binary
    with pytest.raises(ValueError, match="task=4 is not known; choose from 1, 2, 3"):
        common.get_config("task=4")

import dataclasses
import itertools

import pytest

from bhsd_jax.datasets import splits


@dataclasses.dataclass(frozen=True)
class Row:
    id: str
    patient: str
    split: str = "train"
    has_label: bool = True
    bleeding: bool | None = None


@dataclasses.dataclass(frozen=True)
class Salted(Row):
    sorted_by: str = ""


def train_rows(count):
    return [Row(f"t{i:02d}", f"pt{i:02d}") for i in range(count)]


def unlabeled_rows(count, bleeding, letter):
    return [
        Row(f"{letter}{i}", f"p{letter}{i}", "unlabeled", False, bleeding) for i in range(count)
    ]


def everyone(found):
    return (*found.train, *found.unlabeled, *found.val, *found.test)


# sklearn.model_selection.KFold(5, shuffle=True, random_state=12345), scikit-learn 1.9.1.
VALIDATION = {
    7: [[3, 6], [0, 4], [1], [5], [2]],
    12: [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]],
}


@pytest.mark.parametrize("count", VALIDATION)
def test_folds_are_those_of_scikit_learn(count):
    ids = [f"case_{i:02d}" for i in range(count)]
    found = splits.kfold(reversed(ids))
    assert [val for _, val in found] == [tuple(ids[i] for i in fold) for fold in VALIDATION[count]]


def test_folds_of_96_have_the_sizes_nnunet_gets():
    found = splits.kfold(f"{i:03d}" for i in range(96))
    assert [(len(train), len(val)) for train, val in found] == [(76, 20)] + [(77, 19)] * 4


def test_folds_share_nothing_and_cover_everything():
    ids = {f"c{i}" for i in range(23)}
    found = splits.kfold(ids)
    assert sorted(name for _, val in found for name in val) == sorted(ids)
    assert all(set(train) | set(val) == ids and len(train) + len(val) == 23 for train, val in found)


def test_patients_with_one_scan_change_no_fold():
    ids = [f"c{i}" for i in range(17)]
    assert splits.kfold(ids, patients={name: f"p-{name}" for name in ids}) == splits.kfold(ids)


def test_later_scans_follow_the_first_one_of_their_patient():
    ids = [f"c{i:02d}" for i in range(20)]
    plain = splits.kfold(ids)
    fold_of = {name: fold for fold, (_, val) in enumerate(plain) for name in val}
    later = next(name for name in ids if fold_of[name] != fold_of["c00"])
    patients = {name: "twice" if name in ("c00", later) else name for name in ids}
    grouped = splits.kfold(ids, patients=patients)
    assert {"c00", later} <= set(grouped[fold_of["c00"]][1])
    unmoved = [sorted(set(val) - {later}) for _, val in plain]
    assert [sorted(set(val) - {later}) for _, val in grouped] == unmoved


@pytest.mark.parametrize(("ids", "message"), [("abcd", "5 folds of 4"), ("aabcdefg", "distinct")])
def test_folds_that_cannot_be_made_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        splits.kfold(ids)


def test_a_larger_labeled_subset_holds_the_smaller():
    ids = [f"c{i}" for i in range(30)]
    draws = [splits.labeled_subset(ids, amount, 3) for amount in range(1, 31)]
    assert [len(draw) for draw in draws] == list(range(1, 31))
    assert all(set(a) < set(b) for a, b in itertools.pairwise(draws))
    assert draws[-1] == splits.labeled_subset(ids, None, 3) == tuple(sorted(ids))


def test_a_labeled_subset_depends_on_the_seed_and_not_on_the_order():
    ids = [f"c{i}" for i in range(30)]
    assert splits.labeled_subset(ids, 10, 0) == splits.labeled_subset(ids[::-1], 10, 0)
    assert splits.labeled_subset(ids, 10, 0) != splits.labeled_subset(ids, 10, 1)


@pytest.mark.parametrize(
    ("amount", "count"), [(0.1, 2), (0.01, 1), (1.0, 16), (1, 1), (0.5, 8), (16, 16)]
)
def test_fractions_are_shares_and_whole_numbers_are_counts(amount, count):
    assert len(splits.labeled_subset([f"c{i}" for i in range(16)], amount, 0)) == count


@pytest.mark.parametrize("amount", [0, -1, 17, 0.0, 1.5, -0.5, True, float("nan")])
def test_amounts_that_cannot_be_drawn_are_refused(amount):
    with pytest.raises(ValueError, match="labeled_subset: "):
        splits.labeled_subset([f"c{i}" for i in range(16)], amount, 0)


def test_roles_of_a_fold_are_nnunets_fold():
    rows = [*train_rows(20), Row("x", "px", "test")]
    for fold, (train, val) in enumerate(splits.kfold(f"t{i:02d}" for i in range(20))):
        found, notes = splits.roles(rows, fold=fold, labeled=None, seed=0)
        assert (found.train, found.val, found.test, found.unlabeled) == (train, val, ("x",), ())
        assert notes == []


def test_fold_minus_one_trains_on_everything():
    found, _ = splits.roles(train_rows(20), fold=-1, labeled=None, seed=0)
    assert len(found.train) == 20
    assert found.val == ()


THREE = (
    (("t00", "t01", "t03"), ("t02",)),
    (("t02", "t03"), ("t00", "t01")),
    (("t00",), ()),
)


def test_the_folds_of_a_user_are_taken_and_counted():
    rows = [*train_rows(5), Row("x", "px", "test"), Row("u", "pu", "unlabeled", False)]
    found, notes = splits.roles(rows, fold=0, labeled=None, seed=0, folds=THREE)
    assert (found.train, found.val, found.test) == (("t00", "t01", "t03"), ("t02",), ("x",))
    assert found.unlabeled == ("u",), "t04 is in no part, so its image is not used either"
    assert notes == ["fold 0: 1 labeled cases it does not name are not used: t04"]
    found, _ = splits.roles(rows, fold=1, labeled=1, seed=0, folds=THREE)
    assert found.val == ("t00", "t01")
    assert len(found.train) == 1
    assert {*found.train, *found.unlabeled} == {"t02", "t03", "u"}
    assert splits.roles(rows, fold=2, labeled=None, seed=0, folds=THREE)[0].val == ()
    assert len(splits.roles(rows, fold=-1, labeled=None, seed=0, folds=THREE)[0].train) == 5
    with pytest.raises(ValueError, match=r"split\.fold is -1 \(none\) to 2; got 3: there are 3"):
        splits.roles(rows, fold=3, labeled=None, seed=0, folds=THREE)
    more = THREE * 3
    assert splits.roles(rows, fold=7, labeled=None, seed=0, folds=more)[0].val == ("t00", "t01")


def test_a_case_of_a_fold_that_was_not_prepared_is_said():
    _, notes = splits.roles(train_rows(2), fold=0, labeled=None, seed=0, folds=THREE)
    assert notes == ["fold 0: 2 cases it names were not prepared: t02, t03"]


def test_draws_follow_what_cases_are_sorted_by():
    """Salted ids are other ones in every folder of shards."""
    names = [f"t{i:02d}" for i in range(20)]

    def drawn(rename):
        rows = [
            Salted(rename(i), f"p{i}", "train", True, None, name) for i, name in enumerate(names)
        ]
        rows += [Salted(f"x{rename(i)}", "q", "unlabeled", False, True, f"u{i}") for i in range(9)]
        found, _ = splits.roles(rows, fold=2, labeled=5, seed=0, bleeding=4)
        back = {row.id: row.sorted_by for row in rows}
        return [{back[id] for id in part} for part in (found.train, found.val, found.unlabeled)]

    plain = drawn(lambda i: f"t{i:02d}")
    assert plain == drawn(lambda i: f"{(7 * i) % 20:02d}")
    assert plain[1] == set(splits.kfold(names)[2][1])


def test_a_marked_validation_part_wins_over_the_fold():
    rows = [*train_rows(8), Row("v1", "pv1", "val"), Row("v0", "pv0", "val", False)]
    found, notes = splits.roles(rows, fold=2, labeled=None, seed=0)
    assert found.val == ("v1",)
    assert found.train == tuple(f"t{i:02d}" for i in range(8))
    assert notes == [
        "left out 1 validation cases without a mask",
        "split.fold=2 is not drawn: the data set says which 1 cases validate",
    ]
    assert len(splits.roles(rows, fold=0, labeled=None, seed=0)[1]) == 1


def test_cases_whose_masks_are_not_used_join_the_unlabeled():
    rows = [*train_rows(20), Row("t99", "pt99", "train", False), *unlabeled_rows(2, None, "u")]
    found, _ = splits.roles(rows, fold=0, labeled=0.25, seed=0)
    assert len(found.train) == 4
    assert {"t99", "u0", "u1"} < set(found.unlabeled)
    assert sorted(everyone(found)) == sorted(row.id for row in rows)
    larger, _ = splits.roles(rows, fold=0, labeled=0.5, seed=0)
    assert set(found.train) < set(larger.train)
    assert found.val == larger.val


def test_bleeding_and_nonbleeding_cases_are_counted_apart_and_nested():
    rows = [
        *train_rows(5),
        *unlabeled_rows(9, True, "b"),
        *unlabeled_rows(9, False, "n"),
        *unlabeled_rows(2, None, "u"),
    ]

    def letters(**counts):
        found, notes = splits.roles(rows, fold=-1, labeled=None, seed=4, **counts)
        unknown = [note for note in notes if "not known whether they bleed" in note]
        assert notes == unknown
        assert bool(unknown) == ("bleeding" in counts)
        return found.unlabeled

    everything = letters()
    assert len(everything) == 20
    some = letters(bleeding=3, nonbleeding=5)
    assert [name[0] for name in some] == list("bbbnnnnn")  # the unknown only with all bleeding
    assert set(some) < set(letters(bleeding=4, nonbleeding=5)) < set(everything)
    assert [name[0] for name in letters(nonbleeding=0)] == list("bbbbbbbbbuu")


def test_asking_for_more_than_there_is_takes_all_and_says_so():
    rows = [*train_rows(5), *unlabeled_rows(3, True, "b"), *unlabeled_rows(2, False, "n")]
    found, notes = splits.roles(rows, fold=-1, labeled=None, seed=0, bleeding=7, nonbleeding=2)
    assert found.unlabeled == ("b0", "b1", "b2", "n0", "n1")
    assert notes == ["asked for 7 unlabeled bleeding cases, took all 3 there are"]


def test_scans_of_which_nobody_knows_whether_they_bleed_are_said_to_be_left_out():
    rows = [*train_rows(5), *unlabeled_rows(40, None, "u")]
    for counts in ({"bleeding": 500, "nonbleeding": 0}, {"bleeding": 0, "nonbleeding": 9}):
        found, notes = splits.roles(rows, fold=-1, labeled=3, seed=0, **counts)
        assert len(found.unlabeled) == 2  # whose masks are not used
        assert "left out 40 unlabeled cases" in notes[-1]
        assert "split.bleeding=None" in notes[-1]
    found, notes = splits.roles(rows, fold=-1, labeled=3, seed=0, bleeding=0, nonbleeding=0)
    assert (len(found.unlabeled), notes) == (2, [])  # none were asked for


def test_no_patient_is_validated_and_tested():
    rows = [*train_rows(20), *(Row(f"e{i}", f"pt{i:02d}", "test") for i in range(5))]
    for fold in range(-1, 5):
        found, notes = splits.roles(rows, fold=fold, labeled=None, seed=0)
        assert len(found.train) + len(found.val) == 15
        assert not {f"t{i:02d}" for i in range(5)} & set(found.val)
        assert len(found.val) == (0 if fold < 0 else 3)
        assert [note[:24] for note in notes] == ["dropped 5 training cases"]
    rows = [*train_rows(4), Row("v0", "w", "val"), Row("v1", "x", "val"), Row("e", "x", "test")]
    found, notes = splits.roles(rows, fold=0, labeled=None, seed=0)
    assert found.val == ("v0",)
    assert notes == ["dropped 1 validation cases whose patient is tested on: v1"]


def test_no_patient_is_trained_on_and_tested():
    rows = [
        *train_rows(10),
        Row("x", "pt03", "test"),
        Row("v", "pv", "val"),
        Row("u0", "pv", "unlabeled", False),
        Row("u1", "pt03", "unlabeled", False),
        Row("u2", "free", "unlabeled", False),
    ]
    found, notes = splits.roles(rows, fold=0, labeled=None, seed=0)
    assert "t03" not in everyone(found)
    assert found.unlabeled == ("u2",)
    assert notes == [
        "dropped 1 training cases whose patient is validated or tested on: t03",
        "dropped 2 unlabeled cases whose patient is validated or tested on: u0, u1",
    ]


def test_scans_of_one_patient_stay_on_one_side_of_a_fold():
    rows = [Row(f"t{i:02d}", f"p{i // 2}") for i in range(20)]
    patient = {row.id: row.patient for row in rows}
    for fold in range(5):
        found, notes = splits.roles(rows, fold=fold, labeled=None, seed=0)
        held_out = {patient[name] for name in found.val}
        assert not held_out & {patient[name] for name in found.train}
        assert notes == []


@pytest.mark.parametrize("others", [0, 1])
def test_a_fold_that_is_empty_since_patients_have_many_scans_is_refused(others):
    """As where an export has called all patients "ANONYMOUS"."""
    rows = [Row(f"t{i:02d}", "ANONYMOUS" if i >= others else "p") for i in range(20)]
    said, whole = [], []
    for fold in range(5):
        try:
            whole.append(splits.roles(rows, fold=fold, labeled=None, seed=0)[0])
        except ValueError as error:
            said.append(str(error))
    assert (len(said), len(whole)) == ((3, 2) if others else (5, 0))
    assert all(one.train and one.val for one in whole)
    assert all(f"20 labeled cases are of {1 + others} patients" in text for text in said)
    assert all("Is the patient's id the same in all files?" in text for text in said)
    assert len(splits.roles(rows, fold=-1, labeled=None, seed=0)[0].train) == 20


def test_roles_do_not_depend_on_the_order_of_rows():
    rows = [*train_rows(20), *unlabeled_rows(9, True, "b"), *unlabeled_rows(9, False, "n")]
    arguments = {"fold": 1, "labeled": 5, "seed": 2, "bleeding": 4, "nonbleeding": 3}
    assert splits.roles(rows, **arguments) == splits.roles(rows[::-1], **arguments)


@pytest.mark.parametrize(
    ("rows", "changed", "message"),
    [
        ([Row("a", "p", "training")], {}, "split is one of train, val, test, unlabeled"),
        ([Row("a", "p"), Row("a", "q")], {}, "distinct"),
        ([Row("a", "p")], {"fold": 5}, "fold is -1"),
        ([Row("a", "p")], {"bleeding": -1}, "bleeding is a count"),
        ([Row("a", "p")], {"fold": 0}, "5 folds of 1"),
        ([Row("a", "p")], {"labeled": 2}, "2 of 1 cases"),
    ],
)
def test_rows_and_requests_that_make_no_sense_are_refused(rows, changed, message):
    with pytest.raises(ValueError, match=message):
        splits.roles(rows, **{"fold": -1, "labeled": None, "seed": 0, **changed})

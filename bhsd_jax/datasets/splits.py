"""Who trains, who validates, who is tested, and whose masks are used: a pure function of a seed."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, runtime_checkable

import numpy as np

from bhsd_jax.platform.errors import UserError

FOLDS = 5
_SPLITS = ("train", "val", "test", "unlabeled")


@runtime_checkable
class Candidate(Protocol):
    """What has to be known of a case to give it a role."""

    @property
    def id(self) -> str: ...
    @property
    def patient(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def has_label(self) -> bool: ...
    @property
    def bleeding(self) -> bool | None: ...


@dataclass(frozen=True)
class Roles:
    """Ids by use, each sorted; no patient of `val` or `test` is in `train` or `unlabeled`.

    Nor is one of `test` in `val`, which chooses checkpoints and temperatures.
    """

    train: tuple[str, ...]  # image and mask
    unlabeled: tuple[str, ...]  # image only, whether or not a mask exists
    val: tuple[str, ...]
    test: tuple[str, ...]


def kfold(
    ids: Iterable[str],
    *,
    folds: int = FOLDS,
    seed: int = 12345,
    patients: Mapping[str, str] | None = None,
    order: Mapping[str, str] | None = None,
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Splits ids into training and validation part, `folds` times, as nnU-Net does.

    The order in which ids come in does not matter: they are sorted, by `order` if it is given. With
    `patients` (id to patient), all scans of a patient go to the fold of the one whose id sorts
    first; where every patient has one scan, that changes nothing.

    Raises:
        ValueError: If there are fewer ids than folds, or an id twice.

    Source: nnU-Net v2.8.1, which calls `sklearn.model_selection.KFold(5, shuffle=True,
    random_state=12345)` on the sorted ids (scikit-learn 1.9).
    """
    names = _distinct(ids, order)
    if not 2 <= folds <= len(names):
        raise UserError(
            f"kfold: {folds} folds of {len(names)} labeled cases; needs 2 folds or more and at "
            "least one case per fold (config.split.fold = -1 trains without a validation part)"
        )
    # The legacy generator, because scikit-learn uses it.
    shuffled = np.random.RandomState(seed).permutation(len(names))
    fold_of = np.empty(len(names), dtype=int)
    for fold, members in enumerate(np.array_split(shuffled, folds)):
        fold_of[members] = fold
    if patients is not None:
        first: dict[str, int] = {}
        for index, name in enumerate(names):
            fold_of[index] = first.setdefault(patients[name], int(fold_of[index]))
    return [
        (
            tuple(name for name, own in zip(names, fold_of, strict=True) if own != fold),
            tuple(name for name, own in zip(names, fold_of, strict=True) if own == fold),
        )
        for fold in range(folds)
    ]


def labeled_subset(
    ids: Iterable[str],
    amount: int | float | None,
    seed: int = 0,
    order: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Draws `amount` of the ids; of two draws with one seed, the larger holds the smaller.

    Args:
        ids: In any order; the result is sorted.
        amount: A whole number counts, a fraction in (0, 1] is a share (rounded, at least one id);
            None takes all. Note 1 is one id and 1.0 is all of them.
        seed: Of the draw.
        order: What ids are sorted by before; None: by themselves.

    Raises:
        ValueError: If the amount is not positive, above what there is, or neither of the two kinds.
    """
    names = _distinct(ids, order)
    if amount is None:
        return tuple(sorted(names))
    if isinstance(amount, Integral) and not isinstance(amount, bool):
        count = int(amount)
    elif isinstance(amount, float) and 0 < amount <= 1:
        count = max(1, round(amount * len(names)))
    else:
        raise UserError(
            "labeled_subset: split.labeled is a count such as 8, a share in (0, 1] such as 0.1, or "
            f"None for all masks; got {amount!r}"
        )
    if not 0 < count <= len(names):
        raise UserError(
            f"labeled_subset: {amount} of {len(names)} cases cannot be drawn: split.labeled is of "
            "cases with a mask that may train, those that validate or are tested left out; give 1 "
            f"to {len(names)}, or None for all"
        )
    return _draw(names, count, (seed,))


def roles(
    rows: Sequence[Candidate],
    *,
    fold: int,
    labeled: int | float | None,
    seed: int,
    bleeding: int | None = None,
    nonbleeding: int | None = None,
    folds: Sequence[tuple[Sequence[str], Sequence[str]]] = (),
) -> tuple[Roles, list[str]]:
    """Gives every case its use; says in words what could not be done as asked.

    Cases marked "val" are the validation part, and `fold` is then ignored; without any, it is that
    fold of the labeled training cases (-1: none). `folds` are a user's own, training and validation
    cases of each, in place of nnU-Net's five; labeled cases that one does not name are not used.
    `labeled` of the others train; the images of the rest join the unlabeled ones, as do training
    cases without a mask. Of the cases marked "unlabeled", `bleeding` and `nonbleeding` say how many
    known as such to take, None all; those of which it is not known are taken only while `bleeding`
    is None. All draws are nested.

    Raises:
        ValueError: If an id comes twice, a split or the fold is not known, or `labeled` or a count
            cannot be drawn.
    """
    _check(rows, fold, len(folds) or FOLDS, {"bleeding": bleeding, "nonbleeding": nonbleeding})
    notes: list[str] = []
    patient = {row.id: row.patient for row in rows}
    order = _order(rows)
    test = tuple(sorted(row.id for row in rows if row.split == "test"))
    tested = {patient[name] for name in test}
    trainable = {row.id for row in rows if row.split == "train" and row.has_label}
    # Before a fold is drawn of them, so that none of it is lost.
    trainable = list(_without(tested, trainable, patient, "training", notes))
    if folds and fold >= 0 and not any(row.split == "val" for row in rows):
        trainable, val = _given(folds[fold], set(trainable), fold, notes)
    else:
        val = _validation(rows, trainable, fold, patient, order, notes)
        val = _without(tested, set(val), patient, "validation", notes)
    held_out = tested | {patient[name] for name in val}
    trainable = _without(held_out, set(trainable) - set(val), patient, "training", notes)
    train = labeled_subset(trainable, labeled, seed, order)
    unmasked = {row.id for row in rows if row.split == "train" and not row.has_label}
    spare = {row.id for row in rows if row.split == "unlabeled"}
    spare = set(_without(held_out, spare, patient, "unlabeled", notes))
    unmasked = set(_without(held_out, unmasked, patient, "unmasked training", notes))
    pool = sorted((row for row in rows if row.id in spare), key=lambda row: order[row.id])
    taken = _by_bleeding(pool, bleeding, nonbleeding, seed)
    for word, asked, got in taken.short:
        notes.append(f"asked for {asked} unlabeled {word} cases, took all {got} there are")
    if taken.unknown and (bleeding or nonbleeding):
        notes.append(
            f"left out {taken.unknown} unlabeled cases of which it is not known whether they "
            "bleed; split.bleeding=None takes them, too, and scan_labels.csv may say it "
            "(data=bhsd, folder and dicom)"
        )
    unlabeled = (set(trainable) - set(train)) | unmasked | taken.ids
    return Roles(train, tuple(sorted(unlabeled)), val, test), notes


def _given(
    parts: tuple[Sequence[str], Sequence[str]], there: set[str], fold: int, notes: list[str]
) -> tuple[list[str], tuple[str, ...]]:
    """Trainable cases, and of them those that validate, as a user's fold names them."""
    train, val = (sorted(there & set(names)) for names in parts)
    named = {*parts[0], *parts[1]}
    for cases, what in (
        (sorted(named - there), "cases it names were not prepared"),
        (sorted(there - named), "labeled cases it does not name are not used"),
    ):
        if cases:
            more = " ..." if len(cases) > 5 else ""
            notes.append(f"fold {fold}: {len(cases)} {what}: {', '.join(cases[:5])}{more}")
    return [*train, *val], tuple(val)


def _validation(
    rows: Sequence[Candidate],
    trainable: list[str],
    fold: int,
    patient: Mapping[str, str],
    order: Mapping[str, str],
    notes: list[str],
) -> tuple[str, ...]:
    marked = [row for row in rows if row.split == "val"]
    if marked:
        val = sorted(row.id for row in marked if row.has_label)
        if len(val) < len(marked):
            notes.append(f"left out {len(marked) - len(val)} validation cases without a mask")
        if fold > 0:
            notes.append(
                f"split.fold={fold} is not drawn: the data set says which {len(val)} cases validate"
            )
        return tuple(val)
    if fold < 0 or not trainable:
        return ()
    train, val = kfold(trainable, patients=patient, order=order)[fold]
    if not (train and val):
        people = len({patient[name] for name in trainable})
        raise UserError(
            f"config.split.fold={fold} leaves no {'validation' if train else 'training'} case: the "
            f"{len(trainable)} labeled cases are of {people} patients, and all of a patient are on "
            "one side. Is the patient's id the same in all files? Else choose another fold, or -1 "
            "for no validation"
        )
    return val


def _without(
    held_out: set[str], ids: set[str], patient: Mapping[str, str], use: str, notes: list[str]
) -> tuple[str, ...]:
    """Ids of patients that are not held out, sorted; notes what was dropped."""
    kept = tuple(sorted(name for name in ids if patient[name] not in held_out))
    if len(kept) < len(ids):
        gone = sorted(ids - set(kept))
        held = "tested" if use == "validation" else "validated or tested"
        notes.append(
            f"dropped {len(gone)} {use} cases whose patient is {held} on: "
            + ", ".join(gone[:5])
            + (" ..." if len(gone) > 5 else "")
        )
    return kept


@dataclass(frozen=True)
class _Taken:
    ids: set[str]
    unknown: int  # that were not taken, as it is not known whether they bleed
    short: list[tuple[str, int, int]]  # of what, asked, got


def _by_bleeding(
    rows: Sequence[Candidate], bleeding: int | None, nonbleeding: int | None, seed: int
) -> _Taken:
    unknown = {row.id for row in rows if row.bleeding is None}
    ids, left = (set(unknown), 0) if bleeding is None else (set(), len(unknown))
    short = []
    for stream, word, bleeds, asked in (
        (1, "bleeding", True, bleeding),
        (2, "non-bleeding", False, nonbleeding),
    ):
        choices = tuple(row.id for row in rows if row.bleeding is bleeds)
        if asked is not None and asked > len(choices):
            short.append((word, asked, len(choices)))
        count = len(choices) if asked is None else min(asked, len(choices))
        ids.update(_draw(choices, count, (seed, stream)))
    return _Taken(ids, left, short)


def _draw(names: tuple[str, ...], count: int, seed: tuple[int, ...]) -> tuple[str, ...]:
    order = np.random.default_rng(seed).permutation(len(names))
    return tuple(sorted(names[index] for index in order[:count]))


def _order(rows: Sequence[Candidate]) -> dict[str, str]:
    """What ids are sorted by: what their cases say (`Case.sorted_by`), if all do."""
    told = {row.id: str(getattr(row, "sorted_by", "")) for row in rows}
    return told if all(told.values()) else {name: name for name in told}


def _distinct(ids: Iterable[str], order: Mapping[str, str] | None = None) -> tuple[str, ...]:
    names = sorted(ids)
    twice = sorted({a for a, b in itertools.pairwise(names) if a == b})
    if twice:
        raise UserError(f"splits: ids must be distinct; twice or more: {', '.join(twice[:5])}")
    return tuple(names if order is None else sorted(names, key=lambda name: order[name]))


def _check(
    rows: Sequence[Candidate], fold: int, folds: int, counts: Mapping[str, int | None]
) -> None:
    _distinct(row.id for row in rows)
    unknown = sorted({row.split for row in rows} - set(_SPLITS))
    if unknown:
        raise UserError(f"roles: split is one of {', '.join(_SPLITS)}; got {', '.join(unknown)}")
    if fold not in range(-1, folds):
        raise UserError(
            f"config.split.fold is -1 (none) to {folds - 1}; got {fold}: there are {folds} folds, "
            "of a splits_final.json or drawn as nnU-Net draws them"
        )
    for name, count in counts.items():
        if count is not None and count < 0:
            raise UserError(f"roles: {name} is a count or None; got {count}")

"""Scans that a run was trained on are never scored as held out, whatever has changed since."""

import dataclasses
import json

import pytest
from tiny_run import PLAN

from bhsd_jax.assemble import data, ensemble, held_out, pretrained
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import common
from bhsd_jax.datasets import splits_file
from bhsd_jax.platform import files
from bhsd_jax.settings import Settings
from bhsd_jax.shards.store import Entry, write_index
from bhsd_jax.train import checkpoint_files
from bhsd_jax.verbs import calibrate, evaluate
from bhsd_jax.verbs.chosen_scans import find_scans
from bhsd_jax.volume import Case

NAMES = tuple(f"c{i:02}" for i in range(20))
ADDED = tuple(f"a{i:02}" for i in range(5))


def index(folder, train=NAMES, test=("t1", "t2"), **plan):
    """What of shards says whose scans they are; a plan with the digest of these."""
    source = " ".join(sorted((*train, *test)))
    plan = dataclasses.replace(PLAN, **{"source_sha256": source} | plan)
    files.write_json(folder / "shards" / "plan.json", plan.to_json())
    row = {"has_label": True, "bleeding": None, "shape": (4, 4, 4), "voxels": (), "volume_ml": ()}
    rows = [(name, "train") for name in train] + [(name, "test") for name in test]
    entries = [
        Entry(id=name, patient=name, split=split, **row, shard="s", record=0)
        for name, split in rows
    ]
    write_index(folder / "shards", entries)


def trained(folder, fold=0):
    """A run with what its training leaves beside the arrays."""
    index(folder)
    config = common.get_config()
    config.split.fold = fold
    files.write_json(folder / "config.json", config.to_dict())
    files.write_json(folder / "plan.json", json.loads((folder / "shards/plan.json").read_text()))
    opened = ensemble.run_of(folder)
    keep(folder, opened, roles=held_out.record(opened.roles[0], {}))
    return opened


def keep(folder, opened, **roles):
    place = folder / "checkpoints"
    checkpoint_files.make_room(place, 1)
    kept = {"config": opened.config.to_dict(), "plan": opened.plan.to_json(), "input": {}}
    checkpoint_files.finish(place, 1, None, kept | roles)


def asked(opened, split):
    predict = dataclasses.replace(opened.config.predict, split=split)
    return dataclasses.replace(opened.config, predict=predict)


def test_weights_that_have_seen_what_is_held_out_are_told(run, tmp_path, caplog):
    """As of a run of another fold: what validates now has trained then."""
    for fold, told in ((0, False), (1, True)):
        config = common.get_config()
        config.split.fold = fold
        config.preprocess.shards = str(run.folder / "shards")
        config.train.init_from = str(run.folder)
        pretrained.warn_of_seen(Run.of(config, tmp_path / "next", run.plan))
        words = "trained on 4 of the 4 validation scans, whose scores would be too good"
        assert (words in caplog.text) == told
    assert "test scans" not in caplog.text


def test_nothing_is_told_of_a_run_of_which_weights_and_config_alone_were_kept(
    run, tmp_path, caplog
):
    """As one that a colleague sent: it trained, and then asked to prepare a data set."""
    config = common.get_config()
    config.split.fold = 1
    config.preprocess.shards = str(run.folder / "shards")
    config.train.init_from = str(tmp_path / "sent")
    sent = common.get_config()
    sent.preprocess.shards = "/not/here"
    files.write_json(tmp_path / "sent" / "config.json", sent.to_dict())
    pretrained.warn_of_seen(Run.of(config, tmp_path / "next", run.plan))
    assert caplog.text == ""


def test_classes_in_no_mask_that_trains_are_told(tmp_path):
    """As where few masks are drawn; a binary network needs any of them."""
    index(tmp_path)
    path = tmp_path / "shards" / "index.json"
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows["entries"]):
        row["voxels"] = [9] + [int(number == k) for k in range(1, len(PLAN.classes))]
    path.write_text(json.dumps(rows))
    config = common.get_config()
    for labeled, binary, told in ((None, False, ""), (1, False, "1 masks"), (1, True, "1 masks")):
        config.split.update(fold=-1, binary=binary)
        config.split.labeled = labeled
        roles, notes = data.roles(Settings.of(config), tmp_path)
        seen = {k for k, name in enumerate(NAMES[: len(PLAN.classes)]) if name in roles.train} - {0}
        if not told or (binary and seen):
            assert notes == []
        else:
            (note,) = notes
            lacking = ", ".join(n for k, n in enumerate(PLAN.classes) if k and k not in seen)
            assert f"none of the 1 masks that train has {lacking}: a network" in note


@pytest.fixture
def run(tmp_path, monkeypatch):
    opened = trained(tmp_path / "run")

    class Small:
        name, classes, modality, license = PLAN.dataset, PLAN.classes, "ct", ""

        def cases(self):
            for name in (*NAMES, *ADDED, "t1", "t2", "t3"):
                yield Case(name, name, tmp_path / "scan", tmp_path / "mask", "train")

    monkeypatch.setattr(data, "data_set", lambda config, workdir: Small())
    return opened


def ids(opened, split="val"):
    return tuple(case.id for case in find_scans(asked(opened, split), opened.folder))


def test_a_training_that_has_begun_takes_no_other_weights_to_begin_with(tmp_path):
    """It went on as it was, and its config.json said that it had begun with them."""
    opened = trained(tmp_path)

    def go_on(init_from, saved):
        training = dataclasses.replace(opened.config.train, init_from=init_from)
        config = dataclasses.replace(opened.config, train=training)
        pretrained.require_begun_so(dataclasses.replace(opened, config=config), saved, 40)

    for asked, saved in (("", ""), ("", "runs/a"), ("runs/a", "runs/a/")):
        go_on(asked, saved)
    # Copied to the disk of each job, whose folder is called by its number; and another home folder.
    for moved in ("/scratch/1002/a", str(tmp_path / "runs" / "a")):
        go_on(moved, "/scratch/1001/a")
    there = tmp_path / "there" / "a"
    there.mkdir(parents=True)
    with pytest.raises(ValueError, match="leave it out"):
        go_on("/scratch/1002/a", str(there))
    go_on(str(tmp_path / "runs" / ".." / "there" / "a"), str(there))
    with pytest.raises(ValueError, match="has trained 40 steps, which began with random weights"):
        go_on("runs/b", "")
    with pytest.raises(ValueError, match=r"began with runs/a; leave it out .* another --workdir"):
        go_on("runs/b", "runs/a")


def test_a_word_for_the_data_set_that_was_left_out_is_told(tmp_path):
    """`predict` would look for the scans in a generated set, and say to prepare that instead."""
    config = trained(tmp_path).config
    assert config.data["name"] == "synthetic.Synthetic"
    (note,) = data.on_other_scans(config, tmp_path, "BHSD")
    assert note.startswith(f"config.data is synthetic, but the scans in {tmp_path / 'shards'}")
    assert data.on_other_scans(config, tmp_path, "synthetic") == []
    msd = dataclasses.replace(config, data={"name": "msd.MSD", "root": "nowhere"})
    assert data.on_other_scans(msd, tmp_path, "Task04") == [], "whose files would have to be asked"


def test_scans_that_were_added_make_every_verb_refuse_the_folds_of_today(run):
    assert ids(run) == run.roles[0].val
    assert ids(run, "test") == ("t1", "t2")
    index(run.folder, (*NAMES, *ADDED))
    cases = {case.id: case for case in data.data_set(run.config, run.folder).cases()}
    for score in (
        lambda: ids(run),
        lambda: evaluate._members(run.config, run.folder, cases, "val"),
        lambda: calibrate.run(run.config, run.folder),
    ):
        with pytest.raises(ValueError, match=r"val is not what .* held out .*masks were added"):
            score()
    assert ids(run, "test") == ("t1", "t2"), "the same as then"
    index(run.folder, dataset="another")
    assert len(ids(run)) == 4, "of another data set it has seen nothing"


def test_of_a_folder_elsewhere_it_is_said_that_it_may_be_the_same(run, caplog):
    mine = {"config": run.config.to_dict() | {"data": {"root": "/mine"}}, "input": {}}
    mine |= {"plan": run.plan.to_json() | {"dataset": "folder"}}
    mine |= {"roles": held_out.record(run.roles[0], {})}
    place = run.folder / "checkpoints"
    checkpoint_files.make_room(place, 2)
    checkpoint_files.finish(place, 2, None, mine)
    index(run.folder, NAMES[:10], dataset="folder")
    assert len(ids(run)) == 2
    assert "lie elsewhere than those that" in caplog.text


def test_folds_of_a_user_that_came_since_are_noticed_though_the_plan_is_the_same(run):
    splits_file.keep(run.folder / "shards", ((NAMES[4:], NAMES[:4]),))
    with pytest.raises(ValueError, match=r"held out of its training: splits_final\.json"):
        ids(run)
    splits_file.keep(run.folder / "shards", ())
    assert ids(run) == run.roles[0].val


def test_test_scans_may_be_added_but_not_taken_from_the_training(run):
    index(run.folder, test=("t1", "t2", "t3"))
    assert ids(run, "test") == ("t1", "t2", "t3")
    index(run.folder, NAMES[1:], test=("t1", "t2", NAMES[0]))
    with pytest.raises(ValueError, match="split test is not what this run held out"):
        ids(run, "test")


def test_of_older_versions_and_imported_weights_is_compared_what_can_be(run):
    keep(run.folder, run)
    assert ids(run) == run.roles[0].val
    index(run.folder, (*NAMES, *ADDED))
    with pytest.raises(ValueError, match="masks were added"):
        ids(run)
    assert ids(run, "test") == ("t1", "t2")
    assert ensemble.seen(run, [run.folder], ("t1", "t2")) == {}, "test scans are never trained on"
    index(run.folder)
    split = dataclasses.replace(run.config.split, fold=1)  # as an older version let it be changed
    with pytest.raises(ValueError, match=r"split\.fold \(0 -> 1\)"):
        find_scans(dataclasses.replace(asked(run, "val"), split=split), run.folder)
    (run.folder / "checkpoints" / "1" / "input.json").unlink()
    index(run.folder, (*NAMES, *ADDED))
    assert len(ids(run)) == 5, "what imported weights were trained on is not known"


def test_what_further_runs_have_seen_goes_by_what_they_were_trained_on(run, tmp_path):
    val = run.roles[0].val
    seed, fold = trained(tmp_path / "seed"), trained(tmp_path / "fold1", fold=1)
    both = (seed.folder, fold.folder)
    assert ensemble.seen(run, both, val) == {str(fold.folder): len(val)}
    assert ensemble.seen(run, both, ("t1", "t2")) == {}
    new = next(name for name in NAMES if name not in (*val, *fold.roles[0].val))
    assert ensemble.seen(run, both, (new, fold.roles[0].val[0])) == dict.fromkeys(
        map(str, both), 2
    ) | {str(fold.folder): 1}
    for other in both:
        index(other, (*NAMES, *ADDED))
    assert ensemble.seen(run, both, val) == {str(fold.folder): len(val)}
    today = (ADDED[0], *val)
    assert ensemble.seen(run, both, today) == dict.fromkeys(map(str, both), len(today))
    (seed.folder / "shards" / "index.json").unlink()
    assert ensemble.seen(run, both[:1], val) == {}, "its checkpoints say so"
    assert ensemble.seen(run, both[:1], today) == {str(seed.folder): len(today)}


def test_scans_of_two_trainings_in_one_are_in_neither_record(run):
    roles = run.roles[0]
    first = held_out.record(roles, {})
    assert (
        held_out.record(dataclasses.replace(roles, train=(), unlabeled=roles.train), first) == first
    )
    second = held_out.record(dataclasses.replace(roles, train=roles.train[1:]), first)
    assert second == first | {"trained": None}
    assert held_out.record(roles, second)["trained"] is None

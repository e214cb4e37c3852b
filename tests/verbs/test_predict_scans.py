"""Scans whose steps run side by side: order, errors of every step, disks that take no more."""

import contextlib
import csv
import dataclasses
import errno
import json
import logging
import threading
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tiny_run
from test_predict import head, threshold_predictor, thresholds, upright

from bhsd_jax.assemble.measured import ScanVolumes
from bhsd_jax.assemble.origins import Origins
from bhsd_jax.assemble.predictor import Predictor, said_of
from bhsd_jax.assemble.underway import Stopwatch
from bhsd_jax.infer.sliding import SlidingWindow
from bhsd_jax.platform import faults, files
from bhsd_jax.platform.errors import UserError
from bhsd_jax.verbs import predict_scans, review
from bhsd_jax.verbs.predict_scans import Scans, predict_all
from bhsd_jax.volume import Case, Series

WAIT_S = 30.0  # of a test that has failed: nothing is measured in seconds
STEPS = ("prepare", "infer", "write")


def full(path="label.nii.gz"):
    return faults.WriteError(errno.ENOSPC, "No space left on device", path)


class Events:
    """What the steps of the scans have come to; `on` lets one go on when others have come."""

    def __init__(self, on=(), errors=(), there=()):
        self.said, self.changed = [], threading.Condition()
        self.on, self.errors, self.there = dict(on), dict(errors), set(there)

    def say(self, event):
        with self.changed:
            self.said.append(event)
            self.changed.notify_all()

    def wait_for(self, *events):
        with self.changed:
            come = self.changed.wait_for(lambda: set(events) <= set(self.said), WAIT_S)
        assert come, f"{events} never came; {self.said}"

    def step(self, event, check=lambda: None):
        self.say(event)
        self.wait_for(*self.on.get(event, ()))
        check()
        if event in self.errors:
            raise self.errors[event]
        self.say(f"{event} done")


def fake(events):
    """A predictor whose steps only tell of themselves."""

    class Fake(Predictor):
        def compile(self):
            events.step("compile")

        def finished(self, case, target, name):
            return row(name, None) if name in events.there else None

        def prepare(self, case, name, claim=lambda needed: None):
            claim(100)
            events.step(f"prepare {name}")
            return name

        def infer(self, ready, check=lambda: None):
            events.step(f"infer {ready}", check)
            return ready

        def write(self, answer, target):
            events.step(f"write {answer}")
            return row(answer, 1.5)

    of = threshold_predictor()
    return Fake(**{one.name: getattr(of, one.name) for one in dataclasses.fields(of)})


def row(name, seconds):
    return ScanVolumes(name, 0.0, seconds, {"IPH": 1.0})


def scans(tmp_path, events, names="abcd", **changes):
    cases = [Case(name, name, tmp_path / f"{name}.nii.gz", None, "test") for name in names]
    settings = {"names": {name: name for name in names}, "out": tmp_path, "tables": tmp_path}
    settings["record"] = Origins(tmp_path, {})
    return Scans(fake(events), cases, **settings, **{"overwrite": True} | changes)


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_scan_is_read_and_one_written_while_another_is_in_the_network(tmp_path):
    """Each of the three goes on only when the other two have come as well."""
    three = ("prepare c", "infer b", "write a")
    events = Events(on=dict.fromkeys(three, three))
    found = predict_all(scans(tmp_path, events))
    assert [one.case for one in found.rows] == list("abcd")
    for step in ("prepare", "infer", "write"):
        own = [event for event in events.said if event.startswith(step) and "done" not in event]
        assert own == [f"{step} {name}" for name in "abcd"]
    done = events.said.index
    assert done("infer a done") < done("prepare c"), "one scan ahead, not two"
    assert done("write a done") < done("write b")


def test_the_network_is_compiled_while_the_first_scan_is_read(tmp_path):
    events = Events(on={"prepare a": ("compile done",), "compile": ("prepare a",)})
    predict_all(scans(tmp_path, events, "a"))
    assert events.said[:2] in (["prepare a", "compile"], ["compile", "prepare a"])


def test_nothing_is_compiled_where_every_label_map_is_there(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.nii.gz").write_bytes(b"")
    events = Events(there="ab")
    found = predict_all(scans(tmp_path, events, "ab", overwrite=False))
    assert [one.seconds for one in found.rows] == [None, None]
    assert events.said == []


def test_an_error_of_each_step_is_the_scans_own_and_others_go_on(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    errors = {
        "prepare b": UserError("torn"),
        "infer d": UserError("logits are NaN"),
        "write e": OSError(f"{tmp_path / 'e.nii.gz'}: is gone"),
    }
    events = Events(errors=errors)
    found = predict_all(scans(tmp_path, events, "abcdef"))
    assert [one.case for one in found.rows] == list("acf")
    assert found.skipped == {"b": "torn", "d": "logits are NaN", "e": "e: is gone"}
    assert list(found.skipped) == list("bde")
    assert found.fault == ""
    assert [line["case"] for line in rows_of(tmp_path / "volumes.csv")] == list("acf")
    told = [text for text in caplog.messages if " mL" in text or "skipped" in text]
    assert [text.split(":")[0] for text in told] == [
        f"scan {number} of 6, {name}" for number, name in enumerate("abcdef", start=1)
    ]
    begun = [text for text in caplog.messages if text.startswith("scan") and ":" not in text]
    assert begun == [text.split(":")[0] for text in told]


def test_scans_that_were_there_keep_their_place(tmp_path):
    """A scan that takes no network does not overtake the one before it."""
    events = Events(on={"write a": ("prepare c done",)}, there="bd")
    found = predict_all(scans(tmp_path, events, overwrite=False))
    assert [(one.case, one.seconds) for one in found.rows] == [
        *(("a", 1.5), ("b", None)),
        *(("c", 1.5), ("d", None)),
    ]


def test_what_was_measured_of_a_label_map_lasts_as_long_as_it(tmp_path):
    """Older records lack it: then the tables have it, which a call that is stopped cuts short."""
    job = scans(tmp_path, Events(there="abc"), "abc", overwrite=False)
    odd = dataclasses.replace(row("c", 1.5), unlike="slices of 9 mm", disagreement=0.25)
    predict_scans.write_tables(tmp_path, [dataclasses.replace(odd, case="a")])
    job.record.note("b")
    job.record.note("c", review.measured(odd))
    for known in ("abc", "c"):
        found = predict_all(dataclasses.replace(job, record=Origins(tmp_path, {})))
        (tmp_path / "volumes.json").unlink()
        measured = {one.case: (one.unlike, one.disagreement) for one in found.rows}
        want = (odd.unlike, odd.disagreement)
        assert measured == {"a": want if "a" in known else ("", None), "b": ("", None), "c": want}
    Origins(tmp_path, {}).begin("c", overwrite=True)
    assert not Origins(tmp_path, {}).measured("c"), "it is to be made again"


@pytest.mark.parametrize("step", ["prepare", "write"])
def test_a_full_disk_stops_all_that_come_after(tmp_path, step):
    """Also the first network of a cascade writes; the scan in the network is left at once."""
    on = {} if step == "prepare" else {"infer c": ("write b", "prepare d done")}
    events = Events(on=on, errors={f"{step} b": full()})
    found = predict_all(scans(tmp_path, events, "abcdef"))
    assert [one.case for one in found.rows] == ["a"]
    assert found.fault.startswith("label.nii.gz: cannot be written: no space left")
    assert found.skipped == dict.fromkeys("bcdef", f"not predicted: {found.fault}")
    assert not {f"write {name}" for name in "cdef"} & set(events.said)
    assert "prepare f" not in events.said
    listed = json.loads((tmp_path / "volumes.json").read_text())["scans"]
    assert [one["case"] for one in listed] == ["a"]


def test_the_network_ends_in_the_middle_when_nothing_can_be_written(tmp_path, monkeypatch):
    """Its progress asks whether to go on: else a long scan would be computed for nothing."""
    events = Events(errors={"write a": full()})

    def infer(self, ready, check=lambda: None):
        events.say(f"infer {ready}")
        while ready == "b":
            check()
        return ready

    job = scans(tmp_path, events, "abc")
    monkeypatch.setattr(type(job.predict), "infer", infer)
    assert predict_all(job).fault
    assert "infer c" not in events.said


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    events = Events(errors={"infer b": KeyboardInterrupt()}, on={"infer b": ("half",)})
    job = scans(tmp_path, events)

    def write(self, answer, target):
        with files.replacing(target) as temporary:
            temporary.write_bytes(b"half")
            events.say("half")
            while True:
                threading.Event().wait(0.01)

    monkeypatch.setattr(type(job.predict), "write", write)
    threads = threading.enumerate()
    with pytest.raises(KeyboardInterrupt):
        predict_all(job)
    assert list(tmp_path.iterdir()) == []
    assert threading.enumerate() == threads


def test_a_defect_is_raised_when_the_scans_before_it_are_written(tmp_path):
    events = Events(errors={"infer c": TypeError("a defect")})
    with pytest.raises(TypeError, match="a defect"):
        predict_all(scans(tmp_path, events))
    assert [line["case"] for line in rows_of(tmp_path / "volumes.csv")] == ["a", "b"]


@pytest.mark.parametrize(("write_s", "early"), [(0.1, range(1, 20)), (1.0, [1, 8, 15])])
@pytest.mark.parametrize(
    "errors",
    [{}, {"infer t": TypeError("a defect")}, {"write t": full()}],
    ids=["end", "defect", "full disk"],
)
def test_tables_grow_with_every_scan_unless_writing_them_takes_long(
    tmp_path, monkeypatch, write_s, early, errors
):
    """A scan takes 3 s here: tables of 1 s are written again when 20 s have passed, and last."""
    names, now, written = "abcdefghijklmnopqrst", [0.0], []
    monkeypatch.setattr(predict_scans, "time", SimpleNamespace(monotonic=lambda: now[0]))
    job = scans(tmp_path, Events(errors=errors), names)
    write, write_tables = type(job.predict).write, predict_scans.write_tables

    def timed(self, answer, target):
        now[0] += 3
        return write(self, answer, target)

    def timed_tables(out, rows):
        now[0] += write_s
        written.append(len(rows))
        write_tables(out, rows)

    monkeypatch.setattr(type(job.predict), "write", timed)
    monkeypatch.setattr(predict_scans, "write_tables", timed_tables)
    with contextlib.suppress(TypeError):
        predict_all(job)
    done = names[: 19 if errors else 20]
    assert written == sorted({*early, len(done)})
    assert [line["case"] for line in rows_of(tmp_path / "volumes.csv")] == list(done)


def test_a_short_memory_puts_scans_in_turn_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(predict_scans.machine, "memory", lambda: 300)  # half of it holds one of 100
    events = Events(on={"infer a": ("prepare a done",)})
    found = predict_all(scans(tmp_path, events))
    assert [one.case for one in found.rows] == list("abcd")
    done = [event for event in events.said if event.endswith("done") and event != "compile done"]
    assert done == [f"{step} {name} done" for name in "abcd" for step in STEPS]
    assert "not enough memory for several scans at a time" in caplog.text


# The steps of the predictor itself.


def test_the_three_steps_are_the_call(tmp_path):
    source = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(head(), upright((7.5, 1.5, 1.6))), source)
    case, predict = Case("scan", "scan", source, None, "test"), threshold_predictor()
    whole = predict(case, tmp_path / "whole.nii.gz", "scan")
    claimed, checked = [], []
    ready = predict.prepare(case, "scan", claimed.append)
    answer = predict.infer(ready, lambda: checked.append(True))
    row = predict.write(answer, tmp_path / "steps.nii.gz")
    assert (tmp_path / "steps.nii.gz").read_bytes() == (tmp_path / "whole.nii.gz").read_bytes()
    assert dataclasses.replace(row, seconds=None) == dataclasses.replace(whole, seconds=None)
    assert answer.scan.images == (), "the image is not held while the label map is written"
    assert len(checked) == -(-predict.window.count(ready.images[0].shape[:3]) // 2)
    (needed,) = claimed
    logits = sum(one.nbytes for one in answer.logits)
    assert needed > ready.images[0].nbytes + logits
    assert needed < 20 * (ready.images[0].nbytes + logits)


def test_waiting_for_memory_is_not_in_a_scans_seconds(tmp_path, monkeypatch):
    source = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(head(), upright()), source)
    now = [0.0]
    monkeypatch.setattr("bhsd_jax.assemble.underway.time.monotonic", lambda: now[0])

    def wait(needed):
        now[0] += 1000

    case = Case("scan", "scan", source, None, "test")
    ready = threshold_predictor().prepare(case, "scan", wait)
    assert ready.seconds == 0
    watch = Stopwatch()
    with watch.stopped():
        now[0] += 5
    now[0] += 2
    watch.add(3)
    assert watch.seconds == 5


def test_compiling_ahead_leaves_nothing_to_compile():
    """The tile program is traced once: what is compiled ahead is what the first scan runs."""
    traced = []

    def forward(params, raw):
        traced.append(raw.shape)
        return thresholds(params, raw)

    window = SlidingWindow(forward, tiny_run.TILE, mirror=False, tiles_per_call=2)
    window.compile({}, 1)
    assert traced == [(2, *tiny_run.TILE, 1)]
    image = np.zeros((4, 16, 20, 1), np.float32)
    window.logits([{}], image)
    assert len(traced) == 1


def test_a_scan_is_called_by_its_name_and_numbers_stay(tmp_path):
    error = UserError(f"{tmp_path / 'ID_1.nii.gz'}: ID_1 is no twin of ID_12")
    case = Case("ID_1", "p", tmp_path / "ID_1.nii.gz", None, "test")
    assert said_of(error, case, "NAME") == "NAME: NAME is no twin of ID_12"
    series = dataclasses.replace(case, id="1", image=Series((tmp_path / "1",), "series 1"))
    text = "series 1: 1 slice is missing: 10.00 mm after slice 11 of 30"
    assert said_of(UserError(text), series, "NAME") == text

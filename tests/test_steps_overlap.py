"""Jobs whose steps run side by side: what may run when, and what an error in each step leaves."""

import threading

import pytest

from bhsd_jax.platform import overlap

WAIT_S = 30.0  # of a test that has failed: nothing is measured in seconds


class Gate:
    """Says that a step has come to a job, and holds it there until it is let on."""

    def __init__(self):
        self.come, self.on = threading.Event(), threading.Event()

    def __call__(self):
        self.come.set()
        assert self.on.wait(WAIT_S), "nobody has let it on"


def wait_for(event):
    assert event.wait(WAIT_S), "it never came"


class Recorder:
    """Steps that write down what they see; `gates` hold some, `errors` are raised by others."""

    def __init__(self, gates=(), errors=(), claims=()):
        self.said, self.gates, self.errors = [], dict(gates), dict(errors)
        self.claims, self.waited = dict(claims), {}
        self.asked = {job: threading.Event() for job in self.claims}

    def step(self, name, job):
        self.said.append(f"{name} {job}")
        if (name, job) in self.gates:
            self.gates[name, job]()
        if (name, job) in self.errors:
            raise self.errors[name, job]
        self.said.append(f"{name} {job} done")
        return job

    def before(self, job, claim):
        if job in self.claims:
            self.asked[job].set()
            self.waited[job] = claim(self.claims[job])
        return self.step("before", job)

    def work(self, job, check):
        check()
        return self.step("work", job)

    def after(self, job):
        self.step("after", job)

    def run(self, jobs, **options):
        overlap.run(jobs, self.before, self.work, self.after, **options)

    def done(self, name):
        return [
            int(text.split()[1]) for text in self.said if text == f"{name} {text.split()[1]} done"
        ]


def in_a_thread(function, *args, **options):
    thread = threading.Thread(target=function, args=args, kwargs=options, daemon=True)
    thread.start()
    return thread


def test_three_jobs_are_under_way_at_a_time():
    """None of three steps is let on before all three have come: one after the other they hang."""
    gates = {("before", 2): Gate(), ("work", 1): Gate(), ("after", 0): Gate()}
    recorder = Recorder(gates)
    thread = in_a_thread(recorder.run, range(5))
    for gate in gates.values():
        wait_for(gate.come)
    assert set(recorder.said) >= {"before 2", "work 1", "after 0"}
    for gate in gates.values():
        gate.on.set()
    thread.join(WAIT_S)
    for name in ("before", "work", "after"):
        assert recorder.done(name) == list(range(5)), "each step sees them in their order"


def test_no_step_gets_more_than_one_job_ahead():
    gate = Gate()
    recorder = Recorder({("work", 0): gate})
    thread = in_a_thread(recorder.run, range(4))
    wait_for(gate.come)
    while "before 1 done" not in recorder.said:
        pass
    assert "before 2" not in recorder.said
    gate.on.set()
    thread.join(WAIT_S)

    gate = Gate()
    recorder = Recorder({("after", 0): gate})
    thread = in_a_thread(recorder.run, range(5))
    wait_for(gate.come)
    while "before 2 done" not in recorder.said:
        pass
    assert "work 2" not in recorder.said, "job 1 waits for the last step, and job 2 behind it"
    gate.on.set()
    thread.join(WAIT_S)
    assert recorder.done("after") == list(range(5))


def test_what_is_done_meanwhile_does_not_wait_for_the_first_job():
    gate = Gate()
    recorder = Recorder({("before", 0): gate})

    def meanwhile():
        wait_for(gate.come)
        recorder.said.append("meanwhile")
        gate.on.set()

    recorder.run(range(2), meanwhile=meanwhile)
    assert recorder.said[:3] == ["before 0", "meanwhile", "before 0 done"]


@pytest.mark.parametrize("step", ["before", "work"])
def test_jobs_in_front_of_one_that_fails_are_done_with(step):
    recorder = Recorder(errors={(step, 2): ValueError("two")})
    with pytest.raises(ValueError, match="two"):
        recorder.run(range(9))
    assert recorder.done("after") == [0, 1]
    assert f"{step} 3" not in recorder.said


def stay(entered, cleared, job):
    """A step that says it has begun and goes on until it is interrupted, which it notes."""
    try:
        entered.set()
        while True:
            threading.Event().wait(0.01)
    finally:
        cleared.append(job)


def test_an_error_of_the_last_step_ends_the_others_where_they_are():
    """Step two calls `check` until it ends; step one, which is interrupted, clears up behind it."""
    cleared, ready = [], threading.Event()

    def before(job, claim):
        return job if job < 2 else stay(ready, cleared, job)

    def work(job, check):
        while job == 1:
            wait_for(ready)
            check()
        return job

    def after(job):
        wait_for(ready)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        overlap.run(range(5), before, work, after)
    assert cleared == [2]


def test_an_interrupt_ends_all_steps_and_leaves_no_thread():
    held, cleared = threading.Event(), []

    def after(job):
        stay(held, cleared, job)

    def work(job, check):
        if job == 1:
            wait_for(held)
            raise KeyboardInterrupt
        return job

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        overlap.run(range(9), lambda job, claim: job, work, after)
    assert cleared == [0]
    assert threading.active_count() == threads


@pytest.mark.parametrize("size", [60, 500])
def test_jobs_run_in_turn_where_memory_is_short(size):
    """The first job stays in the last step until the second has asked; one too large runs alone."""
    gate = Gate()
    recorder = Recorder({("after", 0): gate}, claims={0: size, 1: size, 2: size})
    thread = in_a_thread(recorder.run, range(3), memory=100)
    wait_for(gate.come)
    wait_for(recorder.asked[1])
    thread.join(0.1)  # time enough for a step that does not wait
    assert recorder.said[-1] == "after 0"
    gate.on.set()
    thread.join(WAIT_S)
    assert recorder.waited[0] is False
    assert recorder.waited[1] is True
    assert recorder.done("after") == [0, 1, 2]
    assert recorder.said.index("after 1 done") < recorder.said.index("before 2")


def test_memory_is_not_asked_for_where_the_system_does_not_tell():
    recorder = Recorder(claims={0: 500, 1: 500})
    recorder.run(range(2), memory=0)
    assert recorder.waited == {0: False, 1: False}

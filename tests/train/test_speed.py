"""What the log tells of speed, slow steps and traces."""

import functools
import logging
import math
import re
import resource
import time

import jax
import jax.numpy as jnp
import pytest

from bhsd_jax.platform import machine
from bhsd_jax.train import speed
from bhsd_jax.train.profile import Profile, Span
from bhsd_jax.train.speed import Speed, Timed, Watch
from bhsd_jax.types import Batch


def delayed(*seconds):
    """Batches that take so long to come."""
    for wait in seconds:
        time.sleep(wait)
        yield Batch(None, None)


class Later:
    """A loss that is there after some seconds and once something has happened."""

    def __init__(self, seconds, happened=lambda: True):
        self.at, self.happened = time.monotonic() + seconds, happened

    def is_ready(self):
        return time.monotonic() >= self.at and self.happened()


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5p", 459.0),
        ("TPU v6 lite", 918.0),
    ],
)
def test_peaks_of_known_devices(kind, tera):
    assert speed.peak_flops(kind) == tera * 1e12


def test_an_unknown_device_has_no_peak():
    assert speed.peak_flops("cpu") is None
    assert speed.peak_flops("NVIDIA A400") is None


def test_rates_follow_from_steps_and_seconds():
    batches = Timed(delayed(0.05, 0.0))
    longest = seconds_of(batches)
    found = Speed(batches, patches=4, flops=2e12, peak=1e13).since(steps=10, seconds=5.0)
    assert found["speed/steps_s"] == pytest.approx(2)
    assert found["speed/patches_s"] == pytest.approx(8)
    assert found["speed/tflops"] == pytest.approx(4)
    assert found["speed/share_of_peak"] == pytest.approx(0.4)
    assert 0.01 <= found["speed/input_wait"] <= longest / 5
    assert 0 < found["memory/host_gb"] <= found["memory/host_peak_gb"] * 1.05


def test_the_peak_of_memory_is_bytes_on_macos_too(monkeypatch):
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert speed.memory()["memory/host_peak_gb"] == pytest.approx(mine * 1024 / 1e9, rel=0.1)
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert speed.memory()["memory/host_peak_gb"] == pytest.approx(mine / 1e9, rel=0.1)


def seconds_of(batches):
    """How long the next one took to come."""
    begun = time.monotonic()
    next(batches)
    return time.monotonic() - begun


def test_input_wait_counts_what_came_since_the_last_line():
    batches = Timed(delayed(0.05, 0.0))
    told = Speed(batches, patches=1, flops=math.nan, peak=None)
    first = seconds_of(batches)
    assert 0.005 <= told.since(1, 10.0)["speed/input_wait"] <= first / 10
    second = seconds_of(batches)
    found = told.since(1, 10.0)
    assert found["speed/input_wait"] <= second / 10
    assert not any("tflops" in key or ("peak" in key and "speed" in key) for key in found)


@pytest.fixture
def watched(caplog):
    """Lines about steps whose losses, and batches, take so long; `UNTIL_SAID` until there is one.

    A machine that halts for a while has slow steps besides: lines of all but the last are left out.
    """
    caplog.set_level(logging.WARNING, "bhsd_jax.train.speed")

    def lines(step):
        said = [record.getMessage() for record in caplog.records]
        return [line for line in said if line.startswith(f"step {step} ")]

    def batches_after(waits):
        for step, wait in enumerate(waits, start=1):
            if wait == UNTIL_SAID:
                until(lambda step=step: lines(step))
            else:
                time.sleep(wait)
            yield Batch(None, None)

    def run(times, waits):
        batches = Timed(batches_after(waits))
        watch = Watch(batches)
        for step, seconds in enumerate(times, start=1):
            next(batches)
            if seconds == UNTIL_SAID:
                loss = Later(0, functools.partial(lines, step))
            else:
                loss = Later(seconds)
            watch(step, None, {"loss": loss})
            until(loss.is_ready)
        until(lambda: not watch._pending)
        watch.close()
        return lines(len(times))

    return run


UNTIL_SAID = math.inf


def until(happened):
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() - begun < 300
        time.sleep(0.002)


def test_a_slow_step_is_said_while_it_goes_on_and_when_it_is_done(watched):
    lines = watched([0.02] * 12 + [UNTIL_SAID], [0.0] * 13)
    assert [line.split(" ")[2] for line in lines] == ["has", "took"]
    assert lines[0].startswith("step 13 has taken ")
    assert re.search(r"the median is \d+\.\d\d s$", lines[1])


def test_a_step_that_waits_for_its_patches_says_so(watched):
    lines = watched([0.02] * 13, [0.0] * 12 + [UNTIL_SAID])
    assert lines[0].startswith("step 13 has waited for its patches for ")
    assert lines[1].startswith("step 13 took ")


def test_even_steps_are_no_news(watched):
    """A tenth of what would be news; a machine that halts for two seconds is another matter."""
    assert watched([0.2] * 12, [0.0] * 12) == []


def test_a_span_is_steps_of_the_run():
    assert Span.parse("", 10) is None
    assert Span.parse("3", 10) == Span(3, 3)
    assert Span.parse("3:10", 10) == Span(3, 10)
    for wrong in ("0:3", "4:3", "9:11", "x", "3-4"):
        with pytest.raises(ValueError, match=r"train\.profile: steps to trace, like 10:15"):
            Span.parse(wrong, 10)


@pytest.mark.parametrize("resumed", [0, 2])
def test_a_trace_of_the_steps_is_written(tmp_path, resumed):
    profile = Profile(Span(1, 3), tmp_path)
    profile.begin(resumed)
    for step in range(resumed + 1, 5):
        profile(step, None, {"loss": jax.jit(jnp.sin)(1.0)})
    profile.close()
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1

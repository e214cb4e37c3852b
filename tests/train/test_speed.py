"""What the log tells of speed, slow steps and traces."""

import logging
import math
import time

import jax
import jax.numpy as jnp
import pytest

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
    """A loss that is there at a given time, as one on a busy device is."""

    def __init__(self, at):
        self.at = at

    def is_ready(self):
        return time.monotonic() >= self.at


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
    next(batches)
    found = Speed(batches, patches=4, flops=2e12, peak=1e13).since(steps=10, seconds=5.0)
    assert found["speed/steps_s"] == pytest.approx(2)
    assert found["speed/patches_s"] == pytest.approx(8)
    assert found["speed/tflops"] == pytest.approx(4)
    assert found["speed/share_of_peak"] == pytest.approx(0.4)
    assert 0.01 <= found["speed/input_wait"] < 0.03
    assert 0 < found["memory/host_gb"] <= found["memory/host_peak_gb"] * 1.05


def test_input_wait_counts_what_came_since_the_last_line():
    batches = Timed(delayed(0.05, 0.0))
    told = Speed(batches, patches=1, flops=math.nan, peak=None)
    next(batches)
    assert told.since(1, 0.1)["speed/input_wait"] >= 0.4
    next(batches)
    found = told.since(1, 0.1)
    assert found["speed/input_wait"] < 0.2
    assert not any("tflops" in key or ("peak" in key and "speed" in key) for key in found)


def watched(times, waits, caplog):
    """Lines about steps whose losses take `times` after batches that took `waits`."""
    batches = Timed(delayed(*waits))
    watch = Watch(batches)
    with caplog.at_level(logging.WARNING, "bhsd_jax.train.speed"):
        for step, seconds in enumerate(times, start=1):
            next(batches)
            loss = Later(time.monotonic() + seconds)
            watch(step, None, {"loss": loss})
            while not loss.is_ready():
                time.sleep(0.002)
        time.sleep(0.1)
        watch.close()
    return [record.getMessage() for record in caplog.records]


def test_a_slow_step_is_said_while_it_goes_on_and_when_it_is_done(caplog):
    lines = watched([0.02] * 12 + [0.6, 0.02], [0.0] * 14, caplog)
    assert [line.split(" 0.")[0] for line in lines] == ["step 13 has taken", "step 13 took"]
    assert "the median is 0.0" in lines[1]


def test_a_step_that_waits_for_its_patches_says_so(caplog):
    lines = watched([0.02] * 13, [0.0] * 12 + [0.6], caplog)
    assert lines[0].startswith("step 13 has waited for its patches for 0.")
    assert lines[1].startswith("step 13 took 0.")


def test_even_steps_are_no_news(caplog):
    assert watched([0.05] * 12, [0.0] * 12, caplog) == []


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

"""Cores of a CPU as devices that share a batch."""

import os
import subprocess
import sys

import pytest

_SHARE = """
import os
os.sched_getaffinity = lambda process: set(range({cores}))
from bhsd_jax.train import processes
split = processes.share_cores({arguments})
import jax
print(jax.device_count())
print(split, processes.share_cores(5), jax.device_count())
"""


@pytest.mark.parametrize(
    ("cores", "arguments", "environment", "devices"),
    [
        (4, "8, 6", {}, 2),
        (4, "8, 0", {}, 4),
        (4, "0, most=3", {}, 3),
        (4, "7", {}, 1),
        (4, "4", {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (4, "4", {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
        (4, "4", {"SLURM_STEP_NODELIST": "node[1-2]"}, 4),  # alone, in a job of two nodes
    ],
)
def test_every_core_is_a_device_where_the_batch_allows(cores, arguments, environment, devices):
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", _SHARE.format(cores=cores, arguments=arguments)],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    split = not {"JAX_NUM_CPU_DEVICES", "XLA_FLAGS"} & environment.keys()
    # Devices in use stay as they are.
    assert done.stdout.split() == [str(devices), str(split), "False", str(devices)]

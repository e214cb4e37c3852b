"""Places for processes on one machine: its GPUs, or the cores of its CPUs, shared out evenly."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from bhsd_jax.platform import machine
from bhsd_jax.platform.errors import UserError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Place:
    """The devices and cores that one of several trials running at once may use."""

    environment: Mapping[str, str] = field(default_factory=dict)  # to add to ours
    prefix: tuple[str, ...] = ()  # words before its command
    text: str = "this machine"  # "GPU 3", "cores 0-3"


def gpus() -> list[str]:
    """GPUs as `CUDA_VISIBLE_DEVICES` names them; none where `JAX_PLATFORMS` leaves them out.

    That variable is believed where it is set; else the driver is asked.
    """
    listed = os.environ.get(_VISIBLE)
    if listed is not None:
        return [word.strip() for word in listed.split(",") if word.strip() not in ("", "-1")]
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if (platforms and not {"cuda", "gpu"} & set(platforms.split(","))) or not shutil.which(
        "nvidia-smi"
    ):
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
    )
    lines = [line for line in asked.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))]


def share(count: int, *, option: str) -> list[Place]:
    """Divides the machine into `count` places; a single one gets everything.

    Args:
        count: Of processes that run at the same time.
        option: That asked for them, for the error.

    Raises:
        ValueError: If there are fewer GPUs.
    """
    if count < 1:
        raise UserError(f"{option}: needs at least 1; got {count}")
    devices = gpus()
    if count == 1:
        return [Place()]
    if devices and count > len(devices):
        raise UserError(
            f"{option}: {count} processes do not fit {len(devices)} GPUs ({', '.join(devices)}); "
            f"choose at most {len(devices)}, or set JAX_PLATFORMS=cpu and {_VISIBLE}= to use none"
        )
    if devices:
        each = len(devices) // count
        parts = [devices[each * i : each * (i + 1)] for i in range(count)]
        return [Place({_VISIBLE: ",".join(part)}, text=f"GPU {', '.join(part)}") for part in parts]
    return [_cores(index, count) for index in range(count)]


def idle(count: int) -> list[str]:
    """GPUs that `share(count)` leaves unused."""
    devices = gpus()
    return devices[len(devices) // count * count :] if count > 1 else []


def _cores(index: int, count: int) -> Place:
    """Cores of its own, where there are enough: threads of several processes get in their way."""
    affinity = getattr(os, "sched_getaffinity", None)
    every = sorted(affinity(0)) if affinity else []
    each = machine.cores() // count
    if not every or not each or not shutil.which("taskset"):
        return Place()
    own = every[each * index : each * (index + 1)]
    text = ",".join(map(str, own))
    return Place(prefix=("taskset", "--cpu-list", text), text=f"cores {text}")

"""Prints a train step as XLA compiles it for an H100, which needs JAX's CUDA wheels and no GPU.

    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python gpu_program.py [bhsd]

Without autotuning, for that runs the kernels. The figures of the card are NVIDIA's; cuDNN is the
one of the wheels.
"""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from test_accelerators import PLAN, SMALL, step_of

from bhsd_jax.models.conv import compiler_options

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 28 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> None:
    """The supervised step of a small plan, or of BHSD's."""
    card = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    plan, words = (PLAN, "data=bhsd") if sys.argv[1:] == ["bhsd"] else (SMALL, "smoke")
    step, arguments = step_of("supervised", words, plan)
    device = card.devices[0]
    place = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), arguments
    )
    options = compiler_options(jnp.bfloat16, device.platform, device.device_kind)
    options |= {"xla_gpu_autotune_level": 0}
    lowered = step.trace(*arguments).lower(lowering_platforms=("cuda",))
    sys.stdout.write(lowered.compile(options).as_text())


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# JAX meets its processes at a host that does not exist, where Slurm abbreviates host names its way.
#
# SLURM_STEP_NODELIST is a list as Slurm writes it: "rack[1-2]n[1-2]" is rack1n1, rack1n2, rack2n1,
# rack2n2, and "n[5]" is n5. JAX takes the first bracket for the only one and its first "," or "-"
# for the end of the number: the coordinator is looked for at "rack1" and at "n5]". A list with one
# range, as "node[001-015]", is read rightly.
#
# It matters because every task then waits five minutes for a name that cannot be resolved. Setting
# JAX_COORDINATOR_ADDRESS from `scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1` avoids it.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 "numpy<3"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PROGRAM'
import os
import sys

import jax
from jax._src.clusters import SlurmCluster

os.environ.update(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0")
lists = {  # as Slurm writes them: the first host, and what JAX took for it
    "node[001-015]": ("node001", "node001"),
    "rack[1-2]n[1-2]": ("rack1n1", "rack1"),
    "n[5]": ("n5", "n5]"),
}
same = True
print(f"jax {jax.__version__}")
for nodes, (first, seen) in lists.items():
    os.environ["SLURM_STEP_NODELIST"] = nodes
    host = SlurmCluster.get_coordinator_address(None, None).rpartition(":")[0]
    print(f"{nodes}: first host {first}, JAX {host} (seen before: {seen})")
    same &= host == seen
print("as before" if same else "the behavior has changed")
sys.exit(0 if same else 1)
PROGRAM

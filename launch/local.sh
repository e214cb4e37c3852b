#!/usr/bin/env bash
# One run in N processes of this machine, which share its GPUs or its cores evenly:
#   launch/local.sh 2 train --config=configs/cps.py:data=bhsd --workdir=runs/cps
# One process drives all GPUs of a machine as well; several are for machines where that is slower, and
# to try what a cluster does. SIGTERM and Ctrl-C make a training save and end with 75; other verbs end
# at once.
set -euo pipefail
# shellcheck source=tools/env
source "$(dirname "$0")/../tools/env"
exec python -m bhsd_jax.experiments.local "$@"

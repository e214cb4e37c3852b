#!/usr/bin/env bash
#SBATCH --job-name=bhsd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
# One process per node owns its GPUs; --nodes=2 trains on two nodes. Two minutes before the time
# limit the run gets SIGTERM, saves, exits with 75 and is queued again, where it left off.
#
#   sbatch launch/slurm.sh --config=configs/cps.py:data=bhsd --workdir=/scratch/runs/cps
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
BHSD_EXTRAS=${BHSD_EXTRAS:-cuda} source tools/env

# Runs a command so that SIGTERM reaches it, and waits until it has saved.
run() {
  "$@" &
  job=$!
  trap 'kill -TERM "$job"' TERM
  wait "$job"; code=$?
  while kill -0 "$job" 2>/dev/null; do wait "$job"; code=$?; done  # a trap ends the first wait
}

run srun --kill-on-bad-exit=1 python -m bhsd_jax.main train "$@"
for verb in ${BHSD_AFTER:-}; do  # as launch/table1 --slurm asks: predict evaluate report
  [ "$code" -eq 0 ] || break
  run srun --nodes=1 --ntasks=1 python -m bhsd_jax.main "$verb" "$@"
  [ "$code" -ne 143 ] || code=75  # ended by SIGTERM: begins anew
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

#!/usr/bin/env bash
#SBATCH --job-name=bhsd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
# Trains on Slurm, one process per node that owns the GPUs of its node. Three minutes before the time
# limit the processes get SIGTERM, save and exit with 75; the job is queued again and goes on there,
# also where it had begun to predict, unless --predict.overwrite is given.
# From the repository's root:
#
#   sbatch launch/slurm.sh --config=configs/cps.py:data=bhsd --workdir=/scratch/runs/cps
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh ...   # 16 GPUs: as many as divide the batch train
#   sbatch --gpus-per-node=0 launch/slurm.sh ...             # CPUs
#   scancel --signal=TERM JOB                                # save now, and be queued again
#
# BHSD_EXTRAS: extras of tools/env, default cuda where the job has GPUs. BHSD_AFTER: verbs to run after
# training, as in "predict evaluate report"; --after="..." as the first word says the same, and comes first.
# BHSD_HOME: the repository, where another folder submits.
# BHSD_REQUEUES: starts in a row without a newer checkpoint before the job gives up, default 3.
set -uo pipefail

die() {
  echo "launch/slurm.sh: $*" >&2
  exit 2
}

# Slurm runs a copy of this file from its own folder: only the submitting folder says where we are.
home=${BHSD_HOME:-${SLURM_SUBMIT_DIR:-.}}
[ -f "$home/tools/env" ] || die "$home is not the repository; submit there, or set BHSD_HOME"
cd "$home" || exit
after=${BHSD_AFTER:-}
case "${1:-}" in --after=*) after=${1#*=} && shift ;; esac
workdir='' predictions='' overwrite=''
for argument in "$@"; do
  case "$argument" in
    --workdir=* | -workdir=*) workdir=${argument#*=} ;;
    *predict.out=*) predictions=${argument#*=} ;;
    *predict.overwrite*) overwrite='the user says' ;;
  esac
done
[ -n "$workdir" ] || die "give --workdir=FOLDER, where the run is kept"
# No shell expands ~ behind =, and the verbs do.
case "$workdir" in [~]/*) workdir=$HOME${workdir#?} ;; esac
case "$predictions" in [~]/*) predictions=$HOME${predictions#?} ;; esac
predictions=${predictions:-$workdir/predictions}
nodes=${SLURM_JOB_NUM_NODES:-1}
processes=${SLURM_NTASKS:-$nodes}

# Says to the report of a series which verb failed, and where the words of this job are.
failed() {
  local log=slurm-$SLURM_JOB_ID.log
  [ -f "$workdir/$log" ] || log=''
  printf '{"verb": "%s", "log": "%s"}\n' "$1" "$log" >"$workdir/failed.json" || true
}

# Starts in a row that found nothing newer than the one before; a job that cannot go on must not
# be queued for ever. Of the label maps those count that this job has written, also in place of others.
progress() {
  find "$workdir/checkpoints" -mindepth 2 -maxdepth 2 \
    \( -name SHA256SUMS -o -name commit_success.txt \) 2>/dev/null |
    sed 's,.*/\([0-9]*\)/[^/]*$,\1,' | sort -n | tail -n 1 | tr '\n' '/'
  find "$predictions" -type f ! -name '.*' -newer "$began" 2>/dev/null | wc -l
}
began=$workdir/.slurm-predicting # holds the number of the job that began to predict last
at=train
if [ "$(cat "$began" 2>/dev/null)" = "$SLURM_JOB_ID" ]; then at=predict; fi
mkdir -p "$workdir" || exit
read -r job seen starts 2>/dev/null <"$workdir/.slurm-starts" || job=''
now=$(progress)
if [ "$job" = "$SLURM_JOB_ID" ] && [ "$seen" = "$now" ]; then starts=$((starts + 1)); else starts=0; fi
echo "$SLURM_JOB_ID $now $starts" >"$workdir/.slurm-starts" || exit
if [ "$starts" -gt "${BHSD_REQUEUES:-3}" ]; then
  failed "$at"
  die "started again $starts times without a newer checkpoint in $workdir; the log above says why, or" \
    "--time is too short for a first one; submit again when that is mended"
fi
rm -f "$workdir/failed.json"

# What this very job has predicted before it was queued again is not predicted again.
kept=''
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$at" = predict ] && [ "${now##*/}" -gt 0 ]; then
  [ -n "$overwrite" ] || kept=--config.predict.overwrite=False
fi

export BHSD_EXTRAS=${BHSD_EXTRAS-${SLURM_JOB_GPUS:+cuda}}
# shellcheck source=tools/env
source tools/env || exit

# What sbatch kept of the shell it was called in, or keeps from the steps of this job.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_GPUS_PER_NODE 2>/dev/null || true
export SLURM_EXPORT_ENV=ALL # with --export=NONE the tasks would not get our PATH
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not read sbatch's since Slurm 22.05

# Where processes meet; how many there are and which is which, they know from Slurm. The address is the
# one that Slurm itself uses, for the names of nodes need not resolve.
unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID # of the shell that submitted
if [ "$processes" -gt 1 ]; then
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  port=${JAX_COORDINATOR_PORT:-$((61440 + SLURM_JOB_ID % 4096))}
  export JAX_COORDINATOR_ADDRESS=${address:-$first}:$port
  if [ -n "${http_proxy:-}${https_proxy:-}${grpc_proxy:-}" ]; then
    export no_grpc_proxy=${address:-$first},127.0.0.1
  fi
fi

# The signal that reaches this script alone (scancel --batch) is passed on to the processes. Never to
# srun, which would answer with SIGKILL to all of them.
woken='' asked=''
# shellcheck disable=SC2317
pass_on() {
  woken=yes
  asked=yes
  scancel --signal=TERM "$SLURM_JOB_ID" || true # they may have ended meanwhile
}
trap pass_on TERM INT USR1

# Runs a verb in `tasks` processes; sets `code`. When one process dies, the others end in
# a minute; at once would be too soon for those that still save.
run() {
  local tasks=$1 job
  shift
  srun --ntasks="$tasks" --nodes="$((tasks < nodes ? tasks : nodes))" --kill-on-bad-exit=0 \
    --wait=60 python -m bhsd_jax.main "$@" &
  job=$!
  while :; do
    woken='' code=0
    wait "$job" || code=$?
    [ -n "$woken" ] || break # a trap ends a wait early
  done
  case "$code" in # the signals that ask to stop, come before a verb could heed them: nothing is lost
    130 | 138 | 143) code=75 ;;
    137) [ -z "$asked" ] || code=75 ;; # srun was sent the signal as well, and killed them
  esac
}

before=$at at=train
run "$processes" train "$@"
for verb in $after; do
  [ "$code" -eq 0 ] || break
  at=$verb
  case "$verb" in
    predict)
      if [ "$before" = train ]; then echo "$SLURM_JOB_ID" >"$began" || true; fi
      run "$processes" predict "$@" ${kept:+"$kept"}
      ;;
    evaluate) run "$processes" evaluate "$@" ;;
    *) run 1 "$verb" "$@" ;;
  esac
done
if [ "$code" -ne 0 ] && [ "$code" -ne 75 ]; then failed "$at"; fi

if [ "$code" -eq 75 ]; then
  trap '' TERM INT USR1
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || true
  if [ "$state" != RUNNING ]; then # scancel, or Slurm queues it again itself
    echo "launch/slurm.sh: stopped and saved; the job is $state and is left so" >&2
  elif ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "launch/slurm.sh: saved, but Slurm does not queue the job again; submit it again to go on" >&2
  fi
fi
exit "$code"

#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud, from queued resource to training on all of its hosts:
#   launch/tpu_vm.sh create NAME --zone=us-east5-a --type=v6e-16 [--spot] [--version=...] [--project=...]
#   launch/tpu_vm.sh wait   NAME --zone=us-east5-a        until it is there
#   launch/tpu_vm.sh setup  NAME --zone=us-east5-a        copies the code, makes the environment
#   launch/tpu_vm.sh run    NAME --zone=us-east5-a -- train --config=configs/cps.py:data=bhsd \
#     --config.input.labeled=16 --config.input.unlabeled=16 --workdir=/mnt/runs/cps
#   launch/tpu_vm.sh stop   NAME --zone=us-east5-a        SIGTERM: a training saves and ends with 75
#   launch/tpu_vm.sh delete NAME --zone=us-east5-a
# --dry-run prints the commands of gcloud and runs none. A run goes on when the connection breaks; `run`
# again is refused while it does. The patches of a step are to be multiples of the hosts, better of the
# chips. The folder of the run must be one that all hosts share and where folders can be renamed:
# Filestore, or by gcsfuse a bucket with hierarchical namespace. Every host starts the verb and JAX finds
# the others; preprocess and report, which need no JAX, are told by the metadata of the slice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() {
  echo "launch/tpu_vm.sh: $*" >&2
  exit 2
}

# No array may be empty: before bash 4.4, as on macOS, `set -u` ends the script at one.
step='' name='' zone='' project='' type='' version='' spot='' dry=''
while [ $# -gt 0 ]; do
  case "$1" in
    --) shift && break ;; # what is left is the verb and its words
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=--spot ;;
    --dry-run) dry=yes ;;
    -*) die "no option ${1%%=*}; $(sed -n '3s/^# *//p' "${BASH_SOURCE[0]}")" ;;
    *) if [ -z "$step" ]; then step=$1; elif [ -z "$name" ]; then name=$1; else die "one NAME, got $name and $1"; fi ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then
  die "needs a step, a NAME and --zone=...; the top of this file has all steps"
fi
where=("--zone=$zone" ${project:+"--project=$project"})

# Words as any shell reads them back, each as it is.
quoted() {
  local word
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=,@%+-]*)
        # In steps: bash 3.2 keeps the quotes in "${word//"'"/"$other"}".
        printf " '"
        while [ "$word" != "${word#*\'}" ]; do
          printf "%s'\\\\''" "${word%%\'*}"
          word=${word#*\'}
        done
        printf "%s'" "$word"
        ;;
      *) printf ' %s' "$word" ;;
    esac
  done
}
say() {
  local line
  line=$(quoted "$@")
  echo "${line# }"
}
do_or_say() {
  if [ -n "$dry" ]; then say "$@"; else "$@"; fi
}

# Runs lines of bash on every host; more words are their arguments, whatever is in them.
on_all() {
  local lines=$1 words
  shift
  words=$(quoted bash -c "$lines" all "$@")
  do_or_say gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="${words# }"
}

create() {
  [ -n "$type" ] || die "create needs --type=, such as v6e-16"
  if [ -z "$version" ]; then
    case "$type" in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v[234]-*) version=tpu-ubuntu2204-base ;;
      *) die "no runtime is known for $type; name one with --version=" ;;
    esac
  fi
  do_or_say gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$type" --runtime-version="$version" ${spot:+"$spot"}
}

wait_for_it() {
  local state ask=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
  if [ -n "$dry" ]; then
    say "${ask[@]}"
    return
  fi
  while :; do
    state=$("${ask[@]}")
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        die "$name is $state; delete it and create it anew"
        ;;
    esac
    echo "$name is $state ... $SECONDS s"
    sleep "${POLL_S:-15}"
  done
}

setup() {
  local code
  code=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf $(printf %q "$code")" EXIT
  git ls-files -z --cached --others --exclude-standard | tar --create --gzip --null --files-from=- --file="$code/bhsd_jax.tgz"
  do_or_say gcloud compute tpus tpu-vm scp "$code/bhsd_jax.tgz" "$name:" "${where[@]}" --worker=all
  # shellcheck disable=SC2016
  on_all '
    set -e
    mkdir -p bhsd_jax && tar -xzf bhsd_jax.tgz -C bhsd_jax && cd bhsd_jax
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" || uv python install 3.12
    BHSD_EXTRAS=tpu tools/env'
}

run() {
  [ $# -gt 0 ] || die "run needs -- VERB --config=... --workdir=..."
  # In a session of its own: it outlives the connection.
  # shellcheck disable=SC2016
  on_all '
    cd bhsd_jax || exit
    export PATH="$HOME/.local/bin:$PATH" BHSD_EXTRAS=tpu
    if kill -0 "$(cat ../bhsd.pid 2>/dev/null)" 2>/dev/null; then
      echo "$(hostname): a run goes on already; stop it first" >&2
      exit 1
    fi
    source tools/env || exit
    case "$1" in preprocess | report) # JAX does not tell them which host this is of how many
      about=http://metadata.google.internal/computeMetadata/v1/instance/attributes
      ask() { curl --silent --show-error --fail --header "Metadata-Flavor: Google" "$about/$1"; }
      number=$(ask agent-worker-number) || exit
      hosts=$(ask worker-network-endpoints) || exit
      commas=${hosts//[^,]/}
      export JAX_PROCESS_ID=$number JAX_NUM_PROCESSES=$((${#commas} + 1)) ;;
    esac
    : >../bhsd.log # before tail looks for it
    setsid python -m bhsd_jax.main "$@" </dev/null >>../bhsd.log 2>&1 &
    echo $! >../bhsd.pid
    tail --pid=$! -n +1 -f ../bhsd.log
    wait $!' "$@"
}

stop() {
  # shellcheck disable=SC2016
  on_all 'kill -TERM "$(cat bhsd.pid)" && tail --pid="$(cat bhsd.pid)" -n 3 -f bhsd.log'
}

case "$step" in
  create) create ;;
  wait) wait_for_it ;;
  setup) setup ;;
  run) run "$@" ;;
  stop) stop ;;
  delete) do_or_say gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
  *) die "no step '$step'; there are create, wait, setup, run, stop and delete" ;;
esac

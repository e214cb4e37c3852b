#!/usr/bin/env bash
# Runs one config with several overrides, one after the other, train to report; what is finished is
# not run again. Each line of FILE is a name and its overrides.
#
#   launch/ablation.sh configs/cps.py:data=bhsd runs/weights FILE
#
#   w02  --config.objective.weight=0.2
#   w10  --config.objective.weight=1.0
set -euo pipefail
if [ $# -ne 3 ]; then
  sed -n '2,9p' "$0"; exit 2
fi
config=$1 folder=$2 list=$3
source "$(dirname "$0")/../tools/env"
names=()
while read -r name overrides; do
  case "$name" in '' | '#'*) continue ;; esac
  names+=("$name")
  [ -f "$folder/$name/report.html" ] && { echo "== $name is done"; continue; }
  read -ra options <<<"$overrides"
  shared=(--config="$config" --workdir="$folder/$name" --config.preprocess.shards="$folder/shards")
  [ -f "$folder/shards/index.json" ] || python -m bhsd_jax.main preprocess "${shared[@]}" "${options[@]}"
  for verb in train predict evaluate report; do
    echo "== $name: $verb"
    python -m bhsd_jax.main "$verb" "${shared[@]}" "${options[@]}" </dev/null
  done
done <"$list"
python - "$folder" "${names[@]}" <<'PY'
import json, pathlib, sys
folder, *names = sys.argv[1:]
print(f"{'run':<20}{'Dice, merged':>14}{'Dice, classes':>15}{'scans':>7}")
for name in names:
    found = json.loads((pathlib.Path(folder) / name / "summary.json").read_text())
    mean = found["conventions"]["nnunet"]["mean"]["dice"]
    print(f"{name:<20}{found['binary']['dice']:>14.4f}{mean or float('nan'):>15.4f}{found['n_cases']:>7}")
PY

#!/usr/bin/env bash
# XLA:CPU of jaxlib 0.10.2 computes a sum of squares of sums wrongly, and says nothing.
#
# 6000 rows of eight ones. Each is summed (as a product with a constant matrix of ones, which the
# compiler turns into a reduction), squared, and added up over three columns: 3 x 8 x 8 = 192.
# Operation by operation, with 512 rows, and in jaxlib 0.10.1 that is what comes out. Compiled with
# 6000 rows it is 3: the inner sum is left out. With random rows the numbers are merely others, so
# that nothing looks broken.
#
# From 0.10.2 on XLA hands reductions on CPUs to YNNPACK, both in one piece here. Without reductions
# (--xla_cpu_experimental_ynn_fusion_type=-reduce) the result is right; without dot products alone it
# is not. Another pattern of the same kind is jax#39103. It matters because 0.10.2 is the last jaxlib
# for Python 3.11, and norms, losses and scores are made of sums of squares of sums.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3.11 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/program.py" <<'PROGRAM'
import jax
import jax.numpy as jnp

def total(x):
    return ((x @ jnp.ones((8, 3))) ** 2).sum(-1)

few, many = jnp.ones((512, 8)), jnp.ones((6000, 8))
said = [float(values.max()) for values in (total(many), jax.jit(total)(few), jax.jit(total)(many))]
print(*said)
PROGRAM
seen=""
for version in 0.10.1 0.10.2; do
  python3.11 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "jax==$version" "jaxlib==$version" "numpy<3"
  for flags in "" --xla_cpu_experimental_ynn_fusion_type=-reduce; do
    numbers=$(JAX_PLATFORMS=cpu XLA_FLAGS=$flags "$folder/$version/bin/python" "$folder/program.py")
    echo "jaxlib $version, flags '$flags': one by one, 512 rows, 6000 rows: $numbers"
    seen+="$numbers;"
  done
done
right="192.0 192.0 192.0;"
if [ "$seen" = "${right}${right}192.0 192.0 3.0;${right}" ]; then
  echo "as before"
else
  echo "the behavior has changed"
  exit 1
fi

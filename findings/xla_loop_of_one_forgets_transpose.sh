#!/usr/bin/env bash
# XLA forgets a transposition of a constant whose bits are read as another type in a loop of one round.
#
# bfloat16 held as uint16 (or float32 as int32), transposed, and read back as numbers inside a
# `fori_loop`: with one round, and the array a constant of the program, the numbers come out in
# the order that they had before the transposition. With two rounds, with the array as an
# argument, without the change of type, or with the pass "constant_folding" left out, they are
# right. So the folding of constants, after such a loop was written out, takes the layout of the
# transposed constant for the usual one. Nothing is raised.
#
# It matters to kernels that keep bfloat16 as bits, and that loop over as many blocks as fit:
# small inputs have one. A program without a loop for one block is right.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 "numpy<3"
cat > "$folder/program.py" <<'PROGRAM'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def rounds(array, scale):
    """The sum over the first axis of the transposed matrices."""
    turned = lax.bitcast_convert_type(array, jnp.uint16).swapaxes(1, 2)

    def add(i, total):
        values = lax.bitcast_convert_type(turned[i], jnp.bfloat16)
        return total + values.astype(jnp.float32) * scale

    return lax.fori_loop(0, len(array), add, jnp.zeros(turned.shape[1:]))


for count in (1, 2):
    numbers = np.arange(count * 12, dtype=np.float32).reshape(count, 4, 3)
    array = jnp.asarray(numbers, jnp.bfloat16)  # exact: all are below 256
    want = numbers.sum(0).T
    constant = jax.jit(lambda scale, array=array: rounds(array, scale))(1.0)
    argument = jax.jit(rounds)(array, 1.0)
    print(f"{count} rounds: constant {np.array_equal(constant, want)}, argument {np.array_equal(argument, want)}")
    if count == 1:
        print(np.asarray(constant)[0], "for", want[0])
PROGRAM
run() { JAX_PLATFORMS=cpu XLA_FLAGS=${1-} "$folder/venv/bin/python" "$folder/program.py"; }
seen=$(run)
without=$(run --xla_disable_hlo_passes=constant_folding)
printf 'jax 0.10.2\n%s\n\nwithout constant_folding:\n%s\n' "$seen" "$without"
if grep -q "^1 rounds: constant False, argument True" <<<"$seen" &&
  grep -q "^2 rounds: constant True, argument True" <<<"$seen" &&
  grep -q "^1 rounds: constant True, argument True" <<<"$without"; then
  echo "as before"
else
  echo "the behavior has changed"
  exit 1
fi

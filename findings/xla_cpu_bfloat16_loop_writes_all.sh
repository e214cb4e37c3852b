#!/usr/bin/env bash
# On a CPU, a loop that writes one row of a bfloat16 array converts the whole array, every time.
#
# XLA:CPU computes almost every operation on bfloat16 in float32. That includes the update of a slice,
# which needs no arithmetic: the compiled body of the loop widens the whole buffer to float32, writes
# one row, and narrows all of it again. A loop over rows (lax.map, lax.scan with outputs, fori_loop
# with .at[].set) so takes time that grows with the square of their number. The same loop in float32,
# or on the bits of the values (bitcast_convert_type to uint16), writes the row in place.
#
# It matters to whoever blocks a convolution or an attention by hand to stay in a CPU's cache: matrix
# products of bfloat16 are twice as fast as those of float32 there (AVX512-BF16), and the loop around
# them loses ten times as much. Move bits, and make them bfloat16 at the product.
#
# Exit 0: the behavior below was seen again. 1: it has changed. Needs python3.11 with venv, and PyPI.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 "numpy<3"
cat > "$folder/program.py" <<'PROGRAM'
import re
import sys
import time

import jax
import jax.numpy as jnp

COLUMNS = 8192


def negated(rows):
    """Row by row; of integers the top bit is the sign of the bfloat16 that they stand for."""
    turn = (lambda row: row ^ jnp.uint16(0x8000)) if rows.dtype == jnp.uint16 else jnp.negative
    return jax.lax.map(turn, rows)


def seen(kind, count):
    """Whether the compiled program narrows an array of all rows, and the shortest run in seconds."""
    rows = jnp.ones((count, COLUMNS), kind)
    program = jax.jit(negated).lower(rows).compile()
    whole = re.search(rf"= bf16\[{count},{COLUMNS}\]\S* convert\(", program.as_text()) is not None
    taken = []
    for _ in range(7):
        begun = time.perf_counter()
        program(rows).block_until_ready()
        taken.append(time.perf_counter() - begun)
    return whole, min(taken)


found = {}
for kind in (jnp.bfloat16, jnp.float32, jnp.uint16):
    few, many = seen(kind, 128), seen(kind, 512)
    found[kind.__name__] = many[0]
    print(
        f"jax {jax.__version__}, {kind.__name__}: all rows converted in the loop: {many[0]}; "
        f"128 rows take {few[1] * 1e3:.1f} ms, 512 rows {many[1] * 1e3:.1f} ms"
    )
sys.exit(0 if found == {"bfloat16": True, "float32": False, "uint16": False} else 1)
PROGRAM
status=0
JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" "$folder/program.py" || status=1
[ "$status" = 0 ] && echo "as before" || echo "the behavior has changed"
exit "$status"

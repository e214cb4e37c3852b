"""Recomputing blocks in the backward pass changes the memory, not the gradients.

UNETR's recomputed gradients are compared with the reference's, the two nnU-Nets' with their own, in
the tests of these.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plain_code
import pytest

from bhsd_jax.assemble import wiring
from bhsd_jax.assemble.run import Run
from bhsd_jax.configs import supervised
from tools import model_table


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["swin_unetr", "cotr", "nnformer"])
def test_recomputed_blocks_give_the_same_gradients(backbone):
    config = supervised.get_config(f"smoke,backbone={backbone}")
    net = wiring.model(Run.of(config, Path("run"), model_table.head_ct_plan()))
    random = np.random.default_rng(1)
    image = random.normal(size=(1, *config.input.patch, 1)).astype(np.float32)
    shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), image)

    def drawn(leaf):
        """Close to 1 for scales, small for all that is summed over."""
        if leaf.ndim == 1:
            return (1 + 0.1 * random.normal(size=leaf.shape)).astype(np.float32)
        wide = np.prod(leaf.shape[:-1]) ** -0.5
        return (wide * random.normal(size=leaf.shape)).astype(np.float32)

    variables = jax.tree.map(drawn, shapes)

    def gradients(remat):
        def loss(variables, image):
            logits = net.clone(remat=remat).apply(variables, image, train=False)
            return sum(jnp.square(head).mean() for head in logits)

        run = jax.jit(jax.grad(loss, (0, 1)), compiler_options=plain_code.OPTIONS)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(run(variables, image))]

    plain, recomputed = gradients("none"), gradients("blocks")
    whole = np.sqrt(sum(np.square(leaf).sum() for leaf in plain))
    apart = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(plain, recomputed, strict=True)))
    assert whole > 0
    assert apart < 2e-6 * whole

"""What the tests of networks share: the references' numbers, and shapes without computing."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

# Most of the time of these tests would be the compiler's optimizations.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def read(folder, case):
    """What is known of a case, its arrays, and the weights among them by PyTorch's names."""
    about = json.loads((folder / f"{case}.json").read_text())
    with np.load(folder / f"{case}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    state = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    return about, arrays, state


def shapes(model, image):
    """Outputs and variables for an image [B D H W C] of this shape."""
    image = jax.ShapeDtypeStruct(image, jnp.float32)
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), image
    )


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def require_norms(gradients, weights, norms):
    """Every weight has a gradient of the length that the reference's has."""
    for name, norm in norms.items():
        path = weights[name].path.split("/")
        leaf = functools.reduce(lambda tree, key: tree[key], path, gradients)
        # A bias before a norm has no gradient but rounding.
        np.testing.assert_allclose(np.linalg.norm(leaf), norm, rtol=1e-3, atol=1e-6, err_msg=name)

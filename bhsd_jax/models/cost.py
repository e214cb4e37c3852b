"""What a network costs, found by tracing it: nothing is compiled, and no array is made."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Cost:
    """Cost of one network for one image size."""

    parameters: int
    multiply_adds: int  # of the forward pass; see `multiply_adds`
    heads: int  # outputs; all are counted
    activation_bytes: int  # kept from forward to backward pass, parameters not counted


def cost(model: nn.Module, image: tuple[int, int, int, int, int]) -> Cost:
    """Traces the model on an image [B D H W C] in inference mode.

    `activation_bytes` is what autodiff keeps, before the compiler recomputes or reuses anything. On
    a CPU attention by windows keeps no weights (`attention`); on accelerators it does.
    """
    shape = jax.ShapeDtypeStruct(image, jnp.float32)
    variables = abstract_variables(model, shape)

    def forward(variables: Any, image: Any) -> Any:
        """Logits, and all that the backward pass will read."""
        return jax.vjp(lambda v, x: model.apply(v, x, train=False), variables, image)

    jaxpr, (logits, kept) = jax.make_jaxpr(forward, return_shape=True)(variables, shape)
    return Cost(
        parameters=_parameters(variables),
        multiply_adds=_count(jaxpr.jaxpr),
        heads=len(logits),
        activation_bytes=_bytes(kept) - _bytes(variables),
    )


def count_parameters(model: nn.Module, image: tuple[int, int, int, int, int]) -> int:
    """Numbers that are trained of the model for images [B D H W C]."""
    return _parameters(abstract_variables(model, jax.ShapeDtypeStruct(image, jnp.float32)))


def abstract_variables(model: nn.Module, image: jax.ShapeDtypeStruct) -> Any:
    """Shapes and types of what the model holds for images [B D H W C]."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k, x: model.init(k, x, train=False), key, image)


def _parameters(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Counts the multiply-adds of all convolutions and matrix products of `function(*arguments)`.

    A convolution has (values put out) x (input channels) x (kernel voxels), taps on the padding
    included; those on the zeros that a stride puts between values do not count, nor do norms,
    activations, gathers, interpolations and additions of biases. Of a part written once per
    platform, the version for accelerators counts. Arguments may be abstract.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def equations(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """Every primitive of the traced function, those of inner functions included, each once."""
    yield from _equations(jax.make_jaxpr(function)(*arguments).jaxpr)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            values = equation.outvars[0].aval.size // math.prod(params["lhs_dilation"])
            total += values * kernel.size // features
        elif name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in summed)
        else:
            repeats = params["length"] if name == "scan" else 1
            total += repeats * sum(map(_count, _inner(equation)))
    return total


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from _equations(inner)


def _inner(equation: Any) -> list[Any]:
    """Functions an equation calls; of the branches of a choice by platform, only the default."""
    if equation.primitive.name == "cond":
        return [equation.params["branches"][-1].jaxpr]  # `lax.platform_dependent` puts it last
    jaxprs = []
    for value in equation.params.values():
        value = getattr(value, "jaxpr", value)  # a closed one holds an open one
        if hasattr(value, "eqns"):
            jaxprs.append(value)
    return jaxprs

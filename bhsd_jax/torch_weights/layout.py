"""Where one PyTorch tensor goes, and how its axes are reordered on the way. NumPy alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """The order of a tensor's axes, there and back; each function undoes the other."""

    to_linen: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _deep(kernel: np.ndarray) -> np.ndarray:
    """A kernel of slices is one of depth 1."""
    return kernel[:, :, None] if kernel.ndim == 4 else kernel


SAME = Layout(np.asarray, np.asarray)
# (out, in, D, H, W) <-> [D H W in out].
CONV = Layout(lambda w: _deep(w).transpose(2, 3, 4, 1, 0), lambda k: k.transpose(4, 3, 0, 1, 2))
# (in, out, D, H, W) <-> [D H W in out]; not mirrored, see `models.conv.conv_transpose`.
CONV_TRANSPOSE = Layout(
    lambda w: _deep(w).transpose(2, 3, 4, 0, 1), lambda k: k.transpose(3, 4, 0, 1, 2)
)
# (out, in) <-> [in out].
LINEAR = Layout(lambda w: w.T, lambda k: k.T)
# A convolution one voxel wide, which is a linear layer here: (out, in, 1, 1, 1) <-> [in out].
POINTWISE = Layout(lambda w: w.squeeze((2, 3, 4)).T, lambda k: k.T[..., None, None, None])


def linear_over_blocks(shape: tuple[int, ...]) -> Layout:
    """(out, d * h * w * in) <-> [d h w in out], the latter a `shape`; a stride of d, h, w."""
    return Layout(lambda w: w.T.reshape(shape), lambda k: k.reshape(-1, k.shape[-1]).T)


@dataclass(frozen=True)
class Weight:
    """The variable that one PyTorch tensor becomes."""

    path: str  # "params/encoder_0/conv_0/conv/kernel"
    layout: Layout = SAME


def layer(source: str, target: str, layout: Layout, *, bias: bool = True) -> dict[str, Weight]:
    """A linear layer or a convolution, by PyTorch name."""
    weights = {f"{source}.weight": Weight(f"params/{target}/kernel", layout)}
    if bias:
        weights[f"{source}.bias"] = Weight(f"params/{target}/bias")
    return weights


def norm(source: str, target: str) -> dict[str, Weight]:
    """The learned scale and bias of a norm, by PyTorch name."""
    return {
        f"{source}.weight": Weight(f"params/{target}/scale"),
        f"{source}.bias": Weight(f"params/{target}/bias"),
    }


def running_statistics(source: str, target: str) -> dict[str, Weight]:
    """Mean and variance that a batch norm has seen, by PyTorch name."""
    return {
        f"{source}.running_mean": Weight(f"batch_stats/{target}/mean"),
        f"{source}.running_var": Weight(f"batch_stats/{target}/var"),
    }

"""Whether probabilities mean what they say: Brier score, reliability, one temperature. NumPy."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

BINS = 10
LIMITS = 0.05, 20.0  # of the temperature


@dataclass(frozen=True)
class Bin:
    """Voxels whose probability lies between two values."""

    low: float
    high: float
    count: int
    mean: float  # probability
    observed: float  # share that bleeds


@dataclass(frozen=True)
class Calibration:
    """Scores of one set of voxels at one temperature."""

    temperature: float
    nll: float  # mean negative log-likelihood of the true class
    brier: float  # mean over voxels of the squared error, summed over classes
    error: float  # mean over voxels of |mean - observed| of their bin: expected calibration error
    bins: tuple[Bin, ...]  # of the probability of any bleeding, those with voxels


def fit_temperature(logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"]) -> float:
    """The temperature with the least negative log-likelihood; probabilities are softmax(z / T).

    Raises:
        ValueError: If there are no voxels.

    Source: Guo et al., ICML 2017, section 4.2.
    """
    if not len(labels):
        raise ValueError("temperature: no voxels to fit it to")
    low, high = np.log(LIMITS)
    found = optimize.minimize_scalar(
        lambda log_t: _nll(logits / np.exp(log_t), labels), bounds=(low, high), method="bounded"
    )
    return float(np.exp(found.x))  # pyright: ignore[reportAttributeAccessIssue]


def is_at_limit(temperature: float) -> bool:
    """Whether a fitted temperature is the lowest or the highest that is tried."""
    return any(np.isclose(temperature, limit, rtol=1e-3) for limit in LIMITS)


def measure(
    logits: Float[np.ndarray, "N K"], labels: Int[np.ndarray, " N"], temperature: float
) -> Calibration:
    """Scores of voxels at a temperature; class 0 is background."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = special.softmax(scaled, axis=1)
    truth = np.eye(logits.shape[1])[labels]
    bins = reliability(1 - probabilities[:, 0], labels > 0)
    off = sum(one.count * abs(one.mean - one.observed) for one in bins)
    return Calibration(
        temperature=temperature,
        nll=_nll(scaled, labels),
        brier=float(np.mean(np.sum((probabilities - truth) ** 2, axis=1))),
        error=off / len(labels),
        bins=bins,
    )


def reliability(
    probability: Float[np.ndarray, " N"], happened: Bool[np.ndarray, " N"]
) -> tuple[Bin, ...]:
    """Bins of equal width over [0, 1]; those without voxels are left out.

    Source: DeGroot and Fienberg, The Statistician 32 (1983).
    """
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    means = np.bincount(place, probability, BINS) / np.maximum(counts, 1)
    observed = np.bincount(place, happened, BINS) / np.maximum(counts, 1)
    return tuple(
        Bin(i / BINS, (i + 1) / BINS, int(counts[i]), float(means[i]), float(observed[i]))
        for i in range(BINS)
        if counts[i]
    )


def _nll(scaled: np.ndarray, labels: np.ndarray) -> float:
    highest = scaled.max(axis=1)
    total = np.log(np.exp(scaled - highest[:, None]).sum(axis=1)) + highest
    return float(np.mean(total - scaled[np.arange(len(labels)), labels]))

"""Distances between sets of feature vectors, (N, D) with a row a picture, computed in float64.

Every function raises DataError when the shapes disagree or there are too few rows. Features come from `features.py`;
how well pictures match their prompts is in `retrieval.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from instaflow.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Principal components: `mean` (D,), `components` (D, k) with orthonormal columns, largest variance first."""

    mean: np.ndarray
    components: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (N, D) → coordinates (N, k)."""
        coordinates: np.ndarray = (features - self.mean) @ self.components
        return coordinates


class Interval(NamedTuple):
    """A measured value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class PrecisionRecall(NamedTuple):
    """Fractions in 0…1: fakes that look real, and reals that the fakes reach."""

    precision: float
    recall: float


def fit_projection(features: np.ndarray, components: int = 64) -> Projection:
    """PCA of real training features (N, D): with few pictures the full covariance is mostly bias."""
    _check(features, features, rows=components + 1)
    if components > features.shape[1]:
        raise DataError(f"{components} components need as many dimensions, got features {features.shape}")
    mean, covariance = _gaussian(features)
    _, vectors = np.linalg.eigh(covariance)
    return Projection(mean=mean, components=vectors[:, ::-1][:, :components])


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between the Gaussians fitted to a (N, D) and b (M, D). Heusel et al. 2017.

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_a^½ Σ_b Σ_a^½)^½). The symmetric form has real eigenvalues ≥ 0, so it
    stays stable for singular covariances. Biased upwards for small N: compare at equal N only.
    """
    _check(a, b, rows=2)
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(a), _gaussian(b)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(max(0.0, ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def replicates(
    fn: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, real: np.ndarray, *, n: int = 200, seed: int = 0
) -> np.ndarray:
    """(1 + n,): fn(a, real), then the same with the rows of both sets resampled (Efron 1979).

    Replicate i of two models meets the same resample of `real`, and of the prompts when both drew for the same ones:
    such replicates are paired, and may be subtracted.
    """
    ours, theirs = (np.random.default_rng([seed, i]) for i in range(2))
    draws = [
        fn(a[ours.integers(len(a), size=len(a))], real[theirs.integers(len(real), size=len(real))]) for _ in range(n)
    ]
    return np.array([fn(a, real), *draws])


def interval(values: np.ndarray) -> Interval:
    """The first of `replicates`, and the 95 % interval of the others.

    A resample repeats rows, which lifts a Fréchet distance or a KID. The replicates are therefore shifted so that
    their median is the measured value: the interval shows the spread of sampling, not the bias of the estimator.
    """
    value, (low, middle, high) = values[0], np.percentile(values[1:], [2.5, 50, 97.5])
    return Interval(float(value), float(value + low - middle), float(value + high - middle))


def bootstrap(
    fn: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, real: np.ndarray, *, n: int = 200, seed: int = 0
) -> Interval:
    """fn(a, real) with its 95 % bootstrap interval."""
    return interval(replicates(fn, a, real, n=n, seed=seed))


def kid_interval(a: np.ndarray, b: np.ndarray, *, n: int = 200, seed: int = 0) -> Interval:
    """Kernel distance, unbiased MMD² with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018), and its 95 % interval.

    Its mean is 0 for equal distributions at every N, so single values may be negative. Resamples are weights on the
    kernel, and no picture is paired with itself, which keeps them unbiased.
    """
    _check(a, b, rows=2)
    rng = np.random.default_rng(seed)
    x, y, width = a.astype(np.float64), b.astype(np.float64), a.shape[1]
    aa, bb, ab = ((u @ v.T / width + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(aa, 0.0)
    np.fill_diagonal(bb, 0.0)

    def weighed(p: np.ndarray, q: np.ndarray) -> float:
        within = [w @ k @ w / (w.sum() ** 2 - w @ w) for w, k in ((p, aa), (q, bb))]
        return float(within[0] + within[1] - 2 * (p @ ab @ q) / (p.sum() * q.sum()))

    def resample(size: int) -> np.ndarray:
        return np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)

    value = weighed(np.ones(len(a)), np.ones(len(b)))
    draws = [weighed(resample(len(a)), resample(len(b))) for _ in range(n)]
    low, middle, high = np.percentile(draws, [2.5, 50, 97.5])
    return Interval(value, float(value + low - middle), float(value + high - middle))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> PrecisionRecall:
    """Precision and recall of k-nearest-neighbour manifolds. Kynkäänniemi et al. 2019.

    A point is inside a manifold when some member is as near to it as to the member's own k-th neighbour.
    """
    _check(real, fake, rows=k + 1)
    between = _squared_distances(real, fake)
    radius_real, radius_fake = (np.partition(_squared_distances(x, x), k, axis=1)[:, k] for x in (real, fake))
    precision = (between <= radius_real[:, None]).any(axis=0).mean()
    recall = (between <= radius_fake[None, :]).any(axis=1).mean()
    return PrecisionRecall(float(precision), float(recall))


def diversity(features: np.ndarray, prompts: np.ndarray) -> float:
    """Mean Euclidean feature distance between pictures of one prompt, averaged over prompts; 0 is mode collapse.

    `features` is (N, D); `prompts` (N,) holds each picture's prompt. A prompt with a single picture is left out.
    """
    means = []
    for prompt in np.unique(prompts):
        rows = features[prompts == prompt]
        if len(rows) > 1:
            upper = np.triu_indices(len(rows), k=1)
            means.append(np.sqrt(_squared_distances(rows, rows)[upper]).mean())
    if not means:
        raise DataError(f"diversity needs a prompt with two pictures, got {len(features)} with a prompt each")
    return float(np.mean(means))


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D)."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    return mean, (features - mean).T @ (features - mean) / (len(features) - 1)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, D), (M, D) → (N, M), centred first so that little is lost in the subtraction."""
    centre = a.mean(axis=0, dtype=np.float64)
    a, b = a - centre, b - centre
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2 * a @ b.T
    return np.asarray(squares.clip(0))


def _check(a: np.ndarray, b: np.ndarray, *, rows: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < rows:
        raise DataError(f"features must be (N, D) with one D and N ≥ {rows}, got {a.shape} and {b.shape}")

"""Does the picture show its prompt? A linear map from Lite0 features to sentence space, and recall in it.

A weak score by nature: print the real pictures' own recall, its ceiling, beside every model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instaflow.errors import DataError

STRENGTHS = tuple(float(s) for s in np.logspace(-4, 2, 13))  # ridge penalties tried, as a share of the rows
VALIDATION = 0.15  # share of the training concepts that choose among them


@dataclass(frozen=True, kw_only=True)
class RidgeMap:
    """Standardised features (N, D) → centred sentence space (N, E).

    `mean`, `scale` (D,), `weights` (D, E), `centre` (E,): the mean embedding in training; `strength`: the penalty.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    centre: np.ndarray
    strength: float

    def similarity(self, features: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
        """Cosine in the centred space of pictures (N, D) and sentences (M, E), (N, M).

        Without centring, the sentences nearest the mean would win for every picture.
        """
        predicted = ((features - self.mean) / self.scale) @ self.weights
        cosine: np.ndarray = _normalise(predicted) @ _normalise(embeddings - self.centre).T
        return cosine


def fit_map(features: np.ndarray, embeddings: np.ndarray, *, seed: int = 0) -> RidgeMap:
    """Ridge regression (Hoerl & Kennard 1970) fitted on real training pictures.

    The penalty is the one that ranks held-out training *concepts* best, by mean reciprocal rank (equal embeddings
    are one concept): what is scored later are concepts never seen. Then all rows are used. Equal input, equal map.

    Args:
        features: (N, D) Lite0 features.
        embeddings: (N, E) the sentence embedding of each picture's name, of length 1.
        seed: of the split into fitting and validation concepts.

    Raises:
        DataError: the numbers of rows differ, or there are fewer than two concepts.
    """
    if features.ndim != 2 or embeddings.ndim != 2 or len(features) != len(embeddings):
        raise DataError(f"features and embeddings must be (N, D) and (N, E), got {features.shape}, {embeddings.shape}")
    concepts, concept = np.unique(embeddings, axis=0, return_inverse=True)
    if len(concepts) < 2:
        raise DataError("a retrieval map needs at least two concepts with different embeddings, got one")
    concept = concept.ravel()
    count = min(len(concepts) - 1, max(1, round(VALIDATION * len(concepts))))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(concepts))[:count])
    held_out = np.isin(concept, chosen)
    own = np.searchsorted(chosen, concept[held_out])
    candidates = _ridge_path(features[~held_out], embeddings[~held_out], STRENGTHS)
    scores = [(1 / _ranks(c, features[held_out], own, concepts[chosen])).mean() for c in candidates]
    return _ridge_path(features, embeddings, (STRENGTHS[int(np.argmax(scores))],))[0]


def recall(
    ridge: RidgeMap,
    features: np.ndarray,
    concept_index: np.ndarray,
    concept_embeddings: np.ndarray,
    ks: Sequence[int] = (1, 5),
) -> dict[int, float]:
    """R@k: how often a picture's own concept is among the k most similar candidates. Ties count against it.

    Args:
        ridge: fitted by `fit_map`.
        features: (N, D) of the pictures.
        concept_index: (N,) the row of `concept_embeddings` that each picture was drawn from.
        concept_embeddings: (M, E) the candidates.
        ks: numbers of guesses allowed.

    Returns:
        k → recall in 0…1; chance is k/M.

    Raises:
        DataError: an index outside the candidates, or one missing.
    """
    if len(features) != len(concept_index) or not len(features):
        raise DataError(f"each picture needs a concept, got {len(features)} pictures, {len(concept_index)} concepts")
    if concept_index.min() < 0 or concept_index.max() >= len(concept_embeddings):
        raise DataError(f"concept_index must be in 0…{len(concept_embeddings) - 1}, got up to {concept_index.max()}")
    ranks = _ranks(ridge, features, concept_index, concept_embeddings)
    return {k: float((ranks <= k).mean()) for k in ks}


def _ranks(ridge: RidgeMap, features: np.ndarray, own: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """(N,) the place of each picture's own concept among all, 1 is first."""
    cosine = ridge.similarity(features, embeddings)
    ranks: np.ndarray = (cosine >= np.take_along_axis(cosine, own[:, None], axis=1)).sum(axis=1)
    return ranks


def _ridge_path(features: np.ndarray, embeddings: np.ndarray, strengths: Sequence[float]) -> list[RidgeMap]:
    """One map a penalty, from a single eigendecomposition of XᵀX."""
    mean, scale = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 1e-6, scale, 1.0)
    centre = embeddings.mean(axis=0, dtype=np.float64)
    x, y = (features - mean) / scale, embeddings - centre
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    rotated = vectors.T @ (x.T @ y / len(x))
    return [
        RidgeMap(mean=mean, scale=scale, centre=centre, strength=s, weights=vectors @ (rotated / (values + s)[:, None]))
        for s in strengths
    ]


def _normalise(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a zero row stays zero."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12))

"""The retrieval map: perfect where a linear map exists, chance where none does."""

from __future__ import annotations

import numpy as np
import pytest

from instaflow.errors import DataError
from instaflow.evaluate.retrieval import STRENGTHS, RidgeMap, fit_map, recall

CONCEPTS, STYLES, WIDTH = 150, 3, 24


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def world(seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, a linear picture of their concept's embedding plus noise; concept numbers; embeddings."""
    rng = np.random.default_rng(seed)
    embeddings = unit(rng.normal(size=(CONCEPTS, 12)) + 1)
    concept = np.repeat(np.arange(CONCEPTS), STYLES)
    mixing = np.random.default_rng(99).normal(size=(12, WIDTH))
    return embeddings[concept] @ mixing + noise * rng.normal(size=(len(concept), WIDTH)), concept, embeddings


def test_recall_is_perfect_on_a_linear_problem_for_unseen_concepts() -> None:
    features, concept, embeddings = world(0, noise=0)
    ridge = fit_map(features, embeddings[concept])
    unseen, index, candidates = world(1, noise=0)
    assert recall(ridge, unseen, index, candidates) == {1: 1.0, 5: 1.0}


def test_recall_is_chance_on_noise() -> None:
    rng = np.random.default_rng(2)
    _, concept, embeddings = world(0, noise=0)
    ridge = fit_map(rng.normal(size=(len(concept), WIDTH)), embeddings[concept])
    index = rng.integers(CONCEPTS, size=4000)
    scores = recall(ridge, rng.normal(size=(4000, WIDTH)), index, embeddings, ks=(1, 5, CONCEPTS))
    assert scores[1] == pytest.approx(1 / CONCEPTS, abs=0.006)  # 4 standard errors
    assert scores[5] == pytest.approx(5 / CONCEPTS, abs=0.012)
    assert scores[CONCEPTS] == 1


def test_recall_counts_places_exactly() -> None:
    identity = RidgeMap(mean=np.zeros(2), scale=np.ones(2), weights=np.eye(2), centre=np.zeros(2), strength=1.0)
    embeddings = unit(np.array([[1.0, 0], [1, 1], [0, 1]]))
    pictures = np.array([[1.0, 0.1], [1, 0.1], [1, 0.1], [1, 0.9]])  # nearest first: 0 1 2, thrice; then 1 0 2
    assert recall(identity, pictures, np.array([0, 1, 2, 1]), embeddings, ks=(1, 2, 3)) == {1: 0.5, 2: 0.75, 3: 1.0}


def test_a_constant_answer_earns_nothing() -> None:
    blind = RidgeMap(mean=np.zeros(2), scale=np.ones(2), weights=np.zeros((2, 2)), centre=np.zeros(2), strength=1.0)
    assert recall(blind, np.ones((3, 2)), np.arange(3), unit(np.array([[1.0, 0], [1, 1], [0, 1]]))) == {1: 0.0, 5: 1.0}


def test_features_that_say_nothing_call_for_a_stronger_penalty() -> None:
    features, concept, embeddings = world(3, noise=1.0)
    distraction = np.random.default_rng(0).normal(size=(len(features), 400))  # nearly as many as there are pictures
    plain = fit_map(features, embeddings[concept]).strength
    distracted = fit_map(np.hstack([features, distraction]), embeddings[concept]).strength
    assert plain < distracted
    assert {plain, distracted} <= set(STRENGTHS)


def test_weights_solve_the_ridge_equations() -> None:
    features, concept, embeddings = world(4, noise=0.5)
    ridge = fit_map(features, embeddings[concept])
    x, y = (features - features.mean(0)) / features.std(0), embeddings[concept] - embeddings[concept].mean(0)
    expected = np.linalg.solve(x.T @ x + ridge.strength * len(x) * np.eye(WIDTH), x.T @ y)
    np.testing.assert_allclose(ridge.weights, expected, atol=1e-8)


def test_the_fit_is_deterministic() -> None:
    features, concept, embeddings = world(5, noise=0.5)
    first, second = (fit_map(features, embeddings[concept]) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)


def test_wrong_input_is_refused() -> None:
    features, concept, embeddings = world(6, noise=0)
    ridge = fit_map(features, embeddings[concept])
    with pytest.raises(DataError, match="must be"):
        fit_map(features[1:], embeddings[concept])
    with pytest.raises(DataError, match="two concepts"):
        fit_map(features, np.ones((len(features), 4)))
    with pytest.raises(DataError, match="concept_index"):
        recall(ridge, features, concept + 1, embeddings)
    with pytest.raises(DataError, match="needs a concept"):
        recall(ridge, features, concept[1:], embeddings)

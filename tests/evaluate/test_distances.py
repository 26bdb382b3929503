"""Distances against closed forms, brute force and their own statistical promises."""

from __future__ import annotations

import numpy as np
import pytest

from instaflow.errors import DataError
from instaflow.evaluate.distances import (
    bootstrap,
    diversity,
    fit_projection,
    frechet,
    interval,
    kid_interval,
    precision_recall,
    replicates,
)


def whitened(seed: int, rows: int, width: int) -> np.ndarray:
    """Rows whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = np.random.default_rng(seed).normal(size=(rows, width))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


def plain_kid(a: np.ndarray, b: np.ndarray) -> float:
    """By its definition, without weights."""
    n, m, width = len(a), len(b), a.shape[1]
    aa, bb, ab = ((x @ y.T / width + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """The value alone."""
    return kid_interval(a, b, n=1).value


def test_frechet_of_diagonal_gaussians_has_its_closed_form() -> None:
    a_dev, b_dev, shift = np.array([1.0, 2.0, 3.0, 0.0]), np.array([2.0, 0.5, 3.0, 1.0]), np.array([1.0, 0, -2, 0.5])
    a, b = whitened(0, 300, 4) * a_dev, whitened(1, 400, 4) * b_dev + shift
    assert frechet(a, b) == pytest.approx(((a_dev - b_dev) ** 2).sum() + (shift**2).sum(), abs=1e-6)
    assert frechet(b, a) == pytest.approx(frechet(a, b), abs=1e-6)


def test_frechet_agrees_with_the_square_root_of_a_product() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) for _ in range(2))
    eigenvalues = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real  # Σ_a Σ_b is similar to the symmetric form
    expected = (
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(eigenvalues).sum()
    )
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_a_translation_is_its_squared_length() -> None:
    a = np.random.default_rng(3).normal(size=(100, 5)).astype(np.float32)
    shift = np.arange(5)
    assert frechet(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_survives_fewer_pictures_than_dimensions() -> None:
    a = np.random.default_rng(4).normal(size=(10, 50))
    assert frechet(a, a + 1) == pytest.approx(50, rel=1e-4)


def test_kid_is_unbiased_and_sees_a_difference() -> None:
    rng = np.random.default_rng(5)
    values = np.array([kid(rng.normal(size=(20, 8)), rng.normal(size=(30, 8))) for _ in range(400)])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert values.min() < 0
    assert kid(rng.normal(size=(200, 8)), rng.normal(size=(200, 8)) + 1) > 20 * values.std()


def test_kid_equals_the_sum_written_out() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = np.mean([kernel(a[i], a[j]) for i in range(4) for j in range(4) if i != j])
    within_b = np.mean([kernel(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kid(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_precision_and_recall_equal_brute_force() -> None:
    rng = np.random.default_rng(7)
    real, fake, k = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.7 + 0.5, 3

    def inside(point: np.ndarray, members: np.ndarray) -> bool:
        radii = [sorted(np.linalg.norm(members - m, axis=1))[k] for m in members]
        return any(np.linalg.norm(point - m) <= r for m, r in zip(members, radii, strict=True))

    result = precision_recall(real, fake, k)
    assert result.precision == pytest.approx(np.mean([inside(p, real) for p in fake]))
    assert result.recall == pytest.approx(np.mean([inside(p, fake) for p in real]))
    assert 0 < result.recall < result.precision < 1  # narrower fakes: precise, not complete


def test_precision_and_recall_at_their_ends() -> None:
    real = np.random.default_rng(8).normal(size=(30, 4))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)


@pytest.mark.parametrize("distance", [frechet, kid])
def test_bootstrap_interval_holds_the_value_and_narrows_with_more_pictures(distance) -> None:
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=(400, 4)), rng.normal(size=(400, 4)) + 0.3
    few, many = bootstrap(distance, a[:40], b[:40]), bootstrap(distance, a, b)
    for found in (few, many):
        assert found.low <= found.value <= found.high
    assert many.value == distance(a, b)
    assert many.high - many.low < (few.high - few.low) / 2
    assert bootstrap(distance, a[:40], b[:40]) == few != bootstrap(distance, a[:40], b[:40], seed=1)


def test_bootstrap_interval_of_a_mean_is_the_textbook_one() -> None:
    rng = np.random.default_rng(10)
    a, b = rng.normal(size=(400, 1)), rng.normal(size=(400, 1))
    found = bootstrap(lambda x, y: float(x.mean() - y.mean()), a, b, n=1000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(a.var() / 400 + b.var() / 400), rel=0.1)


def test_projection_finds_the_plane_the_features_lie_in() -> None:
    rng = np.random.default_rng(11)
    features = rng.normal(size=(100, 2)) * [3, 1] @ rng.normal(size=(2, 10)) + 7
    projection = fit_projection(features, 2)
    coordinates = projection(features)
    np.testing.assert_allclose(projection.components.T @ projection.components, np.eye(2), atol=1e-10)
    np.testing.assert_allclose(coordinates @ projection.components.T + projection.mean, features, atol=1e-8)
    assert coordinates[:, 0].var() > coordinates[:, 1].var()


def test_diversity_is_the_mean_over_prompts_and_zero_for_copies() -> None:
    features = np.array([[0.0, 0], [3, 4], [1, 1], [1, 1], [1, 2], [9, 9]])
    prompts = np.array(["cat", "cat", "dog", "dog", "dog", "alone"])
    assert diversity(features, prompts) == pytest.approx((5 + (0 + 1 + 1) / 3) / 2)
    assert diversity(np.ones((4, 3)), np.zeros(4)) == 0


def test_wrong_shapes_are_refused() -> None:
    a = np.zeros((9, 3))
    for call in (
        lambda: frechet(a, np.zeros((9, 4))),
        lambda: kid(a[:1], a),
        lambda: precision_recall(a[:3], a, k=3),
        lambda: fit_projection(a, 4),
        lambda: fit_projection(a[:2], 2),
        lambda: diversity(a, np.arange(9)),
    ):
        with pytest.raises(DataError, match=r"features|diversity"):
            call()


# -- intervals of differences and of KID -------------------------------------------------------


def test_kid_with_weights_is_kid() -> None:
    a, b = cloud(60, 5, seed=1), cloud(40, 5, seed=2) + 0.3
    found = kid_interval(a, b)
    assert found.value == pytest.approx(plain_kid(a, b), rel=1e-9) and found.low < found.value < found.high


def test_the_interval_of_kid_holds_the_truth() -> None:
    """Of a hundred draws from one distribution the interval misses 0 seldom."""
    missed = sum(
        not found.low <= 0 <= found.high
        for found in (kid_interval(cloud(60, 4, seed=i), cloud(60, 4, seed=i + 500), n=60) for i in range(60))
    )
    assert missed <= 9


def test_a_difference_has_a_narrower_interval_than_its_parts() -> None:
    real = cloud(50, 4, seed=0)
    a, b = cloud(800, 4, seed=1) + 0.8, cloud(800, 4, seed=2) + 0.7
    found = interval(replicates(frechet, a, real) - replicates(frechet, b, real))
    assert found.value == pytest.approx(frechet(a, real) - frechet(b, real))
    own = bootstrap(frechet, a, real)
    assert found.low > 0 and found.high - found.low < own.high - own.low
    same = interval(replicates(frechet, a, real) - replicates(frechet, cloud(800, 4, seed=3) + 0.8, real))
    assert same.low < 0 < same.high


def cloud(count: int, width: int, *, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width))

"""Noise without torch is torch's own, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instaflow.noise import Walk, noise, slerp

SEEDS = [*range(64), 2**31 + 5, 2**32 - 1, 2**32 + 5, 2**63 - 1]


@pytest.mark.parametrize("shape", [(16, 8, 8), (4, 64, 64), (4, 4, 4), (16,), (5, 7, 3), (1, 17)])
def test_it_is_that_of_torch(shape: tuple[int, ...]) -> None:
    theirs = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS]).numpy()
    ours = noise(SEEDS, shape)
    assert ours.dtype == np.float32 and ours.shape == (len(SEEDS), *shape)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert (ours == theirs).all()
    else:  # torch takes the C library's logarithm and sine there
        assert np.abs(ours - theirs).max() < 4e-6


def test_it_is_the_same_everywhere() -> None:
    """Recorded from torch 2.13 with AVX2: what a machine without it must give too."""
    recorded = [1.9269152879714966, 1.4872840642929077, 0.9007171988487244, -2.1055209636688232]
    assert noise([42], (16, 8, 8)).ravel()[:4].tolist() == recorded


def test_each_row_depends_on_its_seed_alone() -> None:
    assert (noise([3, 1, 4], (4, 4, 4))[2] == noise([4], (4, 4, 4))[0]).all()
    assert noise([], (4, 4, 4)).shape == (0, 4, 4, 4)


def test_a_walk_goes_from_one_seed_to_another_on_a_circle() -> None:
    shape = (16, 8, 8)
    walk = noise([Walk(7, 8, m) for m in (0, 0.25, 0.5, 0.75, 1)] + [Walk(7, 7, 0.3)], shape)
    ends = noise([7, 8], shape)
    assert (walk[0] == ends[0]).all() and (walk[4] == ends[1]).all() and (walk[5] == ends[0]).all()
    assert np.abs(walk[1:4].std(axis=(1, 2, 3)) - 1).max() < 0.05  # where a straight line would have √½
    right = slerp(np.array([1, 0], np.float32), np.array([0, 2], np.float32), 1 / 3)
    assert np.allclose(right, [np.sqrt(3) / 2, 1])


def test_it_is_normal() -> None:
    x = noise(range(100), (64, 64)).astype(np.float64)
    assert abs(x.mean()) < 0.005 and abs(x.var() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.05
    corr = np.corrcoef(x.reshape(100, -1))[np.triu_indices(100, 1)]
    assert np.abs(corr).max() < 0.1


def test_too_few_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        noise([0], (15,))

"""Noise as a pure function of its seed: what `torch.randn` gives on a CPU, without torch and on every machine.

torch draws with the Mersenne Twister and Box and Muller's transform, whose logarithm and sine it computes, where the
processor has AVX2, by the single-precision polynomials of Cephes; elsewhere by the C library, and the last bits
differ. Here they are always Cephes', so that a seed means the same noise, to the bit, everywhere.

Source: Matsumoto & Nishimura 1998; Box & Muller 1958; Cephes, netlib.org/cephes (logf, sinf, cosf).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

NOISE = "torch.Generator(cpu).manual_seed(seed), randn, fp32, version 1"
BLOCK = 16  # numbers that torch turns from uniform to normal together

LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LN2 = (-2.12194440e-4, 0.693359375)  # their sum, in two parts
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)  # −π/4, in three parts


class Walk(NamedTuple):
    """In place of a seed: a point on the way from one seed's noise to another's."""

    seed: int
    seed2: int
    mix: float
    """0 is the first's noise, 1 the second's."""


def noise(seeds: Sequence[int | Walk], shape: Sequence[int]) -> Floats:
    """X₀ ~ N(0, I), (B, *shape) fp32; each row depends on its seed alone. Of a seed, the lowest 32 bits count.

    Raises:
        ValueError: a row has fewer than 16 numbers, which torch draws in another way.
    """
    x0 = _normal([s.seed if isinstance(s, Walk) else s for s in seeds], shape)
    for i, walk in enumerate(seeds):
        if isinstance(walk, Walk):
            x0[i] = slerp(x0[i], _normal([walk.seed2], shape)[0], walk.mix)
    return x0


def slerp(a: Floats, b: Floats, mix: float) -> Floats:
    """From a (mix 0, to the bit) along the great circle to b (mix 1): noise on the way is as long as noise is.

    Source: Shoemake 1985, "Animating rotation with quaternion curves".
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosine = np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y))
    angle = math.acos(min(1.0, max(-1.0, float(cosine))))
    if math.sin(angle) < 1e-6:  # the same noise twice
        return a
    both = math.sin((1 - mix) * angle) / math.sin(angle) * x + math.sin(mix * angle) / math.sin(angle) * y
    return both.astype(np.float32)


def _normal(seeds: Sequence[int], shape: Sequence[int]) -> Floats:
    size = math.prod(shape)
    if size < BLOCK:
        raise ValueError(f"noise of {size} numbers is not made here; at least {BLOCK}")
    count = size if size % BLOCK == 0 else size + BLOCK  # torch draws the last block anew when it is cut
    bits = np.stack([_twister(seed, count) for seed in seeds]) if len(seeds) else np.empty((0, count), np.uint32)
    uniform = (bits & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
    normal = np.empty((len(seeds), size), np.float32)
    whole = size - size % BLOCK
    normal[:, :whole] = _box_muller(uniform[:, :whole])
    if whole < size:
        normal[:, -BLOCK:] = _box_muller(uniform[:, size:])
    return normal.reshape(len(seeds), *shape)


def _twister(seed: int, count: int) -> NDArray[np.uint32]:
    return np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, count, dtype=np.uint32)


def _box_muller(uniform: Floats) -> Floats:
    """(B, n) in [0, 1) → N(0, 1): in each block of 16 the first 8 say the radius, the last 8 the angle."""
    pairs = uniform.reshape(len(uniform), uniform.shape[1] // BLOCK, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - pairs[:, :, 0]))
    sine, cosine = _sin_cos(np.float32(2 * math.pi) * pairs[:, :, 1])
    return np.stack([radius * cosine, radius * sine], axis=2).reshape(uniform.shape)


def _fma(a: Floats, b: float | Floats, c: float | Floats) -> Floats:
    """a·b + c rounded once, as one instruction does: the product of two floats is exact in double precision."""
    double = a.astype(np.float64) * np.float32(b) + np.float32(c)
    return double.astype(np.float32)


def _log(x: Floats) -> Floats:
    """Natural logarithm of x > 0: x = m·2ᵉ with m near 1, a polynomial in m − 1, and e·ln 2."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < np.float32(math.sqrt(0.5))
    m = np.where(small, mantissa + mantissa, mantissa) - np.float32(1)
    e = (exponent - small).astype(np.float32)
    square = m * m
    y = np.full_like(m, LOG[0])
    for coefficient in LOG[1:]:
        y = _fma(y, m, coefficient)
    y = _fma(y * m, square, e * np.float32(LN2[0]))
    y = _fma(square, -0.5, y)
    return _fma(e, LN2[1], m + y)


def _sin_cos(x: Floats) -> tuple[Floats, Floats]:
    """Sine and cosine of x ≥ 0: the nearest even multiple of π/4 is taken away, and polynomials do the rest."""
    octant = (x * np.float32(4 / math.pi)).astype(np.int32) + 1 & ~1
    y = octant.astype(np.float32)
    for part in QUARTER_PI:
        x = _fma(y, part, x)
    square = x * x
    cosine = _fma(_fma(np.full_like(x, COS[0]), square, COS[1]), square, COS[2]) * square
    cosine = _fma(cosine, square, np.float32(-0.5) * square) + np.float32(1)
    sine = _fma(_fma(np.full_like(x, SIN[0]), square, SIN[1]), square, SIN[2]) * square
    sine = _fma(sine, x, x)
    swapped = octant & 2 != 0
    sine, cosine = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(octant & 4, -sine, sine), np.where((octant - 2) & 4, cosine, -cosine)

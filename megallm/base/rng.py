"""Named, keyed, counter-based random streams: number i of a stream is a pure function of (key, i).

Nothing here has state, so any rank can make exactly the numbers it owns and nobody else's. The bits
are Philox4x64-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC11). Everything
made of them uses only + - * / sqrt and exact bit operations on contiguous arrays. IEEE 754 fixes
those to the last bit, so a sub-range equals the same range of a whole draw, on every CPU and at
every length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from math import log, prod

import numpy as np

_BLOCK = 4  # numbers that one step of the Philox counter makes
_CHUNK = 1 << 13  # numbers transformed at once: the scratch arrays stay in the cache
_SLAB = 1 << 16  # numbers drawn at once when a box is made of short runs; bounds the slack
_GAP = 1 << 11  # a hole between runs up to this long is cheaper to draw than to jump over

# Wichura, "Algorithm AS 241: The Percentage Points of the Normal Distribution", Applied Statistics
# 37 (1988): PPND16. Each pair is (numerator, denominator), highest power first.
_CENTRE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
_TAIL = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
_FAR_TAIL = (
    (
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        1.24266094738807843860e-3,
        2.65321895265761230930e-2,
        2.96560571828504891230e-1,
        1.78482653991729133580e0,
        5.46378491116411436990e0,
        6.65790464350110377720e0,
    ),
    (
        2.04426310338993978564e-15,
        1.42151175831644588870e-7,
        1.84631831751005468180e-5,
        7.86869131145613259100e-4,
        1.48753612908506148525e-2,
        1.36929880922735805310e-1,
        5.99832206555887937690e-1,
        1.0,
    ),
)
_LN2 = log(2.0)
_HALF_SQRT = 0.7071067811865476
_ATANH = tuple(2.0 / k for k in range(23, 0, -2))  # log(m) = 2 atanh(s) = sum of 2 s^k / k, k odd


def key_of(seed: int, *names: str | int) -> int:
    """Returns the 128-bit key of the stream called `names` under `seed`; different names never
    share a stream.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"megallm.rng")
    for item in (seed, *names):
        body = f"{'s' if isinstance(item, str) else 'i'}{item}".encode()
        digest.update(len(body).to_bytes(8, "little") + body)
    return int.from_bytes(digest.digest(), "little")


def bits(key: int, begin: int, count: int) -> np.ndarray:
    """Returns numbers `begin` to `begin + count` of the stream as uint64 [count]."""
    block, skip = divmod(begin, _BLOCK)
    return np.random.Philox(key=key, counter=block).random_raw(count + skip)[skip:]


def uniform(key: int, begin: int, count: int) -> np.ndarray:
    """Returns numbers of the stream as float64 [count], each an odd multiple of 2^-53, so never 0
    and never 1.
    """
    return _to_uniform(bits(key, begin, count))


def normal_values(key: int, begin: int, count: int) -> np.ndarray:
    """Returns standard normal numbers as float64 [count]: the inverse distribution function of
    `uniform`.
    """
    return normal_box(key, (begin + count,), (begin,), (count,))


def normal_box(
    key: int, full: Sequence[int], offset: Sequence[int], shape: Sequence[int]
) -> np.ndarray:
    """Returns the box at `offset` of `shape` of the logical row-major tensor `full` of normal
    numbers, as float64 [*shape].

    Element at flat index i of the logical tensor is number i of the stream. Beside the box, at most
    2^16 numbers and one integer per contiguous run are held.
    """
    return _box(_inverse_normal, key, full, offset, shape)


def uniform_box(
    key: int, full: Sequence[int], offset: Sequence[int], shape: Sequence[int]
) -> np.ndarray:
    """Returns the same of numbers of `uniform`, in (0, 1)."""
    return _box(np.asarray, key, full, offset, shape)


def _box(
    transform: Callable[[np.ndarray], np.ndarray],
    key: int,
    full: Sequence[int],
    offset: Sequence[int],
    shape: Sequence[int],
) -> np.ndarray:
    if not len(full) == len(offset) == len(shape):
        raise ValueError(
            f"full {full}, offset {offset} and shape {shape} must have equally many dims."
        )
    if any(o < 0 or n < 0 or o + n > f for f, o, n in zip(full, offset, shape, strict=True)):
        raise ValueError(
            f"The box at {tuple(offset)} of {tuple(shape)} is not inside {tuple(full)}."
        )
    if prod(shape) == 0:
        return np.empty(shape)
    starts, run = _runs(full, offset, shape)
    out = np.empty((starts.size, run))
    if run >= _CHUNK:
        for row, begin in enumerate(starts.tolist()):
            for lo in range(0, run, _CHUNK):
                hi = min(lo + _CHUNK, run)
                out[row, lo:hi] = transform(_to_uniform(bits(key, begin + lo, hi - lo)))
    else:
        _fill_short_runs(transform, key, starts, out)
    return out.reshape(shape)


def permutation(key: int, n: int) -> np.ndarray:
    """Returns a permutation of range(n) as int64 [n]: the order that sorts the first n numbers of
    the stream.
    """
    return np.argsort(bits(key, 0, n), kind="stable")


def _runs(
    full: Sequence[int], offset: Sequence[int], shape: Sequence[int]
) -> tuple[np.ndarray, int]:
    """First flat index of every contiguous run of a box, ascending, and their common length."""
    dims = len(full)
    strides = [prod(full[d + 1 :]) for d in range(dims)]
    inner = dims  # dims from `inner` on are whole, so the dim before them still belongs to the run
    while inner > 0 and shape[inner - 1] == full[inner - 1]:
        inner -= 1
    first = max(inner - 1, 0)
    run = prod(shape[first:])
    starts = np.array([sum(o * s for o, s in zip(offset, strides, strict=True))], dtype=np.int64)
    for d in range(first):
        starts = (starts[:, None] + np.arange(shape[d], dtype=np.int64) * strides[d]).ravel()
    return starts, run


def _fill_short_runs(
    transform: Callable[[np.ndarray], np.ndarray], key: int, starts: np.ndarray, out: np.ndarray
) -> None:
    """Draw runs that lie close together as one range, and transform many runs at once."""
    run = out.shape[1]
    rows = max(1, _CHUNK // run)
    columns = np.arange(run)
    for top in range(0, starts.size, rows):
        some = starts[top : top + rows]
        raw = np.empty((some.size, run), dtype=np.uint64)
        jump = (some[1:] // _SLAB != some[:-1] // _SLAB) | (some[1:] - some[:-1] - run > _GAP)
        edges = np.concatenate(([0], np.flatnonzero(jump) + 1, [some.size]))
        for lo, hi in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            begin, end = int(some[lo]), int(some[hi - 1]) + run
            raw[lo:hi] = bits(key, begin, end - begin)[(some[lo:hi] - begin)[:, None] + columns]
        out[top : top + rows] = transform(_to_uniform(raw.ravel())).reshape(some.size, run)


def _to_uniform(raw: np.ndarray) -> np.ndarray:
    out = (raw >> np.uint64(12)).astype(np.float64)
    out += 0.5
    out *= 2.0**-52
    return out


def _inverse_normal(p: np.ndarray) -> np.ndarray:
    """Inverse of the standard normal distribution function, p float64 [n] in (0, 1), |error| <
    1e-15 relative.
    """
    p = np.ascontiguousarray(p)
    q = p - 0.5
    square = q * q
    tail = np.flatnonzero(square > 0.425 * 0.425)
    np.subtract(0.180625, square, out=square)
    out = _rational(_CENTRE, square)
    out *= q
    if tail.size:
        below = p[tail]
        r = np.sqrt(-_log(np.minimum(below, 1.0 - below)))
        value = _rational(_TAIL, r - 1.6)
        far = np.flatnonzero(r > 5.0)
        if far.size:
            value[far] = _rational(_FAR_TAIL, r[far] - 5.0)
        out[tail] = np.where(below < 0.5, -value, value)
    return out


def _rational(pair: tuple[tuple[float, ...], tuple[float, ...]], x: np.ndarray) -> np.ndarray:
    top = _polynomial(pair[0], x)
    top /= _polynomial(pair[1], x)
    return top


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    out = x * coefficients[0]
    for c in coefficients[1:-1]:
        out += c
        out *= x
    out += coefficients[-1]
    return out


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of x in (0, 1): numpy's own differs in the last bit between CPUs, this does
    not.
    """
    m, e = np.frexp(x)
    low = m < _HALF_SQRT
    m = np.where(low, m + m, m)
    e = e - low
    s = (m - 1.0) / (m + 1.0)
    return _polynomial(_ATANH, s * s) * s + e * _LN2

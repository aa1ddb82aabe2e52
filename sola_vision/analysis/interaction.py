# SPDX-License-Identifier: Apache-2.0
"""The interaction range of stacked linear layers: sections 3.2, 4.1 and 9, exactly on the lattice or as printed.

The idealised layer of eqs. 6 and 11 is a convolution along the tokens with K(d) proportional to exp(-w |d|), w > 0 per
token. Eq. 9 divides the decay by the number of tokens N, so its rate per token is w / N (`per_token`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_DIRECT = 8000  # kernel length up to which direct convolution takes negligible time


def decay_range(decay: float, tolerance: float) -> float:
    """Return eq. 5, the distance xi in tokens at which exp(-w xi) falls to the tolerance: ln(1/eps) / w."""
    _check(decay, tolerance)
    return float(np.log(1 / tolerance) / decay)


def per_token(decay: float, num_tokens: int) -> float:
    """Return w / N, the rate per token in eqs. 5 to 8 that corresponds to a decay w in eq. 9.

    The range of eq. 5 is thus N ln(1/eps) / w tokens: a fixed fraction ln(1/eps) / w of the image at any size.
    """
    return decay / num_tokens


def lattice_kernel(decay: float, radius: int) -> Array:
    """Return K(d) of eq. 11 for d = -radius..radius, normalised on the integers: tanh(w/2) exp(-w |d|).

    Eq. 12's factor w/2 normalises the continuous kernel; on tokens its sum is (w/2) coth(w/2), not 1.
    """
    _check(decay)
    distance = np.abs(np.arange(-radius, radius + 1))
    return np.tanh(decay / 2) * np.exp(-decay * distance)


def lattice_variance(decay: float) -> float:
    """Return the exact variance of one layer's kernel on the integers: 1 / (2 sinh^2(w/2))."""
    _check(decay)
    return float(0.5 / np.sinh(decay / 2) ** 2)


def continuous_variance(decay: float) -> float:
    """Return eq. 13, the variance 2 / w^2 of the continuous kernel.

    It is the limit of `lattice_variance` for small w, and 8.6 % larger at w = 1.
    """
    _check(decay)
    return 2 / decay**2


def stacked_variance(decays: Sequence[float], *, lattice: bool = True) -> float:
    """Return eqs. 7 and 14, the sum of the layers' variances; with lattice=False the paper's 2 / w^2 for each."""
    return float(sum(map(lattice_variance if lattice else continuous_variance, decays)))


def stacked_kernel(decays: Sequence[float]) -> Array:
    """Return eq. 6, K1 * ... * KM on the integers; the middle element is offset 0.

    Each layer's kernel is truncated where it has fallen by e^-40.
    """
    kernels = [lattice_kernel(decay, int(np.ceil(40 / decay)) + 1) for decay in decays]
    length = sum(len(kernel) - 1 for kernel in kernels) + 1
    if length < _DIRECT:
        stacked: Array = np.ones(1)
        for kernel in kernels:
            stacked = np.asarray(np.convolve(stacked, kernel), float)
        return stacked
    # slow decays give long kernels: use the Fourier transform, accurate to 1e-16 of the centre
    transform = np.ones(length // 2 + 1, dtype=complex)
    for kernel in kernels:
        transform *= np.fft.rfft(kernel, length)
    return np.fft.irfft(transform, length).clip(min=0)


def gaussian_kernel(variance: float, radius: int) -> Array:
    """Return eqs. 7 and 15 with the constant they omit: the normal density on the integers -radius..radius."""
    offset = np.arange(-radius, radius + 1)
    return np.exp(-(offset**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def interaction_radius(decays: Sequence[float], tolerance: float, *, lattice: bool = True) -> float:
    """Return eqs. 8 and 17, sigma_M sqrt(2 ln(1/eps)): the distance at which the Gaussian falls to the tolerance.

    For identical layers and lattice=False this is eq. 19, sqrt(4 M ln(1/eps)) / w, which grows with the square root of
    depth.
    """
    _check(1.0, tolerance)
    return float(np.sqrt(2 * np.log(1 / tolerance) * stacked_variance(decays, lattice=lattice)))


def exact_radius(kernel: Array, tolerance: float) -> float:
    """Return the distance at which a symmetric kernel falls to `tolerance` of its centre: eq. 16 without the Gaussian.

    The logarithm of the kernel is interpolated between tokens. Raise ValueError if the kernel is too short.
    """
    half = kernel[len(kernel) // 2 :] / kernel[len(kernel) // 2]
    below = np.flatnonzero(half < tolerance)
    if not below.size:
        raise ValueError(f"the kernel stays above {tolerance:g} of its centre within {len(half) - 1} tokens: widen it")
    last = int(below[0])
    high, low, level = np.log(half[last - 1]), np.log(max(half[last], 1e-300)), np.log(tolerance)
    return float(last - 1 + (high - level) / (high - low))


def lobe_error(decays: Sequence[float]) -> float:
    """Return the largest error |K / Gauss - 1| of eq. 15 in the central lobe |d| <= sigma, both scaled to 1 at 0."""
    kernel = stacked_kernel(decays)
    variance = stacked_variance(decays)
    middle = len(kernel) // 2
    lobe = slice(middle, middle + max(1, int(np.sqrt(variance))) + 1)
    gauss = gaussian_kernel(variance, middle)
    return float(np.abs((kernel[lobe] / kernel[middle]) / (gauss[lobe] / gauss[middle]) - 1).max())


def raster_kernel(decays: Sequence[float], height: int, width: int, row: int, column: int) -> Array:
    """Return the weights with which a stack of idealised layers reads every pixel, a map [height, width].

    Tokens are pixels in raster order, so the pixel at offset (dy, dx) is dy * width + dx tokens away. The lobe is
    therefore a run of tokens, not a disc: the vertical neighbour is `width` tokens away, while the last pixel of a row
    and the first of the next are neighbours. Decays are per token; the kernel is cut off at the borders.
    """
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"point ({row}, {column}) lies outside the {height}x{width} grid")
    num_tokens = height * width
    kernel = stacked_kernel(decays)
    middle = len(kernel) // 2
    offset = np.arange(num_tokens) - (row * width + column)
    inside = np.abs(offset) <= middle
    read = np.zeros(num_tokens)
    read[inside] = kernel[offset[inside] + middle]
    return (read / read.sum()).reshape(height, width)


def spread(weights: Array, row: float, column: float) -> tuple[float, float]:
    """Return the root mean square distances of a non-negative map [height, width] from a point: (rows, columns)."""
    share = weights / weights.sum()
    rows, columns = np.arange(weights.shape[0]) - row, np.arange(weights.shape[1]) - column
    return float(np.sqrt(share.sum(1) @ rows**2)), float(np.sqrt(share.sum(0) @ columns**2))


def _check(decay: float, tolerance: float = 0.5) -> None:
    if not decay > 0:
        raise ValueError(f"decay {decay:g} must be above 0: the analysis assumes weights that fall with distance")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance {tolerance:g} must lie between 0 and 1")

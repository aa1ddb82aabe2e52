# SPDX-License-Identifier: Apache-2.0
"""The theory of interaction ranges against brute-force convolution."""

import numpy as np
import pytest

from sola_vision.analysis.interaction import (
    continuous_variance,
    decay_range,
    exact_radius,
    gaussian_kernel,
    interaction_radius,
    lattice_kernel,
    lattice_variance,
    lobe_error,
    per_token,
    raster_kernel,
    spread,
    stacked_kernel,
    stacked_variance,
)


def variance(kernel):
    offset = np.arange(len(kernel)) - len(kernel) // 2
    return (kernel * offset**2).sum() / kernel.sum()


@pytest.mark.parametrize("decay", [0.05, 0.3, 1.0, 2.5])
def test_the_lattice_variance_is_the_kernel_s(decay):
    kernel = lattice_kernel(decay, int(60 / decay))
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert lattice_variance(decay) == pytest.approx(variance(kernel), rel=1e-6)


def test_the_paper_s_variance_is_the_limit_of_slow_decay():
    assert continuous_variance(1.0) / lattice_variance(1.0) == pytest.approx(1.0862, abs=1e-4)
    errors = [continuous_variance(w) / lattice_variance(w) - 1 for w in (1.0, 0.1, 0.01)]
    # w^2 / 12 to the first order
    np.testing.assert_allclose(errors, [w**2 / 12 for w in (1.0, 0.1, 0.01)], rtol=0.05)


@pytest.mark.parametrize("decays", [[0.4], [0.3, 0.9, 2.0], [0.5] * 7, [0.01] * 4])
def test_variances_add_over_layers(decays):
    kernel = stacked_kernel(decays)
    assert kernel.sum() == pytest.approx(1, abs=1e-9)
    assert stacked_variance(decays) == pytest.approx(variance(kernel), rel=1e-6)


def test_the_stack_is_a_convolution_by_loops():
    first, second = lattice_kernel(1.5, 40), lattice_kernel(2.0, 40)
    expected = np.zeros(161)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            expected[i + j] += a * b
    stacked = stacked_kernel([1.5, 2.0])
    middle, reach = len(stacked) // 2, 15
    np.testing.assert_allclose(
        stacked[middle - reach : middle + reach + 1], expected[80 - reach : 81 + reach], rtol=1e-9
    )


def test_long_kernels_by_fourier_equal_short_ones_by_convolution():
    slow = stacked_kernel([0.02] * 3)  # 12,000 offsets, by Fourier transform
    kernel = lattice_kernel(0.02, 2001)
    direct = np.convolve(np.convolve(kernel, kernel), kernel)
    middle, other = len(slow) // 2, len(direct) // 2
    np.testing.assert_allclose(slow[middle : middle + 500], direct[other : other + 500], rtol=1e-9)


def test_the_radius_grows_with_the_root_of_depth():
    exact = [exact_radius(stacked_kernel([0.2] * depth), 0.01) for depth in (10, 40)]
    assert exact[1] / exact[0] == pytest.approx(2, rel=0.05)
    assert interaction_radius([0.2] * 40, 0.01) == pytest.approx(2 * interaction_radius([0.2] * 10, 0.01))
    # eq. 19 in closed form
    assert interaction_radius([0.2] * 6, 0.01, lattice=False) == pytest.approx(np.sqrt(4 * 6 / 0.04 * np.log(100)))


def test_errors_of_radius_and_lobe_shrink_with_depth():
    depths = (2, 4, 8, 16, 32)
    radius = [
        abs(interaction_radius([0.3] * d, 0.01) / exact_radius(stacked_kernel([0.3] * d), 0.01) - 1) for d in depths
    ]
    lobe = [lobe_error([0.3] * d) for d in depths]
    assert sorted(radius, reverse=True) == radius
    assert sorted(lobe, reverse=True) == lobe
    assert radius[-1] < 0.02
    assert lobe[0] > 0.2


def test_a_single_layer_s_radius_is_equation_5():
    assert exact_radius(lattice_kernel(0.37, 200), 0.02) == pytest.approx(decay_range(0.37, 0.02), rel=1e-6)


def test_equation_9_makes_the_range_a_fixed_share_of_the_image():
    shares = [decay_range(per_token(8.0, n), 0.01) / n for n in (49, 196, 4096)]
    np.testing.assert_allclose(shares, np.log(100) / 8)


def test_a_gaussian_has_its_variance():
    assert variance(gaussian_kernel(30.0, 100)) == pytest.approx(30, rel=1e-6)


def test_raster_order_reads_runs_of_tokens():
    height, width = 12, 20
    read = raster_kernel([0.5], height, width, 5, 10)
    assert read.sum() == pytest.approx(1)
    assert read[5, 11] / read[5, 10] == pytest.approx(np.exp(-0.5))
    assert read[6, 10] / read[5, 10] == pytest.approx(np.exp(-0.5 * width))
    # the end of a row and the start of the next are neighbours
    edge = raster_kernel([0.5], height, width, 5, width - 1)
    assert edge[6, 0] == pytest.approx(edge[5, width - 2])
    rows, columns = spread(read, 5, 10)
    assert columns > 5 * rows


def test_slow_decay_in_raster_order_reads_whole_rows():
    read = raster_kernel([per_token(30.0, 56 * 56)] * 2, 56, 56, 28, 28)
    share_of_columns = read.sum(0)
    assert share_of_columns.max() / share_of_columns.min() < 1.1
    # its width in rows is its width in tokens divided by the tokens per row
    rows, _ = spread(read, 28, 28)
    assert rows == pytest.approx(np.sqrt(stacked_variance([30.0 / 3136] * 2)) / 56, rel=0.05)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: decay_range(-1.0, 0.1), "decay -1 must be above 0"),
        (lambda: decay_range(1.0, 1.5), "tolerance 1.5 must lie between"),
        (lambda: exact_radius(lattice_kernel(0.1, 5), 0.01), "widen it"),
        (lambda: raster_kernel([1.0], 4, 4, 4, 0), "outside the 4x4 grid"),
    ],
)
def test_impossible_questions_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()

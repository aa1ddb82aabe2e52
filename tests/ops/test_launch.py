# SPDX-License-Identifier: Apache-2.0
"""Launching: Triton is asked once for each kind of arguments, and always where a tensor is not aligned."""

import pytest
import torch

from sola_vision.ops import launch as launching


class Kernel:
    """Counts how often Triton would look at all arguments, and what its binaries are launched with."""

    def __init__(self, interpreted=False):
        self.asked, self.launched, self.interpreted = [], [], interpreted

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.asked.append((grid, arguments, constants))
            return None if self.interpreted else Binary(self)

        return run


class Binary:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture(autouse=True)
def _none_before(monkeypatch):
    monkeypatch.setattr(launching, "_binaries", {})


def launch(kernel, *tensors, numbers=(32, 7), **constants):
    launching.launch(kernel, 3, tensors, numbers, {"C": 8, **constants}, {"num_warps": 1})


def test_the_second_launch_takes_the_binary_of_the_first():
    kernel, x, y = Kernel(), torch.ones(64), torch.ones(64).half()
    launch(kernel, x, y)
    assert kernel.asked == [((3, 1, 1), (x, y, 32, 7), {"C": 8, "num_warps": 1})]
    other = x + 1
    launch(kernel, other, y, numbers=(48, 9))
    assert len(kernel.asked) == 1
    assert kernel.launched == [((3, 1, 1), (other.data_ptr(), y.data_ptr(), 48, 9, 8))]


@pytest.mark.parametrize(
    "other",
    [
        {"tensor": torch.ones(64).double()},
        {"numbers": (33, 7)},  # 16 does not divide it any more
        {"numbers": (32, 1)},
        {"numbers": (2**31, 7)},
        {"C": 9},
        {"L": 4},
    ],
)
def test_other_arguments_have_a_binary_of_their_own(other):
    kernel, x = Kernel(), torch.ones(64)
    launch(kernel, x)
    tensor = other.pop("tensor", x)
    for _ in range(2):
        launch(kernel, tensor, **other)
    assert len(kernel.asked) == 2
    assert len(kernel.launched) == 1
    launch(kernel, x)
    assert len(kernel.asked) == 2


def test_two_kernels_are_not_mistaken_for_each_other():
    first, second, x = Kernel(), Kernel(), torch.ones(64)
    launch(first, x)
    launch(second, x)
    assert len(first.asked) == len(second.asked) == 1


def test_what_is_not_aligned_is_left_to_triton():
    kernel, x = Kernel(), torch.ones(65)
    launch(kernel, x[:64])
    for _ in range(2):
        launch(kernel, x[1:])
    assert len(kernel.asked) == 3
    assert not kernel.launched


def test_large_storages_are_left_to_triton_where_it_compiles_for_small_ones(monkeypatch):
    monkeypatch.setattr(launching, "_AMD", True)
    monkeypatch.setattr(launching, "_INT32", 1000)
    kernel = Kernel()
    for size in (64, 250, 64):  # 256, 1000 and 256 bytes
        launch(kernel, torch.ones(size))
    assert len(kernel.asked) == 2
    assert len(kernel.launched) == 1


def test_the_interpreter_has_no_binaries():
    kernel, x = Kernel(interpreted=True), torch.ones(64)
    for _ in range(3):
        launch(kernel, x)
    assert len(kernel.asked) == 3

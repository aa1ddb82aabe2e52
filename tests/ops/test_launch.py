# SPDX-License-Identifier: Apache-2.0
"""Launching: Triton looks up a binary once per specialization, and at every launch if a tensor is not aligned."""

import pytest
import torch

from sola_vision.ops import launch as launching


class Kernel:
    """Records the launches through Triton and the launches of its binaries."""

    def __init__(self, interpreted=False):
        self.through_triton, self.direct, self.interpreted = [], [], interpreted

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.through_triton.append((grid, arguments, constants))
            return None if self.interpreted else Binary(self)

        return run


class Binary:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.direct.append((grid, arguments))


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch):
    monkeypatch.setattr(launching, "_binaries", {})


def launch(kernel, *tensors, numbers=(32, 7), **constants):
    launching.launch(kernel, 3, tensors, numbers, {"C": 8, **constants}, {"num_warps": 1})


def test_the_second_launch_reuses_the_binary_of_the_first():
    kernel, x, y = Kernel(), torch.ones(64), torch.ones(64).half()
    launch(kernel, x, y)
    assert kernel.through_triton == [((3, 1, 1), (x, y, 32, 7), {"C": 8, "num_warps": 1})]
    other = x + 1
    launch(kernel, other, y, numbers=(48, 9))
    assert len(kernel.through_triton) == 1
    assert kernel.direct == [((3, 1, 1), (other.data_ptr(), y.data_ptr(), 48, 9, 8))]


@pytest.mark.parametrize(
    "other",
    [
        {"tensor": torch.ones(64).double()},
        {"numbers": (33, 7)},  # not divisible by 16
        {"numbers": (32, 1)},
        {"numbers": (2**31, 7)},
        {"C": 9},
        {"L": 4},
    ],
)
def test_other_specializations_have_separate_binaries(other):
    kernel, x = Kernel(), torch.ones(64)
    launch(kernel, x)
    tensor = other.pop("tensor", x)
    for _ in range(2):
        launch(kernel, tensor, **other)
    assert len(kernel.through_triton) == 2
    assert len(kernel.direct) == 1
    launch(kernel, x)
    assert len(kernel.through_triton) == 2


def test_two_kernels_have_separate_binaries():
    first, second, x = Kernel(), Kernel(), torch.ones(64)
    launch(first, x)
    launch(second, x)
    assert len(first.through_triton) == len(second.through_triton) == 1


def test_unaligned_tensors_are_launched_through_triton():
    kernel, x = Kernel(), torch.ones(65)
    launch(kernel, x[:64])
    for _ in range(2):
        launch(kernel, x[1:])
    assert len(kernel.through_triton) == 3
    assert not kernel.direct


def test_large_storages_are_launched_through_triton_on_amd(monkeypatch):
    monkeypatch.setattr(launching, "_AMD", True)
    monkeypatch.setattr(launching, "_INT32", 1000)
    kernel = Kernel()
    for size in (64, 250, 64):  # 256, 1000 and 256 bytes
        launch(kernel, torch.ones(size))
    assert len(kernel.through_triton) == 2
    assert len(kernel.direct) == 1


def test_the_interpreter_has_no_binaries():
    kernel, x = Kernel(interpreted=True), torch.ones(64)
    for _ in range(3):
        launch(kernel, x)
    assert len(kernel.through_triton) == 3

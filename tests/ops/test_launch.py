# SPDX-License-Identifier: Apache-2.0
"""Launching: Triton looks up a binary once per specialization, and at every launch if a tensor is not aligned."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from sola_vision.ops import launch as launching


class Kernel:
    """Records the launches through Triton and the launches of its binaries."""

    def __init__(self, interpreted=False):
        self.through_triton, self.direct, self.hooked, self.interpreted = [], [], [], interpreted

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.through_triton.append((grid, arguments, constants))
            return None if self.interpreted else Binary(self)

        return run


class Binary:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.hooked.append((grid, arguments))

    def run(self, x, y, z, *arguments):
        assert arguments[:6] == ("stream of -1", "function", "metadata", None, None, None)  # device -1: a CPU
        self.kernel.direct.append(((x, y, z), arguments[6:]))


class Chain:
    """Triton's chain of hooks."""

    def __init__(self):
        self.calls = []


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    """Triton's hooks around launches; none is set."""
    monkeypatch.setattr(launching, "_binaries", {})
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: f"stream of {device}"))
    hooks = SimpleNamespace(launch_enter_hook=Chain(), launch_exit_hook=Chain())
    monkeypatch.setattr(launching, "_triton", lambda: (driver, hooks))
    return hooks


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


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_sees_the_launches(hooks, name):
    kernel, x = Kernel(), torch.ones(64)
    launch(kernel, x)
    getattr(hooks, name).calls.append(print)
    launch(kernel, x)
    assert kernel.hooked == [((3, 1, 1), (x.data_ptr(), 32, 7, 8))]
    assert not kernel.direct


def test_the_hooks_and_the_arguments_of_run_are_those_of_the_installed_triton(monkeypatch):
    monkeypatch.undo()
    pytest.importorskip("triton")
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import CompiledKernel

    _, hooks = launching._triton()
    assert not launching._is_set(hooks.launch_enter_hook)
    assert not launching._is_set(hooks.launch_exit_hook)
    assert isinstance(CompiledKernel.run, property)
    named = list(inspect.signature(CudaLauncher.__call__).parameters)
    assert named[1:6] == ["gridX", "gridY", "gridZ", "stream", "function"]
    expected = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"]
    assert named[6:] in (expected, ["args"])


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

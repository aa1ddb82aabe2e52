# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by the tests of the kernels."""

import numpy as np
import pytest
import torch

from sola_vision.ops import cpu


@pytest.fixture
def switch():
    """A function that selects an instruction set for the rest of the test, or skips the test if it is not supported."""
    reason = cpu.load()
    before = cpu.instruction_set() if reason is None else ""

    def select(name):
        if reason is not None:
            pytest.skip(reason)
        try:
            return cpu.instruction_set(name)
        except ValueError as error:
            pytest.skip(str(error))

    yield select
    if before:
        cpu.instruction_set(before)


@pytest.fixture
def kernel_error():
    """What torch raises for an exception in the kernel."""
    return RuntimeError if torch.__version__ >= "2.15" else ValueError


@pytest.fixture
def poisoned_memory():
    """torch.empty is filled with NaN, which reveals values that a kernel does not write."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def kernels_scratch(monkeypatch):
    """For Triton's kernels: uninitialized memory is NaN, and without a device the interpreter patches triton.language
    once, not at every call of a helper.
    """

    def poisoned(allocate):
        def call(*args, **kwargs):
            memory = allocate(*args, **kwargs)
            return memory.fill_(float("nan") if memory.is_floating_point() else 2**30)

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
    # masked lanes and rows compute 0 / 0, and exponentials overflow
    with np.errstate(all="ignore"):
        yield

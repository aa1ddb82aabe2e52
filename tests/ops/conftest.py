# SPDX-License-Identifier: Apache-2.0
"""What the tests of the kernels share."""

import numpy as np
import pytest
import torch

from sola_vision.ops import cpu


@pytest.fixture
def switch():
    """A function that takes an instruction set for the length of a test, and skips it where there is none such."""
    reason = cpu.load()
    before = cpu.instruction_set() if reason is None else ""

    def to(name):
        if reason is not None:
            pytest.skip(reason)
        try:
            return cpu.instruction_set(name)
        except ValueError as missing:
            pytest.skip(str(missing))

    yield to
    if before:
        cpu.instruction_set(before)


@pytest.fixture
def poisoned_memory():
    """torch.empty holds NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def kernels_scratch(monkeypatch):
    """For Triton's kernels: memory that nobody wrote is nan, and without a device the interpreter patches
    triton.language once, not at every call of a helper.
    """

    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan") if made.is_floating_point() else 2**30)

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    if not torch.cuda.is_available():
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
    # lanes without a channel and rows without a token divide nothing by nothing, and exponentials overflow
    with np.errstate(all="ignore"):
        yield

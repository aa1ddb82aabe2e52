# SPDX-License-Identifier: Apache-2.0
"""What the tests of the CPU kernels share."""

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

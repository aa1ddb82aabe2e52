# SPDX-License-Identifier: Apache-2.0
"""Let the tests here import `tiny`, which is also a script, and compute with one thread as its processes do."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    # runs are compared bit by bit, and another number of threads sums in another order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def whole_run(tmp_path_factory):
    """A run that was not interrupted."""
    from tiny import train  # importable only after the path has been extended

    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder

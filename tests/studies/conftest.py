# SPDX-License-Identifier: Apache-2.0
"""Fixtures: images for the small study of `little`, and the folder of its run."""

import pytest
import torch
from little import planned, run, write_images


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    # results are compared with those of single-threaded processes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="package")  # like _one_thread; a session fixture would run before it
def finished(tmp_path_factory, data):
    """The folder of a study that ran without interruption; read-only for tests."""
    out = tmp_path_factory.mktemp("studies")
    assert run(planned(data), out) == 0
    return out

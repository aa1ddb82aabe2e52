# SPDX-License-Identifier: Apache-2.0
"""Images for the little study, and the study run once."""

import pytest
import torch
from little import planned, run, write_images


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    # results are compared with those of processes of one thread
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="package")  # as the number of its threads; a session's fixture would come before
def finished(tmp_path_factory, data):
    """The folder of a study that ran without interruption; tests must not write there."""
    out = tmp_path_factory.mktemp("studies")
    assert run(planned(data), out) == 0
    return out

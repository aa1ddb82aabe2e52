# SPDX-License-Identifier: Apache-2.0
"""A run is owned by at most one living process, whatever way owners end."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sola_vision.studies import claims
from sola_vision.studies.claims import _STALE, claimed, owner

# loaded by path: importing the package would import torch, which takes seconds in every process
HOLD = (
    "import importlib.util, sys, time; from pathlib import Path\n"
    f"spec = importlib.util.spec_from_file_location('claims', {claims.__file__!r})\n"
    "claims = importlib.util.module_from_spec(spec); spec.loader.exec_module(claims)\n"
    "with claims.claimed(Path(sys.argv[1])) as mine: print(mine, flush=True); time.sleep(float(sys.argv[2]))"
)


def start(folder, seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_a_living_owner_keeps_it_and_a_killed_one_does_not(tmp_path):
    process, mine = start(tmp_path, 60)
    try:
        assert mine == "True"
        with claimed(tmp_path) as free:
            assert not free
        assert str(process.pid) in owner(tmp_path)
    finally:
        process.kill()
        process.wait()
    assert owner(tmp_path) is None
    with claimed(tmp_path) as free:
        assert free
    assert owner(tmp_path) is None


def test_it_is_released_when_the_block_fails(tmp_path):
    try:
        with claimed(tmp_path):
            raise RuntimeError
    except RuntimeError:
        pass
    with claimed(tmp_path) as free:
        assert free


def test_of_many_at_once_one_gets_it(tmp_path):
    dead = {"host": "elsewhere", "process": 1, "started": "0", "seen": time.time() - 2 * _STALE}
    (tmp_path / "claim.0").write_text(json.dumps(dead))
    started = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "4"], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate()[0].strip() for process in started]
    assert sorted(said) == ["False", "False", "False", "True"]


def test_an_owner_on_another_machine_lives_while_it_gives_signs(tmp_path):
    elsewhere = {"host": "elsewhere", "process": os.getpid(), "started": "0", "seen": time.time()}
    (tmp_path / "claim.0").write_text(json.dumps(elsewhere))
    with claimed(tmp_path) as free:
        assert not free
    (tmp_path / "claim.0").write_text(json.dumps({**elsewhere, "seen": time.time() - _STALE - 1}))
    with claimed(tmp_path) as free:
        assert free


def test_a_process_number_that_came_again_is_not_the_owner(tmp_path):
    with claimed(tmp_path):
        claim = json.loads((tmp_path / "claim.0").read_text())
    (tmp_path / "claim.0").write_text(json.dumps({**claim, "started": "another time", "released": False}))
    with claimed(tmp_path) as free:
        assert free


def seen(folder):
    return json.loads((folder / "claim.0").read_text())["seen"]


def test_a_file_system_that_fails_for_a_moment_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_RENEW", 0.01)
    replace, failed = os.replace, []

    def fail(beside, path):
        failed.append(path)
        raise OSError(errno.ESTALE, "stale")

    with claimed(tmp_path):
        monkeypatch.setattr(os, "replace", fail)
        while len(failed) < 2:
            time.sleep(0.01)
        before = seen(tmp_path)
        monkeypatch.setattr(os, "replace", replace)
        while seen(tmp_path) == before:
            time.sleep(0.01)
        monkeypatch.setattr(os, "replace", fail)  # also for the release


def test_who_slept_gives_no_signs_beside_the_one_who_took_over(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_RENEW", 0.01)
    with claimed(tmp_path):
        elsewhere = {"host": "elsewhere", "process": 1, "started": "0", "seen": time.time()}
        (tmp_path / "claim.1").write_text(json.dumps(elsewhere))
        time.sleep(0.1)
        last = seen(tmp_path)
        time.sleep(0.2)
        assert seen(tmp_path) == last
    assert owner(tmp_path) == "process 1 on elsewhere"


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="no containers here")
def test_in_another_container_a_number_is_another_process(tmp_path, monkeypatch):
    mine = {"host": claims._host(), "process": 2**30, "started": "0", "seen": time.time()}
    (tmp_path / "claim.0").write_text(json.dumps(mine))
    assert owner(tmp_path) is None
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert owner(tmp_path) is not None


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    def fail(mine, path):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", fail)
    says = f"{tmp_path}: its file system has no hard links.*choose another --out"
    with pytest.raises(OSError, match=says), claimed(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []

# SPDX-License-Identifier: Apache-2.0
"""The modules that a command imports at its start, since times differ between machines."""

import gc
import importlib
import json
import sys

import pytest
from small import python

from sola_vision.startup import uncollected

# heavy libraries that only some commands need
HEAVY = {"matplotlib", "tensorboard", "jsonargparse", "sklearn", "faster_coco_eval", "onnx", "onnxruntime", "gradio"}
LOADED = """
import json, sys
from sola_vision.cli import main
main(sys.argv[1:])
print()
print(json.dumps([*sys.modules]))
"""


def loaded(*words):
    """The modules in a process after a command."""
    ended = python("-c", LOADED, *words)
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_help_costs_what_timm_costs():
    timm = set(json.loads(python("-c", "import sys, json, timm; print(json.dumps([*sys.modules]))").stdout))
    names = loaded("--help")
    assert {name.split(".")[0] for name in names - timm} - sys.stdlib_module_names <= {"sola_vision", "torch"}
    assert not {name for name in names if name.startswith(("sola_vision.tasks", "sola_vision.engine"))}


def test_a_prediction_loads_no_library_of_other_commands(trained, data):
    names = loaded("predict", data / "val" / "ant", "--checkpoint", trained)
    assert {name.split(".")[0] for name in names} & HEAVY == set()


@pytest.mark.parametrize("on", [True, False])
def test_importing_leaves_the_garbage_collector_as_it_was(on):
    switch = "" if on else "gc.disable();"
    said = python("-c", f"import gc; {switch} import sola_vision; print(gc.isenabled())").stdout
    assert said.split()[-1] == str(on)


def test_the_garbage_collector_is_back_after_an_error():
    with pytest.raises(ModuleNotFoundError), uncollected():
        importlib.import_module("sola_vision.nothing")
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()

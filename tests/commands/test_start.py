# SPDX-License-Identifier: Apache-2.0
"""What a command imports before it works: counted, since times differ from machine to machine."""

import json
import sys

from small import python

# of other programs, or heavy and of other commands
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

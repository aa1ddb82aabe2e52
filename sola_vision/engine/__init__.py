# SPDX-License-Identifier: Apache-2.0
"""One training loop for every task: `fit(task, model, train_set, val_set, config, folder)`.

It depends on the `Task` protocol, not on any task, and on nothing else in the package but the wording of its messages.
Read `loop` first.
"""

from .checkpoint import LoadReport, load_weights, read_metadata, read_weights, save_weights, take_weights
from .config import Task, TrainConfig
from .distributed import World, all_reduce_sum, distributed, gather_objects, on_main
from .loading import EvaluationBatches, to_device
from .log import write_json
from .loop import TrainingStopped, evaluate, fit
from .memory import keep_heap
from .optim import lr_at
from .resuming import check_folder

__all__ = [
    "EvaluationBatches",
    "LoadReport",
    "Task",
    "TrainConfig",
    "TrainingStopped",
    "World",
    "all_reduce_sum",
    "check_folder",
    "distributed",
    "evaluate",
    "fit",
    "gather_objects",
    "keep_heap",
    "load_weights",
    "lr_at",
    "on_main",
    "read_metadata",
    "read_weights",
    "save_weights",
    "take_weights",
    "to_device",
    "write_json",
]

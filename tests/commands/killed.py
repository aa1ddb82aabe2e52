# SPDX-License-Identifier: Apache-2.0
"""`python killed.py STEP train ...` is `sola train ...` that kills itself within that step's loss, as kill -9 would."""

import os
import signal
import sys

from sola_vision.cli import main
from sola_vision.tasks import Classification

steps = int(sys.argv[1])
loss = Classification.loss


def die(self, model, batch):
    global steps
    steps -= 1
    if steps == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, model, batch)


Classification.loss = die  # type: ignore[method-assign]
sys.exit(main(sys.argv[2:]))

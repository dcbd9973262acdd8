"""The language-model recipe, killed right after a given step: `dying_pretrain_lm.py STEP [the recipe's arguments]`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import pretrain_lm

LAST_STEP = int(sys.argv.pop(1))
Callback = pretrain_lm.CompreSSMCallback


class CompreSSMCallback(Callback):
    """Its name is the one that checkpoints know it by."""

    def on_step_end(self, args, state, control, **kwargs):
        control = super().on_step_end(args, state, control, **kwargs)
        if state.global_step == LAST_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return control


pretrain_lm.CompreSSMCallback = CompreSSMCallback
pretrain_lm.main()

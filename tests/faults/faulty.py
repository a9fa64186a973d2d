"""Things that go wrong on purpose, where the environment says so."""

import os
import shutil
import signal

import torch

from datamodules import ImageFolder
from labn.explainers import Explainer
from labn.modules import LABN


def remove_run():
    """Remove the folder that LABN_TEST_REMOVE names, once."""
    if folder := os.environ.pop("LABN_TEST_REMOVE", None):
        shutil.rmtree(folder)


class Hungry(Explainer):
    """Asks for more memory than there is, on the rank that LABN_TEST_HUNGRY names; removes LABN_TEST_REMOVE.

    The first explanation gets the signals LABN_TEST_EXPLAIN.
    """

    def attribute(self, model, images, targets, indices):
        remove_run()
        for name in os.environ.get("LABN_TEST_EXPLAIN", "").split():
            os.kill(os.getpid(), signal.Signals[name])
            print("the explanation goes on after the signal")
        if os.environ.get("LABN_TEST_HUNGRY") == os.environ.get("RANK", "0"):
            torch.empty(2**55)
        return images[:, 0] * (1 + indices[:, None, None])


class Nervous(LABN):
    """Loses its weights at step LABN_TEST_NAN, gets LABN_TEST_SIGNALS at step LABN_TEST_AT or removes its run folder.

    It is killed at the end of epoch LABN_TEST_UNLOGGED, after the checkpoint and before the row of the log.
    """

    def training_step(self, batch, batch_idx):
        if self.global_step == int(os.environ.get("LABN_TEST_NAN", -1)):
            with torch.no_grad():
                self.network.head.weight.fill_(torch.nan)
        if self.global_step == int(os.environ.get("LABN_TEST_AT", -1)):
            remove_run()
            for name in os.environ.get("LABN_TEST_SIGNALS", "").split():
                os.kill(os.getpid(), signal.Signals[name])
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler, metric):
        if self.current_epoch == int(os.environ.get("LABN_TEST_UNLOGGED", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        super().lr_scheduler_step(scheduler, metric)


class Vanishing(ImageFolder):
    """The last picture of the test goes away when the first one is read, where LABN_TEST_VANISH is set."""

    def _build(self):
        sources = super()._build()
        test = sources["test"]
        load = test.load

        def load_once(index):
            if index == 0 and "LABN_TEST_VANISH" in os.environ:
                test.records[-1].path.rename(os.environ["LABN_TEST_VANISH"])
            return load(index)

        test.load = load_once
        return sources

"""What a run tells while it trains: on the terminal, in its folder (`records`), in Weights & Biases (`tracking`)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captioner import images
from captioner.config import TrainingConfig, as_json
from captioner.errors import CaptionerError, ImageError
from captioner.model import Caption
from captioner.training.inputs import Inputs
from captioner.training.records import Records, environment
from captioner.training.run import History
from captioner.training.tracking import Tracker

log = logging.getLogger(__name__)

_TRAINING = ("epoch", "train_loss")  # values in an epoch's record that are not of validation
_THUMBNAIL = 224  # height and width of photos shown in Weights & Biases, in pixels
_SAMPLES = 8  # validation photos shown in Weights & Biases


class _Step(NamedTuple):
    """A step whose numbers are on their way from the device."""

    step: int
    epoch: float
    rate: float
    seconds: float
    numbers: Tensor  # loss and norm of the gradient
    arrived: torch.cuda.Event | None


class Reports:
    """Tells of a run. Of several processes, only the first one does."""

    def __init__(self, config: TrainingConfig, data: Inputs, *, main: bool) -> None:
        """Tell nothing yet.

        Args:
            config: all settings.
            data: the photos of validation, and the faults of the data.
            main: whether this is the first process.
        """
        self._config, self._data, self._main = config, data, main
        self._tracker = Tracker(None)
        self._records = Records(config.output, write=main)
        self._noted: _Step | None = None
        self.loss: float | None = None  # the one that was told last

    def begin(self, history: History, device: torch.device) -> None:
        """Begin, or go on, and give the history the number of the run in Weights & Biases."""
        config, data = self._config, self._data
        if config.tracking == "wandb" and self._main:
            self._tracker = Tracker.start(config.output, config.project, as_json(config), history.run_id)
        self._records.begin(
            step=history.step, epoch=history.epoch, train=data.train.examples, val=data.val.examples,
            problems=data.problems, environment=environment(device, history.processes),
        )  # fmt: skip
        history.run_id = self._tracker.run_id or history.run_id

    def note(self, step: int, epoch: float, rate: float, seconds: float, loss: Tensor, norm: Tensor) -> None:
        """Tell of the step that was noted before, and note this one, so that nothing waits for its numbers.

        Args:
            step: of the optimiser, from 1.
            epoch: passes over the captions so far, with the present one's part.
            rate: learning rate of the decoder.
            seconds: since the run began.
            loss: of the step, on its device.
            norm: of the gradient, before it was clipped.
        """
        self.tell()
        numbers = torch.stack([loss, norm]).to("cpu", non_blocking=True)
        arrived = None
        if loss.device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._noted = _Step(step, epoch, rate, seconds, numbers, arrived)

    def tell(self) -> None:
        """Tell of the step that was noted last.

        Raises:
            CaptionerError: its loss is no number.
        """
        if self._noted is None:
            return
        noted, self._noted = self._noted, None
        if noted.arrived is not None:
            noted.arrived.synchronize()
        loss, norm = noted.numbers.tolist()
        self._records.step(
            noted.step,
            epoch=noted.epoch,
            loss=loss,
            gradient_norm=norm,
            learning_rate=noted.rate,
            seconds=noted.seconds,
        )
        self.loss = finite(loss, noted.step)
        self._tracker.log(
            noted.step,
            {
                "train/loss": loss,
                "train/gradient_norm": norm,
                "train/learning_rate": noted.rate,
                "train/epoch": noted.epoch,
            },
        )

    def captions(self, epoch: int, captions: Sequence[Caption]) -> None:
        """Keep the validation captions of an epoch."""
        self._records.epoch(epoch, self._data.val.examples, captions)

    def epoch(self, history: History, captions: Sequence[Caption]) -> None:
        """Tell of the epoch that was finished and saved."""
        if not self._main:
            return
        scores = history.epochs[-1]
        best = " (best so far)" if history.best_epoch == history.epoch else ""
        log.info(
            "epoch %d: loss %.3f, validation loss %.3f, BLEU-4 %.4f, CIDEr %.4f%s",
            history.epoch, scores["train_loss"], scores["val_loss"], scores["bleu_4"], scores["cider"], best,
        )  # fmt: skip
        self._tracker.log(
            history.step,
            {f"val/{name.removeprefix('val_')}": value for name, value in scores.items() if name not in _TRAINING},
        )
        pairs = list(zip(self._data.val.examples, captions, strict=True))
        rows = []
        for example, caption in pairs[:: max(1, len(pairs) // _SAMPLES)][:_SAMPLES]:
            with contextlib.suppress(ImageError):  # the photo has gone meanwhile: the table does without it
                pixels = images.load(example.path, _THUMBNAIL).transpose(1, 2, 0)
                rows.append((pixels, caption.text, caption.logprob, "\n".join(example.captions)))
        self._tracker.samples(history.step, ("photo", "caption", "log-probability", "human captions"), rows)
        self._tracker.judge(history.step, self._config.output)

    def abandon(self) -> None:
        """End as a run that failed; a later start can go on with it."""
        self._tracker.abandon()

    def finish(self, history: History) -> None:
        """End."""
        self._tracker.finish({"best_epoch": history.best_epoch, "best_cider": history.best_cider})


def finite(loss: float, step: int) -> float:
    """A loss, if it is a number.

    Raises:
        CaptionerError: it is none.
    """
    if math.isfinite(loss):
        return loss
    raise CaptionerError(
        f"the loss is {loss} at step {step:,}; the checkpoints of earlier epochs are kept: "
        "lower --optimisation.learning-rate or use --precision fp32, with a new --output"
    )

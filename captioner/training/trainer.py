"""The training loop: captions and features -> checkpoints.

The seed, the number of the step and the number of the process decide everything that is random in a step. So a run that
is stopped and started again computes the same numbers as an uninterrupted one, and no generator's state is saved.

Nothing in a step asks the device for a number, so the host can prepare steps ahead: losses are added up where they are
computed, and those that are reported are copied while the device works on, and read later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, set_seed
from jaxtyping import Float
from torch import Tensor

from captioner import checkpoint, files
from captioner.config import TrainingConfig
from captioner.datasets.annotations import captions_sha256
from captioner.datasets.batches import Batch, CaptionDataset
from captioner.errors import CheckpointError
from captioner.evaluation import load_meteor
from captioner.machine import processors
from captioner.model import Caption, Captioner
from captioner.networks import weights
from captioner.networks.decoder import Decoder
from captioner.networks.inference import TorchEngine
from captioner.progress import Progress
from captioner.training import run
from captioner.training.inputs import Inputs, load_inputs
from captioner.training.language import learn_language, read_captions
from captioner.training.loading import Loader
from captioner.training.network import Network, statistics_kept
from captioner.training.optimisation import Average, clip, optimiser_of, warmed
from captioner.training.reports import Reports, finite
from captioner.training.reward import Reward
from captioner.training.rounding import Rounding
from captioner.training.run import History
from captioner.training.start import Start, load_start
from captioner.training.stopping import Signals
from captioner.training.validation import caption_validation, validation_loss
from captioner.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_TRAINING = ("epoch", "train_loss")  # values in an epoch's record that are not of validation
_FEW = 20  # validation photos; with fewer, their CIDEr tells little
_LOG_EVERY = 20  # optimiser steps
_MOST_WORKERS = 16  # processes that decode photos


def train(config: TrainingConfig) -> History:
    """Train a model, or go on with a run that was stopped.

    Writes to `config.output`: `best/` and `last/` (models; `last` also holds what is needed to go on), `config.json`,
    `captions_val.json` (COCO's result format, of the best epoch), the files of `records` and `wandb/`.

    Args:
        config: all settings.

    Returns:
        How the run went.

    Raises:
        CaptionerError: the data, the weights or the folder do not allow it; what was saved before is kept.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # see `Rounding`
        # Other processes wait while the first one computes features.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    Rounding(config.precision, accelerator.device)  # refuses a precision that this device cannot train in
    start = None if config.start is None else load_start(config)
    if start is not None:
        config = dataclasses.replace(config, encoder=start.encoder.config, decoder=start.decoder.config)
    with run.claimed(config, write=accelerator.is_main_process):
        listed = "".join(f"\n  {name:40}{value}" for name, (value, _) in config.changed().items())
        log.info("settings (any other has its default, all are in %s):%s", config.output / "config.json", listed)
        state = None if start is None or start.encoder.elsewhere else start.encoder.body.state_dict()
        return Trainer(config, load_inputs(config, accelerator, state), accelerator, start).run()


class Trainer:
    """The state of a run and the loop over it."""

    def __init__(
        self, config: TrainingConfig, data: Inputs, accelerator: Accelerator, start: Start | None = None
    ) -> None:
        """Build the model and the optimiser.

        Args:
            config: all settings.
            data: photos and captions to learn from.
            accelerator: device and processes.
            start: the model to begin with.
        """
        self.config, self.data, self.accelerator = config, data, accelerator
        self._meteor = load_meteor() if config.meteor else False
        options, device = config.optimisation, accelerator.device
        self._rounding = Rounding(config.precision, device)
        captions = (caption for example in data.train.examples for caption in example.captions)
        self.vocabulary = start.vocabulary if start else Vocabulary.build(captions, config.min_count)
        self.train, self.val = (
            CaptionDataset.of(split.examples, self.vocabulary, split.rows, config.max_words)
            for split in (data.train, data.val)
        )
        workers = config.workers
        if workers is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = max(1, min(_MOST_WORKERS, processors() // local - 1))
        self._load = Loader(self.train, data.train.source, device, workers)
        beside = self._load if data.val.source is data.train.source else None
        self._load_val = Loader(self.val, data.val.source, device, workers, beside)
        self._captions_sha256 = captions_sha256([*data.train.examples, *data.val.examples])
        set_seed(config.seed)
        decoder = Decoder(config.decoder, len(self.vocabulary))
        if start:
            decoder.load_state_dict(start.decoder.state_dict())
        self.reward = None
        if options.objective == "cider":
            self.reward = Reward(
                data.train.examples,
                data.train.rows,
                self.vocabulary,
                max_words=config.decoding.max_words,
                device=device,
            )
        self.network = Network(data.encoder, decoder).to(device)
        self._optimiser = optimiser_of(self.network, options)
        self._rates = [group["lr"] for group in self._optimiser.param_groups]
        self._average = Average(self.network, options)
        self.captioner = self._captioner()
        self.history = History(processes=accelerator.num_processes)
        self._total = torch.zeros((), device=device, dtype=torch.float64)  # sum of losses of the epoch's words
        self._words = 0  # their number
        self._wrapped: tuple[bool, torch.nn.Module] | None = None
        self._signals = Signals()
        self._reports = Reports(config, data, main=accelerator.is_main_process)
        batches = self.train.batches(options.batch_size, accelerator.num_processes)
        self.steps_an_epoch = -(-batches // options.accumulate)

    def run(self) -> History:
        """Train to the end."""
        self._resume()
        config, history = self.config, self.history
        if self.accelerator.is_main_process:
            run.save_settings(config)
        if self._finished():
            log.info(
                "%s: this run is finished (%d epochs, the best is %d); choose another --output for a new one",
                config.output, history.epoch, history.best_epoch,
            )  # fmt: skip
            return history
        try:
            self._reports.begin(history, self.accelerator.device)
            with self._signals:
                self._train()
        except BaseException:
            self._reports.abandon()
            raise
        self._reports.finish(history)
        return history

    def _train(self) -> None:
        """Train the epochs that are left."""
        history, main, options = self.history, self.accelerator.is_main_process, self.config.optimisation
        log.info(
            "%s captions of %s photos, %s words; %s steps an epoch on %s, in %s",
            f"{len(self.train):,}", f"{len(self.data.train.examples):,}", f"{len(self.vocabulary):,}",
            f"{self.steps_an_epoch:,}", self.accelerator.device, str(self._rounding.dtype).removeprefix("torch."),
        )  # fmt: skip
        if main and len(self.data.val.examples) < _FEW:
            log.warning(
                "validation has %d photos: that is few to choose the best epoch by", len(self.data.val.examples)
            )
        if history.step == 0 and options.language_captions is not None:
            self._learn_language(options.language_captions)
        self._saved = time.monotonic()
        self._began = self._saved - history.seconds
        while not self._finished():
            losses = self._epoch()
            self._average.after_epoch(history.epoch + 1)
            with self._average.in_use():
                captions, scores = self._validate()
                history.epoch += 1
                history.epoch_step = 0
                history.seconds = time.monotonic() - self._began
                self._forget_losses()
                history.epochs.append({**losses, **scores})
                better = self._better(scores)
                if better:
                    history.best_cider, history.best_epoch = scores["cider"], history.epoch
                self._reports.captions(history.epoch, captions)
                if main and better:
                    self._save_best(captions)
            self._save_last()
            self._reports.epoch(history, captions)
            self.accelerator.wait_for_everyone()

    def _better(self, scores: Mapping[str, float]) -> bool:
        """Whether these scores are the best so far: by CIDEr, or by the loss where CIDEr is the same.

        CIDEr is the same, 0, in every epoch where validation has a single photo.
        """
        history = self.history
        if scores["cider"] != history.best_cider:
            return scores["cider"] > history.best_cider
        return scores["val_loss"] < history.epochs[history.best_epoch - 1]["val_loss"]

    def _learn_language(self, file: Path) -> None:
        """Let the decoder learn from captions without photos; a run that is killed later finds the result."""
        kept = self.config.output / "language.safetensors"
        if self.accelerator.is_main_process:
            decoder = self.network.decoder
            if kept.exists():
                weights.fill(decoder, weights.read(kept), str(kept))
            else:
                captions = read_captions(file)
                learn_language(decoder, captions, self.vocabulary, self.config, self._rounding, self._leave_if_asked)
                run.save_tensors(kept, decoder.state_dict())
        self.accelerator.wait_for_everyone()
        if self.accelerator.num_processes > 1:
            for parameter in self.network.decoder.parameters():
                parameter.data.copy_(broadcast(parameter.data))

    def _epoch(self) -> dict[str, float]:
        """One pass over the training captions."""
        accelerator, options, history = self.accelerator, self.config.optimisation, self.history
        self.network.let_encoder_learn(history.epoch >= options.unfreeze_after)
        wrapped = self._wrap()
        self.network.train()
        shares = self.train.epoch(
            history.epoch,
            batch_size=options.batch_size,
            seed=self.config.seed,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            by_photo=self.data.encoder.trainable or self.reward is not None,
            first=history.epoch_step * options.accumulate,
            accumulate=options.accumulate,
        )
        batches = self._load(shares)
        with Progress(
            f"epoch {history.epoch + 1}", len(self.train), "captions", shown=accelerator.is_main_process
        ) as progress:
            while together := list(itertools.islice(batches, options.accumulate)):
                share = self._step(wrapped, together)
                if history.step % _LOG_EVERY == 0 or history.step == 1:
                    rate, seconds = options.learning_rate * share, time.monotonic() - self._began
                    epoch = history.step / self.steps_an_epoch
                    self._reports.note(history.step, epoch, rate, seconds, self._latest, self._norm)
                note = "" if self._reports.loss is None else f"loss {self._reports.loss:.3f}"
                captions = sum(len(batch.tokens) for batch in together)
                progress.advance(captions * accelerator.num_processes, note)
                due = time.monotonic() - self._saved >= 60 * self.config.checkpoint_minutes
                if due or self._signals.noted is not None:
                    self._reports.tell()  # a run that goes on from here does not compute that step again
                if due:
                    self._save_last()
                if accelerator.num_processes == 1 or history.step % _LOG_EVERY == 0:
                    self._stop_if_asked()
        self._reports.tell()
        total = torch.tensor([float(self._total), self._words], dtype=torch.float64, device=accelerator.device)
        loss_sum, word_count = accelerator.reduce(total, "sum").tolist()
        return {"epoch": history.epoch + 1, "train_loss": self._finite(loss_sum / word_count)}

    def _wrap(self) -> torch.nn.Module:
        """The network as several processes train it together, made anew when another part of it learns."""
        learns = self.network.encoder_learns
        if self._wrapped is None or self._wrapped[0] != learns:
            self._wrapped = learns, self.accelerator.prepare_model(self.network)
        return self._wrapped[1]

    def _step(self, wrapped: torch.nn.Module, batches: Sequence[Batch]) -> float:
        """One step of the optimiser; returns the share of the learning rates that it took."""
        accelerator, options, history = self.accelerator, self.config.optimisation, self.history
        entropy = (self.config.seed, history.step, accelerator.process_index)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        share = self._schedule(history.step)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimiser.zero_grad()
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
                loss = self._loss(wrapped, batch, len(batches))
                self._rounding.scaled(loss).backward()  # type: ignore[no-untyped-call]
        self._rounding.unscale(self._optimiser)
        self._norm = clip(self.network, options)
        self._rounding.step(self._optimiser)
        history.step += 1
        history.epoch_step += 1
        self._average.after_step(history.step)
        return share

    def _loss(self, wrapped: torch.nn.Module, batch: Batch, together: int) -> Float[Tensor, ""]:
        """A batch's part of the loss to minimise: of the cross-entropy, or of minus the expected reward."""
        options = self.config.optimisation
        if self.reward is None:
            own = options.scheduled_sampling * self.history.step / (options.epochs * self.steps_an_epoch)
            with self._rounding.autocast():
                summed: Tensor = wrapped(batch, smoothing=options.label_smoothing, own_words=own)
            self._latest = summed.detach() / len(batch.targets)
            self._total += summed.detach()
            self._words += len(batch.targets)
            return summed * batch.weight
        with (
            torch.no_grad(),
            self._rounding.autocast(),
            statistics_kept(self.network),
            _evaluating(self.network.decoder),
        ):
            state = self.network.decoder.start(self.network.features(batch))
            drawn = self.reward.draw(self.network.decoder, state, batch)
        with self._rounding.autocast():
            loss: Tensor = wrapped(drawn.batch, drawn.weights, never=self.reward.never)
        self._latest = 0 * loss.detach() - drawn.reward  # NaN where the loss is
        self._total += self._latest * len(drawn.weights)
        self._words += len(drawn.weights)
        return loss / together

    def _validate(self) -> tuple[list[Caption], dict[str, float]]:
        """Captions, scores and loss of the validation photos, in fp32."""
        self.network.eval()
        if self.accelerator.num_processes > 1:
            # All use the running statistics of the first process, whose checkpoint is saved.
            for buffer in self.network.buffers():
                buffer.copy_(broadcast(buffer))
        self.captioner = self._captioner()
        between = self._stop_if_asked if self.accelerator.num_processes == 1 else lambda: None
        captions, scores = caption_validation(
            self.captioner, self.data.val, self.accelerator, meteor=self._meteor, between=between
        )
        shares = self.val.epoch(
            0,
            batch_size=self.config.optimisation.batch_size,
            seed=0,
            by_photo=self.data.encoder.trainable,
        )
        loss = validation_loss(self.network, self._load_val(shares), between)
        return captions, {"val_loss": self._finite(loss), **scores}

    def _captioner(self) -> Captioner:
        """The model with the present weights; it captions in fp32."""
        engine = TorchEngine(self.data.encoder, self.network.decoder, "fp32", self.accelerator.device)
        return Captioner(engine, self.vocabulary, self.config.decoding)

    def _schedule(self, step: int) -> float:
        """Share of the learning rates at a step."""
        return warmed(self.config.optimisation, step, self.steps_an_epoch)

    def _forget_losses(self) -> None:
        self._total.zero_()
        self._words = 0

    def _finished(self) -> bool:
        history, options = self.history, self.config.optimisation
        return history.epoch >= options.epochs or history.epoch - history.best_epoch >= options.patience

    def _finite(self, loss: float) -> float:
        return finite(loss, self.history.step)

    def _save_best(self, captions: Sequence[Caption]) -> None:
        """Save the model of an epoch that is better than all before, with its captions."""
        output = self.config.output
        results = [
            {"image_id": example.image_id, "caption": caption.text}
            for example, caption in zip(self.data.val.examples, captions, strict=True)
        ]
        self.captioner.training = self._record()
        self.captioner.save_pretrained(output / "best")
        try:
            files.write(output / "captions_val.json", json.dumps(results, indent=0) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{output / 'captions_val.json'}: cannot be written ({error.strerror}); make room and run again"
            ) from None

    def _save_last(self) -> None:
        """Save the model and all that is needed to go on with the next step. Only the first process writes."""
        self._saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        history = self.history
        history.seconds = self._saved - self._began
        history.loss_sum, history.loss_words = float(self._total), self._words
        history.moments, history.scale = self._average.moments, self._rounding.state()
        self._finite(history.loss_sum)
        with self._average.own_weights():
            if not all(bool(parameter.isfinite().all()) for parameter in self.network.parameters()):
                self._finite(math.nan)
            model = self._captioner()
            model.training = self._record()
            with checkpoint.replacing(self.config.output / "last") as folder:
                model.write(folder)
                run.save_state(folder, history, self._optimiser, self._average.state())

    def _record(self) -> dict[str, Any]:
        """How the model came about, as its checkpoint says it."""
        history = self.history
        names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
        scores = {name: history.epochs[-1][name] for name in names} if history.epochs else None
        return {
            "data": self.data.name,
            "train_photos": len(self.data.train.examples),
            "val_photos": len(self.data.val.examples),
            "captions_sha256": self._captions_sha256,
            "train_sha256": captions_sha256(self.data.train.examples),
            "val_share": self.config.data.val_share,
            "restval": self.config.data.restval,
            "start": None if self.config.start is None else Path(self.config.start).name,
            "objective": self.config.optimisation.objective,
            "epoch": history.epoch,
            "seed": self.config.seed,
            "seconds": round(history.seconds, 1),
            # Inside an epoch, the model is no longer the one whose scores are known.
            **({} if scores is None or history.epoch_step else {"scores": scores}),
        }

    def _stop_if_asked(self) -> None:
        """Save and stop, if a signal asked for it. Several processes agree, so that none waits for one that stopped."""
        signals = self._signals
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.gather(torch.tensor([signals.noted or 0], device=self.accelerator.device))
            signals.noted = int(asked.max()) or None
        if signals.noted is None:
            return
        self._save_last()
        log.info("stopped after step %s, which is saved; the same command goes on", f"{self.history.step:,}")
        signals.stop()

    def _leave_if_asked(self) -> None:
        """Stop before the first step, if a signal asked for it."""
        if self._signals.noted is not None:
            log.info("stopped before the first step; the same command begins anew")
            self._signals.stop()

    def _resume(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        last = self.config.output / "last"
        if not checkpoint.recover(last):
            return
        saved = checkpoint.read(last)
        if saved.training.get("captions_sha256") != self._captions_sha256:
            raise CheckpointError(
                f"{last}: was trained with other photos or captions than the data now has "
                f"({saved.training.get('train_photos')} photos of training then, {len(self.data.train.examples)} now); "
                "choose another --output"
            )
        if saved.vocabulary.sha256 != self.vocabulary.sha256:
            raise CheckpointError(
                f"{last}: its vocabulary ({len(saved.vocabulary):,} words) is not what this version makes of the data "
                f"({len(self.vocabulary):,} words); choose another --output"
            )
        encoder = self.data.encoder
        if not encoder.trainable and saved.encoder_sha256 != encoder.weights_sha256:
            raise CheckpointError(
                f"{last}: was trained with other {encoder.config.name} weights ({saved.encoder_sha256[:12]}, "
                f"not {encoder.weights_sha256[:12]}); give those with --encoder.weights, or choose another --output"
            )
        weights.fill(self.network.decoder, saved.decoder_state, str(last))
        if self.data.encoder.trainable:
            weights.fill(self.data.encoder.body, saved.encoder_state or {}, str(last))
        self.history, averaged = run.load_state(last, self._optimiser)
        self._average.load(averaged, self.history.moments)
        self._rounding.load(self.history.scale)
        if not all({*_TRAINING, "val_loss", "cider"} <= record.keys() for record in self.history.epochs) or (
            self.history.epoch and not self.history.best_epoch
        ):
            raise CheckpointError(f"{last}: training.json lacks scores of an epoch; choose another --output")
        history, processes = self.history, self.accelerator.num_processes
        if history.epoch_step and history.processes != processes:
            raise CheckpointError(
                f"{last}: was saved inside an epoch that {history.processes} processes share, and now there are "
                f"{processes}; go on with {history.processes}"
            )
        history.processes = processes
        if self.accelerator.is_main_process:
            self._total += history.loss_sum
            self._words = int(history.loss_words)
        log.info("%s: going on after epoch %d, step %s", last, history.epoch, f"{history.step:,}")


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Leave out dropout for a while."""
    module.eval()
    try:
        yield
    finally:
        module.train()

"""The training loop: captions and features -> checkpoints.

The seed, the number of the step and the number of the process decide everything that is random in a step. So a run that
is stopped and started again computes the same numbers as an uninterrupted one, and no generator's state is saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, gather_object, set_seed
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner import checkpoint, files, images, metrics
from captioner.config import DataConfig, DecoderConfig, EncoderConfig, TrainingConfig
from captioner.datasets.annotations import captions_sha256
from captioner.datasets.batches import Batch, CaptionDataset
from captioner.errors import CaptionerError, CheckpointError, ImageError, WeightsError
from captioner.evaluation import caption_rows, load_meteor, references_of
from captioner.model import Caption, Captioner
from captioner.networks import weights
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchEngine, has_fast_bf16
from captioner.progress import Progress
from captioner.training import run
from captioner.training.inputs import Inputs, load_inputs
from captioner.training.presets import PRESETS
from captioner.training.reward import Reward
from captioner.training.run import History
from captioner.training.tracking import Tracker
from captioner.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_TRAINING = ("epoch", "train_loss")  # values in an epoch's record that are not of validation
_THUMBNAIL = 224  # height and width of photos shown in Weights & Biases, in pixels
_FEW = 20  # validation photos; with fewer, their CIDEr tells little
_SAMPLES = 8  # validation photos shown in Weights & Biases
_LOG_EVERY = 20  # optimiser steps; reading the loss makes the device wait
_CHUNK = 1024  # validation photos that are captioned between two looks for a signal to stop
_LAST_SHARE = 0.01  # of the learning rate, at the end of a run


class Network(nn.Module):
    """All that training changes: the decoder, and the encoder where it is not frozen."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder if encoder.trainable else None

    def forward(self, batch: Batch) -> Float[Tensor, "words vocabulary"]:
        """Logits of a batch's targets."""
        logits: Tensor = self.decoder(self.features(batch)[batch.photo], batch.inputs, batch.keep)
        return logits

    def features(self, batch: Batch) -> Float[Tensor, "photos 4096"]:
        """Features of a batch's photos."""
        features: Tensor = batch.photos if self.encoder is None else self.encoder(batch.photos)
        return features


def train(config: TrainingConfig) -> History:
    """Train a model, or go on with a run that was stopped.

    Writes to `config.output`: `best/` and `last/` (models; `last` also holds what is needed to go on), `config.json`,
    `captions_val.json` (COCO's result format, of the best epoch) and `wandb/`.

    Args:
        config: all settings.

    Returns:
        How the run went.

    Raises:
        CaptionerError: the data, the weights or the folder do not allow it; what was saved before is kept.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=_mixed_precision(config),
            # Other processes wait while the first one computes features.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )
    except ValueError as error:  # not of this device, or not the one that this process has trained with before
        raise CaptionerError(f"--precision {config.precision} cannot be used: {error}") from None
    start = None if config.start is None else _load_start(config)
    if start is not None:
        config = dataclasses.replace(config, encoder=start.encoder.config, decoder=start.decoder.config)
    with run.claimed(config, write=accelerator.is_main_process):
        changed = run.differences(
            run.as_json(TrainingConfig(DataConfig(config.data.data), config.output)), run.as_json(config)
        )
        listed = "".join(f"\n  {name:40}{value}" for name, (_, value) in changed.items())
        log.info("settings (any other has its default, all are in %s):%s", config.output / "config.json", listed)
        state = None if start is None or start.encoder.elsewhere else start.encoder.body.state_dict()
        return Trainer(config, load_inputs(config, accelerator, state), accelerator, start).run()


class Start(NamedTuple):
    """The parts of a saved model that a run begins with."""

    encoder: Encoder
    decoder: Decoder
    vocabulary: Vocabulary


def _load_start(config: TrainingConfig) -> Start:
    """Load the model to begin with.

    Raises:
        CaptionerError: it cannot be loaded, or the settings ask for another encoder or decoder than it has.
    """
    assert config.start is not None
    try:
        model = Captioner.from_pretrained(config.start, engine="torch", device="cpu")
    except WeightsError:
        if config.encoder.weights == "default":
            raise
        weights_file = config.encoder.weights
        model = Captioner.from_pretrained(config.start, engine="torch", device="cpu", encoder_weights=weights_file)
    assert isinstance(model.engine, TorchEngine)
    start = Start(model.engine.encoder, model.engine.decoder, model.vocabulary)
    # Settings that are a preset's, or the default, were not asked for: they are replaced by those of the model.
    pairs: list[tuple[str, Any, Any, list[Any]]] = [
        ("encoder", config.encoder, start.encoder.config, [EncoderConfig(), *(p.encoder for p in PRESETS.values())]),
        ("decoder", config.decoder, start.decoder.config, [DecoderConfig(), *(p.decoder for p in PRESETS.values())]),
    ]
    for name, given, own, usual in pairs:
        for field in dataclasses.fields(given):
            value = getattr(given, field.name)
            known = [getattr(each, field.name) for each in (own, *usual)]
            if field.name != "weights" and value not in known:  # `encoder.weights` says where to find the model's own
                raise CaptionerError(
                    f"{name}.{field.name} is {value!r}, and the model to start with has {known[0]!r}; "
                    f"leave out --{name}.{field.name.replace('_', '-')}, or leave out --start"
                )
    return start


def warmed_cosine(step: int, steps: int, warmup: int, last: float = 0.0) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine (Loshchilov & Hutter 2017).

    Args:
        step: from 0.
        steps: of the whole run.
        warmup: steps until the share is 1; at most a quarter of all steps, so that short runs learn too.
        last: share at the end of the cosine, 0 to 1.
    """
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return last + (1 - last) * (1 + math.cos(math.pi * done)) / 2


class Trainer:
    """The state of a run and the loop over it."""

    def __init__(
        self, config: TrainingConfig, data: Inputs, accelerator: Accelerator, start: Start | None = None
    ) -> None:
        """Build the model and the optimiser.

        Args:
            config: all settings.
            data: photos and captions to learn from.
            accelerator: device, precision and processes.
            start: the model to begin with.
        """
        self.config, self.data, self.accelerator = config, data, accelerator
        self._meteor = load_meteor() if config.meteor else False
        options = config.optimisation
        captions = (caption for example in data.train.examples for caption in example.captions)
        vocabulary = start.vocabulary if start else Vocabulary.build(captions, config.min_count)
        self.train, self.val = (
            CaptionDataset(split.examples, vocabulary, split.source, split.rows, config.max_words)
            for split in (data.train, data.val)
        )
        self._captions_sha256 = captions_sha256([*data.train.examples, *data.val.examples])
        set_seed(config.seed)
        decoder = Decoder(config.decoder, len(vocabulary))
        if start:
            decoder.load_state_dict(start.decoder.state_dict())
        self.reward = None
        if options.objective == "cider":
            self.reward = Reward(
                data.train.examples,
                data.train.rows,
                vocabulary,
                max_words=config.decoding.max_words,
                precision="fp32" if config.precision == "fp32" else "auto",
            )
        groups: list[dict[str, Any]] = [{"params": list(decoder.parameters()), "lr": options.learning_rate}]
        if data.encoder.trainable:
            groups.append({"params": list(data.encoder.parameters()), "lr": options.encoder_learning_rate})
        self._rates: list[float] = [group["lr"] for group in groups]
        self.network, self.optimiser = accelerator.prepare(
            Network(data.encoder, decoder), torch.optim.Adam(groups, fused=True)
        )
        self.vocabulary = vocabulary
        self.captioner = self._captioner()
        self.history = History(processes=accelerator.num_processes)
        self._total = torch.zeros(2, device=accelerator.device, dtype=torch.float64)  # sum of losses, number of words
        self._signal: int | None = None  # that asked this process to stop
        self.steps_an_epoch = self.train.steps(options.batch_size, accelerator.num_processes)

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
        wanted = config.tracking == "wandb" and self.accelerator.is_main_process
        tracker = Tracker(None)
        if wanted:
            tracker = Tracker.start(config.output, config.project, run.as_json(config), history.run_id)
        try:
            history.run_id = tracker.run_id or history.run_id
            with self._signals():
                self._train(tracker)
        except BaseException:
            tracker.abandon()
            raise
        tracker.finish({"best_epoch": history.best_epoch, "best_cider": history.best_cider})
        return history

    def _train(self, tracker: Tracker) -> None:
        """Train the epochs that are left."""
        history, main = self.history, self.accelerator.is_main_process
        log.info(
            "%s captions of %s photos, %s words; %s steps an epoch on %s",
            f"{len(self.train):,}", f"{len(self.data.train.examples):,}", f"{len(self.captioner.vocabulary):,}",
            f"{self.steps_an_epoch:,}", self.accelerator.device,
        )  # fmt: skip
        if main and len(self.data.val.examples) < _FEW:
            log.warning(
                "validation has %d photos: that is few to choose the best epoch by", len(self.data.val.examples)
            )
        self._saved = time.monotonic()
        self._began = self._saved - history.seconds
        while not self._finished():
            losses = self._epoch(tracker)
            captions, scores = self._validate()
            history.epoch += 1
            history.epoch_step = 0
            history.seconds = time.monotonic() - self._began
            self._total.zero_()
            history.epochs.append({**losses, **scores})
            better = self._better(scores)
            if better:
                history.best_cider, history.best_epoch = scores["cider"], history.epoch
            if main:
                self._save(better, captions)
                self._report(tracker, captions)
            self.accelerator.wait_for_everyone()

    def _better(self, scores: Mapping[str, float]) -> bool:
        """Whether these scores are the best so far: by CIDEr, or by the loss where CIDEr is the same.

        CIDEr is the same, 0, in every epoch where validation has a single photo.
        """
        history = self.history
        if scores["cider"] != history.best_cider:
            return scores["cider"] > history.best_cider
        return scores["val_loss"] < history.epochs[history.best_epoch - 1]["val_loss"]

    def _epoch(self, tracker: Tracker) -> dict[str, float]:
        """One pass over the training captions."""
        accelerator, options, history = self.accelerator, self.config.optimisation, self.history
        self.network.train()
        batches = self.train.epoch(
            history.epoch,
            batch_size=options.batch_size,
            seed=self.config.seed,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            by_photo=self.data.encoder.trainable or self.reward is not None,
            first=history.epoch_step,
        )
        with Progress(
            f"epoch {history.epoch + 1}", len(self.train), "captions", shown=accelerator.is_main_process
        ) as progress:
            for batch in batches:
                entropy = (self.config.seed, history.step, accelerator.process_index)
                torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
                batch = batch.to(accelerator.device)
                if options.mirror:
                    batch = _mirrored(batch)
                share = self._schedule(history.step)
                for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
                    group["lr"] = rate * share
                loss, shown = self._loss(batch)
                self.optimiser.zero_grad()
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(self.network.parameters(), options.gradient_clip)
                self.optimiser.step()
                history.step += 1
                history.epoch_step += 1
                words = len(batch.targets)
                self._total += torch.stack((shown * words, torch.full_like(shown, words)))
                note = ""
                if history.step % _LOG_EVERY == 0 or history.step == 1:
                    value = self._finite(float(shown))
                    note = f"loss {value:.3f}"
                    tracker.log(
                        history.step,
                        {
                            "train/loss": value,
                            "train/gradient_norm": float(norm),
                            "train/learning_rate": options.learning_rate * share,
                            "train/epoch": history.step / self.steps_an_epoch,
                        },
                    )
                progress.advance(len(batch.lengths) * accelerator.num_processes, note)
                if time.monotonic() - self._saved >= 60 * self.config.checkpoint_minutes:
                    self._save_last()
                if accelerator.num_processes == 1 or history.step % _LOG_EVERY == 0:
                    self._stop_if_asked()
        loss_sum, word_count = accelerator.reduce(self._total, "sum")
        return {"epoch": history.epoch + 1, "train_loss": self._finite(float(loss_sum / word_count))}

    def _loss(self, batch: Batch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss to minimise, and the value to report: the cross-entropy, or minus the mean reward."""
        options = self.config.optimisation
        if self.reward is None:
            with self.accelerator.autocast():
                logits = self.network(batch)
            loss = F.cross_entropy(logits.float(), batch.targets, label_smoothing=options.label_smoothing)
            return loss, loss.detach()
        network = self.accelerator.unwrap_model(self.network)
        # Each step has a seed of its own. Processes share it, since the draws depend on the photos too.
        seed = self.config.seed * 2**31 + self.history.step
        with torch.no_grad():
            features = network.features(batch)
        drawn = self.reward.draw(network.decoder, features, batch, seed=seed)
        if not len(drawn.batch.targets):  # a network whose weights have become NaN writes nothing
            self._finite(math.nan)
        with self.accelerator.autocast():
            logits = self.network(drawn.batch)
        loss = self.reward.loss(logits, drawn)
        return loss, 0 * loss.detach() - drawn.reward  # NaN where the loss is

    @torch.inference_mode()
    def _validate(self) -> tuple[list[Caption], dict[str, float]]:
        """Captions, scores and loss of the validation photos; each process takes a share of the captions."""
        self.network.eval()
        accelerator, split = self.accelerator, self.data.val
        rank, processes = accelerator.process_index, accelerator.num_processes
        if processes > 1:  # all use the running statistics of the first process, whose checkpoint is saved
            for buffer in self.network.buffers():
                buffer.copy_(broadcast(buffer))
        self.captioner = self._captioner()
        rows, captions = split.rows[rank::processes], []
        for start in range(0, len(rows), _CHUNK):
            if processes == 1:
                self._stop_if_asked()
            captions += caption_rows(self.captioner, split.source, rows[start : start + _CHUNK])
        if processes > 1:
            numbered = gather_object(list(zip(range(rank, len(split.rows), processes), captions, strict=True)))
            captions = [caption for _, caption in sorted(numbered, key=lambda pair: pair[0])]
        # Every process computes the scores, so that all take the same decisions.
        references = references_of(split.examples)
        hypotheses = dict(zip(references, (caption.text for caption in captions), strict=True))
        scores = metrics.score(references, hypotheses, meteor=self._meteor)
        total, words = 0.0, 0
        for batch in self.val.epoch(
            0, batch_size=self.config.optimisation.batch_size, seed=0, by_photo=self.data.encoder.trainable
        ):
            if processes == 1:
                self._stop_if_asked()
            batch = batch.to(accelerator.device)
            logits = accelerator.unwrap_model(self.network)(batch)
            total += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
            words += len(batch.targets)
        return captions, {"val_loss": self._finite(total / words), **scores}

    def _captioner(self) -> Captioner:
        """The model with the present weights; it captions in fp32."""
        network = self.accelerator.unwrap_model(self.network)
        engine = TorchEngine(self.data.encoder, network.decoder, "fp32", self.accelerator.device)
        return Captioner(engine, self.vocabulary, self.config.decoding)

    def _schedule(self, step: int) -> float:
        """Share of the learning rate at a step."""
        options = self.config.optimisation
        return warmed_cosine(step, options.epochs * self.steps_an_epoch, options.warmup_steps, last=_LAST_SHARE)

    def _finished(self) -> bool:
        history, options = self.history, self.config.optimisation
        return history.epoch >= options.epochs or history.epoch - history.best_epoch >= options.patience

    def _finite(self, loss: float) -> float:
        if math.isfinite(loss):
            return loss
        raise CaptionerError(
            f"the loss is {loss} at step {self.history.step:,}; the checkpoints of earlier epochs are kept: "
            "lower --optimisation.learning-rate or use --precision fp32, with a new --output"
        )

    def _report(self, tracker: Tracker, captions: Sequence[Caption]) -> None:
        history = self.history
        scores = history.epochs[-1]
        best = " (best so far)" if history.best_epoch == history.epoch else ""
        log.info(
            "epoch %d: loss %.3f, validation loss %.3f, BLEU-4 %.4f, CIDEr %.4f%s",
            history.epoch, scores["train_loss"], scores["val_loss"], scores["bleu_4"], scores["cider"], best,
        )  # fmt: skip
        tracker.log(
            history.step,
            {f"val/{name.removeprefix('val_')}": value for name, value in scores.items() if name not in _TRAINING},
        )
        pairs = list(zip(self.data.val.examples, captions, strict=True))
        rows = []
        for example, caption in pairs[:: max(1, len(pairs) // _SAMPLES)][:_SAMPLES]:
            with contextlib.suppress(ImageError):  # the photo has gone meanwhile: the table does without it
                pixels = images.load(example.path, _THUMBNAIL).transpose(1, 2, 0)
                rows.append((pixels, caption.text, caption.logprob, "\n".join(example.captions)))
        tracker.samples(history.step, ("photo", "caption", "log-probability", "human captions"), rows)

    def _save(self, better: bool, captions: Sequence[Caption]) -> None:
        """Save the checkpoints of a finished epoch."""
        output = self.config.output
        if better:
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
        self._save_last()

    def _save_last(self) -> None:
        """Save the model and all that is needed to go on with the next step. Only the first process writes."""
        self._saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        history, network = self.history, self.accelerator.unwrap_model(self.network)
        history.seconds = self._saved - self._began
        history.loss_sum, history.loss_words = self._total.tolist()
        self._finite(history.loss_sum)
        if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
            self._finite(math.nan)
        model = self._captioner()
        model.training = self._record()
        with checkpoint.replacing(self.config.output / "last") as folder:
            model.write(folder)
            run.save_state(folder, history, self.optimiser)

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

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGTERM and Ctrl-C instead of stopping at once; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
            yield
            return
        before: dict[int, Any] = {}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, _: FrameType | None) -> None:
            self._signal = number
            restore()

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number) or signal.SIG_DFL
            signal.signal(number, note)
        try:
            yield
        finally:
            restore()

    def _stop_if_asked(self) -> None:
        """Save and stop, if a signal asked for it. Several processes agree, so that none waits for one that stopped."""
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.gather(torch.tensor([self._signal or 0], device=self.accelerator.device))
            self._signal = int(asked.max()) or None
        if self._signal is None:
            return
        self._save_last()
        log.info("stopped after step %s, which is saved; the same command goes on", f"{self.history.step:,}")
        raise KeyboardInterrupt if self._signal == signal.SIGINT else SystemExit(128 + self._signal)

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
        if saved.vocabulary.sha256 != self.captioner.vocabulary.sha256:
            raise CheckpointError(
                f"{last}: its vocabulary ({len(saved.vocabulary):,} words) is not what this version makes of the data "
                f"({len(self.captioner.vocabulary):,} words); choose another --output"
            )
        encoder = self.data.encoder
        if not encoder.trainable and saved.encoder_sha256 != encoder.weights_sha256:
            raise CheckpointError(
                f"{last}: was trained with other {encoder.config.name} weights ({saved.encoder_sha256[:12]}, "
                f"not {encoder.weights_sha256[:12]}); give those with --encoder.weights, or choose another --output"
            )
        weights.fill(self.accelerator.unwrap_model(self.network).decoder, saved.decoder_state, str(last))
        if self.data.encoder.trainable:
            weights.fill(self.data.encoder.body, saved.encoder_state or {}, str(last))
        self.history = run.load_state(last, self.optimiser)
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
            self._total += torch.tensor([history.loss_sum, history.loss_words], dtype=torch.float64).to(self._total)
        log.info("%s: going on after epoch %d, step %s", last, history.epoch, f"{history.step:,}")


def _mirrored(batch: Batch) -> Batch:
    """A batch with about half of its photos, chosen at random, mirrored."""
    chosen = torch.rand(len(batch.photos), 1, 1, 1, device=batch.photos.device) < 0.5
    return dataclasses.replace(batch, photos=torch.where(chosen, batch.photos.flip(3), batch.photos))


def _mixed_precision(config: TrainingConfig) -> str | None:
    """Accelerate's name for the precision to compute in; None leaves it to `accelerate launch`."""
    if config.precision != "auto":
        return {"fp32": "no"}.get(config.precision, config.precision)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if has_fast_bf16(device) else "no"

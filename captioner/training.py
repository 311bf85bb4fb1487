"""The training loop: captions and features -> checkpoints.

Everything random in an epoch follows from the seed, the epoch's number and the process, so a run that is stopped and
started again gives the same numbers as one that was not, without saving any generator's state.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object, set_seed
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner import checkpoint, features, metrics, weights
from captioner.annotations import Annotations, Example, load
from captioner.config import TrainingConfig
from captioner.dataset import CaptionDataset
from captioner.decoder import Decoder
from captioner.encoder import Encoder
from captioner.errors import CaptionerError, CheckpointError
from captioner.evaluation import Evaluation, describe
from captioner.features import FeatureStore, Stamp
from captioner.model import Captioner
from captioner.progress import Progress
from captioner.tracking import Tracker
from captioner.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_STATE, _HISTORY = "training_state.safetensors", "training.json"
_SAMPLES = 8  # validation photos shown in Weights & Biases
_LOG_EVERY = 20  # optimiser steps; reading the loss makes the device wait


@dataclass
class History:
    """How far a run has come; saved with every checkpoint."""

    epoch: int = 0  # epochs that are finished
    step: int = 0  # optimiser steps taken
    best_epoch: int = 0
    best_cider: float = -1.0
    seconds: float = 0.0  # spent in training and validation
    run_id: str | None = None  # of Weights & Biases
    epochs: list[dict[str, float]] = field(default_factory=list)  # losses and scores of each


@dataclass(frozen=True)
class _Data:
    """What training reads."""

    annotations: Annotations
    train: Sequence[Example]
    val: Sequence[Example]
    store: FeatureStore
    encoder: Encoder


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
    accelerator = Accelerator(
        mixed_precision=_mixed_precision(config),
        # Other processes wait while the first one computes features.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    settings = _claim(config)
    data = _prepare(config, accelerator)
    trainer = Trainer(config, data, accelerator)
    return trainer.run(settings)


class Trainer:
    """The state of a run and the loop over it."""

    def __init__(self, config: TrainingConfig, data: _Data, accelerator: Accelerator) -> None:
        """Build the model and the optimiser.

        Args:
            config: all settings.
            data: what to learn from.
            accelerator: device, precision and processes.
        """
        self.config, self.data, self.accelerator = config, data, accelerator
        vocabulary = Vocabulary.build(
            (caption for example in data.train for caption in example.captions), config.min_count
        )
        self.dataset, self.validation = (
            CaptionDataset(
                examples,
                vocabulary,
                data.store.features(),
                data.store.rows([example.image_id for example in examples]),
                config.max_words,
            )
            for examples in (data.train, data.val)
        )
        set_seed(config.seed)
        decoder = Decoder(config.decoder, len(vocabulary))
        optimiser = torch.optim.Adam(decoder.parameters(), lr=config.optimisation.learning_rate, fused=True)
        self.decoder, self.optimiser = accelerator.prepare(decoder, optimiser)
        self.captioner = Captioner(data.encoder, accelerator.unwrap_model(self.decoder), vocabulary, config.decoding)
        self.history = History()
        self.steps_an_epoch = self.dataset.steps(config.optimisation.batch_size, accelerator.num_processes)

    def run(self, settings: Mapping[str, Any]) -> History:
        """Train to the end.

        Args:
            settings: the configuration in JSON's types.
        """
        config, history = self.config, self.history
        self._resume()
        main = self.accelerator.is_main_process
        wanted = config.tracking == "wandb" and main and not self._finished()
        tracker = Tracker.start(config.output, config.project, settings, history.run_id) if wanted else Tracker(None)
        history.run_id = tracker.run_id or history.run_id
        log.info(
            "%s captions of %s photos, %s words; %s steps an epoch on %s",
            f"{len(self.dataset):,}", f"{len(self.data.train):,}", f"{len(self.captioner.vocabulary):,}",
            f"{self.steps_an_epoch:,}", self.accelerator.device,
        )  # fmt: skip
        while not self._finished():
            began = time.monotonic()
            scores = self._epoch(tracker)
            evaluation = self._validate()
            history.epoch += 1
            history.seconds += time.monotonic() - began
            scores |= evaluation.scores
            history.epochs.append(scores)
            better = scores["cider"] > history.best_cider
            if better:
                history.best_cider, history.best_epoch = scores["cider"], history.epoch
            if main:
                self._report(tracker, scores, evaluation)
                self._save(better, evaluation)
            self.accelerator.wait_for_everyone()
        tracker.finish({"best_epoch": history.best_epoch, "best_cider": history.best_cider})
        return history

    def _epoch(self, tracker: Tracker) -> dict[str, float]:
        """One pass over the training captions."""
        accelerator, options, history = self.accelerator, self.config.optimisation, self.history
        # Dropout of this epoch, on this process.
        entropy = (self.config.seed, history.epoch, accelerator.process_index)
        set_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        self.decoder.train()
        total = torch.zeros((), device=accelerator.device)
        words = 0
        batches = self.dataset.epoch(
            history.epoch,
            batch_size=options.batch_size,
            seed=self.config.seed,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        with Progress(
            f"epoch {history.epoch + 1}", len(self.dataset), "captions", shown=accelerator.is_main_process
        ) as progress:
            for batch in batches:
                batch = batch.to(accelerator.device)
                for group in self.optimiser.param_groups:
                    group["lr"] = self._learning_rate(history.step)
                with accelerator.autocast():
                    logits = self.decoder(batch.features, batch.inputs, batch.keep)
                loss = F.cross_entropy(logits.float(), batch.targets, label_smoothing=options.label_smoothing)
                self.optimiser.zero_grad()
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(self.decoder.parameters(), options.gradient_clip)
                self.optimiser.step()
                history.step += 1
                total += loss.detach() * len(batch.targets)
                words += len(batch.targets)
                note = ""
                if history.step % _LOG_EVERY == 0 or history.step == 1:
                    value = self._finite(float(loss))
                    note = f"loss {value:.3f}"
                    tracker.log(
                        history.step,
                        {
                            "train/loss": value,
                            "train/gradient_norm": float(norm),
                            "train/learning_rate": self._learning_rate(history.step - 1),
                            "train/epoch": history.step / self.steps_an_epoch,
                        },
                    )
                progress.advance(len(batch.lengths) * accelerator.num_processes, note)
        return {"epoch": history.epoch + 1, "train_loss": self._finite(float(total) / words)}

    @torch.inference_mode()
    def _validate(self) -> Evaluation:
        """Captions, scores and loss of the validation photos; each process takes a share of them."""
        self.decoder.eval()
        accelerator = self.accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        captions = describe(self.captioner, self.data.store, self.data.val[rank::processes])
        if processes > 1:
            captions = dict(gather_object(list(captions.items())))
        # Everyone computes the scores, so that everyone takes the same decisions.
        references = {example.image_id: example.captions for example in self.data.val}
        scores = metrics.score(references, {image_id: captions[image_id].text for image_id in references})
        total, words = 0.0, 0
        for batch in self.validation.epoch(0, batch_size=self.config.optimisation.batch_size, seed=0):
            batch = batch.to(accelerator.device)
            logits = self.captioner.decoder(batch.features, batch.inputs, batch.keep)
            total += float(F.cross_entropy(logits, batch.targets, reduction="sum"))
            words += len(batch.targets)
        return Evaluation({key: captions[key] for key in references}, {"val_loss": total / words, **scores})

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 1 % (Loshchilov & Hutter 2017, without restarts)."""
        options = self.config.optimisation
        if step < options.warmup_steps:
            return options.learning_rate * (step + 1) / options.warmup_steps
        rest = max(1, options.epochs * self.steps_an_epoch - options.warmup_steps)
        share = min(1.0, (step - options.warmup_steps) / rest)
        return options.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)

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

    def _report(self, tracker: Tracker, scores: Mapping[str, float], evaluation: Evaluation) -> None:
        history = self.history
        best = " (best so far)" if history.best_epoch == history.epoch else ""
        log.info(
            "epoch %d: loss %.3f, validation loss %.3f, BLEU-4 %.4f, CIDEr %.4f%s",
            history.epoch, scores["train_loss"], scores["val_loss"], scores["bleu_4"], scores["cider"], best,
        )  # fmt: skip
        tracker.log(history.step, {f"val/{name}": value for name, value in evaluation.scores.items()})
        shown = self.data.val[:: max(1, len(self.data.val) // _SAMPLES)][:_SAMPLES]
        tracker.samples(
            history.step,
            ("photo", "caption", "log-probability", "human captions"),
            [
                (
                    example.path,
                    evaluation.captions[example.image_id].text,
                    evaluation.captions[example.image_id].logprob,
                    "\n".join(example.captions),
                )
                for example in shown
            ],
        )

    def _save(self, better: bool, evaluation: Evaluation) -> None:
        history, output = self.history, self.config.output
        names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
        self.captioner.training = {
            "data": self.data.annotations.name,
            "train_photos": len(self.data.train),
            "val_photos": len(self.data.val),
            "epoch": history.epoch,
            "seed": self.config.seed,
            "seconds": round(history.seconds, 1),
            "scores": {name: evaluation.scores[name] for name in names},
        }
        if better:
            self.captioner.save_pretrained(output / "best")
            checkpoint.write_text(output / "captions_val.json", json.dumps(evaluation.results(), indent=0) + "\n")
        with checkpoint.replacing(output / "last") as folder:
            self.captioner.write(folder)
            save_file(self._state(), folder / _STATE)
            checkpoint.write_text(folder / _HISTORY, json.dumps(dataclasses.asdict(history), indent=2) + "\n")

    def _state(self) -> dict[str, Tensor]:
        """The optimiser's moments: number of the parameter and name -> tensor."""
        return {
            f"{index}.{name}": tensor.detach().cpu().contiguous()
            for index, values in self.optimiser.state_dict()["state"].items()
            for name, tensor in values.items()
        }

    def _resume(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        last = self.config.output / "last"
        if not checkpoint.recover(last):
            return
        saved = checkpoint.read(last)
        vocabulary = self.captioner.vocabulary
        if saved.vocabulary.sha256 != vocabulary.sha256:
            raise CheckpointError(
                f"{last}: its vocabulary ({len(saved.vocabulary):,} words) is not that of the data "
                f"({len(vocabulary):,} words): the captions have changed; choose another --output"
            )
        checkpoint.fill(self.captioner.decoder, saved.decoder_state, str(last))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in weights.read(last / _STATE).items():
            index, kind = name.split(".", 1)
            moments.setdefault(int(index), {})[kind] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.history = History(**json.loads((last / _HISTORY).read_text(encoding="utf-8")))
        log.info("%s: going on after epoch %d", last, self.history.epoch)


def _prepare(config: TrainingConfig, accelerator: Accelerator) -> _Data:
    """Read and check the captions, then compute the features that are not stored yet."""
    where = config.data
    with accelerator.main_process_first():
        captions = load(
            where.data,
            images=where.images,
            restval=where.restval,
            on_problem=where.on_problem,
            val_share=where.val_share,
            seed=config.seed,
        )
    log.info("%s: %s", captions.name, captions.problems.report())
    train, val = captions.split("train"), captions.split("val")
    encoder = Encoder(config.encoder).to(accelerator.device)
    stamp = Stamp.of(encoder)
    folder = where.features or features.default_folder(captions, stamp)
    with accelerator.main_process_first():
        store = FeatureStore(folder, stamp)
        log.info("features of %s are kept in %s", config.encoder.name, folder)
        with Progress("features", 0, "photos", shown=accelerator.is_main_process) as progress:
            failures = features.add_photos(store, encoder, (*train, *val), progress=progress.set)
    for error in failures.values():
        log.warning("left out: %s", error)
    return _Data(
        captions,
        [example for example in train if example.image_id not in failures],
        [example for example in val if example.image_id not in failures],
        store,
        encoder,
    )


def _claim(config: TrainingConfig) -> dict[str, Any]:
    """Take the output folder for this run; a run with other settings that is there already is not touched."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    path = config.output / "config.json"
    free = {"output", "tracking", "project"}  # may differ between two starts of one run
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged, not JSON ({error}); choose another --output") from None
        different = [
            f"{key} was {old!r}, now {new!r}"
            for key, (old, new) in _differences(before, settings).items()
            if key.split(".")[0] not in free
        ]
        if different:
            raise CheckpointError(
                f"{config.output}: holds a run with other settings: {'; '.join(different[:3])}; choose another --output"
            )
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{config.output}: cannot be written ({error.strerror})") from None
    return settings


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by their dotted names."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in old.keys() | new.keys():
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= {f"{key}.{inner}": pair for inner, pair in _differences(before, after).items()}
        elif before != after:
            found[key] = (before, after)
    return found


def _mixed_precision(config: TrainingConfig) -> str | None:
    """Accelerate's name for the precision to compute in; None leaves it to `accelerate launch`."""
    if config.precision != "auto":
        return {"fp32": "no"}.get(config.precision, config.precision)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"

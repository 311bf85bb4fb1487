"""Distillation: `mini` learns to see what a teacher sees, without labels (Hinton et al. 2015, Romero et al. 2015).

The student's last map is turned linearly into the teacher's channels. Both are averaged onto a grid of places of 32
pixels, one of 2 x 2 and a single place, and the squared differences are taken there, in units of each channel's
standard deviation: a channel that is always small counts like any other. The teacher's numbers enter by their square
root, as features do in the decoder. Nothing of the teacher remains in the student.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import set_seed
from jaxtyping import Float
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner import checkpoint, files, images
from captioner.config import EncoderConfig
from captioner.datasets.annotations import load_dataset
from captioner.errors import CaptionerError
from captioner.networks import weights
from captioner.networks.encoder import Encoder
from captioner.networks.inference import has_fast_bf16
from captioner.progress import Progress
from captioner.training import run
from captioner.training.run import History
from captioner.training.trainer import warmed_cosine
from recipes.mini import teacher
from recipes.mini.presets import DistillationConfig
from recipes.mini.teacher import Teacher, Views

log = logging.getLogger(__name__)

_HELD_OUT = 50  # one photo in so many is not learned from, and tells how well the rest was learned
_SAMPLE = 2000  # photos that means and deviations of the teacher's channels are taken over
_SMALLEST = 1e-3  # deviation of a channel that is always 0
_STUDENT = "student.safetensors"
_JITTER = 0.2  # largest change of brightness and of contrast, as a share


class Student(nn.Module):
    """The CNN, and the layer that turns its channels into the teacher's, which is thrown away in the end."""

    def __init__(self, encoder: Encoder, channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.translate = nn.Conv2d(1024, channels, 1)
        nn.init.zeros_(self.translate.weight)  # at first the student says what the teacher says on average
        assert self.translate.bias is not None
        nn.init.zeros_(self.translate.bias)

    def forward(self, photos: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch channels rows columns"]:
        """What the student thinks the teacher sees."""
        answer: Tensor = self.translate(self.encoder.map(photos))
        return answer


def distil(config: DistillationConfig) -> History:
    """Train a student, or go on with a run that was stopped.

    Writes to `config.output`: `views/` (see `teacher.cut_views`), `last/` (what is needed to go on), `config.json`, and
    in the end `encoder.safetensors`, which `EncoderConfig.weights` takes.

    Returns:
        How the run went; `explained` is the share of the variance of the teacher's numbers, averaged over the whole
        photo and over quarters of it, on photos that were not learned from.

    Raises:
        CaptionerError: photos, teacher or folder do not allow it; what was saved before is kept.
    """
    with run.claimed(config):
        log.info("settings: %s", run.as_json(config))
        paths = _photos(config)
        views = teacher.cut_views(
            config.output / "views",
            Teacher(config.teacher),
            paths,
            views=config.views,
            size=config.view_size,
            seed=config.seed,
        )
        run.save_settings(config)
        return Distiller(config, views).run()


def _photos(config: DistillationConfig) -> list[Path]:
    """Photos to learn from: those of training, and others, unless they are of the data set too; all can be read."""
    captions = load_dataset(config.data)
    paths = [example.path for example in captions.split("train")]
    known = {example.path.resolve() for example in captions.examples}
    if config.photos:
        paths += [path for path in dict.fromkeys(images.find(config.photos)) if path.resolve() not in known]
    failures = images.Photos(paths, 32).check()
    for error in failures.values():
        log.warning("left out: %s", error)
    return [path for number, path in enumerate(paths) if number not in failures]


class Distiller:
    """The state of a run and the loop over it."""

    def __init__(self, config: DistillationConfig, views: Views) -> None:
        self.config, self.views = config, views
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        photos = np.arange(len(views.pixels))
        self.held_out, self.photos = photos[::_HELD_OUT], np.delete(photos, photos[::_HELD_OUT])
        if not len(self.photos):
            raise CaptionerError(f"{config.data.data}: has one photo for training; a student needs more")
        set_seed(config.seed)
        encoder = Encoder(EncoderConfig("mini", "random", max(config.sizes)), trainable=True)
        self.student = Student(encoder, views.answers.shape[-1]).to(self.device)
        matrices = [parameter for parameter in self.student.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.student.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        # Standard deviation of each channel of the teacher, averaged over places of each size: (1, channels, 1, 1).
        sample = np.random.default_rng(config.seed).choice(self.photos, min(len(self.photos), _SAMPLE), replace=False)
        self._roots = torch.arange(256, device=self.device).mul(views.scale).sqrt()
        roots = self._answers(sample, np.zeros(len(sample), np.int64))
        self._mean = roots.mean((0, 2, 3), keepdim=True)
        self._deviation = {
            side: F.adaptive_avg_pool2d(roots, side).std((0, 2, 3), keepdim=True).clamp_min(_SMALLEST)
            for side in range(1, roots.shape[-1] + 1)
        }
        self.history = History()
        self.steps_an_epoch = -(-len(self.photos) // config.batch_size)

    def run(self) -> History:
        """Train to the end."""
        history, last = self.history, self.config.output / "last"
        if checkpoint.recover(last):
            weights.fill(self.student, weights.read(last / _STUDENT), str(last))
            history = self.history = run.load_state(last, self.optimiser)
            log.info("%s: going on after epoch %d", last, history.epoch)
        while history.epoch < self.config.epochs:
            began = time.monotonic()
            loss = self._epoch()
            explained = self._explained()
            history.epoch += 1
            history.seconds += time.monotonic() - began
            history.epochs.append({"epoch": history.epoch, "train_loss": loss, "explained": explained})
            log.info("epoch %d: loss %.4f, explained %.4f", history.epoch, loss, explained)
            with checkpoint.replacing(last) as folder:
                save_file(_on_cpu(self.student.state_dict()), folder / _STUDENT)
                run.save_state(folder, history, self.optimiser)
        path = self.config.output / "encoder.safetensors"
        try:
            files.write(path, save(_on_cpu(self.student.encoder.body.state_dict())))
        except OSError as error:
            raise CaptionerError(f"{path}: cannot be written ({error.strerror}); make room and run again") from None
        return history

    def _epoch(self) -> float:
        """One view of every photo; returns the mean loss."""
        config, history = self.config, self.history
        entropy = np.random.SeedSequence((config.seed, history.epoch))
        random = np.random.default_rng(entropy)
        size = self._size()
        photos = random.permutation(self.photos)
        chosen = random.integers(self.views.pixels.shape[1], size=len(photos))
        total = 0.0
        self.student.train()
        with Progress(f"epoch {history.epoch + 1}", len(photos), "photos") as progress:
            for start in range(0, len(photos), config.batch_size):
                batch = slice(start, start + config.batch_size)
                pixels, roots = self._batch(photos[batch], chosen[batch])
                pixels, roots = _mix(*_augment(pixels, roots, size, random), random)
                loss = self._loss(pixels, roots, (min(pixels.shape[-1] // 32, roots.shape[-1]), 2, 1)).mean()
                share = warmed_cosine(history.step, config.epochs * self.steps_an_epoch, config.warmup_steps)
                for group in self.optimiser.param_groups:
                    group["lr"] = config.learning_rate * share
                self.optimiser.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(self.student.parameters(), config.gradient_clip)
                self.optimiser.step()
                history.step += 1
                total += float(loss.detach()) * len(pixels)
                progress.advance(len(pixels), f"loss {float(loss.detach()):.3f}")
        if not math.isfinite(total):
            raise CaptionerError(
                f"the loss is {total} at step {history.step:,}; what was saved before is kept: "
                "lower --learning-rate, with a new --output"
            )
        return total / len(photos)

    @torch.inference_mode()
    def _explained(self) -> float:
        """Share of the variance of the teacher's numbers that the student explains, of whole photos held out."""
        self.student.eval()
        size = self._size()
        total = 0.0
        for start in range(0, len(self.held_out), self.config.batch_size):
            photos = self.held_out[start : start + self.config.batch_size]
            pixels, roots = self._batch(photos, np.zeros(len(photos), np.int64))
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
            total += float(self._loss(pixels, roots, (2, 1)).mean()) * len(photos)
        return 1 - total / len(self.held_out)

    def _loss(
        self,
        pixels: Float[Tensor, "batch 3 size size"],
        roots: Float[Tensor, "batch channels rows columns"],
        grids: tuple[int, ...],
    ) -> Float[Tensor, " grids"]:
        """Mean squared error on each grid, in units of the variance of the teacher's channels there."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_fast_bf16(self.device)):
            said = self.student(pixels)
        difference = said.float()
        losses = []
        for side in grids:
            wanted = F.adaptive_avg_pool2d(roots, side) - self._mean
            error = (F.adaptive_avg_pool2d(difference, side) - wanted) / self._deviation[side]
            losses.append(error.square().mean())
        return torch.stack(losses)

    def _batch(self, photos: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Views, 0 to 255, `(batch, 3, size, size)`, and what the teacher says of them, see `_answers`."""
        pixels = torch.from_numpy(self.views.pixels[photos, views]).to(self.device).float()
        return pixels, self._answers(photos, views)

    def _answers(self, photos: npt.NDArray[np.int64], views: npt.NDArray[np.int64]) -> Tensor:
        """Square roots of the teacher's map, `(batch, channels, rows, columns)`."""
        answers = torch.from_numpy(self.views.answers[photos, views]).to(self.device)
        return self._roots[answers.int()].permute(0, 3, 1, 2)

    def _size(self) -> int:
        """Height and width that the student sees in this epoch."""
        sizes = self.config.sizes
        return sizes[self.history.epoch * len(sizes) // self.config.epochs]


def _augment(
    pixels: Float[Tensor, "batch 3 view view"],
    roots: Float[Tensor, "batch channels rows columns"],
    size: int,
    random: np.random.Generator,
) -> tuple[Float[Tensor, "batch 3 size size"], Float[Tensor, "batch channels rows columns"]]:
    """Vary what the teacher hardly notices: a frame of few pixels, left and right, brightness and contrast."""
    view = pixels.shape[-1]
    side = int(random.integers(view * 8 // 9, view + 1))
    top, left = random.integers(view - side + 1, size=2)
    pixels = pixels[:, :, top : top + side, left : left + side]
    if side != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    mirrored = torch.from_numpy(random.random(len(pixels)) < 0.5).to(pixels.device)[:, None, None, None]
    pixels = torch.where(mirrored, pixels.flip(3), pixels)
    roots = torch.where(mirrored, roots.flip(3), roots)
    drawn = random.uniform(-_JITTER, _JITTER, (2, len(pixels), 1, 1, 1)).astype(np.float32)
    brightness, contrast = torch.from_numpy(drawn).to(pixels.device)
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - middle) * (1 + contrast) + middle * (1 + brightness)
    return pixels.clamp(0, 255), roots


def _mix(
    pixels: Float[Tensor, "batch 3 size size"],
    roots: Float[Tensor, "batch channels rows columns"],
    random: np.random.Generator,
) -> tuple[Float[Tensor, "batch 3 size size"], Float[Tensor, "batch channels rows columns"]]:
    """CutMix (Yun et al. 2019): every other batch has a rectangle of another photo in each, and in its answer too."""
    if random.random() < 0.5:
        return pixels, roots
    share = math.sqrt(random.random())  # of each side, so that any share of the area is as likely
    cells, size = roots.shape[-1], pixels.shape[-1]
    length = round(cells * share)
    corner = random.integers(cells - length + 1, size=2)
    mixed = []
    for tensor, scale in ((pixels, size / cells), (roots, 1.0)):
        top, left, bottom, right = (round(edge * scale) for edge in (*corner, *(corner + length)))
        tensor = tensor.clone()
        tensor[:, :, top:bottom, left:right] = tensor.roll(1, 0)[:, :, top:bottom, left:right]
        mixed.append(tensor)
    return mixed[0], mixed[1]


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

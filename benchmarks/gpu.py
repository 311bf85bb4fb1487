"""Training, search and features on a GPU, each beside what the card's matrix and memory rates would allow.

    python -m benchmarks.gpu                          # all of it: minutes on a large card
    python -m benchmarks.gpu --photos FOLDER          # features of these JPEG files; by default of 64 that are drawn
    python -m benchmarks.gpu --device cpu --small     # the same program on a processor, at a hundredth of the size

Figures: captions a second of cross-entropy steps with features on the card, and how often a step makes the host wait;
captions a second of a beam search; photos a second of feature extraction from JPEG files; and the whole of a run of
COCO's size with made-up captions: 113,287 photos of 5 captions, 30 epochs, 5,000 validation photos captioned and scored
after each. Goals on a card like an H100: 300,000 captions/s, and the run in 5 minutes.

"allowed" is the figure of a card that does nothing but the matrix products and the traffic that cannot be left out,
both at the rates measured in the same run, and both at once. That of features counts the CNN alone; beside it stands
how many photos the processors decode.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import report
from benchmarks.common import seconds as seconds_of
from benchmarks.training import CAPTIONS, EMBEDDING, HIDDEN, PAD, WORDS, Steps, captions, timed
from captioner import images
from captioner.config import (
    FEATURE_SIZE,
    DataConfig,
    DecoderConfig,
    DecodingOptions,
    EncoderConfig,
    OptimisationConfig,
    TrainingConfig,
)
from captioner.datasets.annotations import Example
from captioner.datasets.batches import CaptionDataset
from captioner.datasets.features import FeatureStore, Stamp, add_photos
from captioner.decoding.search import decode
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchDecoder, dtype_for
from captioner.training.inputs import Inputs, SplitInputs
from captioner.training.rounding import Rounding
from captioner.training.trainer import Trainer
from captioner.vocabulary import Vocabulary

_GOAL_CAPTIONS, _GOAL_MINUTES = 300_000, 5
_PHOTO = (480, 640, 3)  # of the JPEG files that are drawn


@dataclass(frozen=True)
class Rates:
    """What a device does in a second at most."""

    products: float  # operations of large matrix products, in the precision of training
    memory: float  # bytes read or written

    def seconds(self, operations: float, traffic: float) -> float:
        """The least time for some work: the device computes while it reads and writes."""
        return max(operations / self.products, traffic / self.memory)


def rates(device: torch.device, size: int) -> Rates:
    """Measure a device by products of square matrices, and by copies."""
    dtype = dtype_for("auto", device)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = 2 * size**3 / timed(device, lambda: one @ other, 10)
    source = torch.empty(size * size * 4, device=device)
    target = torch.empty_like(source)
    return Rates(products, 2 * source.nbytes / timed(device, lambda: target.copy_(source), 10))


def steps(device: torch.device, batch_size: int, card: Rates) -> dict[str, Any]:
    """Captions a second of cross-entropy steps, and how often a step waits.

    Adam reads weights, gradients and both moments, and writes weights and moments, in fp32; the gradient of each logit
    is written once and read twice, in 16 bits.
    """
    ids = captions(np.random.default_rng(0))
    dataset = CaptionDataset(ids, np.arange(len(ids) // CAPTIONS).repeat(CAPTIONS), PAD)
    work = Steps(device, Rounding("auto", device), dataset, batch_size)
    seconds = timed(device, work, 20)
    operations, captions_a_step, words_a_step = work.operations / 21, work.captions / 21, work.words / 21
    allowed = card.seconds(operations, 7 * 4 * work.parameters + 3 * 2 * words_a_step * WORDS)
    waits = None
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for _ in range(10):
                work()
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(warning.message) for warning in caught) / 10
    return {
        "captions_s": captions_a_step / seconds,
        "allowed": captions_a_step / allowed,
        "share of the matrix rate": operations / seconds / card.products,
        "host waits a step": waits,
    }


def search(device: torch.device, photos: int, card: Rates) -> dict[str, float]:
    """Captions a second of a beam search of width 3 from features; logits are written and read once, in fp32."""
    vocabulary = words()
    decoder = Decoder(DecoderConfig(hidden_size=HIDDEN, embedding_size=EMBEDDING), len(vocabulary)).to(device)
    features = np.random.default_rng(3).random((photos, FEATURE_SIZE), np.float32)
    model = TorchDecoder(decoder)
    with FlopCounterMode(display=False) as counted:
        decode(model, features, vocabulary, DecodingOptions())
    read = counted.get_total_flops() / (2 * (HIDDEN * WORDS + (EMBEDDING + HIDDEN) * 4 * HIDDEN))  # words, about
    seconds = timed(device, lambda: decode(model, features, vocabulary, DecodingOptions()), 1)
    allowed = card.seconds(counted.get_total_flops(), 2 * 4 * read * WORDS)
    return {"captions_s": photos / seconds, "allowed": photos / allowed}


def extraction(device: torch.device, name: Any, files: Sequence[Path], photos: int, card: Rates) -> dict[str, float]:
    """Photos a second from JPEG files to stored features, and of decoding alone."""
    encoder = Encoder(EncoderConfig(name, "random")).to(device)
    paths = [files[n % len(files)] for n in range(photos)]
    examples = [Example(n, path, ("a",), "train") for n, path in enumerate(paths)]
    size = encoder.config.image_size
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        encoder.map(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    decoding = seconds_of(lambda: list(images.stream(paths, size, batch_size=encoder.together)))
    with tempfile.TemporaryDirectory() as made:
        store = FeatureStore(Path(made), Stamp.of(encoder))
        add_photos(store, encoder, examples[: encoder.together], batch_size=encoder.together)  # warms up
        began = time.perf_counter()
        add_photos(store, encoder, examples, batch_size=encoder.together)
        found = (photos - encoder.together) / (time.perf_counter() - began)
    allowed = 1 / card.seconds(counted.get_total_flops(), 0)
    return {"photos_s": found, "allowed": allowed, "decoding alone": photos / decoding}


def draw_photos(folder: Path) -> list[Path]:
    """64 JPEG files of noise that is smooth, as that of photos."""
    random = np.random.default_rng(4)
    files = [folder / f"{number}.jpg" for number in range(64)]
    for file in files:
        rough = Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8))
        rough.resize(_PHOTO[1::-1], Image.Resampling.BICUBIC).save(file, quality=90)
    return files


def words() -> Vocabulary:
    """As many words as COCO has, from "w0" on."""
    return Vocabulary.build([f"w{n}" for n in range(WORDS - 4)], 1)


def whole_run(folder: Path, photos: int, validation: int, epochs: int) -> dict[str, Any]:
    """A run from stored features to the last checkpoint."""
    random = np.random.default_rng(5)
    features = random.random((photos + validation, FEATURE_SIZE), np.float32).astype(np.float16)
    lengths = 8 + random.poisson(2.5, (photos + validation, CAPTIONS))
    lengths[0, 0] = WORDS  # every word is in the vocabulary
    examples = []
    for n, row in enumerate(lengths):
        ids = [range(WORDS - 4) if length == WORDS else random.integers(0, WORDS - 4, length) for length in row]
        split: Any = "train" if n < photos else "val"
        examples.append(Example(n, Path(f"{n}.jpg"), tuple(" ".join(f"w{i}" for i in some) for some in ids), split))
    config = TrainingConfig(
        DataConfig(folder / "data"),
        folder / "run",
        decoder=DecoderConfig(hidden_size=HIDDEN, embedding_size=EMBEDDING),
        optimisation=OptimisationConfig(epochs=epochs, batch_size=1024, patience=epochs),
        min_count=1,
        tracking="none",
    )
    accelerator = Accelerator(mixed_precision="no")
    encoder = Encoder(EncoderConfig("tiny", "random", 32)).to(accelerator.device)
    splits = [
        SplitInputs(examples[start:stop], features, np.arange(start, stop))
        for start, stop in ((0, photos), (photos, photos + validation))
    ]
    config.output.mkdir()
    began = time.perf_counter()
    history = Trainer(config, Inputs("made up", encoder, splits[0], splits[1]), accelerator).run()
    return {"minutes": (time.perf_counter() - began) / 60, "epochs": history.epoch, "steps": history.step}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="about a hundredth of the size")
    parser.add_argument("--epochs", type=int, default=30, help="of the COCO-sized run")
    parser.add_argument("--photos", type=Path, help="folder of JPEG files")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use; `--device cpu --small` runs the same on a processor")
    small = arguments.small
    card = rates(device, 1024 if small else 8192)
    ours: dict[str, Any] = {}
    for batch_size in (128,) if small else (128, 1024, 4096):
        ours[f"steps of {batch_size}"] = steps(device, batch_size, card)
        print(batch_size, ours[f"steps of {batch_size}"], flush=True)
    ours["search"] = search(device, 64 if small else 5000, card)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        files = sorted(arguments.photos.rglob("*.jpg")) if arguments.photos else draw_photos(folder)
        if not files:
            raise SystemExit(f"{arguments.photos}: holds no .jpg file; give a folder of photos")
        for name in ("resnet50",) if small else ("vgg16", "resnet101"):
            photos = 96 if small else 5000
            ours[f"features of {name}"] = extraction(device, name, files, photos, card)
            print(name, ours[f"features of {name}"], flush=True)
        photos, validation = (400, 50) if small else (113_287, 5000)
        ours["run"] = whole_run(folder, photos, validation, 1 if small else arguments.epochs)
    report(
        "training and captioning on a GPU",
        ours=ours,
        ceiling={
            "matrix products, Gop_s": card.products / 1e9,
            "memory, GB_s": card.memory / 1e9,
            "goals": {"captions_s": _GOAL_CAPTIONS, "minutes": _GOAL_MINUTES},
            "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        },
    )


if __name__ == "__main__":
    main()

"""The decoder's first lessons: captions without photos, of which it learns the language before it sees anything."""

from __future__ import annotations

import gzip
import itertools
import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from captioner.config import TrainingConfig
from captioner.datasets.batches import CaptionDataset
from captioner.errors import AnnotationError
from captioner.networks.decoder import Decoder
from captioner.progress import Progress
from captioner.training.loss import word_losses
from captioner.training.optimisation import clip, warmed
from captioner.training.rounding import Rounding
from captioner.vocabulary import Vocabulary

log = logging.getLogger(__name__)


def read_captions(file: Path) -> list[str]:
    """Captions of a text file, one a line; of a line with tabs, the last column. The file may be gzipped.

    Raises:
        AnnotationError: it cannot be read, or holds nothing.
    """
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise AnnotationError(
            f"{file}: captions without photos cannot be read ({error}); expected text in UTF-8, a caption a line"
        ) from None
    captions = [line.rpartition("\t")[2].strip() for line in text.splitlines()]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise AnnotationError(f"{file}: holds no caption; expected text in UTF-8, a caption a line")
    return captions


def learn_language(
    decoder: Decoder,
    captions: Sequence[str],
    vocabulary: Vocabulary,
    config: TrainingConfig,
    rounding: Rounding,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Train a decoder that sees no photo: each caption begins in the same hidden state.

    Captions with unknown words are left out. Afterwards all photos still look the same to the decoder (the layer that
    reads them is zero), so what it has learned is not disturbed by numbers that it does not understand yet.

    Args:
        decoder: is changed.
        captions: texts.
        vocabulary: of the decoder.
        config: passes, batches and rates of its `optimisation`, and the seed.
        rounding: precision of the products.
        between: is called after each step.

    Raises:
        AnnotationError: no caption is left.
    """
    options, device = config.optimisation, decoder.output.weight.device
    ids = [each for each in vocabulary.encode(captions, config.max_words) if vocabulary.unk not in each]
    if not ids:
        raise AnnotationError(
            f"{options.language_captions}: every caption has words that those of the photos lack; leave the file out"
        )
    log.info("%s of %s captions without photos have known words alone", f"{len(ids):,}", f"{len(captions):,}")
    dataset = CaptionDataset(ids, np.zeros(len(ids), np.int64), vocabulary.pad)
    nn.init.zeros_(decoder.initial.weight)
    optimiser = torch.optim.AdamW(decoder.parameters(), options.learning_rate, weight_decay=0.0, fused=True)
    epochs = itertools.chain.from_iterable(
        dataset.epoch(number, batch_size=options.batch_size, seed=config.seed) for number in itertools.count()
    )
    steps = max(1, round(options.language_epochs * dataset.batches(options.batch_size)))
    schedule = replace(options, epochs=1)
    decoder.train()
    with Progress("language", steps, "steps") as progress:
        for step, share in enumerate(itertools.islice(epochs, steps)):
            torch.manual_seed(int(np.random.SeedSequence((config.seed, step, 1)).generate_state(1)[0]))
            batch = dataset.batch(share).to(device)
            for group in optimiser.param_groups:
                group["lr"] = options.learning_rate * warmed(schedule, step, steps)
            with rounding.autocast():
                state = decoder.arrange(decoder.initial.bias.expand(len(batch.tokens), -1))
                hidden = decoder.read(state, batch.inputs).flatten(0, 1).index_select(0, batch.keep)
                loss = word_losses(hidden, decoder.output, batch.targets, smoothing=options.label_smoothing)
            optimiser.zero_grad()
            rounding.scaled(loss * batch.weight).backward()  # type: ignore[no-untyped-call]
            rounding.unscale(optimiser)
            clip(decoder, options)
            rounding.step(optimiser)
            progress.advance(1)
            between()

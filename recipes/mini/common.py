"""Parts that the steps of the recipe share."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that everyone uses

from captioner import metrics
from captioner.config import DecoderConfig, DecodingOptions, EncoderConfig, Precision
from captioner.datasets.annotations import Annotations, Example
from captioner.decoding.search import decode
from captioner.model import Captioner
from captioner.networks.decoder import Decoder
from captioner.networks.encoder import Encoder
from captioner.networks.inference import TorchDecoder, TorchEngine, dtype_for
from captioner.training.language import read_captions
from captioner.vocabulary import Vocabulary

SEARCH = DecodingOptions(length_normalisation="average", no_repeat_ngram=3, unique_words=True, max_words=28)
MIN_COUNT = 5  # words seen fewer times in the captions of training photos become [unk]
FAST = dtype_for("auto", torch.device("cpu"))  # bfloat16 where the processor multiplies it faster, else fp32
MAX_WORDS = 20  # longer training captions are cut there

#: Words that no caption may end with.
UNFINISHED = frozenset(
    "a an the and or of in on at with to for from by into onto over under near next beside behind between through "
    "around along across down up off as is are that while very".split()
)

_HOLDING = frozenset("with that other another front into onto from over under their there while next each".split())


@dataclass(frozen=True)
class Set:
    """Photos of a split with their captions in ids, caption by caption."""

    examples: Sequence[Example]
    tokens: list[npt.NDArray[np.int64]]  # [start] ... [end]
    photo: npt.NDArray[np.int64]  # row of each caption's photo

    @classmethod
    def of(cls, examples: Sequence[Example], vocabulary: Vocabulary) -> Set:
        """Encode the captions of examples."""
        photo = np.repeat(np.arange(len(examples)), [len(example.captions) for example in examples])
        ids = vocabulary.encode([caption for example in examples for caption in example.captions], MAX_WORDS)
        return cls(examples, [np.array(each) for each in ids], photo)

    def by_photo(self) -> list[npt.NDArray[np.int64]]:
        """Numbers of each photo's captions."""
        return np.split(np.arange(len(self.photo)), np.searchsorted(self.photo, np.arange(1, len(self.examples))))


def vocabulary_of(data: Annotations) -> Vocabulary:
    """The words of the training captions."""
    return Vocabulary.build((c for example in data.split("train") for c in example.captions), MIN_COUNT)


def text_only(file: Path, vocabulary: Vocabulary) -> list[npt.NDArray[np.int64]]:
    """Captions without photos (`id<TAB>caption` a line, gzip) that have no unknown word."""
    ids = vocabulary.encode(read_captions(file), MAX_WORDS)
    return [np.array(each) for each in ids if vocabulary.unk not in each]


def collate(captions: Sequence[npt.NDArray[np.int64]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids `(captions, time)`, and which of the positions after the first are words, `(captions, time - 1)`."""
    lengths = np.array([len(caption) for caption in captions])
    tokens = np.full((len(captions), lengths.max()), pad)
    for row, caption in enumerate(captions):
        tokens[row, : len(caption)] = caption
    keep = np.arange(tokens.shape[1] - 1) < (lengths - 1)[:, None]
    return torch.from_numpy(tokens), torch.from_numpy(keep)


def logits(decoder: Decoder, state: Sequence[Tensor], tokens: Tensor, keep: Tensor) -> Tensor:
    """What may follow the positions kept, from hidden states `(layers, captions, hidden)`."""
    h0, c0 = (part.contiguous() for part in state)
    x = decoder.dropout(decoder.embedding(tokens[:, :-1]))
    hidden, _ = decoder.rnn(x, (h0.to(x.dtype), c0.to(x.dtype)))
    result: Tensor = decoder.output(decoder.dropout(hidden)[keep])
    return result


def rounded() -> torch.autocast:
    """A context in which matrix products are computed as this processor does it fastest, see `FAST`."""
    return torch.autocast("cpu", FAST, enabled=torch.float32 != FAST)


def cross_entropy(found: Tensor, tokens: Tensor, keep: Tensor, smoothing: float) -> Tensor:
    """Mean over the words kept."""
    return F.cross_entropy(found.float(), tokens[:, 1:][keep], label_smoothing=smoothing)


def chunks(order: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Parts of at most `size`."""
    for start in range(0, len(order), size):
        yield order[start : start + size]


class Average:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take a step's weights in; the first steps count more, so that the first values are soon forgotten."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                self.state[name].lerp_(tensor, share)


def describe(decoder: Decoder, features: Tensor, vocabulary: Vocabulary, precision: Precision = "fp32") -> list[str]:
    """The best caption of each row of features."""
    found = decode(TorchDecoder(decoder, precision), features.float().numpy(), vocabulary, SEARCH)
    return [vocabulary.decode(best.tokens) for best, *_ in found]


def report(examples: Sequence[Example], captions: Sequence[str]) -> dict[str, Any]:
    """Scores of each data set, and what is wrong with captions."""
    result: dict[str, Any] = {}
    for name in ("flickr8k", "coco"):
        chosen = [i for i, example in enumerate(examples) if str(example.image_id).startswith(name)]
        references = {examples[i].image_id: examples[i].captions for i in chosen}
        scores = metrics.score(references, dict(zip(references, (captions[i] for i in chosen), strict=True)))
        result[name] = {"b4": round(scores["bleu_4"], 4), "cider": round(scores["cider"], 4)}
    words = [caption.split() for caption in captions]
    result["distinct"] = len(set(captions))
    result["unfinished"] = sum(not each or each[-1] in UNFINISHED for each in words)
    result["twice"] = sum(said_twice(each) for each in words)
    result["length"] = round(float(np.mean([len(each) for each in words])), 2)
    return result


def has_meaning(word: str) -> bool:
    """Whether a word tells of the photo: not one of those that hold a sentence together."""
    return len(word) > 3 and word not in _HOLDING


def said_twice(words: Sequence[str]) -> bool:
    """Whether a caption says a word of meaning again."""
    content = [word for word in words if has_meaning(word)]
    return len(set(content)) < len(content)


def save(
    folder: Path, network: Mapping[str, Tensor], decoder: Decoder, vocabulary: Vocabulary, training: Mapping[str, Any]
) -> None:
    """Write a model in the project's form."""
    encoder = Encoder(EncoderConfig("efficientnet_lite2", "default", 192), network)
    engine = TorchEngine(encoder, decoder, "fp32")
    Captioner(engine, vocabulary, SEARCH, training).save_pretrained(folder)


def new_decoder(vocabulary: Vocabulary, hidden: int = 512) -> Decoder:
    """A decoder that knows nothing, and to which all photos look the same."""
    decoder = Decoder(DecoderConfig(hidden_size=hidden, embedding_size=256), len(vocabulary))
    nn.init.zeros_(decoder.initial.weight)
    return decoder


def cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def log(file: Path, record: Mapping[str, Any]) -> None:
    """Print a line, and add it to a file."""
    line = json.dumps({"time": time.strftime("%H:%M:%S"), **record})
    print(line, flush=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(line + "\n")

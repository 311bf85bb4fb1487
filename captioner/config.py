"""Every setting, with its default and its reason; validated when it is built; and the named presets.

The dataclasses are the command line: the comment behind a field is its help text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from captioner.errors import CaptionerError

FEATURE_SIZE = 4096

EncoderName = Literal[
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "alexnet",
    "resnet50",
    "resnet101",
    "resnet152",
    "squeezenet1_1",
    "googlenet",
    "tiny",
    "mini",
    "efficientnet_lite2",
]
CellName = Literal["lstm", "gru", "rnn", "irnn"]
FeatureNorm = Literal["standard", "sqrt", "none"]
Precision = Literal["auto", "fp32", "bf16"]
Method = Literal["beam", "sample"]
Normalisation = Literal["none", "average", "gnmt"]
Objective = Literal["likelihood", "cider"]
Tracking = Literal["wandb", "none"]


@dataclass(frozen=True)
class EncoderConfig:
    """The CNN that looks."""

    name: EncoderName = "vgg16"  # network of torchvision; "mini" and "tiny" are this project's own
    weights: str = "default"  # "default" (torchvision's, downloaded once; mini's are here), "random", or a weights file
    image_size: int = 224  # photos are resized to this height and width, in pixels

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("encoder.name", self.name, EncoderName)
        _at_least("encoder.image_size", self.image_size, 32)


@dataclass(frozen=True)
class DecoderConfig:
    """The recurrent network that writes."""

    cell: CellName = "lstm"  # "rnn" has tanh units, "irnn" ReLU units whose recurrent matrix starts as the identity
    hidden_size: int = 512  # units a layer
    embedding_size: int = 512  # numbers a word is turned into
    layers: int = 1  # recurrent layers
    dropout: float = 0.5  # share of inputs and outputs of the recurrent layers that is zeroed in training
    feature_norm: FeatureNorm = "standard"  # "sqrt": square root, unit length; "standard": then unit variance a channel

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("decoder.cell", self.cell, CellName)
        _choice("decoder.feature_norm", self.feature_norm, FeatureNorm)
        for name in ("hidden_size", "embedding_size", "layers"):
            _at_least(f"decoder.{name}", getattr(self, name), 1)
        _share("decoder.dropout", self.dropout)


@dataclass(frozen=True)
class DecodingOptions:
    """How captions are searched for."""

    method: Method = "beam"  # "beam" looks for the likeliest captions, "sample" draws them at random
    beam_size: int = 3  # hypotheses kept an image; 1 is greedy search
    num_captions: int = 1  # captions an image, best first; the beam is at least this wide
    max_words: int = 20  # longer captions are cut there
    min_words: int = 1  # a caption may not end before it has this many words
    length_normalisation: Normalisation = "none"  # what log-probabilities are divided by to rank
    gnmt_alpha: float = 0.6  # strength of the "gnmt" normalisation, ((5 + length) / 6) ** alpha
    no_repeat_ngram: int = 0  # a run of this many words comes at most once in a caption; 0 allows all
    forbidden_words: tuple[str, ...] = ()  # words that a caption never has
    required_words: tuple[str, ...] = ()  # words or phrases that every caption has; "dog|dogs" asks for one of the two
    beam_groups: int = 1  # groups that the beam is split into, each urged to differ from those before it
    diversity: float = 0.5  # what a word costs, in log-probability, for each earlier group that just chose it
    temperature: float = 1.0  # sampling: below 1 keeps to likely words, above 1 strays from them
    top_k: int = 0  # sampling: only among this many likeliest words; 0 allows all
    top_p: float = 1.0  # sampling: only among the likeliest words that together have this probability
    typical_p: float = 1.0  # sampling: only among the most typical words that together have this probability
    seed: int = 0  # sampling: the same seed and photo give the same captions, in any batch
    precision: Precision = "auto"  # arithmetic; "auto" is bf16 where the device has it fast

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            CaptionerError: a setting is out of its range, or two contradict each other.
        """
        for name, least, most in (
            ("beam_size", 1, 1000),
            ("num_captions", 1, 100_000 if self.method == "sample" else 1000),
            ("max_words", 1, 500),
            ("beam_groups", 1, 1000),
            ("gnmt_alpha", 0, 10),
            ("diversity", 0, 1000),
            ("temperature", 0.001, 1000),
        ):
            if not least <= getattr(self, name) <= most:
                raise CaptionerError(f"{name} is {getattr(self, name)}; expected {least} to {most}")
        for name in ("min_words", "no_repeat_ngram", "top_k"):
            if getattr(self, name) < 0:
                raise CaptionerError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.min_words > self.max_words:
            raise CaptionerError(
                f"min_words is {self.min_words} and max_words {self.max_words}; expected min_words <= max_words"
            )
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise CaptionerError(f"{name} is {getattr(self, name)}; expected a probability above 0, and 1 at most")
        if self.width % self.beam_groups:
            raise CaptionerError(
                f"beam_groups is {self.beam_groups}, which does not divide the beam of {self.width}; "
                "expected groups of equal size"
            )
        for name, allowed in (("method", Method), ("length_normalisation", Normalisation), ("precision", Precision)):
            _choice(name, getattr(self, name), allowed)
        if not 0 <= self.seed < 2**63:
            raise CaptionerError(f"seed is {self.seed}; expected 0 to {2**63 - 1}")
        if self.required_words and (self.method == "sample" or self.beam_groups > 1):
            raise CaptionerError('required_words need method "beam" and 1 of beam_groups; leave one of them out')
        if self.beam_groups > 1 and self.method == "sample":
            raise CaptionerError('beam_groups need method "beam"; samples differ by themselves')

    @property
    def width(self) -> int:
        """Hypotheses kept an image: `beam_size`, or `num_captions` where that is more."""
        return max(self.beam_size, self.num_captions)


@dataclass(frozen=True)
class DataConfig:
    """Photos and captions."""

    data: Path  # a folder in a known layout (COCO, Karpathy split, Flickr8k), or a caption file (JSON, CSV, JSONL)
    images: Path | None = None  # folder of the photos, where the layout does not say it
    restval: Literal["train", "exclude"] = "train"  # what the "restval" photos of a Karpathy split count as
    on_problem: Literal["error", "skip"] = "error"  # missing photos, double ids and so on: stop, or leave them out
    val_share: float = 0.05  # share of photos taken for validation from a CSV or JSONL file without a "split" column
    features: Path | None = None  # folder of the feature store; by default one in ~/.cache/captioner a set and encoder

    def __post_init__(self) -> None:
        """Check the ranges."""
        _share("val_share", self.val_share)


@dataclass(frozen=True)
class OptimisationConfig:
    """How the decoder learns."""

    objective: Objective = "likelihood"  # of the human captions; or CIDEr of captions that the model draws itself
    epochs: int = 30  # passes over all captions, at most
    batch_size: int = 128  # captions a step and process
    learning_rate: float = 5e-4  # Adam's, after the warm-up
    encoder_learning_rate: float = 0.0  # the same for the CNN; 0 freezes it, and its features are computed only once
    mirror: bool = False  # show the CNN half of the photos mirrored while it learns
    warmup_steps: int = 200  # the learning rate rises over these, at most a quarter of all, then falls to 1 % of it
    gradient_clip: float = 5.0  # largest norm of the gradient
    label_smoothing: float = 0.0  # share of the target probability that is spread over all words; not of a reward
    patience: int = 5  # epochs without a better validation CIDEr (or the same, and a lower loss) before training stops

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("optimisation.objective", self.objective, Objective)
        for name in ("epochs", "batch_size", "patience"):
            _at_least(f"optimisation.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "gradient_clip"):
            _positive(f"optimisation.{name}", getattr(self, name))
        for name in ("encoder_learning_rate", "warmup_steps"):
            _at_least(f"optimisation.{name}", getattr(self, name), 0)
        _share("optimisation.label_smoothing", self.label_smoothing)
        if self.mirror and not self.encoder_learning_rate:
            raise CaptionerError(
                "optimisation.mirror needs a CNN that learns; give optimisation.encoder_learning_rate, or leave it out"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that a training run depends on."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")]
    output: Path  # folder of the run; the same command goes on with the run that it holds
    start: str | None = None  # model to begin with (as for captioning); encoder, decoder and words are then its own
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    # how validation captions are searched for: by average log-probability, since the sum favours captions that say too
    # little; without loops; and in fp32, so that scores do not depend on the machine
    decoding: DecodingOptions = field(
        default_factory=lambda: DecodingOptions(length_normalisation="average", no_repeat_ngram=3, precision="fp32")
    )
    min_count: int = 5  # words seen fewer times in the training captions become [unk]
    max_words: int = 30  # longer training captions are cut there
    precision: Precision = "auto"  # "auto" is bf16 where the processor or GPU is fast at it, else fp32
    seed: int = 0  # decides the decoder's initial weights, the order of captions and dropout
    tracking: Tracking = "wandb"  # Weights & Biases; offline by itself where there is no API key
    project: str = "captioner"  # of Weights & Biases

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("min_count", "max_words"):
            _at_least(name, getattr(self, name), 1)
        if self.optimisation.objective == "cider" and self.start is None:
            raise CaptionerError(
                'optimisation.objective "cider" needs a model that writes already; give one with --start DIR'
            )
        _seed(self.seed)
        _choice("precision", self.precision, Precision)
        _choice("tracking", self.tracking, Tracking)


@dataclass(frozen=True)
class DistillationConfig:
    """Train a CNN of this project to see what a teacher sees."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")]  # its training photos are learned from, its captions are not
    teacher: Path  # a network for photos in LiteRT's format (.tflite)
    output: Path  # folder of the run; the same command goes on with the run that it holds
    photos: tuple[Path, ...] = ()  # more photos, or folders of photos; those of the data set are passed over
    views: int = 5  # of each photo: the whole, and random parts; all views are kept on disk, 120 KB each
    view_size: int = 144  # height and width that views are kept at, in pixels
    sizes: tuple[int, ...] = (64, 96, 96, 96, 128)  # height and width that the student sees, each for as many epochs
    epochs: int = 40  # passes over all photos, one view of each
    batch_size: int = 64
    learning_rate: float = 2e-3  # AdamW's, after the warm-up
    warmup_steps: int = 300  # the learning rate rises over these, at most a quarter of all, then falls to 0
    weight_decay: float = 0.05  # of the weights of convolutions
    gradient_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # decides views, initial weights, order and augmentation

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("views", "epochs", "batch_size"):
            _at_least(name, getattr(self, name), 1)
        _at_least("view_size", self.view_size, 32)
        for name in ("warmup_steps", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "gradient_clip"):
            _positive(name, getattr(self, name))
        _seed(self.seed)
        if not self.sizes or not all(32 <= size <= self.view_size for size in self.sizes):
            raise CaptionerError(f"sizes are {self.sizes}; expected numbers from 32 to view_size, {self.view_size}")


@dataclass(frozen=True)
class Statistics:
    """How sure scores are, and how it was computed."""

    resamples: int = 1000  # of the bootstrap, and swaps of the paired test; 0: no intervals
    confidence: float = 0.95  # of the intervals
    seed: int = 0  # of both

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least("statistics.resamples", self.resamples, 0)
        if not 0 < self.confidence < 1:
            raise CaptionerError(f"statistics.confidence is {self.confidence}; expected more than 0 and less than 1")


def _choice(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise CaptionerError(f"{name} is {value!r}; expected one of {', '.join(get_args(allowed))}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise CaptionerError(f"{name} is {value}; expected {low} or more")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise CaptionerError(f"{name} is {value}; expected more than 0")


def _seed(value: int) -> None:
    if not 0 <= value < 2**32:
        raise CaptionerError(f"seed is {value}; expected 0 to {2**32 - 1}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise CaptionerError(f"{name} is {value}; expected 0 or more and less than 1")


#: The named recipes of `train.py`, each a complete configuration that any option overrides.
PRESETS: dict[str, tuple[str, TrainingConfig]] = {
    "coco": (
        "VGG16 on MSCOCO: the default recipe",
        TrainingConfig(data=DataConfig(data=Path("data/coco")), output=Path("runs/coco")),
    ),
    "flickr8k": (
        "Flickr8k: 8,000 photos, for machines without a GPU",
        TrainingConfig(
            data=DataConfig(data=Path("data/flickr8k")),
            output=Path("runs/flickr8k"),
            optimisation=OptimisationConfig(epochs=10, learning_rate=1e-3, label_smoothing=0.1),
        ),
    ),
    "mini": (
        "the decoder of the model in the box, on features of its CNN",
        TrainingConfig(
            data=DataConfig(data=Path("data/flickr8k")),
            output=Path("runs/mini"),
            encoder=EncoderConfig(name="mini", weights="runs/distil/encoder.safetensors", image_size=144),
            decoder=DecoderConfig(embedding_size=256),
            optimisation=OptimisationConfig(epochs=10, learning_rate=1e-3, label_smoothing=0.1),
        ),
    ),
    "mini-joint": (
        "then its decoder and CNN together",
        TrainingConfig(
            data=DataConfig(data=Path("data/flickr8k")),
            output=Path("runs/mini-joint"),
            start="runs/mini",
            optimisation=OptimisationConfig(
                epochs=10,
                batch_size=320,
                learning_rate=5e-4,
                encoder_learning_rate=1e-4,
                mirror=True,
                label_smoothing=0.1,
            ),
        ),
    ),
    "mini-cider": (
        "then its decoder alone, with CIDEr as the reward",
        TrainingConfig(
            data=DataConfig(data=Path("data/flickr8k")),
            output=Path("runs/mini-cider"),
            start="runs/mini-joint",
            optimisation=OptimisationConfig(
                objective="cider", epochs=4, batch_size=320, learning_rate=5e-5, warmup_steps=50
            ),
        ),
    ),
    "shapes": (
        "coloured shapes that are drawn on the spot: trains from nothing, offline, in minutes",
        TrainingConfig(
            data=DataConfig(data=Path("data/shapes")),
            output=Path("runs/shapes"),
            encoder=EncoderConfig(name="tiny", weights="random", image_size=64),
            decoder=DecoderConfig(hidden_size=256, embedding_size=128, dropout=0.0, feature_norm="none"),
            optimisation=OptimisationConfig(
                epochs=10, batch_size=80, learning_rate=3e-3, encoder_learning_rate=3e-3, warmup_steps=100
            ),
            min_count=1,
        ),
    ),
}

"""Every setting, with its default and its range, which is checked when the settings are built.

The commands take their options from these dataclasses: the comment behind a field is its help text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Method = Literal["beam", "sample"]
Normalisation = Literal["none", "average", "gnmt"]
Objective = Literal["likelihood", "cider"]
Schedule = Literal["cosine", "step", "constant"]
Averaging = Literal["none", "ema", "epochs"]
Tracking = Literal["wandb", "none"]

_Settings = TypeVar("_Settings")

_LARGEST_NUMBER = 10**30  # beyond it, a whole number of a file is a mistake, and too long to be shown
_MOST_LEARNING_RATE = 1.0  # Adam moves every weight by about the learning rate in each step


@dataclass(frozen=True)
class EncoderConfig:
    """The CNN, which turns a photo into 4096 numbers."""

    name: EncoderName = "vgg16"  # torchvision's; "efficientnet_lite2" (an extra); or our own "tiny" or "mini"
    weights: str = "default"  # "default" (torchvision's, downloaded once; the extra's), "random", or a file
    image_size: int = 224  # photos are resized to this height and width, in pixels

    def __post_init__(self) -> None:
        """Check the ranges."""
        _choice("encoder.name", self.name, EncoderName)
        _at_least("encoder.image_size", self.image_size, 32)


@dataclass(frozen=True)
class DecoderConfig:
    """The recurrent network, which writes the caption."""

    cell: CellName = "lstm"  # "rnn" has tanh units, "irnn" ReLU units whose recurrent matrix starts as the identity
    hidden_size: int = 512  # units a layer
    embedding_size: int = 512  # numbers that stand for a word
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
    length_normalisation: Normalisation = "none"  # divisor of a log-probability, by which captions are ranked
    gnmt_alpha: float = 0.6  # strength of the "gnmt" normalisation, ((5 + length) / 6) ** alpha
    no_repeat_ngram: int = 0  # a run of this many words comes at most once in a caption; 0 allows all
    unique_words: bool = False  # a word comes at most once in a caption, except "a", "the", "of" and the like
    forbidden_words: tuple[str, ...] = ()  # words that a caption never has
    required_words: tuple[str, ...] = ()  # words or phrases that every caption has; "dog|dogs": one of the two
    beam_groups: int = 1  # groups that the beam is split into, each urged to differ from those before it
    diversity: float = 0.5  # taken off the log-probability of a word for each earlier group that just chose it
    temperature: float = 1.0  # sampling: below 1 keeps to likely words, above 1 strays from them
    top_k: int = 0  # sampling: only among this many likeliest words; 0 allows all
    top_p: float = 1.0  # sampling: only among the likeliest words that together have this probability
    seed: int = 0  # sampling: the same seed and photo give the same captions, in any batch

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
        if not 0 < self.top_p <= 1:
            raise CaptionerError(f"top_p is {self.top_p}; expected a probability above 0, and 1 at most")
        if self.width % self.beam_groups:
            raise CaptionerError(
                f"beam_groups is {self.beam_groups}, which does not divide the beam of {self.width}; "
                "expected groups of equal size"
            )
        for name, allowed in (("method", Method), ("length_normalisation", Normalisation)):
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

    data: Path  # folder in a known layout (COCO, Karpathy, Flickr8k), or caption file; data/shapes is drawn if missing
    images: Path | None = None  # folder of the photos, where the layout does not say it
    restval: Literal["train", "exclude"] = "train"  # whether the "restval" photos of a Karpathy split are of training
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
    batch_size: int = 128  # captions a batch and process
    accumulate: int = 1  # batches a step
    learning_rate: float = 5e-4  # of Adam, after the warm-up
    schedule: Schedule = "cosine"  # how it falls after the warm-up: to 1 % of it, by --step-share at times, or never
    step_epochs: int = 3  # of schedule "step": epochs between two falls
    step_share: float = 0.8  # of schedule "step": the learning rate after a fall, as a share of that before
    warmup_steps: int = 200  # the learning rate rises over these, at most a quarter of all
    weight_decay: float = 0.0  # share of each weight matrix that is taken off a step, times the learning rate
    gradient_clip: float = 5.0  # largest norm of the gradient
    gradient_clip_value: float = 0.0  # largest number in the gradient; 0 bounds the norm alone
    label_smoothing: float = 0.0  # share of the target probability that is spread over all words; not of a reward
    scheduled_sampling: float = 0.0  # share of the words read that the model wrote itself, at the end; rises from 0
    average: Averaging = "none"  # mean of the weights of all steps, the latest most, or of the last half's epochs
    ema_decay: float = 0.999  # of average "ema": weight of the past in each step
    language_captions: Path | None = None  # captions without photos, of which the decoder first learns the language
    language_epochs: float = 1.0  # passes over them
    encoder_learning_rate: float = 0.0  # of the CNN; 0 freezes it, and its features are computed only once
    encoder_layer_decay: float = 1.0  # learning rate of a layer of the CNN, as a share of that of the layer behind it
    unfreeze_after: int = 0  # epochs before the CNN begins to learn
    mirror: bool = False  # show the CNN half of the photos mirrored while it learns
    crop: float = 1.0  # show it a part of each photo, at least this share of the area
    colour: float = 0.0  # change brightness, contrast and saturation of its photos by up to this share
    patience: int = 5  # epochs without a better validation CIDEr (or the same, and a lower loss) before training stops

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, allowed in (("objective", Objective), ("schedule", Schedule), ("average", Averaging)):
            _choice(f"optimisation.{name}", getattr(self, name), allowed)
        for name in ("epochs", "batch_size", "accumulate", "step_epochs", "patience"):
            _at_least(f"optimisation.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "step_share", "gradient_clip", "encoder_layer_decay", "crop", "language_epochs"):
            _positive(f"optimisation.{name}", getattr(self, name))
        for name in ("encoder_learning_rate", "warmup_steps", "weight_decay", "gradient_clip_value", "unfreeze_after"):
            _at_least(f"optimisation.{name}", getattr(self, name), 0)
        for name in ("learning_rate", "encoder_learning_rate"):
            _at_most(f"optimisation.{name}", getattr(self, name), _MOST_LEARNING_RATE)
        for name in ("step_share", "encoder_layer_decay", "crop", "scheduled_sampling"):
            _at_most(f"optimisation.{name}", getattr(self, name), 1)
        for name in ("label_smoothing", "ema_decay", "colour"):
            _share(f"optimisation.{name}", getattr(self, name))
        _at_least("optimisation.scheduled_sampling", self.scheduled_sampling, 0)
        for name in ("mirror", "crop", "colour", "encoder_layer_decay", "unfreeze_after"):
            changed = getattr(self, name) != getattr(OptimisationConfig, name)
            if changed and not self.encoder_learning_rate:
                raise CaptionerError(
                    f"optimisation.{name} needs a CNN that learns; give optimisation.encoder_learning_rate, "
                    "or leave it out"
                )


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that a training run depends on."""

    data: DataConfig
    output: Path  # folder of the run; the same command goes on with the run that it holds
    start: str | None = None  # saved model to begin with, which brings its own encoder, decoder and vocabulary
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    # how validation captions are searched for: by average log-probability, since the sum favours captions that say too
    # little, and without loops; always in fp32, so that scores do not depend on the machine
    decoding: DecodingOptions = field(
        default_factory=lambda: DecodingOptions(length_normalisation="average", no_repeat_ngram=3)
    )
    min_count: int = 5  # words seen fewer times in the training captions become [unk]
    max_words: int = 30  # longer training captions are cut there
    precision: Precision = "auto"  # of training: "auto" is bf16 where the machine is fast at it, fp16 on other GPUs
    seed: int = 0  # decides the decoder's initial weights, the order of captions and dropout
    meteor: bool = False  # METEOR of the validation captions beside the other scores (needs captioner[meteor])
    workers: int | None = None  # processes that decode photos for a CNN that learns; by default all processors but one
    checkpoint_minutes: float = 10.0  # time between two checkpoints inside an epoch, from which a stopped run goes on
    tracking: Tracking = "wandb"  # Weights & Biases, which stays offline where there is no API key
    project: str = "captioner"  # name of the project in Weights & Biases

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("min_count", "max_words"):
            _at_least(name, getattr(self, name), 1)
        if self.optimisation.objective == "cider" and self.start is None:
            raise CaptionerError(
                'optimisation.objective "cider" needs a model that writes already; give one with --start DIR'
            )
        _at_least("checkpoint_minutes", self.checkpoint_minutes, 0)
        if self.workers is not None:
            _at_least("workers", self.workers, 0)
        _seed(self.seed)
        _choice("precision", self.precision, Precision)
        _choice("tracking", self.tracking, Tracking)

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that are not the default: the value and the default of each, by dotted name."""
        return differences(self, TrainingConfig(DataConfig(self.data.data), self.output))


@dataclass(frozen=True)
class Statistics:
    """How the confidence intervals of scores, and the comparison of two models, are computed."""

    resamples: int = 1000  # samples of the bootstrap, and swaps of the paired test; 0 leaves both out
    confidence: float = 0.95  # of the intervals
    seed: int = 0  # of the bootstrap and of the paired test

    def __post_init__(self) -> None:
        """Check the ranges."""
        _at_least("statistics.resamples", self.resamples, 0)
        if not 0 < self.confidence < 1:
            raise CaptionerError(f"statistics.confidence is {self.confidence}; expected more than 0 and less than 1")


def _choice(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise CaptionerError(f"{name} is {_shown(value)}; expected one of {', '.join(get_args(allowed))}")


def _at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise CaptionerError(f"{name} is {value}; expected {low} or more")


def _at_most(name: str, value: float, high: float) -> None:
    if not value <= high:
        raise CaptionerError(f"{name} is {value}; expected {high:g} or less")


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise CaptionerError(f"{name} is {value}; expected more than 0")


def _seed(value: int) -> None:
    if not 0 <= value < 2**32:
        raise CaptionerError(f"seed is {value}; expected 0 to {2**32 - 1}")


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise CaptionerError(f"{name} is {value}; expected 0 or more and less than 1")


# To JSON -----------------------------------------------------------------------------------------------------------


def as_json(settings: Any) -> dict[str, Any]:
    """Settings in JSON's types."""
    saved: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    return saved


def flat(settings: Any) -> dict[str, Any]:
    """Settings by their dotted names, in JSON's types."""

    def inner(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= inner(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return inner(as_json(settings), "")


def differences(settings: _Settings, others: _Settings) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by their dotted names, with both values."""
    one, other = flat(settings), flat(others)
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


# From JSON ---------------------------------------------------------------------------------------------------------

#: Settings that earlier versions saved and that no longer exist; they are passed over.
RETIRED: dict[type, frozenset[str]] = {DecodingOptions: frozenset({"precision", "typical_p"})}

_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}


def from_json(kind: type[_Settings], saved: object, where: str = "") -> _Settings:
    """Build settings from the JSON that they were saved as (`dataclasses.asdict`).

    Settings that are not in the JSON, because the version that saved it did not have them, take their defaults.

    Args:
        kind: the dataclass to build.
        saved: the JSON document.
        where: dotted name of the settings in the document, for messages; empty for the whole document.

    Raises:
        CaptionerError: a setting is unknown, is missing and has no default, or is of the wrong type or out of range.
    """
    if not isinstance(saved, Mapping):
        raise CaptionerError(f"{where or 'the document'} is {_shown(saved)}; expected an object")
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind)
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = {name: value for name, value in saved.items() if name not in RETIRED.get(kind, ())}
    if unknown := [name for name in given if name not in fields]:
        raise CaptionerError(f"{prefix}{unknown[0]:.60} is no setting of this version; expected {', '.join(fields)}")
    values = {name: typed(hints[name], value, prefix + name) for name, value in given.items()}
    for name, each in fields.items():
        no_default = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            raise CaptionerError(f"{prefix}{name} is missing")
    return kind(**values)


def typed(hint: Any, value: Any, name: str) -> Any:
    """A value of JSON as a value of a type.

    Args:
        hint: the type.
        value: as `json.loads` gave it.
        name: of the value, for messages.

    Raises:
        CaptionerError: the value is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        _choice(name, value, hint)
        return value
    if origin in (Union, types.UnionType):  # of a type and None
        (inner,) = (each for each in arguments if each is not types.NoneType)
        return None if value is None else typed(inner, value, name)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise CaptionerError(f"{name} is {_shown(value)}; expected a list")
        return origin(typed(arguments[0], each, f"{name}[{index}]") for index, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise CaptionerError(f"{name} is {_shown(value)}; expected an object")
        return {key: typed(arguments[1], each, f"{name}.{key:.60}") for key, each in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, name)  # type: ignore[arg-type]
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is hint and not (hint is int and abs(value) >= _LARGEST_NUMBER):
        return value
    if hint is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    raise CaptionerError(f"{name} is {_shown(value)}; expected {_NAMES[hint]}")


def _shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

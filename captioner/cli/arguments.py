"""Arguments that several commands share, and how all of them are parsed."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar, get_type_hints

import tyro

from captioner.config import DecodingOptions, Precision

if TYPE_CHECKING:
    from captioner.model import Captioner

_A = TypeVar("_A")


@dataclass(frozen=True)
class EngineArguments:
    """Settings of the program that runs the network."""

    engine: Literal["auto", "onnx", "torch"] = "auto"  # "auto": ONNX graphs if the model has them, else torch
    device: str | None = None  # of torch, such as "cpu" or "cuda:1"; by default a GPU if there is one
    precision: Precision = "auto"  # of torch; "auto": 16 bits where the device is fast at them; fp16 needs a GPU
    # file of the CNN's weights, where the model names them and does not hold them
    encoder_weights: Annotated[str | None, tyro.conf.arg(name="encoder.weights")] = None

    def load(self, model: str) -> Captioner:
        """Load a model for this engine.

        Raises:
            CaptionerError: the model is not there or cannot be used.
        """
        from captioner.model import Captioner

        return Captioner.from_pretrained(
            model,
            engine=self.engine,
            encoder_weights=self.encoder_weights,
            device=self.device,
            precision=self.precision,
        )


def comments(kind: type) -> dict[str, str]:
    """The comment behind each field of a class."""
    return dict(re.findall(r"^    (\w+): [^#\n]*  # (.*)$", inspect.getsource(kind), re.MULTILINE))


def _optional(kind: type) -> Any:
    """The fields of a dataclass as arguments of which only those that are given appear in the result."""
    types, texts = get_type_hints(kind), comments(kind)
    valued: Any = tyro.conf.FlagConversionOff  # switches that the model has turned on may be turned off
    fields = {
        field.name: Annotated[
            valued[types[field.name]],
            tyro.conf.arg(help=texts.get(field.name), help_behavior_hint="(default: the model's own)"),
        ]
        for field in dataclasses.fields(kind)
    }
    make: Any = TypedDict
    return make(kind.__name__, fields, total=False)


if TYPE_CHECKING:
    SearchArguments = dict[str, Any]
else:
    SearchArguments = _optional(DecodingOptions)


def search_options(captioner: Captioner, given: SearchArguments) -> DecodingOptions:
    """Search options as given; those that are not given are the ones that the model was validated with.

    Raises:
        CaptionerError: they contradict each other or the model's own.
    """
    return dataclasses.replace(captioner.options, **given)


def parse(kind: type[_A], arguments: Sequence[str], prog: str) -> _A:
    """Parse what was typed; `--help` and mistakes end the process, as is usual."""
    return tyro.cli(kind, args=arguments, prog=prog, config=CONFIG)


CONFIG = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)

"""Make the model in the box, one training after the other: `python -m recipes.mini distil|mini|mini-joint|mini-cider`.

`--help` behind a name lists its options.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from captioner.config import DataConfig, TrainingConfig
from captioner.errors import CaptionerError
from recipes.mini.presets import DESCRIPTIONS, PRESETS, DistillationConfig


@dataclasses.dataclass(frozen=True)
class _Distil(DistillationConfig):
    data: Annotated[DataConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class _Train(TrainingConfig):
    data: Annotated[DataConfig, tyro.conf.arg(name="")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit status: 0 done, 2 the request is not possible."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name != "distil" and name not in PRESETS:
        lines = [f"  {each:12}{text}" for each, text in {"distil": "the CNN", **DESCRIPTIONS}.items()]
        print("usage: python -m recipes.mini NAME [options]", *lines, sep="\n")
        return 0 if name in ("-h", "--help") else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    prog = f"python -m recipes.mini {name}"
    try:
        if name == "distil":
            from recipes.mini.distillation import distil

            config = tyro.cli(_Distil, args=rest, prog=prog)
            history = distil(config)
            print(
                f"{history.epoch} epochs: {history.epochs[-1]['explained']:.4f} of the teacher's variance explained; "
                f"{history.seconds / 60:.1f} minutes; the CNN is in {config.output / 'encoder.safetensors'}"
            )
        else:
            from captioner.training.trainer import train

            preset: dict[str, Any] = {
                field.name: getattr(PRESETS[name], field.name) for field in dataclasses.fields(PRESETS[name])
            }
            train(tyro.cli(_Train, args=rest, prog=prog, default=_Train(**preset), description=DESCRIPTIONS[name]))
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

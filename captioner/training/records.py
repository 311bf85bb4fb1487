"""The records of a training run, from which `captioner report` makes its page.

All are written by the main process alone. A run that goes on from a checkpoint takes back what was written after that
checkpoint, so that no step and no epoch is there twice.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch

from captioner import files
from captioner.datasets.annotations import Example
from captioner.errors import CaptionerError
from captioner.machine import processors
from captioner.model import Caption
from captioner.report.run import CAPTIONS, ENVIRONMENT, STEPS, VALIDATION, Step, captions_file, read_steps

log = logging.getLogger(__name__)

_PACKAGES = ("captioner", "torch", "torchvision", "accelerate", "numpy", "pillow")
_MOST_PROBLEMS = 200  # that are kept by name

_P = ParamSpec("_P")


def _by_main_process(method: Callable[Concatenate[Records, _P], None]) -> Callable[Concatenate[Records, _P], None]:
    """Let only the main process write, and warn once where the disk refuses: the checkpoints matter more."""

    @functools.wraps(method)
    def write(self: Records, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        if not self.write:
            return
        try:
            method(self, *args, **kwargs)
        except (OSError, CaptionerError) as error:
            if not self.warned:
                log.warning("records cannot be written (%s); `captioner report` will lack a part of this run", error)
            self.warned = True

    return write


class Records:
    """Writes the records of a run into its folder. A record that cannot be written does not stop the run."""

    def __init__(self, output: Path, *, write: bool = True) -> None:
        """Write nothing yet.

        Args:
            output: folder of the run.
            write: whether this process writes; of several that train together, only the main one does.
        """
        self.output, self.write = output, write
        self.warned = False

    @_by_main_process
    def begin(
        self,
        *,
        step: int,
        epoch: int,
        train: Sequence[Example],
        val: Sequence[Example],
        problems: Sequence[str],
        environment: Mapping[str, Any],
    ) -> None:
        """Note where a start of the run begins and on what; take back what an earlier start wrote beyond that.

        Args:
            step: optimiser steps that are done; later records are dropped.
            epoch: epochs that are finished; captions of later ones are deleted.
            train: photos to learn from.
            val: photos that are captioned after each epoch.
            problems: faults of the data, a line each.
            environment: see `environment`.
        """
        (self.output / CAPTIONS).mkdir(exist_ok=True)
        for path in (self.output / CAPTIONS).iterdir():
            number = path.name.removesuffix(".json")
            if not number.isdecimal() or int(number) > epoch:  # of an epoch that comes again, or half written
                path.unlink()
        for path in self.output.glob(f".{STEPS}.*"):  # half written
            path.unlink()
        kept = {record.step: record for record in read_steps(self.output / STEPS) if record.step <= step}
        files.write(self.output / STEPS, "".join(map(_line, kept.values())))
        rows = [
            {"image_id": example.image_id, "path": str(example.path), "captions": example.captions} for example in val
        ]
        files.write(self.output / VALIDATION, json.dumps(rows) + "\n")
        left = len(problems) - _MOST_PROBLEMS
        known = {
            "starts": [*self._starts(), {"step": step, **environment}],
            "train_photos": len(train),
            "problems": [*problems[:_MOST_PROBLEMS], *([f"and {left:,} more"] if left > 0 else [])],
        }
        files.write(self.output / ENVIRONMENT, json.dumps(known, indent=2) + "\n")

    @_by_main_process
    def step(
        self, step: int, *, epoch: float, loss: float, gradient_norm: float, learning_rate: float, seconds: float
    ) -> None:
        """Record a step of the optimiser; see `report.run.Step`."""
        with (self.output / STEPS).open("a", encoding="utf-8") as file:
            file.write(_line(Step(step, epoch, loss, gradient_norm, learning_rate, seconds)))

    @_by_main_process
    def epoch(self, number: int, val: Sequence[Example], captions: Sequence[Caption]) -> None:
        """Record the validation captions of an epoch, in COCO's result format.

        Args:
            number: of the epoch, from 1.
            val: the photos.
            captions: one for each photo.
        """
        rows = [
            {
                "image_id": example.image_id,
                "caption": caption.text,
                "logprob": caption.logprob if math.isfinite(caption.logprob) else None,
                "finished": caption.finished,
            }
            for example, caption in zip(val, captions, strict=True)
        ]
        files.write(captions_file(self.output, number), json.dumps(rows, indent=0) + "\n")

    def _starts(self) -> list[Any]:
        """The earlier starts of this run."""
        try:
            return list(files.read_json(self.output / ENVIRONMENT, 1 << 24)["starts"])
        except (OSError, ValueError, KeyError, TypeError):  # this is the first, or the file is damaged
            return []


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """The command, the versions and the machine of this start, in JSON's types.

    Args:
        device: of the main process.
        processes: that train together.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": processes,
        "processors": processors(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # captioner itself, run from a checkout
        return "unknown"


def _line(record: Step) -> str:
    values = {name: value if math.isfinite(value) else None for name, value in record._asdict().items()}
    return json.dumps(values) + "\n"

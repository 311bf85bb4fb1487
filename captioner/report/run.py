"""The folder of a training run, read without torch: while it trains, after a kill, and when it is finished.

`training.records` writes most of these files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from captioner import checkpoint, files
from captioner.config import TrainingConfig, from_json
from captioner.datasets.formats import ImageId
from captioner.errors import CaptionerError

#: The files of a run that a report reads.
SETTINGS, STEPS, ENVIRONMENT, VALIDATION = "config.json", "steps.jsonl", "environment.json", "validation.json"
CAPTIONS = "captions"  # a folder with a file for each epoch

_HISTORY = "last/training.json"
_LARGEST = 1 << 30  # bytes of a file that are read


def captions_file(folder: Path, epoch: int) -> Path:
    """The file of an epoch's validation captions.

    Args:
        folder: of the run.
        epoch: from 1.
    """
    return folder / CAPTIONS / f"{epoch:04}.json"


class Step(NamedTuple):
    """One logged step of the optimiser; NaN stands for a number that was not finite."""

    step: int  # from 1
    epoch: float  # epochs done by then, 1.5 in the middle of the second
    loss: float
    gradient_norm: float  # before it was clipped
    learning_rate: float
    seconds: float  # since the run began, without the time in which it was stopped


class Photo(NamedTuple):
    """A validation photo."""

    path: str
    captions: tuple[str, ...]  # by people


class Written(NamedTuple):
    """A caption that the model wrote."""

    text: str
    logprob: float
    finished: bool  # ended by the model, rather than cut at the longest length


@dataclass(frozen=True)
class Run:
    """All that a run has written so far."""

    folder: Path
    settings: TrainingConfig
    steps: list[Step] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)  # losses and scores of each finished epoch
    best_epoch: int = 0  # by CIDEr; 0 before the first validation
    seconds: float = 0.0  # of training and validation
    starts: list[dict[str, Any]] = field(default_factory=list)  # time, command and machine of each start
    problems: list[str] = field(default_factory=list)  # faults of the data, a line each
    train_photos: int | None = None
    photos: dict[ImageId, Photo] = field(default_factory=dict)  # of validation

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or validation has not become better for as many as the settings allow."""
        options, done = self.settings.optimisation, len(self.epochs)
        return done >= options.epochs or done - self.best_epoch >= options.patience

    def captions(self, epoch: int) -> dict[ImageId, Written]:
        """The validation captions of an epoch; none where they were not kept.

        Raises:
            CaptionerError: the file is damaged.
        """
        path = captions_file(self.folder, epoch)
        try:
            return {
                row["image_id"]: Written(str(row["caption"]), _number(row["logprob"]), bool(row["finished"]))
                for row in _json(path, [])
            }
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None


def read(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        CaptionerError: it is not one, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise CaptionerError(f"{folder}: no such folder; give the --output of a training run")
    saved = _json(folder / SETTINGS, None)
    if saved is None:
        raise CaptionerError(f"{folder}: not a training run, it has no {SETTINGS}; give the --output of one")
    try:
        settings = from_json(TrainingConfig, saved)
    except CaptionerError as error:
        raise CaptionerError(
            f"{folder / SETTINGS}: not the settings of a training run ({error}); give the --output of one"
        ) from None
    path = folder
    try:
        path = folder / _HISTORY
        history = _history(folder)
        epochs = [{name: _number(value) for name, value in record.items()} for record in history.get("epochs", [])]
        best_epoch, seconds = int(history.get("best_epoch", 0)), _number(history.get("seconds", 0.0))
        if not 0 <= best_epoch <= len(epochs) or any(not {"val_loss", "cider"} <= record.keys() for record in epochs):
            raise ValueError("its epochs are not whole")
        path = folder / ENVIRONMENT
        environment = _json(path, {})
        starts = [dict(start) for start in environment.get("starts", [])]
        problems = [str(problem) for problem in environment.get("problems", [])]
        train_photos = environment.get("train_photos")
        path = folder / VALIDATION
        photos = {row["image_id"]: Photo(str(row["path"]), tuple(map(str, row["captions"]))) for row in _json(path, [])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    steps = read_steps(folder / STEPS)
    if steps:
        seconds = max(seconds, steps[-1].seconds)
    return Run(folder, settings, steps, epochs, best_epoch, seconds, starts, problems, train_photos, photos)


def read_steps(path: Path) -> list[Step]:
    """Read the logged steps; a line that is not whole, as a kill may leave it, is passed over.

    Raises:
        CaptionerError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CaptionerError(f"{path}: cannot be read ({error.strerror}); change its permissions") from None
    steps = []
    for line in lines:
        try:
            row = json.loads(line)
            steps.append(Step(int(row["step"]), *(_number(row[name]) for name in Step._fields[1:])))
        except (KeyError, TypeError, ValueError, RecursionError):
            continue
    return steps


def when(path: Path) -> str:
    """The time at which a file was last written, or nothing."""
    try:
        changed = datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    except OSError:
        return ""
    return f"{changed:%Y-%m-%d %H:%M} UTC"


def _history(folder: Path) -> dict[str, Any]:
    """The history that the last checkpoint holds; empty before the first."""
    for _ in range(3):  # the folder may be replaced by a newer one at this moment
        checkpoint.recover(folder / "last")
        history = _json(folder / _HISTORY, None)
        if history is not None:
            return dict(history)
    return {}


def _json(path: Path, missing: Any) -> Any:
    """A file of JSON; `missing` where it is not there.

    Raises:
        CaptionerError: it is damaged.
    """
    try:
        return files.read_json(path, _LARGEST)
    except FileNotFoundError:
        return missing
    except ValueError as error:
        raise _damaged(path, error) from None
    except OSError as error:
        raise CaptionerError(
            f"{path}: cannot be read ({error.strerror}); give the --output of a training run"
        ) from None


def _number(value: Any) -> float:
    """A number of JSON; null stands for one that is not finite."""
    return math.nan if value is None else float(value)


def _damaged(path: Path, error: Exception) -> CaptionerError:
    reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return CaptionerError(f"{path}: damaged ({reason}); delete it, or go on with the run")

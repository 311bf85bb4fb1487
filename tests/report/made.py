"""A training run that nobody trained: the files that a report reads."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers import make_photo

WORDS = "red blue green small large round old young wet dry".split()
THINGS = "dog cat man girl boat ball tree bird car horse".split()


def good_caption(photo: int, epoch: int) -> str:
    """A sentence of its own for each photo, except in the first epoch."""
    return "a dog" if epoch == 1 and photo % 4 else f"a {WORDS[photo % 10]} {THINGS[photo // 10 % 10]} runs"


def falling(step: int) -> float:
    """The loss of a run that learns."""
    return 2 + 5 * math.exp(-step / 400) + 0.1 * math.sin(step)


def make_run(
    folder: Path,
    *,
    epochs: int = 4,
    of: int = 4,
    photos: int = 40,
    caption: Callable[[int, int], str] = good_caption,
    finished: Callable[[int], bool] = lambda photo: True,
    loss: Callable[[int], float] = falling,
    norm: Callable[[int], float] = lambda step: 1 + 0.3 * math.sin(step),
    val_loss: Sequence[float] = (4.0, 3.2, 2.9, 2.8),
    cider: Sequence[float] = (0.1, 0.3, 0.5, 0.4),
    settings: dict[str, Any] | None = None,
    names: Callable[[int], str] = "photo{}.png".format,
) -> Path:
    """Write a run whose every part can be changed; as it is, all is well with it."""
    (folder / "captions").mkdir(parents=True)
    (folder / "last").mkdir()
    given: dict[str, Any] = {"data": {"data": "data/flickr8k"}, "output": str(folder)}
    given |= {"optimisation": {"epochs": of, "learning_rate": 0.001}} | (settings or {})
    (folder / "config.json").write_text(json.dumps(given))
    steps = [
        {
            "step": step,
            "epoch": step / 250,
            "loss": loss(step),
            "gradient_norm": norm(step),
            "learning_rate": 0.001 * (1 - step / 250 / 5),
            "seconds": step / 10,
        }
        for step in (1, *range(20, 250 * epochs + 1, 20))
    ]
    rows = [json.dumps(_finite(row)) for row in steps]
    (folder / "steps.jsonl").write_text("\n".join(rows) + "\n")
    records = [
        {
            "epoch": epoch + 1,
            "train_loss": 4.0 - 0.4 * epoch,
            "val_loss": val_loss[epoch],
            "cider": cider[epoch],
            "bleu_4": cider[epoch] / 3,
            "rouge_l": 0.4,
        }
        for epoch in range(epochs)
    ]
    best = max(range(epochs), key=lambda epoch: cider[epoch]) + 1 if epochs else 0
    history = {"epoch": epochs, "best_epoch": best, "seconds": 100.0 * epochs, "epochs": records}
    (folder / "last" / "training.json").write_text(json.dumps(history))
    for epoch in range(1, epochs + 1):
        written = [
            {"image_id": photo, "caption": caption(photo, epoch), "logprob": -5.0, "finished": finished(photo)}
            for photo in range(photos)
        ]
        (folder / "captions" / f"{epoch:04}.json").write_text(json.dumps(written))
    validation = []
    for photo in range(photos):
        path = folder / "photos" / names(photo)
        make_photo(path, (photo * 5 % 256, 90, 120))
        people = [f"a {WORDS[photo % 10]} {THINGS[photo // 10 % 10]} runs", f"the {THINGS[photo // 10 % 10]} is here"]
        validation.append({"image_id": photo, "path": str(path), "captions": people})
    (folder / "validation.json").write_text(json.dumps(validation))
    environment = {
        "starts": [{"step": 0, "time": "2026-01-01T00:00:00+00:00", "command": "train.py flickr8k", "torch": "2.9"}],
        "train_photos": 300,
        "problems": ["missing photos: 2 (left out), e.g. lost.jpg"],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def _finite(row: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}

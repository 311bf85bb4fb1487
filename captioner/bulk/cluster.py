"""The same work on many machines, by Ray Data: each actor holds a model, and takes chunks of photos through all stages.

The journal stays on the machine that gives the command. It says which photos are to be done, and results go into it as
they come; so a worker that is killed costs time and no photo, and a run that is stopped goes on like any other. (Ray's
own checkpoints would read all input again.) A photo that fails is a row like the others, since an exception would end
the whole job.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.bulk import pipeline
from captioner.bulk.journal import Found, Result, Todo
from captioner.bulk.pipeline import Model
from captioner.bulk.sources import Item, Remote, Slice
from captioner.errors import ImageError, missing_extra

if TYPE_CHECKING:
    from captioner.config import DecodingOptions

#: Photos that are given to the cluster at once.
_WAVE = 20_000

#: Bytes of photos in memory that are given to the cluster at once (those of Parquet files and compressed shards).
_WAVE_BYTES = 256 << 20


class Worker:
    """An actor: a model in a process of its own, that captions chunks of photos."""

    def __init__(
        self, load: Callable[[], Model], options: DecodingOptions | None, timeout: float, hashed: bool
    ) -> None:
        self._model = load()
        self._options, self._timeout, self._hashed = options, timeout, hashed

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Caption a chunk: columns of `_row` -> place and outcome, as JSON."""
        items = [_item({name: column[index] for name, column in batch.items()}) for index in range(len(batch["place"]))]
        results = pipeline.caption(
            self._model, items, self._options, workers=1, timeout=self._timeout, hashed=self._hashed
        )
        outcomes = []
        for _, result in results:
            if result.error is not None:
                outcome: dict[str, Any] = {"kind": result.error.kind, "reason": str(result.error)}
            else:
                outcome = {"captions": [[c.text, c.logprob, c.score, c.satisfied] for c in result.captions]}
            outcomes.append(json.dumps({**outcome, "sha256": result.sha256}))
        return {"place": batch["place"], "outcome": np.array(outcomes, dtype=object)}


def caption(
    load: Callable[[], Model],
    todo: Iterator[Todo],
    options: DecodingOptions | None,
    *,
    address: str,
    workers: int,
    timeout: float,
    hashed: bool,
    now: Callable[[], str],
    stopped: Callable[[], bool],
) -> Iterator[Result]:
    """Caption photos on a cluster; results come as they are ready.

    Args:
        load: loads the model; called once in each actor.
        todo: photos.
        options: how to search.
        address: of the cluster; "local" starts one on this machine.
        workers: actors; 0: as many as the cluster has processors.
        timeout: seconds after which a photo that is being decoded is set aside.
        hashed: whether to compute the SHA-256 of each photo.
        now: the time, for the journal.
        stopped: asked before each wave of photos.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise missing_extra("ray", "ray") from None
    if not ray.is_initialized():
        ray.init(None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    actors = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    while not stopped() and (wave := list(_wave(todo))):
        by_place = {each.place: each for each in wave}
        rows = ray.data.from_items([_row(each) for each in wave], override_num_blocks=_blocks(len(wave), actors))
        done = rows.map_batches(
            Worker,
            fn_constructor_args=(load, options, timeout, hashed),
            batch_size=pipeline.CHUNK,
            batch_format="numpy",
            concurrency=actors,
            num_cpus=1,
        )
        for batch in done.iter_batches(batch_size=pipeline.CHUNK, batch_format="numpy"):
            for place, outcome in zip(batch["place"], batch["outcome"], strict=True):
                # A chunk whose actor was killed after it had answered may come twice.
                if (each := by_place.pop(int(place), None)) is not None:
                    yield _result(each, json.loads(outcome), now())


def _wave(todo: Iterator[Todo]) -> Iterator[Todo]:
    left = _WAVE_BYTES
    for each in itertools.islice(todo, _WAVE):
        yield each
        left -= len(each.item.content) if isinstance(each.item.content, bytes) else 0
        if left < 0:
            return


def _blocks(photos: int, actors: int) -> int:
    return max(1, min(photos // 8, max(actors * 4, photos // pipeline.CHUNK)))


def _result(each: Todo, outcome: dict[str, Any], done: str) -> Result:
    if "kind" in outcome:
        return each, ImageError(outcome["reason"], outcome["kind"]), outcome["sha256"], done
    return each, [Found(*values) for values in outcome["captions"]], outcome["sha256"], done


def _row(each: Todo) -> dict[str, Any]:
    """A photo as columns that Arrow can hold; names may be any bytes."""
    item, content = each.item, each.item.content
    path = content.path if isinstance(content, Slice) else content.url if isinstance(content, Remote) else content
    error = item.error
    return {
        "place": each.place,
        "image": os.fsencode(item.image),
        "path": os.fsencode(path) if isinstance(path, str) else b"",
        "data": path if isinstance(path, bytes) else b"",
        "kind": type(content).__name__,
        "offset": content.offset if isinstance(content, Slice) else -1,
        "size": content.size if isinstance(content, Slice) else -1,
        "error": json.dumps([str(error), error.kind]) if error is not None else "",
    }


def _item(row: dict[str, Any]) -> Item:
    path, kind = os.fsdecode(row["path"]), row["kind"]
    content: str | bytes | Slice | Remote = path
    if kind == "Slice":
        content = Slice(path, int(row["offset"]), int(row["size"]))
    elif kind == "Remote":
        content = Remote(path)
    elif kind == "bytes":
        content = bytes(row["data"])
    error = ImageError(*json.loads(row["error"])) if row["error"] else None
    return Item("", os.fsdecode(row["image"]), content, error=error)

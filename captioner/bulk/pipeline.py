"""Many photos -> captions, in a stream.

Each worker thread takes a chunk of photos through all stages: it reads and decodes them, computes their features and
searches for their captions. Nothing is handed from thread to thread between the stages. Results come in the order of
the photos, in constant memory.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from captioner import images
from captioner.bulk.sources import Item, blocks, some
from captioner.errors import ImageError
from captioner.machine import processors

if TYPE_CHECKING:
    from captioner.config import DecodingOptions
    from captioner.model import Caption

#: Photos that a worker takes at once. More are not faster, and take more memory.
CHUNK = 64

#: Bytes of photos in memory that a worker takes at once (those of Parquet files and compressed shards; others are read
#: one at a time).
_CHUNK_BYTES = 32 << 20

#: Seconds that threads have at the end to finish the photo that they are at.
_PATIENCE = 5.0

#: Seconds between two looks at whether a photo takes too long.
_LOOK = 0.2


class Model(Protocol):
    """A model as the pipeline needs it (`captioner.model.Captioner`)."""

    @property
    def image_size(self) -> int:
        """Height and width of photos, in pixels."""

    def features(self, photos: npt.NDArray[np.uint8], /) -> npt.NDArray[np.float32]:
        """`(photos, 3, size, size)` -> `(photos, 4096)`."""

    def describe(
        self, features: npt.NDArray[np.float32], options: DecodingOptions | None = None, /
    ) -> Sequence[Sequence[Caption]]:
        """`(photos, 4096)` -> captions of each, best first."""


@dataclass(frozen=True)
class Captioned:
    """The captions of one photo, or why there are none."""

    path: Path
    captions: tuple[Caption, ...]  # best first; empty if the photo could not be decoded
    error: ImageError | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The captions of one item, or why there are none."""

    captions: Sequence[Caption]  # best first; empty if there is an error
    error: ImageError | None
    sha256: str | None = None  # of the photo, where it was asked for


@dataclass
class Seconds:
    """How long all workers together were at each stage."""

    decode: float = 0.0
    features: float = 0.0
    search: float = 0.0


def caption_photos(
    captioner: Model,
    paths: Iterable[str | Path],
    options: DecodingOptions | None = None,
    *,
    workers: int = 0,
    timeout: float = math.inf,
) -> Iterator[Captioned]:
    """Caption photos in their order, in constant memory; one that cannot be decoded does not stop the others.

    Args:
        captioner: the model.
        paths: photos.
        options: how to search; by default as the model was validated.
        workers: threads; 0: one for each processor.
        timeout: seconds after which a photo that is still being decoded is set aside.
    """
    items = (Item("", str(path), str(path)) for path in paths)
    for item, result in caption(captioner, items, options, workers=workers, timeout=timeout):
        yield Captioned(Path(item.image), tuple(result.captions), result.error)


def caption(
    model: Model,
    items: Iterable[Item],
    options: DecodingOptions | None = None,
    *,
    workers: int = 0,
    timeout: float = math.inf,
    hashed: bool = False,
    seconds: Seconds | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Item, Result]]:
    """Caption items in their order.

    Args:
        model: what captions them. One that may not be called by several threads at once (it lacks an attribute
            `concurrent` that is true) is called by one at a time, while others decode.
        items: photos; taken from the iterator by the calling thread, a few chunks ahead.
        options: how to search; by default as the model was validated.
        workers: threads; 0: one for each processor.
        timeout: seconds after which a photo that is still being decoded is set aside.
        hashed: whether to compute the SHA-256 of each photo.
        seconds: where to add how long each stage took.
        stopped: asked before each chunk is begun; once it is true, chunks in hand are finished, and no others are.
    """
    workers = workers or processors()
    stages = _Stages(model, options, hashed, seconds or Seconds())
    crew = _Crew(stages, workers, timeout)
    chunks = _chunks(items, workers)
    waiting: deque[_Chunk] = deque()
    end: Exception | None = None
    more = True
    try:
        while True:
            while more and len(waiting) < 2 * workers and not stopped():
                try:
                    waiting.append(crew.begin(next(chunks)))
                except StopIteration:
                    more = False
                except Exception as error:  # of the source; it is raised after the photos before it
                    more, end = False, error
            if not waiting and end is not None:
                raise end
            if not waiting:
                return
            results = crew.result(waiting[0], stopped)
            if results is None:
                return
            yield from zip(waiting.popleft().items, results, strict=True)
    finally:
        crew.dismiss()


def _chunks(items: Iterable[Item], workers: int) -> Iterator[list[Item]]:
    """Divide items into chunks; those that are too few for a full chunk a worker are divided equally."""
    for block in blocks(iter(items), lambda rest: some(rest, workers * CHUNK, workers * _CHUNK_BYTES)):
        size = min(CHUNK, math.ceil(len(block) / workers))
        yield from (block[start : start + size] for start in range(0, len(block), size))


@dataclass
class _Attempt:
    """A thread's work on a chunk."""

    thread: threading.Thread = field(default_factory=threading.current_thread)
    decoding: tuple[int, float] | None = None  # which photo, since when
    given_up: bool = False


@dataclass(eq=False)
class _Chunk:
    """Photos on their way."""

    items: list[Item]
    set_aside: dict[int, ImageError] = field(default_factory=dict)  # photos that took too long
    attempt: _Attempt | None = None  # none: no thread has begun it
    results: list[Result] | BaseException | None = None


@dataclass
class _Stages:
    """All that is done to a chunk, by one thread."""

    model: Model
    options: DecodingOptions | None
    hashed: bool
    seconds: Seconds

    def __post_init__(self) -> None:
        self._size = self.model.image_size
        self._turn: AbstractContextManager[object] = (
            nullcontext() if getattr(self.model, "concurrent", False) else threading.Lock()
        )

    def run(self, items: list[Item], set_aside: dict[int, ImageError], attempt: _Attempt) -> list[Result]:
        """Caption a chunk."""
        began = time.perf_counter()
        pixels = np.empty((len(items), 3, self._size, self._size), np.uint8)
        decoded: list[int] = []
        errors = dict(set_aside)
        hashes: dict[int, str] = {}
        for index, item in enumerate(items):
            if attempt.given_up:
                return []
            if index in errors:
                continue
            attempt.decoding = (index, time.monotonic())
            try:
                pixels[len(decoded)], hashes[index] = self._decode(item)
                decoded.append(index)
            except ImageError as error:
                errors[index] = error
        attempt.decoding = None
        read = time.perf_counter()
        captions: dict[int, Sequence[Caption]] = {}
        found = read
        if decoded:
            with self._turn:
                features = self.model.features(pixels[: len(decoded)])
                found = time.perf_counter()
                described = self.model.describe(features, self.options)
            captions = dict(zip(decoded, described, strict=True))
        self.seconds.decode += read - began
        self.seconds.features += found - read
        self.seconds.search += time.perf_counter() - found
        return [
            Result(captions.get(index, ()), errors.get(index), hashes.get(index) or None) for index in range(len(items))
        ]

    def _decode(self, item: Item) -> tuple[images.Pixels, str]:
        if item.error is not None:
            raise item.error
        try:
            content = item.read()
        except OSError as error:
            raise ImageError(f"{item.image}: cannot be read ({error.strerror}); see to its shard") from None
        if self.hashed and isinstance(content, str):
            content = images.read(content)
        sha256 = hashlib.sha256(content).hexdigest() if self.hashed and isinstance(content, bytes) else ""
        return images.load(content, self._size, name=item.image), sha256


class _Crew:
    """Threads that take chunks; one that hangs in a photo is given up, and another goes on without the photo."""

    def __init__(self, stages: _Stages, workers: int, timeout: float) -> None:
        self._stages, self._timeout = stages, timeout
        self._chunks: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._active: set[_Chunk] = set()
        self._threads: list[threading.Thread] = []
        for _ in range(workers):
            self._hire()

    def _hire(self) -> None:
        # Daemons: a thread that hangs, for example in a lost network drive, must not keep the process alive.
        thread = threading.Thread(target=self._work, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            with self._changed:
                attempt = chunk.attempt = _Attempt()
                self._active.add(chunk)
            results: list[Result] | BaseException
            try:
                results = self._stages.run(chunk.items, chunk.set_aside, attempt)
            except BaseException as error:  # the thread that waits for the chunk raises it
                results = error
            with self._changed:
                if attempt.given_up:
                    return
                chunk.results = results
                self._active.discard(chunk)
                self._changed.notify_all()
            del chunk, results  # while this thread waits for the next

    def begin(self, items: list[Item]) -> _Chunk:
        """Hand a chunk to the next thread that is free."""
        chunk = _Chunk(items)
        self._chunks.put(chunk)
        return chunk

    def result(self, chunk: _Chunk, stopped: Callable[[], bool]) -> list[Result] | None:
        """Wait for a chunk; nothing comes of it if it was not begun when the work was stopped."""
        while True:
            with self._changed:
                if chunk.results is None:
                    self._changed.wait(_LOOK)
                if isinstance(chunk.results, BaseException):
                    raise chunk.results
                if chunk.results is not None:
                    return chunk.results
                if stopped() and chunk.attempt is None:
                    return None
                for other in list(self._active):
                    self._look_at(other)

    def _look_at(self, chunk: _Chunk) -> None:
        """Give up a thread that hangs, and let another begin its chunk again without the photo that it hangs in."""
        decoding = chunk.attempt.decoding if chunk.attempt is not None else None
        if chunk.attempt is None or decoding is None or time.monotonic() - decoding[1] <= self._timeout:
            return
        index = decoding[0]
        said = f"{chunk.items[index].image}: took longer than {self._timeout:g} seconds; give more with --timeout"
        chunk.attempt.given_up = True
        chunk.set_aside = {**chunk.set_aside, index: ImageError(said, "timeout")}
        self._active.discard(chunk)
        self._threads = [thread for thread in self._threads if thread is not chunk.attempt.thread]
        self._chunks.put(chunk)
        self._hire()

    def dismiss(self) -> None:
        """Let the threads go, but for one that hangs: a process that ends under a thread in foreign code may abort."""
        with suppress(queue.Empty):
            while True:
                self._chunks.get_nowait()
        with self._changed:
            for chunk in self._active:
                if chunk.attempt is not None:
                    chunk.attempt.given_up = True
        for _ in self._threads:
            self._chunks.put(None)
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

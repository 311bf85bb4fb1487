"""A bulk job from start to end: caption what is not done yet, then write the output from the journal."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import files
from captioner.bulk import index, pipeline, sidecars, sources, writers
from captioner.bulk.job import SIDECARS, Job
from captioner.bulk.journal import Counts, Found, Journal, Result, Row, Todo
from captioner.bulk.pipeline import Model, Seconds
from captioner.errors import CaptionerError, ImageError
from captioner.machine import processors
from captioner.progress import Progress

if TYPE_CHECKING:
    from captioner.config import DecodingOptions

log = logging.getLogger(__name__)

#: Results are committed at least this often, in seconds, or when there are so many.
_COMMIT_SECONDS, _COMMIT_ROWS = 1.0, 256


@dataclass(frozen=True)
class Provenance:
    """The model and options that captions depend on: a journal with others is not continued."""

    name: str  # of the model, for people
    model: str  # a hash of its files
    options: DecodingOptions
    engine: str = ""  # what computes, and how precisely; see `Captioner.engine_name`

    def as_json(self) -> dict[str, Any]:
        """For the journal, and for rows with details."""
        options = dataclasses.asdict(self.options)
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"name": self.name, "model": self.model, "engine": self.engine, "options": options}


@dataclass
class Report:
    """How a run went."""

    captioned: int = 0  # photos that this run captioned
    failed: int = 0  # photos without a caption, or whose sidecar could not be written
    skipped: int = 0  # photos that had a sidecar already
    total: int = 0  # photos that have captions now
    counts: Counts = field(default_factory=Counts)
    interrupted: int = 0  # the signal that stopped it, if one did
    output: Path | None = None
    failures: Path | None = None  # list of the photos that failed
    seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)  # of the workers' time, by stage
    busy: float = 0.0  # share of the time in which the workers were at one of the stages

    @property
    def status(self) -> int:
        """Exit status: 0 all done, 1 some photos failed, 130 interrupted, 143 terminated."""
        if self.interrupted:
            return 128 + self.interrupted
        return 1 if self.failed or self.counts.failed else 0


def run(job: Job, model: Model | Callable[[], Model], provenance: Provenance) -> Report:
    """Caption the photos of a job that are not done yet, and write the output.

    Args:
        job: which photos, and where the captions go.
        model: what captions them, or a function that loads it (a cluster needs one, which is sent to its machines).
        provenance: what describes the model and the search options.

    Raises:
        CaptionerError: the job is not possible, another process is at it, or the disk is full. What was captioned is
            kept, and the same job goes on from there.
    """
    began = time.monotonic()
    report = Report(output=job.output)
    check(job)
    with (
        Journal(job.journal_path(), provenance.as_json(), overwrite=job.overwrite) as journal,
        _signals() as received,
    ):
        items = sources.find(job)
        if job.skip_existing:
            items = _without_sidecar(items, _rules(job, provenance), report)
        todo = journal.todo(items, retry_failed=job.retry_failed, by_content=job.by_content)
        seconds = Seconds()
        write_began = 0.0
        captioning = time.monotonic()
        with _progress(job) as show:
            _caption(job, model, provenance, journal, todo, seconds, show, received, report)
        in_all = (time.monotonic() - captioning) * (job.workers or processors())
        report.busy = sum(dataclasses.astuple(seconds)) / in_all
        report.counts = journal.counts
        if received:
            report.interrupted = received[0]
        else:
            journal.complete()
            write_began = time.monotonic()
            _write(job, provenance, journal, report)
        report.total = journal.count()
    now = time.monotonic()
    report.seconds = now - began
    stages = {**dataclasses.asdict(seconds), "write": now - write_began if write_began else 0.0}
    report.shares = {name: value / (sum(stages.values()) or 1) for name, value in stages.items()}
    return report


def check(job: Job) -> None:
    """Refuse a job that cannot end well, before a model is loaded.

    Raises:
        CaptionerError: it cannot end well.
    """
    format_ = job.resolved_format()
    for path in job.photos:
        sources.check(path, job)
    if not job.photos and job.list is None:
        raise CaptionerError("there is nothing to caption; give photos, folders, shards, or --list FILE")
    if format_ in SIDECARS and not all(map(sources.in_folder, job.photos)):
        raise CaptionerError("sidecars lie beside photos, and photos in a shard have no place; give --output FILE")
    shards = _shards(job)
    if format_ == "webdataset" and len(set(shards)) < len(shards):
        twice = next(name for name in shards if shards.count(name) > 1)
        raise CaptionerError(f"{twice}: is the name of two shards, and would be of both in the output; rename one")
    if job.captions_only and format_ != "webdataset":
        raise CaptionerError(f"--captions-only has no meaning for {format_}, which never holds photos; leave it out")
    journal = job.journal_path()
    if job.output is None:
        return
    if job.output.is_dir():
        raise CaptionerError(f"{job.output}: is a folder; give the name of a file")
    first = writers.nth(job.output, 0) if format_ == "webdataset" else job.output
    if first.exists() and format_ != "sqlite" and not job.overwrite and not journal.exists():
        raise CaptionerError(
            f"{first}: is there, and no journal says what is in it; give another --output, or --overwrite"
        )
    if any(_same(job.output, Path(path)) for path in job.photos):
        raise CaptionerError(f"{job.output}: is one of the photos; give another --output")


def _shards(job: Job) -> list[str]:
    """The names of a job's shards, without their endings."""
    names = [path.rsplit("/", 1)[-1] for path in job.photos if not sources.in_folder(path)]
    return [name[: ending.start()] for name in names if (ending := sources.SHARD.search(name))]


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def _rules(job: Job, provenance: Provenance) -> sidecars.Rules:
    format_ = job.resolved_format()
    assert format_ in ("txt", "xmp")
    return sidecars.Rules(format_, job.sidecar_names, job.overwrite, job.skip_existing, provenance.name)


def _without_sidecar(items: Iterator[sources.Item], rules: sidecars.Rules, report: Report) -> Iterator[sources.Item]:
    """The photos that have no sidecar yet; the others are counted."""
    for item in items:
        if item.error is None and sidecars.exists(item.image, rules):
            report.skipped += 1
        else:
            yield item


def _caption(
    job: Job,
    model: Model | Callable[[], Model],
    provenance: Provenance,
    journal: Journal,
    todo: Iterator[Todo],
    seconds: Seconds,
    show: Callable[[int, int], None],
    received: list[int],
    report: Report,
) -> None:
    """Caption what is to be done, and commit it to the journal."""
    pending: list[Result] = []
    committed = time.monotonic()
    try:
        for result in _results(job, model, provenance, todo, seconds, lambda: bool(received)):
            pending.append(result)
            report.failed += isinstance(result[1], ImageError)
            report.captioned += not isinstance(result[1], ImageError)
            if len(pending) >= _COMMIT_ROWS or time.monotonic() - committed > _COMMIT_SECONDS:
                batch, pending, committed = pending, [], time.monotonic()
                journal.record(batch)
                show(journal.counts.known + report.captioned + report.failed, report.failed)
    finally:  # the source may end in an error
        journal.record(pending)


def _results(
    job: Job,
    model: Model | Callable[[], Model],
    provenance: Provenance,
    todo: Iterator[Todo],
    seconds: Seconds,
    stopped: Callable[[], bool],
) -> Iterator[Result]:
    """Caption on a cluster, or here."""
    options, hashed = provenance.options, job.details or job.by_content
    if job.ray is not None:
        from captioner.bulk import cluster

        assert callable(model), "a cluster loads the model itself"
        yield from cluster.caption(
            model,
            todo,
            options,
            address=job.ray,
            workers=job.workers,
            timeout=job.timeout,
            hashed=hashed,
            now=_now,
            stopped=stopped,
        )
        return
    wanted, ahead = itertools.tee(todo)
    results = pipeline.caption(
        model() if callable(model) else model,
        (each.item for each in wanted),
        options,
        workers=job.workers,
        timeout=job.timeout,
        hashed=hashed,
        seconds=seconds,
        stopped=stopped,
    )
    for (_, result), each in zip(results, ahead, strict=False):
        found = [Found(c.text, c.logprob, c.score, c.satisfied) for c in result.captions]
        yield each, result.error or found, result.sha256, _now()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _write(job: Job, provenance: Provenance, journal: Journal, report: Report) -> None:
    """Write the output from the journal, and the list of failures."""
    format_ = job.resolved_format()
    if format_ in SIDECARS:
        report.failed += journal.refused(sidecars.write(_rows(job, journal), _rules(job, provenance)))
    elif format_ == "sqlite":
        index.build(journal)
    else:
        assert job.output is not None
        options = provenance.options
        style = writers.Style(job.details, options.num_captions > 1, bool(options.required_words), provenance.as_json())
        if format_ == "webdataset":
            read = None if job.captions_only else sources.reader(job)
            several = len(_shards(job)) > 1
            left_out = writers.webdataset(_rows(job, journal), job.output, style, read, several=several)
            report.failed += journal.refused(left_out)
        else:
            writers.write(format_, _rows(job, journal), job.output, style)
    journal_path = job.journal_path()
    name = (job.output or journal_path).name + ".failures.jsonl"
    report.failures = journal_path.with_name(name)
    if not writers.write_failures(journal.failures(), report.failures):
        report.failures = None


def _rows(job: Job, journal: Journal) -> Iterator[Row]:
    """The photos that have captions; a bar shows how many are written."""
    total = journal.count()
    with Progress("writing", total, "photos", shown=not job.quiet) as bar:
        for number, row in enumerate(journal.rows()):
            if number % _COMMIT_ROWS == 0:
                bar.set(number, total)
            yield row


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Note the first Ctrl-C or SIGTERM instead of ending at once; the second ends at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        log.warning("stopping: the photos in hand are finished first; once more stops at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(job: Job) -> Iterator[Callable[[int, int], None]]:
    """A bar, or lines; how many photos there are is counted meanwhile, from when the first is captioned."""
    total = 0

    def count() -> None:
        nonlocal total
        with suppress(CaptionerError):  # the run itself says it
            total = sources.count(job)

    counting = threading.Thread(target=count, daemon=True)
    with Progress("captioning", 0, "photos", shown=not job.quiet) as bar:

        def show(done: int, failed: int) -> None:
            if counting.ident is None and not job.quiet:
                counting.start()
            bar.set(done, max(total, done), f"{failed:,} failed" if failed else "")

        yield show


def summary(report: Report) -> str:
    """How a run went, in one line."""
    counts = report.counts
    said = [f"{report.captioned:,} photos captioned"]
    for number, text in (
        (counts.known, "done before"),
        (report.skipped, "with a sidecar already"),
        (counts.changed, "changed and done again"),
        (counts.renamed, "known by their content"),
        (counts.twice, "named twice"),
        (counts.removed, f"no longer there (e.g. {counts.removed_example})"),
        (report.failed, "failed"),
        (counts.failed, "failed before (try them again with --retry-failed)"),
    ):
        if number:
            said.append(f"{number:,} {text}")
    return ", ".join(said)


def advice(report: Report) -> Iterator[str]:
    """How to go on, in a line each."""
    if report.interrupted:
        written = f", and writes {report.output} when all are done" if report.output is not None else ""
        yield f"stopped; {report.total:,} photos have captions; the same command goes on{written}"
    elif report.output is not None:
        yield f"{report.output}: {report.total:,} photos"
    if report.failures is not None:
        yield f"photos without a caption, and why: {report.failures}"


def model_sha256(folder: Path) -> str:
    """SHA-256 of the files of a saved model that captions depend on."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".onnx"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + files.sha256(path).encode())
    return digest.hexdigest()

"""`captioner caption`: photos -> sentences on the screen, in a file, or beside the photos."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from captioner.bulk.job import ENDINGS, SIDECARS, Job, Options
from captioner.cli import output
from captioner.cli.arguments import EngineArguments, SearchArguments, parse, search_options
from captioner.config import FEATURE_SIZE
from captioner.errors import CaptionerError, ImageError

if TYPE_CHECKING:
    from captioner.bulk.pipeline import Result
    from captioner.bulk.sources import Item
    from captioner.config import DecodingOptions
    from captioner.model import Captioner


@dataclass(frozen=True)
class CaptionArguments:
    """Write a sentence about each photo."""

    # photos, or folders of photos (text, since `Path("")` would be the current folder)
    photos: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="[PATH ...]",
            help="photos, folders of photos, WebDataset shards (.tar, .tar.gz), or Parquet files with photos",
            help_behavior_hint="",
        ),
    ] = ()
    model: str = "mini"  # folder of a saved model or of a training run, owner/name on the Hugging Face Hub, or "mini"
    # "text": sentences; "txt" and "xmp": a file beside each photo; by default as the output's ending says, or text
    format: Literal["text", "jsonl", "csv", "parquet", "coco", "webdataset", "sqlite", "txt", "xmp"] | None = None
    # file to write when all photos are done, instead of standard output; a run that was stopped goes on
    output: Path | None = None
    explain: bool = False  # show the search: every word that was considered, as a tree
    engine: Annotated[EngineArguments, tyro.conf.arg(name="")] = field(default_factory=EngineArguments)
    many: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    search: Annotated[SearchArguments, tyro.conf.arg(name="")] = field(default_factory=dict)


def command(arguments: Sequence[str], prog: str) -> int:
    """Caption photos, and return the exit status."""
    _check_dashes(arguments, prog)
    chosen = parse(CaptionArguments, arguments, prog)
    job = Job(
        photos=chosen.photos,
        output=chosen.output,
        format=None if chosen.format == "text" else chosen.format,
        **{each.name: getattr(chosen.many, each.name) for each in fields(Options)},
    )
    if not all(chosen.photos or ("" if job.list is None else "-",)):
        raise CaptionerError(
            f"there is nothing to caption; give photos or folders of photos, before the options: {prog} photo.jpg"
        )
    if chosen.explain and (chosen.output or chosen.format not in (None, "text")):
        raise CaptionerError("--explain prints on the screen; leave out --output and --format")
    if _is_bulk(chosen):
        return _bulk(job, chosen)
    if chosen.format not in (None, "text", "jsonl"):
        raise CaptionerError(f"{chosen.format} is no format for the screen; give --output FILE")
    if chosen.output is None or chosen.explain:
        output.check_standard_output()

    from captioner.bulk import sources

    for path in chosen.photos:
        sources.check(path, job)
        if chosen.output is not None and _same(chosen.output, Path(path)):
            raise CaptionerError(f"{chosen.output}: is one of the photos; give another --output")
    captioner = chosen.engine.load(chosen.model)
    options = search_options(captioner, chosen.search)
    _check_words(captioner, options)
    if chosen.explain:
        with output.writer(None):
            return _explain(captioner, [Path(item.image) for item in sources.find(job)], options)
    return _stream(captioner, job, options, chosen)


def _is_bulk(chosen: CaptionArguments) -> bool:
    """Whether there is a journal: for files, but for plain sentences and for pipes, and for sidecars."""
    if chosen.format in SIDECARS:
        return True
    if chosen.output is None or chosen.explain or output.is_special(chosen.output):
        return False
    return chosen.format not in (None, "text") or (chosen.format is None and chosen.output.suffix.lower() in ENDINGS)


def _bulk(job: Job, chosen: CaptionArguments) -> int:
    """Caption into files that a stopped run goes on with."""
    from captioner import hub
    from captioner.bulk import run

    run.check(job)
    captioner = chosen.engine.load(chosen.model)
    options = search_options(captioner, chosen.search)
    _check_words(captioner, options)
    provenance = run.Provenance(
        name=chosen.model,
        model=run.model_sha256(hub.find(chosen.model)),
        options=options,
        engine=captioner.engine_name,
    )
    # Machines of a cluster load the model themselves: one in the package, or in a folder that all of them see.
    load = functools.partial(chosen.engine.load, chosen.model) if job.ray is not None else None
    report = run.run(job, load or captioner, provenance)
    output.say(run.summary(report))
    for line in run.advice(report):
        output.say(line)
    return report.status


def _stream(captioner: Captioner, job: Job, options: DecodingOptions, chosen: CaptionArguments) -> int:
    """Caption onto the screen, or into a file of plain sentences."""
    from captioner.bulk import pipeline, sources

    done = bad = 0
    named = len(job.photos) != 1 or job.list is not None or sources.holds_many(job.photos[0])
    with output.writer(chosen.output) as out:
        items = sources.find(job)
        for item, photo in pipeline.caption(captioner, items, options, workers=job.workers, timeout=job.timeout):
            if photo.error is not None:
                bad += 1
                output.say(f"error: {photo.error}")
                continue
            done += 1
            if not photo.captions[0].satisfied:
                output.say(f"{item.image}: found no caption with all required words; this is one without")
            if chosen.format == "jsonl":
                print(output.as_json(_row(item, photo, options)), file=out, flush=True)
                continue
            name = f"{output.one_line(item.image)}: " if named else ""
            for found in photo.captions:
                rank = f"  (score {found.score:.2f}, log-probability {found.logprob:.2f})"
                print(f"{name}{found.text}{rank if options.num_captions > 1 else ''}", file=out, flush=True)
    if bad:
        kept = f"; {chosen.output} is not written" if chosen.output is not None and not done else ""
        output.say(f"{done} of {done + bad} photos captioned, {bad} could not be read{kept}")
    return 1 if bad else 0


def _row(item: Item, photo: Result, options: DecodingOptions) -> dict[str, object]:
    """The JSON object of a photo."""
    row: dict[str, object] = {"image": item.image, "caption": photo.captions[0].text}
    if options.required_words:
        row["satisfied"] = photo.captions[0].satisfied
    if options.num_captions > 1:
        row["captions"] = [{"caption": c.text, "score": c.score, "logprob": c.logprob} for c in photo.captions]
    return row


def _explain(captioner: Captioner, paths: Sequence[Path], options: DecodingOptions) -> int:
    from rich.console import Console
    from rich.text import Text

    from captioner.decoding.explain import render

    bad = 0
    for path in paths:
        try:
            tree = render(captioner.explain(path, options), captioner.vocabulary)
        except ImageError as error:
            bad += 1
            output.say(f"error: {error}")
            continue
        tree.label = Text(output.one_line(path))
        Console(highlight=False).print(tree)
    return 1 if bad else 0


def _check_dashes(arguments: Sequence[str], prog: str) -> None:
    """Refuse a photo whose name would be taken for an option."""
    for argument in arguments[: list(arguments).index("--")] if "--" in arguments else arguments:
        if argument.startswith("-") and argument != "-" and os.path.lexists(argument):
            raise CaptionerError(
                f"{argument}: is a file whose name begins like an option; put -- before it: {prog} -- {argument}"
            )


def _check_words(captioner: Captioner, options: DecodingOptions) -> None:
    """Refuse words that the model does not know before any photo is read."""
    import numpy as np

    captioner.describe(np.empty((0, FEATURE_SIZE), np.float32), options)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False

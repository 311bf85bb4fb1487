"""`captioner caption`: photos -> sentences on the screen or in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from captioner.cli import output
from captioner.cli.arguments import EngineArguments, SearchArguments, parse, search_options
from captioner.config import FEATURE_SIZE
from captioner.errors import CaptionerError, ImageError

if TYPE_CHECKING:
    from captioner.bulk.pipeline import Captioned
    from captioner.config import DecodingOptions
    from captioner.model import Captioner


@dataclass(frozen=True)
class CaptionArguments:
    """Write a sentence about each photo."""

    # photos, or folders of photos (text, since `Path("")` would be the current folder)
    photos: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[PATH ...]", help="photos, or folders of photos", help_behavior_hint=""),
    ] = ()
    model: str = "mini"  # folder of a saved model or of a training run, owner/name on the Hugging Face Hub, or "mini"
    format: Literal["text", "jsonl"] = "text"  # "text": sentences; "jsonl": a JSON object per photo
    output: Path | None = None  # file to write to, instead of standard output; until it is complete, FILE.part
    explain: bool = False  # show the search: every word that was considered, as a tree
    engine: Annotated[EngineArguments, tyro.conf.arg(name="")] = field(default_factory=EngineArguments)
    search: Annotated[SearchArguments, tyro.conf.arg(name="")] = field(default_factory=dict)


def command(arguments: Sequence[str], prog: str) -> int:
    """Caption photos, and return the exit status."""
    _check_dashes(arguments, prog)
    chosen = parse(CaptionArguments, arguments, prog)
    if not all(chosen.photos or ("",)):
        raise CaptionerError(
            f"there is nothing to caption; give photos or folders of photos, before the options: {prog} photo.jpg"
        )
    if chosen.explain and (chosen.output or chosen.format != "text"):
        raise CaptionerError("--explain prints on the screen; leave out --output and --format")
    if chosen.output is None or chosen.explain:
        output.check_standard_output()

    from captioner import images

    paths = images.find(map(Path, chosen.photos))
    if chosen.output is not None and any(_same(chosen.output, path) for path in paths):
        raise CaptionerError(f"{chosen.output}: is one of the photos; give another --output")
    captioner = chosen.engine.load(chosen.model)
    options = search_options(captioner, chosen.search)
    _check_words(captioner, options)
    if chosen.explain:
        with output.writer(None):
            return _explain(captioner, paths, options)
    return _caption(captioner, paths, options, chosen)


def _caption(captioner: Captioner, paths: Sequence[Path], options: DecodingOptions, chosen: CaptionArguments) -> int:
    from captioner.bulk.pipeline import caption_photos

    bad = 0
    with output.writer(chosen.output) as out:
        for photo in caption_photos(captioner, paths, options):
            if photo.error is not None:
                bad += 1
                output.say(f"error: {photo.error}")
                continue
            if not photo.captions[0].satisfied:
                output.say(f"{photo.path}: found no caption with all required words; this is one without")
            if chosen.format == "jsonl":
                print(output.as_json(_row(photo, options)), file=out, flush=True)
                continue
            name = f"{output.one_line(photo.path)}: " if len(paths) > 1 else ""
            for found in photo.captions:
                rank = f"  (score {found.score:.2f}, log-probability {found.logprob:.2f})"
                print(f"{name}{found.text}{rank if options.num_captions > 1 else ''}", file=out, flush=True)
    if bad:
        kept = f"; {chosen.output} is not written" if chosen.output is not None and bad == len(paths) else ""
        output.say(f"{len(paths) - bad} of {len(paths)} photos captioned, {bad} could not be read{kept}")
    return 1 if bad else 0


def _row(photo: Captioned, options: DecodingOptions) -> dict[str, object]:
    """The JSON object of a photo."""
    row: dict[str, object] = {"image": str(photo.path), "caption": photo.captions[0].text}
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

"""The commands: they parse, call, print, and turn errors into one line and an exit status.

Exit status: 0 all done; 1 done, but some photos could not be read; 2 the request is not possible; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from captioner.cli import output
from captioner.config import (
    FEATURE_SIZE,
    PRESETS,
    DataConfig,
    DecodingOptions,
    DistillationConfig,
    Statistics,
    TrainingConfig,
)
from captioner.errors import CaptionerError, ImageError
from captioner.metrics.bridge import why_not

if TYPE_CHECKING:
    from captioner.bulk.pipeline import Captioned
    from captioner.datasets.annotations import Annotations
    from captioner.datasets.formats import ImageId
    from captioner.model import Captioner
    from captioner.scoring import Hypotheses

_A = TypeVar("_A", "CaptionArguments", "EvaluateArguments")

# As they were given: `Path("")` would be the current folder.
_Photos = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PATH ...]")]


@dataclass(frozen=True)
class CaptionArguments:
    """Write a sentence about each photo.

    Search options that are not given are those that the model was validated with, not the defaults below.
    """

    photos: _Photos  # photos, or folders of photos
    model: str = "mini"  # folder of a saved model or of a training run, owner/name on the Hugging Face Hub, or "mini"
    encoder_weights: Annotated[str | None, tyro.conf.arg(name="encoder.weights")] = None  # where the CNN's weights are
    format: Literal["text", "jsonl"] = "text"  # "text": sentences; "jsonl": a JSON object a photo
    output: Path | None = None  # file to write to, instead of standard output; until it is complete, FILE.part
    explain: bool = False  # show how the search went: every word that was considered, as a tree
    decoding: Annotated[DecodingOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=DecodingOptions)


@dataclass(frozen=True)
class EvaluateArguments:
    """Score captions: of a model on a split (--model, --data), or files of results (--references).

    Two files of results are compared with each other by a paired test.
    """

    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # one or two files in COCO's result format
    results_file: Annotated[Path | None, tyro.conf.arg(name="results")] = None  # the same, as an option
    references: Path | None = None  # human captions: any caption file or folder that --data takes; no photos needed
    model: str | None = None  # folder of a saved model or of a training run, owner/name on the Hub, or "mini"
    encoder_weights: Annotated[str | None, tyro.conf.arg(name="encoder.weights")] = None  # where the CNN's weights are
    data: Path | None = None  # photos and captions: a folder in a known layout, or a caption file
    images: Path | None = None  # folder of the photos, where the layout does not say it
    split: Literal["train", "val", "test"] | None = None  # by default "val", or all --references that are not divided
    on_problem: Literal["error", "skip"] = "error"  # missing photos, double ids and so on: stop, or leave them out
    features: Path | None = None  # folder of the feature store
    idf: Path | None = None  # document frequencies for CIDEr, to score few photos meaningfully (see --save-idf)
    save_idf: Path | None = None  # file to write the references' document frequencies to
    java: tuple[Literal["meteor", "spice"], ...] = ()  # scores that need Java and pycocoevalcap
    statistics: Statistics = dataclasses.field(default_factory=Statistics)
    output: Path | None = None  # JSON file for the scores and all that they depend on
    per_image: Path | None = None  # JSONL file for the scores of each photo
    captions: Path | None = None  # JSON file for the model's captions, in COCO's result format
    decoding: Annotated[DecodingOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=DecodingOptions)


@dataclass(frozen=True)
class CompactArguments:
    """Save a model together with its CNN, in 8 bits: a quarter of what both take otherwise.

    It computes in bf16 where that is fast, whatever the precision that it was validated with.
    """

    model: Annotated[str, tyro.conf.Positional]  # a saved model or training run, owner/name on the Hub, or "mini"
    folder: Annotated[Path, tyro.conf.Positional]  # folder to save to
    encoder_weights: Annotated[str | None, tyro.conf.arg(name="encoder.weights")] = None  # where the CNN's weights are


@dataclass(frozen=True)
class _Unchecked(DecodingOptions):
    """Options as they are given: whether they can be meant depends on the others, which the model has."""

    def __post_init__(self) -> None:
        """Refuse nothing; `_options` does."""


def train(arguments: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Train a model: `train.py PRESET [options]`."""
    return _guarded(lambda: _train(tyro.extras.overridable_config_cli(PRESETS, args=arguments, prog=prog)))


def caption(arguments: Sequence[str] | None = None, prog: str = "caption.py") -> int:
    """Caption photos: `caption.py PHOTO ... [options]`."""
    return _guarded(lambda: _caption(arguments, prog))


def evaluate(arguments: Sequence[str] | None = None, prog: str = "captioner evaluate") -> int:
    """Score a model: `captioner evaluate --model DIR --data ...`."""
    return _guarded(lambda: _evaluate(arguments, prog))


def compact(arguments: Sequence[str] | None = None, prog: str = "captioner compact") -> int:
    """Save a model in a quarter of its size: `captioner compact MODEL FOLDER`."""
    return _guarded(lambda: _compact(tyro.cli(CompactArguments, args=arguments, prog=prog)))


def distil(arguments: Sequence[str] | None = None, prog: str = "captioner distil") -> int:
    """Train a CNN of this project: `captioner distil --data ... --teacher FILE --output DIR`."""
    return _guarded(lambda: _distil(tyro.cli(DistillationConfig, args=arguments, prog=prog)))


COMMANDS: dict[str, Callable[[Sequence[str] | None, str], int]] = {
    "caption": caption,
    "train": train,
    "evaluate": evaluate,
    "distil": distil,
    "compact": compact,
}


def main() -> int:
    """`captioner COMMAND ...`: what the console script runs."""
    names = ", ".join(COMMANDS)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: captioner COMMAND [options]\n\ncommands: {names}; captioner COMMAND --help tells more")
        return 0 if len(sys.argv) > 1 else 2
    command, *arguments = sys.argv[1:]
    if command not in COMMANDS:
        print(f"captioner: {command!r} is no command; expected one of {names}", file=sys.stderr)
        return 2
    return COMMANDS[command](arguments, f"captioner {command}")


def _guarded(command: Callable[[], int]) -> int:
    """Run a command; errors that are not ours to fix become one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("captioner").setLevel(logging.INFO if _first_process() else logging.WARNING)
    try:
        return command()
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has enough
        output.drop()
        return 0


def _first_process() -> bool:
    """Whether this process speaks for all that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def _train(config: TrainingConfig) -> int:
    from captioner.datasets import shapes
    from captioner.training.trainer import train as run

    if config.data.data == PRESETS["shapes"][1].data.data:
        shapes.generate(config.data.data)
    history = run(config)
    best = history.epochs[history.best_epoch - 1]
    if _first_process():
        print(
            f"best epoch {history.best_epoch} of {history.epoch}: validation BLEU-4 {best['bleu_4']:.4f}, "
            f"CIDEr {best['cider']:.4f}; {history.seconds / 60:.1f} minutes; the model is in {config.output / 'best'}"
        )
    return 0


def _distil(config: DistillationConfig) -> int:
    from recipes.mini.distillation import distil as run

    history = run(config)
    print(
        f"{history.epoch} epochs: {history.epochs[-1]['explained']:.4f} of the teacher's variance explained; "
        f"{history.seconds / 60:.1f} minutes; the CNN is in {config.output / 'encoder.safetensors'}"
    )
    return 0


def _compact(chosen: CompactArguments) -> int:
    from captioner.model import Captioner

    captioner = Captioner.from_pretrained(chosen.model, encoder_weights=chosen.encoder_weights)
    captioner.options = dataclasses.replace(captioner.options, precision="auto")
    captioner.save_pretrained(chosen.folder, packed=True)
    size = sum(path.stat().st_size for path in chosen.folder.iterdir())
    print(f"{chosen.folder}: {size / 1e6:.1f} MB")
    return 0


def _caption(arguments: Sequence[str] | None, prog: str) -> int:
    unchecked = CaptionArguments(photos=(), decoding=_Unchecked())
    chosen = tyro.cli(CaptionArguments, args=arguments, prog=prog, default=unchecked)
    import torch

    from captioner import images
    from captioner.bulk.pipeline import caption_photos
    from captioner.model import Captioner

    if not all(chosen.photos or ("",)):
        raise CaptionerError(
            f"there is nothing to caption; give photos or folders of photos, before the options: {prog} photo.jpg"
        )
    paths = images.find(map(Path, chosen.photos))
    captioner = Captioner.from_pretrained(chosen.model, encoder_weights=chosen.encoder_weights)
    options = _options(CaptionArguments, chosen, arguments, prog, captioner)
    if chosen.explain and (chosen.output or chosen.format != "text"):
        raise CaptionerError("--explain prints on the screen; leave out --output and --format")
    if chosen.output is not None and any(_same(chosen.output, path) for path in paths):
        raise CaptionerError(f"{chosen.output}: is one of the photos; give another --output")
    captioner.describe(torch.empty(0, FEATURE_SIZE), options)  # refuses words that cannot be asked for
    if chosen.explain:
        with output.writer(None):
            return _explain(captioner, paths, options)
    bad = 0
    with output.writer(chosen.output) as out:
        for photo in caption_photos(captioner, paths, options):
            if photo.error is not None:
                bad += 1
                print(f"error: {output.one_line(photo.error)}", file=sys.stderr)
                continue
            if not photo.captions[0].satisfied:
                unmet = "found no caption with all required words; this is one without"
                print(f"{output.one_line(photo.path)}: {unmet}", file=sys.stderr)
            if chosen.format == "jsonl":
                print(output.as_json(_row(photo, options)), file=out, flush=True)
                continue
            name = f"{output.one_line(photo.path)}: " if len(paths) > 1 else ""
            for found in photo.captions:
                rank = f"  (score {found.score:.2f}, log-probability {found.logprob:.2f})"
                print(f"{name}{found.text}{rank if options.num_captions > 1 else ''}", file=out, flush=True)
    if bad:
        kept = f"; {chosen.output} is not written" if chosen.output is not None and bad == len(paths) else ""
        print(f"{len(paths) - bad} of {len(paths)} photos captioned, {bad} could not be read{kept}", file=sys.stderr)
    return 1 if bad else 0


def _row(photo: Captioned, options: DecodingOptions) -> dict[str, object]:
    """A photo's line of JSON."""
    row: dict[str, object] = {"image": str(photo.path), "caption": photo.captions[0].text}
    if options.required_words:
        row["satisfied"] = photo.captions[0].satisfied
    if options.num_captions > 1:
        row["captions"] = [{"caption": c.text, "score": c.score, "logprob": c.logprob} for c in photo.captions]
    return row


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


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
            print(f"error: {output.one_line(error)}", file=sys.stderr)
            continue
        tree.label = Text(output.one_line(path))
        Console(highlight=False).print(tree)
    return 1 if bad else 0


_ARGUMENTS = ("data", "images", "references", "on_problem", "java")  # that scores depend on


@dataclass(frozen=True)
class _Subject:
    """What `captioner evaluate` scores."""

    annotations: Annotations
    split: str
    references: Mapping[ImageId, Sequence[str]]
    candidates: Sequence[Hypotheses]
    training: Sequence[str] = ()  # captions that the model has learned from, where they are known
    unreadable: Sequence[str] = ()  # photos that were left out, and why


def _evaluate(arguments: Sequence[str] | None, prog: str) -> int:
    chosen = tyro.cli(EvaluateArguments, args=arguments, prog=prog, default=EvaluateArguments(decoding=_Unchecked()))
    from captioner import scoring
    from captioner.cli.reports import show

    results = chosen.results + ((chosen.results_file,) if chosen.results_file else ())
    _check_evaluate(chosen, results)
    idf = None if chosen.idf is None else scoring.read_idf(chosen.idf)
    subject = _model_on_split(chosen, arguments, prog) if chosen.model else _results(chosen, results)
    if chosen.captions is not None:
        output.write(chosen.captions, json.dumps(subject.candidates[0].results(), indent=0) + "\n")
    evaluations = [
        scoring.evaluate(
            subject.references,
            candidate,
            training=subject.training,
            idf=idf,
            statistics=chosen.statistics,
            java=chosen.java,
        )
        for candidate in subject.candidates
    ]
    compared = len(evaluations) == 2 and chosen.statistics.resamples > 0
    comparison = scoring.compare(evaluations, chosen.statistics) if compared else {}
    with output.writer(None):
        show(evaluations, comparison)
    if chosen.save_idf is not None:
        scoring.save_idf(subject.references, chosen.save_idf)
    if chosen.output is not None:
        result = {
            **scoring.circumstances(subject.annotations, chosen.idf, chosen.statistics),
            "arguments": {
                name: getattr(chosen, name) for name in ("data", "images", "references", "on_problem", "java")
            },
            "split": subject.split,
            "photos": len(subject.references),
            "unreadable": subject.unreadable,
            "evaluations": [evaluation.as_json() for evaluation in evaluations],
            "comparison": {name: dataclasses.asdict(value) for name, value in comparison.items()},
        }
        output.write(chosen.output, json.dumps(result, indent=2, default=str) + "\n")
    if chosen.per_image is not None:
        rows = (row for evaluation in evaluations for row in evaluation.per_image())
        output.write(chosen.per_image, "".join(json.dumps(row) + "\n" for row in rows))
    return 1 if subject.unreadable else 0


def _check_evaluate(chosen: EvaluateArguments, results: Sequence[Path]) -> None:
    """Refuse what cannot be meant or cannot end well, before anything is computed."""
    if (chosen.model is None) == (not results) or len(results) > 2:
        raise CaptionerError("what to score is not clear; give --model DIR with --data, or one or two files of results")
    needed, other = ("data", "references") if chosen.model else ("references", "data")
    if getattr(chosen, needed) is None:
        raise CaptionerError(f"the human captions are missing; give them with --{needed}")
    idle = [other] if chosen.model else [other, "images", "features", "captions", "encoder_weights"]
    given = [f"--{name.replace('_', '-')}" for name in idle if getattr(chosen, name) is not None]
    if given:
        subject = "--model" if chosen.model else "files of results"
        raise CaptionerError(f"{', '.join(given)} has no meaning with {subject}; leave it out")
    for path in (chosen.output, chosen.per_image, chosen.captions, chosen.save_idf):
        if path is not None and not path.parent.is_dir():
            raise CaptionerError(f"{path}: its folder does not exist; make it, or give another file")
    for metric in chosen.java:
        if reason := why_not(metric):
            raise CaptionerError(reason)


def _model_on_split(chosen: EvaluateArguments, arguments: Sequence[str] | None, prog: str) -> _Subject:
    """Caption a split with a model."""
    from captioner.datasets.annotations import load
    from captioner.evaluation import caption_split
    from captioner.model import Captioner
    from captioner.scoring import references_of
    from captioner.training.inputs import stored_features
    from captioner.training.run import fingerprint

    assert chosen.model is not None
    assert chosen.data is not None
    captioner = Captioner.from_pretrained(chosen.model, encoder_weights=chosen.encoder_weights)
    captioner.options = _options(EvaluateArguments, chosen, arguments, prog, captioner)
    trained = captioner.training
    captions = load(
        chosen.data,
        images=chosen.images,
        restval=trained.get("restval", "train"),
        on_problem=chosen.on_problem,
        val_share=trained.get("val_share", DataConfig.val_share),  # the same photos are kept back as in training
    )
    split = chosen.split or "val"
    examples = captions.split(split)
    store, failures = stored_features(captions, examples, captioner.encoder, chosen.features)
    readable = [example for example in examples if example.image_id not in failures]
    known = [example for example in captions.examples if example.split == "train"]
    # Copies of training captions are counted where it is known that these were the ones, and they are not scored on.
    counted = split != "train" and trained.get("train_sha256") == fingerprint(known)
    return _Subject(
        captions,
        split,
        references_of(readable),
        [caption_split(captioner, store, readable)],
        [caption for example in known for caption in example.captions] if counted else (),
        [str(error) for error in failures.values()],
    )


def _results(chosen: EvaluateArguments, paths: Sequence[Path]) -> _Subject:
    """Read files of results and their references."""
    from captioner.datasets.annotations import load
    from captioner.scoring import read_results, references_of

    assert chosen.references is not None
    # Where references are not divided into splits, none are kept back for validation, unless a split is asked for.
    share = 0 if chosen.split is None else DataConfig.val_share
    captions = load(chosen.references, on_problem=chosen.on_problem, val_share=share, check_images=False)
    undivided = chosen.split is None and len({example.split for example in captions.examples}) == 1
    split = chosen.split or "val"
    references = references_of(captions.examples if undivided else captions.split(split))
    candidates = [read_results(path, references) for path in paths]
    return _Subject(captions, "all" if undivided else split, references, candidates)


def _options(
    kind: type[_A], chosen: _A, arguments: Sequence[str] | None, prog: str, captioner: Captioner
) -> DecodingOptions:
    """Decoding options as given; those that were not are the ones that the model was validated with."""
    default = dataclasses.replace(chosen, decoding=captioner.options)
    return tyro.cli(kind, args=arguments, prog=prog, default=default).decoding

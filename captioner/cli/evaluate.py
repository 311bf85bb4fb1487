"""`captioner evaluate`: scores as a table, and in files with all that they depend on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from captioner.cli import output
from captioner.cli.arguments import EngineArguments, SearchArguments, parse, search_options
from captioner.config import DataConfig, Statistics
from captioner.errors import CaptionerError

if TYPE_CHECKING:
    from rich.text import Text

    from captioner.evaluation import Evaluation
    from captioner.metrics import Comparison

_Results = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RESULTS ...]", help_behavior_hint="")
]


@dataclass(frozen=True)
class EvaluateArguments:
    """Score captions: of a model on a split (--model, --data), or in files of results (--references).

    Two files of results are compared with each other by a paired test.
    """

    results: _Results = ()  # one or two files in COCO's result format
    references: Path | None = None  # human captions: any caption file or folder that --data takes; no photos needed
    model: str | None = None  # folder of a saved model or of a training run, owner/name on the Hub, or "mini"
    data: Path | None = None  # photos and captions: a folder in a known layout, or a caption file
    images: Path | None = None  # folder of the photos, where the layout does not say it
    split: Literal["train", "val", "test"] | None = None  # by default "val", or all --references that are not divided
    on_problem: Literal["error", "skip"] = "error"  # missing photos, double ids and so on: stop, or leave them out
    features: Path | None = None  # folder of the feature store (of the engine torch)
    idf: Path | None = None  # document frequencies for CIDEr, to score few photos meaningfully (see --save-idf)
    save_idf: Path | None = None  # file to write the references' document frequencies to
    meteor: bool = False  # METEOR 1.5 too, without Java (needs captioner[meteor])
    java: tuple[Literal["spice"], ...] = ()  # scores that need Java and pycocoevalcap
    statistics: Statistics = field(default_factory=Statistics)
    output: Path | None = None  # JSON file for the scores and all that they depend on
    per_image: Path | None = None  # JSONL file for the scores of each photo
    captions: Path | None = None  # JSON file for the model's captions, in COCO's result format
    engine: Annotated[EngineArguments, tyro.conf.arg(name="")] = field(default_factory=EngineArguments)
    search: Annotated[SearchArguments, tyro.conf.arg(name="")] = field(default_factory=dict)


def command(arguments: Sequence[str], prog: str) -> int:
    """Score captions, and return the exit status."""
    chosen = parse(EvaluateArguments, arguments, prog)
    _check(chosen)
    evaluations = _evaluations(chosen)
    first = evaluations[0]
    if chosen.captions is not None:
        output.write(chosen.captions, json.dumps(first.hypotheses.results(), indent=0) + "\n")

    from captioner import evaluation

    comparison = {}
    if len(evaluations) == 2 and chosen.statistics.resamples > 0:
        comparison = evaluation.compare(evaluations[0], evaluations[1], chosen.statistics)
    with output.writer(None):
        _show(evaluations, comparison)
    if chosen.save_idf is not None:
        evaluation.save_idf(first.references.captions, chosen.save_idf)
    if chosen.output is not None:
        names = ("data", "images", "references", "on_problem", "meteor", "java")
        result = {
            **evaluation.circumstances(first.references, chosen.idf, chosen.statistics),
            "arguments": {name: getattr(chosen, name) for name in names},
            "evaluations": [found.as_json() for found in evaluations],
            "comparison": {name: dataclasses.asdict(value) for name, value in comparison.items()},
        }
        output.write(chosen.output, json.dumps(result, indent=2, default=str) + "\n")
    if chosen.per_image is not None:
        rows = (row for found in evaluations for row in found.per_image())
        output.write(chosen.per_image, "".join(json.dumps(row) + "\n" for row in rows))
    return 1 if first.references.unreadable else 0


def _evaluations(chosen: EvaluateArguments) -> list[Evaluation]:
    """Score a model, or each file of results."""
    from captioner import evaluation

    idf = None if chosen.idf is None else evaluation.read_idf(chosen.idf)
    meteor = evaluation.load_meteor() if chosen.meteor else False
    measures = evaluation.Measures(idf, chosen.statistics, meteor, chosen.java)
    if chosen.model is None:
        assert chosen.references is not None
        references = evaluation.read_references(chosen.references, chosen.split, on_problem=chosen.on_problem)
        return [evaluation.evaluate_results(path, references, measures) for path in chosen.results]
    assert chosen.data is not None
    captioner = chosen.engine.load(chosen.model)
    captioner.options = search_options(captioner, chosen.search)
    data = DataConfig(data=chosen.data, images=chosen.images, on_problem=chosen.on_problem, features=chosen.features)
    split = chosen.split or "val"
    return [evaluation.evaluate_model(captioner, data, split, measures)]


def _check(chosen: EvaluateArguments) -> None:
    """Refuse requests that cannot be meant or cannot end well, before anything is computed."""
    if (chosen.model is None) == (not chosen.results) or len(chosen.results) > 2:
        raise CaptionerError("what to score is not clear; give --model DIR with --data, or one or two files of results")
    needed, other = ("data", "references") if chosen.model else ("references", "data")
    if getattr(chosen, needed) is None:
        raise CaptionerError(f"the human captions are missing; give them with --{needed}")
    idle = [other] if chosen.model else [other, "images", "features", "captions"]
    given = [f"--{name.replace('_', '-')}" for name in idle if getattr(chosen, name) is not None]
    if not chosen.model:
        engine = {name for name, value in vars(chosen.engine).items() if value != getattr(EngineArguments, name)}
        names = ["encoder.weights" if name == "encoder_weights" else name for name in sorted({*engine, *chosen.search})]
        given += [f"--{name.replace('_', '-')}" for name in names]
    if given:
        subject = "--model" if chosen.model else "files of results"
        raise CaptionerError(f"{', '.join(given)} has no meaning with {subject}; leave it out")
    for path in (chosen.output, chosen.per_image, chosen.captions, chosen.save_idf):
        if path is not None and not path.parent.is_dir():
            raise CaptionerError(f"{path}: its folder does not exist; make it, or give another file")
    if chosen.java:
        from captioner.metrics import why_not

        if reason := next(filter(None, map(why_not, chosen.java)), None):
            raise CaptionerError(reason)
    if chosen.output is None:
        output.check_standard_output()


def _show(evaluations: Sequence[Evaluation], comparison: Mapping[str, Comparison]) -> None:
    """Print scores with their intervals, statistics of the captions, and how two sets of them differ."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None)
    for number, found in enumerate(evaluations):
        table.add_column(_heading(found, number))
    if comparison:
        table.add_column("difference")
        table.add_column("p")
    first = evaluations[0]
    for score in (*first.scores.corpus, *first.java):
        cells = [_score(found, score) for found in evaluations]
        if score in comparison:
            by = comparison[score]
            cells += [f"{by.difference:+.4f} [{by.interval.low:+.4f}, {by.interval.high:+.4f}]", f"{by.p_value:.4f}"]
        table.add_row(score, *cells)
    table.add_section()
    for name in vars(first.diversity):
        values = [getattr(found.diversity, name) for found in evaluations]
        if values[0] is not None:
            table.add_row(name, *(f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for value in values))
    Console(width=max(100, Console().width)).print(table)


def _heading(found: Evaluation, number: int) -> Text:
    from rich.text import Text

    return Text(output.one_line(found.hypotheses.origin.get("results", "score" if number == 0 else "")))


def _score(found: Evaluation, score: str) -> str:
    if score in found.java:
        return f"{found.java[score][0]:.4f}"
    value = f"{found.scores.corpus[score]:.4f}"
    if score not in found.intervals:
        return value
    interval = found.intervals[score]
    return f"{value} [{interval.low:.4f}, {interval.high:.4f}]"

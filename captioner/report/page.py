"""The page of a run: curves, captions, alarms, settings and faults of the data."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from captioner import images
from captioner.config import flat
from captioner.datasets.formats import ImageId
from captioner.errors import ImageError, printable
from captioner.report.alarms import alarms
from captioner.report.curves import Line, chart, number
from captioner.report.run import SETTINGS, STEPS, Photo, Run, Written, when

_SIDE = 320  # the longer side of a thumbnail, in pixels
_EXTREMES = 8  # best photos, and as many of the worst
_MOST_ROWS = 8  # captions of a photo through the epochs, and the best epoch's

#: The names of scores, in the order of tables.
SCORES = {
    "cider": "CIDEr",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
}


class Chart(NamedTuple):
    """A chart with its heading."""

    title: str
    svg: str  # its texts are escaped
    legend: Sequence[Line]  # empty where there is one line
    note: str


class Card(NamedTuple):
    """A photo with captions."""

    name: str
    thumbnail: str  # a data URI; empty where the photo cannot be read
    human: Sequence[str]
    captions: Sequence[tuple[str, str]]  # a label and a caption each


@dataclass
class Thumbnails:
    """Makes small pictures of photos, and counts those that cannot be read any more."""

    failures: dict[str, str] = field(default_factory=dict)  # path -> reason

    def __call__(self, path: str) -> str:
        """A photo as a data URI; an empty text where it cannot be read."""
        try:
            picture = images.thumbnail(path, _SIDE)
        except ImageError as error:
            self.failures[path] = str(error)
            return ""
        jpeg = io.BytesIO()
        picture.save(jpeg, "JPEG", quality=78)
        return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()

    @property
    def said(self) -> str:
        """One line about the photos that are not shown."""
        if not self.failures:
            return ""
        reason = next(iter(self.failures.values()))
        return f"{len(self.failures):,} of the photos chosen cannot be read any more and are not shown, e.g. {reason}"


def report(run: Run, photos: int = 12) -> str:
    """The page of a run.

    Args:
        run: finished or not.
        photos: number of validation photos whose captions are shown through the epochs.

    Raises:
        CaptionerError: a file of the run is damaged, or jinja2 is not installed.
    """
    thumbnails = Thumbnails()
    samples = _samples(run, photos, thumbnails)
    best, worst = _extremes(run, thumbnails)
    return render(
        "report.html",
        title=run.name,
        run=run,
        status=status(run),
        figures=_figures(run),
        alarms=alarms(run),
        charts=charts([("", run)]),
        scores=scores_of(run),
        score_names=SCORES,
        samples=samples,
        best=best,
        worst=worst,
        photos_missing=thumbnails.said,
        changed=run.settings.changed(),
        settings=flat(run.settings),
        starts=run.starts,
    )


def render(template: str, **values: Any) -> str:
    """Fill a template; all values are escaped, and letters that no page can hold are spelled out.

    Raises:
        ModuleNotFoundError: jinja2 is not installed, which the commands say in one line.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if hasattr(value, "__html__") else printable(value),
    )
    environment.filters.update(number=number, setting=_setting, score="{:.4f}".format, options=_options, dotted=_dotted)
    return environment.get_template(template).render(**values)


def status(run: Run) -> str:
    """How far the run has come, in one line."""
    done, options = len(run.epochs), run.settings.optimisation
    written = when(run.folder / STEPS) or when(run.folder / SETTINGS)
    steps = f", step {run.steps[-1].step:,}" if run.steps else ""
    if run.finished:
        early = "" if done >= options.epochs else f", ended after {options.patience} epochs without a better CIDEr"
        return f"Finished: {done} of {options.epochs} epochs{early}"
    return f"In training or stopped: {done} of {options.epochs} epochs{steps}, last record {written}"


def scores_of(run: Run) -> list[str]:
    """The scores that the epochs of a run have, in the order of tables."""
    return [name for name in SCORES if any(name in record for record in run.epochs)]


def charts(runs: Sequence[tuple[str, Run]]) -> list[Chart]:
    """The curves of one run, or of several in the same charts.

    Args:
        runs: each with its name, which is left empty where there is one.
    """

    def lines(*series: tuple[str, Callable[[Run], list[tuple[float, float]]], bool]) -> list[Line]:
        found: list[Line] = []
        for label, points, dots in series:
            for number_, (name, run) in enumerate(runs, start=1):
                # One run: a colour for each series. Several: a colour for each run, the first series dashed.
                colour = len(found) + 1 if len(runs) == 1 else number_
                dashed = len(runs) > 1 and len(series) > 1 and label == series[0][0]
                text = " · ".join(filter(None, (name, label)))
                found.append(Line(text, points(run), colour, dots=dots, dashed=dashed))
        return found

    def made(title: str, drawn: Sequence[Line], note: str = "", **options: Any) -> Chart:
        shown = [line for line in drawn if line.points]
        return Chart(title, chart(shown, **options), shown if len(shown) > 1 else [], note)

    first = runs[0][1].settings.optimisation
    loss = "Loss, nats a word" if first.objective == "likelihood" else "Loss: minus CIDEr-D; nats in validation"
    note = "With label smoothing and dropout, training shows a higher loss than validation would."
    return [
        found
        for found in (
            made("CIDEr", lines(("", _by_epoch("cider"), True))),
            made(
                loss,
                lines(("training", _by_step("loss"), False), ("validation", _by_epoch("val_loss"), True)),
                note if first.label_smoothing else "",
            ),
            *(
                [made("Other scores", lines(*((SCORES[n], _by_epoch(n), True) for n in scores_of(runs[0][1])[1:])))]
                if len(runs) == 1
                else [made("BLEU-4", lines(("", _by_epoch("bleu_4"), True)))]
            ),
            made("Different captions, share of photos", lines(("", _different, True))),
            made("Learning rate", lines(("", _by_step("learning_rate"), False))),
            made(
                "Norm of the gradient",
                lines(("", _by_step("gradient_norm"), False)),
                f"Before clipping; the dotted line is the limit, {first.gradient_clip:g}.",
                log=True,
                level=first.gradient_clip,
            ),
        )
        if found.svg
    ]


def _by_epoch(name: str) -> Callable[[Run], list[tuple[float, float]]]:
    return lambda run: [(epoch, record[name]) for epoch, record in enumerate(run.epochs, start=1) if name in record]


def _by_step(name: str) -> Callable[[Run], list[tuple[float, float]]]:
    return lambda run: [(step.epoch, getattr(step, name)) for step in run.steps]


def _different(run: Run) -> list[tuple[float, float]]:
    """The share of different captions in each epoch."""
    found = []
    for epoch in range(1, len(run.epochs) + 1):
        texts = [caption.text for caption in run.captions(epoch).values()]
        if texts:
            found.append((float(epoch), len(set(texts)) / len(texts)))
    return found


def _figures(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers that tell most: a name, a value and a remark each."""
    figures = []
    if run.best_epoch:
        best = run.epochs[run.best_epoch - 1]
        figures.append(("best CIDEr", f"{best['cider']:.3f}", f"epoch {run.best_epoch}"))
        if "bleu_4" in best:
            figures.append(("BLEU-4", f"{best['bleu_4']:.3f}", f"epoch {run.best_epoch}"))
        figures.append(("validation loss", f"{best['val_loss']:.3f}", f"epoch {run.best_epoch}"))
    elif run.steps:
        figures.append(("training loss", number(run.steps[-1].loss), f"step {run.steps[-1].step:,}"))
    figures.append(("epochs", f"{len(run.epochs)}", f"of {run.settings.optimisation.epochs}"))
    figures.append(("time", _duration(run.seconds), "training and validation"))
    if rate := _captions_a_second(run):
        figures.append(("speed", f"{rate:,.0f}", "captions a second"))
    if run.photos:
        trained = "" if run.train_photos is None else f"{run.train_photos:,}"
        figures.append(("photos", trained or f"{len(run.photos):,}", f"and {len(run.photos):,} of validation"))
    return figures


def _captions_a_second(run: Run) -> float | None:
    """The usual speed between two logged steps."""
    pairs = zip(run.steps, run.steps[1:], strict=False)
    rates = [(b.step - a.step) / (b.seconds - a.seconds) for a, b in pairs if b.seconds > a.seconds]
    processes = int(run.starts[-1].get("processes", 1)) if run.starts else 1
    options = run.settings.optimisation
    return median(rates) * options.batch_size * options.accumulate * processes if rates else None


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _samples(run: Run, photos: int, thumbnails: Thumbnails) -> list[Card]:
    """A few validation photos, evenly spread, with their captions through the epochs."""
    if not run.epochs or not photos:
        return []
    ids = list(run.photos)
    chosen = ids[:: max(1, len(ids) // photos)][:photos]
    said: dict[ImageId, list[tuple[int, str]]] = {image_id: [] for image_id in chosen}
    for epoch in range(1, len(run.epochs) + 1):
        captions = run.captions(epoch)
        for image_id in chosen:
            if image_id in captions:
                said[image_id].append((epoch, captions[image_id].text))
    return [
        card(run.photos[image_id], _through_epochs(captions, run.best_epoch), thumbnails)
        for image_id, captions in said.items()
        if captions
    ]


def _through_epochs(said: Sequence[tuple[int, str]], best: int) -> list[tuple[str, str]]:
    """The captions of a photo by epoch; neighbouring epochs with the same caption are one row.

    Args:
        said: epoch and caption, in order.
        best: epoch that is marked.
    """
    rows = []
    for caption, group in groupby(said, key=lambda pair: pair[1]):
        epochs = [epoch for epoch, _ in group]
        label = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]}–{epochs[-1]}"
        rows.append((label + (" ★" if best in epochs else ""), caption))
    if len(rows) <= _MOST_ROWS:
        return rows
    spread = {round(index * (len(rows) - 1) / (_MOST_ROWS - 1)) for index in range(_MOST_ROWS)}
    return [row for index, row in enumerate(rows) if index in spread or "★" in row[0]]


def card(photo: Photo, captions: Sequence[tuple[str, str]], thumbnails: Thumbnails) -> Card:
    """A photo with captions; see `Card`."""
    return Card(photo.path.rpartition("/")[2], thumbnails(photo.path), photo.captions, captions)


def _extremes(run: Run, thumbnails: Thumbnails) -> tuple[list[Card], list[Card]]:
    """The photos of the best epoch with the highest CIDEr, and those with the lowest."""
    captions = run.captions(run.best_epoch)
    ranked = ranking(run, captions)
    most = min(_EXTREMES, len(ranked) // 2)

    def cards(chosen: Sequence[tuple[ImageId, float]]) -> list[Card]:
        return [
            card(run.photos[image_id], [(f"{cider:.2f}", captions[image_id].text)], thumbnails)
            for image_id, cider in chosen
        ]

    return cards(ranked[:most]), cards(ranked[::-1][:most])


def ranking(run: Run, captions: dict[ImageId, Written]) -> list[tuple[ImageId, float]]:
    """Photos with the CIDEr of their captions, the highest first; among equals, by ROUGE-L.

    Raises:
        CaptionerError: captions and photos are not of the same run.
    """
    from captioner import evaluation
    from captioner.config import Statistics

    if not captions or not run.photos:
        return []
    scores = evaluation.evaluate(
        evaluation.References({image_id: photo.captions for image_id, photo in run.photos.items()}),
        evaluation.Hypotheses({image_id: caption.text for image_id, caption in captions.items()}, {}),
        evaluation.Measures(statistics=Statistics(resamples=0)),
    ).scores
    values = zip(scores.per_image["cider"], scores.per_image["rouge_l"], list(run.photos), strict=True)
    ranked = sorted(values, key=lambda row: row[:2], reverse=True)
    return [(image_id, float(cider)) for cider, _, image_id in ranked]


def _options(text: str) -> str:
    """A text as HTML in which options of commands stand out, and are not broken into lines."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"--[a-z][\w.-]*\w", r"<code>\g<0></code>", str(escape(printable(text)))))


def _dotted(name: str) -> str:
    """A setting's name as HTML that may be broken into lines between its words."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def _setting(value: Any) -> str:
    """A setting as it is typed."""
    if value is None or value == []:
        return "none"
    return "yes" if value is True else "no" if value is False else str(value) or "“”"

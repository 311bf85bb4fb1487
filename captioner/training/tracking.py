"""Weights & Biases: the reports of a training run."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner import files, images
from captioner.errors import CaptionerError, ImageError

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_THUMBNAIL = 224  # height and width of photos, in pixels
_EXTREMES = 8  # best photos, and as many of the worst


class Tracker:
    """A run of Weights & Biases; without one, all reports are dropped."""

    def __init__(self, run: wandb.Run | None, reported: Path | None = None) -> None:
        """Report to a run.

        Args:
            run: None drops all reports.
            reported: file that keeps the last step reported of each group of charts. A run that goes on from an earlier
                step computes the same numbers again, which are then not reported a second time.
        """
        self._run, self._file = run, reported
        self._reported: dict[str, int] = {}
        self._alarms: set[str] = set()  # titles of those that were raised
        with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is damaged
            if reported is not None:
                self._reported = {str(group): int(step) for group, step in json.loads(reported.read_text()).items()}

    @classmethod
    def start(cls, folder: Path, project: str, config: Mapping[str, Any], run_id: str | None) -> Tracker:
        """Begin a run, or go on with one.

        Where there is no API key, or no way to the server, the run is kept in the folder instead, and a line says how
        to upload it.

        Args:
            folder: of the training run; Weights & Biases keeps its files in `wandb/` there.
            project: name of the project in Weights & Biases.
            config: all settings, in JSON's types.
            run_id: of the run to go on with; None starts a new one.
        """
        import wandb

        begin = functools.partial(
            wandb.init,
            project=project,
            config=dict(config),
            dir=folder,
            id=run_id,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        # A mode that was chosen outside (WANDB_MODE, `wandb offline`) is respected.
        mode: Any = wandb.setup().settings.mode
        try:
            if mode == "online" and not wandb.login(prompt=False):
                mode = "offline"
            run = begin(mode=mode)
        except wandb.errors.Error as error:  # the server cannot be reached, or does not know the key
            log.warning("Weights & Biases cannot be used (%s)", (str(error).splitlines() or ["no reason given"])[0])
            mode = "offline"
            try:
                run = begin(mode=mode)
            except wandb.errors.Error:
                log.warning("this run is not tracked; mend that, or use --tracking none")
                return cls(None)
        if mode == "offline":
            kept = Path(run.settings.sync_dir)
            log.info("Weights & Biases: offline; upload this run with `wandb login` and `wandb sync %s`", kept)
        elif mode == "online":
            log.info("Weights & Biases: %s", run.url)
        reported = folder / "wandb" / "reported.json"
        if run_id is None:
            reported.unlink(missing_ok=True)
        return cls(run, reported)

    @property
    def run_id(self) -> str | None:
        """Identifies the run, so that a later start can go on with it."""
        return None if self._run is None else self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report numbers.

        Args:
            step: of the optimiser, from 1.
            values: number by name; a slash groups them in charts.
        """
        group = next(iter(values), "").partition("/")[0]
        if self._run is not None and self._is_new(group, step):
            self._run.log({**values, "step": step})

    def samples(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Report photos with captions as a table.

        Args:
            step: of the optimiser.
            columns: names; the values of the one called "photo" are pixels, `(height, width, 3)`, 0 to 255.
            rows: a list of values each.
        """
        self._table("samples", step, columns, rows)

    def judge(self, step: int, folder: Path) -> None:
        """Report the alarms of a run, each once, and the best and worst photos of its last epoch.

        Args:
            step: of the optimiser.
            folder: of the run, with the records and the checkpoint of the epoch.
        """
        if self._run is None or step <= self._reported.get("best", -1):
            return
        from captioner.report.alarms import alarms
        from captioner.report.page import ranking
        from captioner.report.run import read

        try:
            run = read(folder)
            captions = run.captions(len(run.epochs))
            ranked, found = ranking(run, captions), alarms(run)
        except CaptionerError as error:
            log.warning("Weights & Biases: no alarms of this epoch (%s)", error)
            return
        for alarm in found:
            if alarm.title not in self._alarms:
                self._alarms.add(alarm.title)
                self._run.alert(alarm.title, alarm.text)
        columns = ("photo", "caption", "CIDEr", "human captions")
        for name, chosen in (("best", ranked[:_EXTREMES]), ("worst", ranked[::-1][:_EXTREMES])):
            rows = []
            for image_id, cider in chosen:
                photo = run.photos[image_id]
                with contextlib.suppress(ImageError):  # the photo has gone meanwhile: the table does without it
                    pixels = images.load(photo.path, _THUMBNAIL).transpose(1, 2, 0)
                    rows.append((pixels, captions[image_id].text, cider, "\n".join(photo.captions)))
            self._table(name, step, columns, rows)

    def _table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Report a table with photos, unless that step of it was reported before; see `samples`."""
        if self._run is None or not self._is_new(name, step):
            return
        import wandb

        photo = list(columns).index("photo")
        table = wandb.Table(columns=list(columns))
        for row in rows:
            table.add_data(*row[:photo], wandb.Image(row[photo]), *row[photo + 1 :])
        self._run.log({name: table, "step": step})

    def _is_new(self, group: str, step: int) -> bool:
        """Whether this step of a group has not been reported; from now on, it has."""
        if step <= self._reported.get(group, -1):
            return False
        self._reported[group] = step
        if self._file is not None:
            with contextlib.suppress(OSError):  # at worst, a step is reported twice
                files.write(self._file, json.dumps(self._reported), durable=False)
        return True

    def abandon(self) -> None:
        """End the run as one that failed; a later start can go on with it."""
        if self._run is not None:
            self._run.finish(exit_code=1)

    def finish(self, summary: Mapping[str, float]) -> None:
        """End the run.

        Args:
            summary: the numbers that lists of runs show.
        """
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._run.finish()

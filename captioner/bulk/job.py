"""Which photos are captioned, and where the captions go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from captioner.errors import CaptionerError

Format = Literal["jsonl", "csv", "parquet", "coco", "webdataset", "sqlite", "txt", "xmp"]

#: What an output's ending says about its format.
ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".json": "coco",
    ".tar": "webdataset",
    ".db": "sqlite",
    ".sqlite": "sqlite",
    ".sqlite3": "sqlite",
}

#: Formats that are written beside each photo instead of to one file.
SIDECARS = ("txt", "xmp")


@dataclass(frozen=True)
class Options:
    """Settings for many photos."""

    list: str | None = None  # file that lists photos, one a line or separated by NUL; "-" is standard input
    not_recursive: bool = False  # leave folders within folders out
    hidden: bool = False  # files and folders whose names begin with a dot too
    include: tuple[str, ...] = ()  # of folders, only photos whose name or path in the folder matches one of these globs
    exclude: tuple[str, ...] = ()  # of folders, no photos whose name or path in the folder matches one of these globs
    journal: Path | None = None  # notes what was done; by default OUTPUT.journal, or .captioner.journal in the folder
    details: bool = False  # write log-probabilities, model, options, and size, hash and time of each photo too
    captions_only: bool = False  # leave the photos themselves out of a WebDataset that is written
    by_content: bool = False  # tell changed photos by their content rather than by size and time; finds renamed ones
    overwrite: bool = False  # begin anew, and replace captions that are there
    skip_existing: bool = False  # leave photos alone that have a sidecar already
    retry_failed: bool = False  # try photos again that failed before
    timeout: float = 120.0  # seconds after which a photo that is being decoded is set aside
    sidecar_names: Literal["photo.jpg.xmp", "photo.xmp"] = "photo.jpg.xmp"  # how XMP sidecars are named
    workers: int = 0  # threads; 0: one for each processor
    ray: str | None = None  # address of a Ray cluster whose machines do the work; "local" starts one here
    quiet: bool = False  # show no progress

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant.

        Raises:
            CaptionerError: a setting is out of its range, or two contradict each other.
        """
        if not self.timeout > 0:
            raise CaptionerError(f"timeout is {self.timeout:g}; expected seconds, more than 0")
        if self.workers < 0:
            raise CaptionerError(f"workers is {self.workers}; expected 0 or more")
        if self.overwrite and self.skip_existing:
            raise CaptionerError("--overwrite and --skip-existing contradict each other; leave one of them out")


@dataclass(frozen=True)
class Job(Options):
    """Photos that are captioned in bulk, and where the captions go."""

    photos: tuple[str, ...] = ()  # photos, folders of photos, WebDataset shards and Parquet files with photos
    output: Path | None = None  # file that is written when all photos are done; for sidecars, none
    format: Format | None = None  # of the output; by default as its ending says

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant; see `Options`."""
        super().__post_init__()
        if self.format is not None and self.format not in get_args(Format):
            raise CaptionerError(f"format is {self.format!r}; expected one of {', '.join(get_args(Format))}")
        if self.format in SIDECARS and self.output is not None:
            raise CaptionerError(f"{self.format} sidecars lie beside the photos; leave out --output")
        if self.skip_existing and self.output is not None:
            raise CaptionerError(
                "--skip-existing is for sidecars; a run with --output goes on where it stopped anyway; leave it out"
            )

    def resolved_format(self) -> Format:
        """The format that was asked for, or that the output's ending says.

        Raises:
            CaptionerError: neither says one, or there is no output.
        """
        if self.format in SIDECARS:
            return self.format
        if self.output is None:
            raise CaptionerError(
                "there is nowhere to write to; give --output FILE, or --format txt or xmp for sidecars"
            )
        format_ = self.format or ENDINGS.get(self.output.suffix.lower())
        if not self.output.name:
            raise CaptionerError(f"{self.output}: is a folder; give the name of a file")
        if format_ is None:
            raise CaptionerError(
                f"{self.output}: its ending says no format; expected {' '.join(ENDINGS)}, or give --format"
            )
        return format_

    def journal_path(self) -> Path:
        """The journal's file.

        Raises:
            CaptionerError: sidecars are asked for, and it cannot be told where the journal of them should lie.
        """
        if self.journal is not None:
            return self.journal
        if self.output is not None:
            is_library = self.resolved_format() == "sqlite"
            return self.output if is_library else self.output.with_name(self.output.name + ".journal")
        folders = [path for path in self.photos if os.path.isdir(path)]  # noqa: PTH112 (a name may be too long)
        if not folders:
            raise CaptionerError("the journal has no place; give --journal FILE, or a folder of photos")
        return Path(folders[0]) / ".captioner.journal"

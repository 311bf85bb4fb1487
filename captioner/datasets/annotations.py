"""Caption files -> examples: each photo with its path, its human captions and its split.

`load` recognises every format by its content and checks it before training begins: it finds photos that are missing,
ids that are given twice, captions that are empty or of no photo, and photos that training and evaluation share.
`load_dataset` does the same for settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from captioner.config import DataConfig
from captioner.datasets import shapes
from captioner.datasets.formats import (
    Found,
    ImageId,
    Photo,
    Problems,
    Split,
    locate_files,
    named,
    read,
)
from captioner.errors import AnnotationError, printable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One photo with its captions."""

    image_id: ImageId  # as the caption file gives it (COCO: a number; CSV, JSONL and Flickr8k: the photo's name)
    path: Path
    captions: tuple[str, ...]  # as written, without white space around them; at least one
    split: Split


@dataclass(frozen=True)
class Annotations:
    """The checked contents of one data set's caption files."""

    name: str  # "coco2017", "flickr8k", or the file's or folder's own; short and fit for a folder name
    source: tuple[Path, ...]  # the caption files that were read
    examples: tuple[Example, ...]  # in the order of the files
    problems: Problems

    def split(self, split: Split) -> tuple[Example, ...]:
        """Return the examples of a split.

        Raises:
            AnnotationError: There are none; the message lists the splits that there are.
        """
        chosen = tuple(example for example in self.examples if example.split == split)
        if not chosen:
            there = {name: sum(example.split == name for example in self.examples) for name in get_args(Split)}
            listed = ", ".join(f"{name} ({count:,})" for name, count in there.items() if count)
            raise AnnotationError(
                f"{named(self.source)}: holds no {split!r} photos; the splits there are: {listed}; "
                f"choose one of these, or give data with {split!r}"
            )
        return chosen


def load_dataset(config: DataConfig) -> Annotations:
    """Load the data set that settings name, and log its problems. The generated one is drawn where it is missing.

    Raises:
        AnnotationError: see `load`.
    """
    if config.data == shapes.FOLDER:
        shapes.generate(config.data)
    captions = load(
        config.data,
        images=config.images,
        restval=config.restval,
        on_problem=config.on_problem,
        val_share=config.val_share,
    )
    log.info("%s: %s", printable(captions.name), captions.problems.report())
    return captions


def load(
    data: Path | str,
    *,
    images: Path | None = None,
    restval: Literal["train", "exclude"] = "train",
    on_problem: Literal["error", "skip"] = "error",
    val_share: float = 0.05,
    check_images: bool = True,
) -> Annotations:
    """Read and check the captions of a data set.

    Args:
        data: A caption file, or a folder in a layout that data/README.md shows: COCO captions (2014, 2017), a Karpathy
            split (`dataset_*.json`), Flickr8k, or CSV or JSON lines with `image` and `caption`.
        images: The folder of the photos; where not given, the usual places beside the caption file are searched.
        restval: Whether the photos that a Karpathy split marks "restval" are of training, as is usual, or left out.
        on_problem: Whether a problem is an error, or the photos and captions concerned are left out (see
            `Problems.report`).
        val_share: The share of photos that goes to validation where the files name no splits, 0 to 1; at least one.
            A photo's name alone chooses it, so that adding photos moves none of the others.
        check_images: Whether to look for each photo's file (which is not opened); else no folder of photos is read.

    Raises:
        AnnotationError: A file cannot be read, is of no known kind, or has problems; one line that counts them all.
    """
    if not 0 <= val_share < 1:
        raise AnnotationError(f"val_share is {val_share}; expected a share from 0 to less than 1, such as 0.05")
    data = Path(data).expanduser().absolute()
    images = None if images is None else Path(images).expanduser().absolute()
    if images is not None and check_images and not images.is_dir():
        raise AnnotationError(f"{images}: is not a folder; give the folder that holds the photos")
    found = Found()
    names, photos = [], []
    source = locate_files(data, images)
    for path in source:
        name, photos_read = read(path, images, restval, found, alone=len(source) == 1)
        names.append(name)
        photos += photos_read
    _share_out(photos, val_share)
    missing = _locate(photos, found) if check_images else _suppose(photos)
    kept = [p for p in _without_repeats(photos, found) if id(p) not in missing]
    examples = []
    for photo in kept:
        if photo.captions:
            split = cast(Split, photo.split)
            examples.append(Example(photo.image_id, photo.path, tuple(photo.captions), split))
        else:
            found.add("photos without a caption", photo.file)
        for _ in range(len(photo.captions) - len(set(photo.captions))):
            found.add("captions given twice for one photo", photo.file)
    problems = found.problems()
    serious = [problem for problem in problems.found if problem.serious]
    if serious and (on_problem == "error" or not examples):
        wrong = "; ".join(f"{p.kind}: {p.count:,} (e.g. {p.samples[0]}{p.detail})" for p in serious)
        remedy = "correct the files"
        if examples:
            share = f"{len(examples):,} of {len(photos):,} photos"
            remedy += f", or leave these out with --on-problem skip, which keeps {share}"
        if problems.count("missing photos"):
            remedy = f"give the folder of the photos with --images DIR, {remedy}"
        raise AnnotationError(f"{named(source)}: {wrong}; {remedy}")
    if not examples:
        raise AnnotationError(
            f"{named(source)}: holds no photo with a caption ({problems.summary()}); give a file that has some"
        )
    return Annotations(_folder_name(names[0]), source, tuple(examples), problems)


def captions_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 of the photos' ids, captions and splits; a training run goes on only with those that it began with."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.image_id, example.split, *example.captions]).encode())
    return digest.hexdigest()


# Checking ----------------------------------------------------------------------------------------------------------


def _share_out(photos: list[Photo], val_share: float) -> None:
    """Choose the split of the photos whose files do not say it."""

    def rank(photo: Photo) -> float:
        digest = hashlib.blake2b(photo.file.encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    ranked = sorted((photo for photo in photos if photo.split is None), key=rank)
    for index, photo in enumerate(ranked):
        # At least one for each, where there are two.
        val = val_share > 0 and len(ranked) > 1 and (index == 0 or rank(photo) < val_share) and index < len(ranked) - 1
        photo.split = "val" if val else "train"


def _suppose(photos: list[Photo]) -> set[int]:
    """Set the path of every photo to the likeliest one, without a look at the disk; none counts as missing."""
    for photo in photos:
        photo.path = Path(photo.folders[0], photo.file)
    return set()


def _locate(photos: list[Photo], found: Found) -> set[int]:
    """Set the path of every photo, and return the `id()` of those that are in none of their folders."""
    # Each folder is listed once, since asking for every photo by itself takes minutes on a network disk.
    listings: dict[tuple[str, str], set[str]] = {}

    def listing(folder: str, below: str) -> set[str]:
        if (folder, below) not in listings:
            listings[folder, below] = set()
            with contextlib.suppress(OSError, ValueError), os.scandir(Path(folder, below)) as entries:
                listings[folder, below] = {entry.name for entry in entries if _is_file(entry)}
        return listings[folder, below]

    missing: set[int] = set()
    looked: dict[tuple[str, str], None] = {}  # folders that were searched for missing photos, each once, in order
    for photo in photos:
        below, _, name = photo.file.rpartition("/")
        folder = next((folder for folder in photo.folders if name in listing(folder, below)), None)
        photo.path = Path(folder or photo.folders[0], photo.file)
        if folder is None:
            missing.add(id(photo))
            found.add("missing photos", photo.file)
            looked.update(dict.fromkeys((folder, below) for folder in photo.folders))
    if missing:
        # Where some photos were found, folders that do not exist would only distract in the message.
        tried = [path for path in (Path(*each) for each in looked) if len(missing) == len(photos) or _is_folder(path)]
        found.detail["missing photos"] = f"; looked in {named(tried[:8])}"
    return missing


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _without_repeats(photos: list[Photo], found: Found) -> list[Photo]:
    """Drop photos that are listed twice, and from training (or validation) those that also serve to evaluate."""
    order = get_args(Split)  # a photo belongs to the last of these that claims it
    last: dict[int | str | Path, int] = {}
    for photo in photos:
        for key in (photo.image_id, photo.path):
            last[key] = max(last.get(key, 0), order.index(photo.split))
    kept = []
    seen: set[int | str | Path] = set()
    for photo in photos:
        keys: set[int | str | Path] = {photo.image_id, photo.path}
        if any(last[key] > order.index(photo.split) for key in keys):
            found.add("photos in two splits", photo.file)
        elif keys & seen:
            found.add("photos listed twice", photo.file)
        else:
            seen |= keys
            kept.append(photo)
    return kept


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:60] or "captions"

"""Caption files -> photos with captions, as the files have them, and a count of the problems in them.

Every format is recognised by its content: official COCO captions, Karpathy splits, `Flickr8k.token.txt`, CSV and JSON
lines. `annotations` checks the photos and captions that are read here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from captioner.errors import AnnotationError, printable

Split = Literal["train", "val", "test"]

# Kind of problem -> how it is dealt with under on_problem="skip".
PROBLEMS = {
    "missing photos": "left out",
    "photos in two splits": "left out of training, kept for evaluation",
    "photos listed twice": "the first is kept",
    "caption ids given twice": "the first is kept",
    "captions for an unknown image": "left out",
    "empty captions": "left out",
    "captions with half a character": "left out",  # a lone surrogate, as where a JSON text was cut inside an emoji
}
# Kinds that are reported but stop nothing: both Flickr8k and COCO, as published, have some of these.
_NOTES = {
    "photos without a caption": "left out",
    "photos in no split list": "left out",
    "captions given twice for one photo": "kept",
}
_SAMPLES = 3  # names kept of each kind of problem
_LONGEST = 200  # characters of such a name

#: How a caption file names a photo.
ImageId = int | str

_WORDS: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
_WORDS |= {"valid": "val", "validation": "val", "dev": "val"}
_COCO_NAME = re.compile(r"captions_(train|val|test)(\d*)\.json")
_TOKEN_LINE = re.compile(r"([^\t#]+)#\d+\t(.*)")  # of Flickr8k.token.txt: "name.jpg#0<tab>caption"
_LINE_END = re.compile(r"\r\n?|\n")  # not str.splitlines: U+2028 may stand inside a JSON string
_CAPTION_FOLDERS = ("annotations", "Flickr8k_text")  # inside a data set's own folder, beside those of its photos
_FLICKR_FOLDERS = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Flicker8k_photos", "flickr30k-images", "flickr30k_images")


@dataclass(frozen=True)
class Problem:
    """One kind of thing that is wrong in caption files, and how often."""

    kind: str
    count: int
    samples: tuple[str, ...]  # the first few, by name
    detail: str = ""  # of photos that are missing: the folders that were searched

    @property
    def serious(self) -> bool:
        """Whether loading stops for it unless told to skip."""
        return self.kind in PROBLEMS


@dataclass(frozen=True)
class Problems:
    """All problems of a data set's caption files, by kind."""

    found: tuple[Problem, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.found)

    def count(self, kind: str) -> int:
        """How often a kind of problem was found: 0 where it was not."""
        return sum(problem.count for problem in self.found if problem.kind == kind)

    def summary(self) -> str:
        """One line: every kind with its count."""
        return "; ".join(f"{problem.kind}: {problem.count:,}" for problem in self.found) or "no problems"

    def report(self) -> str:
        """One line for each kind: the count, some names, and how it was dealt with."""
        lines = []
        for problem in self.found:
            done = {**PROBLEMS, **_NOTES}[problem.kind]
            lines.append(
                f"{problem.kind}: {problem.count:,} ({done}), e.g. {', '.join(problem.samples)}{problem.detail}"
            )
        return "\n".join(lines) or "no problems"


@dataclass
class Photo:
    """One photo as a caption file has it, before any check."""

    image_id: int | str
    file: str  # its path below one of the folders
    captions: list[str]
    split: Split | None  # None: the files do not say
    folders: tuple[str, ...]  # where to look for it
    path: Path = Path()


@dataclass
class Found:
    """Counts problems, and keeps the first few names of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[str]] = field(default_factory=dict)
    detail: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, sample: object) -> None:
        """Count a problem of a kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= _SAMPLES:
            self.samples.setdefault(kind, []).append(printable(sample)[:_LONGEST])

    def caption(self, text: str | None, whose: object, into: list[str]) -> None:
        """Add a caption to a photo's list, unless it is empty or no text that could be saved."""
        stripped = (text or "").strip()
        if not stripped:
            self.add("empty captions", f"of {whose}")
        elif not stripped.isascii() and any("\ud800" <= letter <= "\udfff" for letter in stripped):
            self.add("captions with half a character", f"of {whose}")
        else:
            into.append(stripped)

    def problems(self) -> Problems:
        """The problems that were counted, the serious kinds first."""
        kinds = [kind for kind in (*PROBLEMS, *_NOTES) if kind in self.counts]
        return Problems(
            tuple(Problem(k, self.counts[k], tuple(self.samples[k]), self.detail.get(k, "")) for k in kinds)
        )


# Which files -------------------------------------------------------------------------------------------------------


def locate_files(data: Path, images: Path | None) -> tuple[Path, ...]:
    """Return the caption files of a folder in a known layout, or the one file given."""
    try:
        return _caption_files(data, images)
    except OSError as error:  # a name that is too long, or a folder that may not be entered
        raise AnnotationError(
            f"{error.filename or data}: cannot be looked at ({error.strerror}); give a caption file or a folder that "
            "may be read"
        ) from None


def _caption_files(data: Path, images: Path | None) -> tuple[Path, ...]:
    if data.is_file():
        return (data,)
    if not data.is_dir():
        command = f"make it with `python data/prepare.py {data.name} --folder {data}` (see data/README.md), or "
        remedy = command if data.name in ("coco", "flickr8k") else ""
        raise AnnotationError(f"{data}: is not there; {remedy}give a caption file or the folder of a data set")
    places = [place for place in (data, *(data / name for name in _CAPTION_FOLDERS)) if place.is_dir()]
    there = sorted(path for place in places for path in place.iterdir() if path.is_file())
    rows = [path for path in there if path.suffix.lower() in (".jsonl", ".csv", ".tsv") and path.parent == data]
    years = {path: match[2] for path in there if (match := _COCO_NAME.fullmatch(path.name))}
    for choice in (
        [path for path in there if re.fullmatch(r"dataset_\w+\.json", path.name)],
        list(years),
        [path for path in there if path.name == "Flickr8k.token.txt"],
        [path for path in there if path.name in ("captions.jsonl", "captions.csv", "captions.txt")],
        [path for path in rows if path.stem in _WORDS],
        rows,
    ):
        if choice and choice[0] in years:
            return tuple(_one_year(years, images or data))
        if len(choice) == 1 or (choice and len({_split_in(path) for path in choice} - {None}) == len(choice)):
            return tuple(choice)
        if choice:
            raise AnnotationError(f"{data}: holds several caption files ({named(choice)}); give the one that is meant")
    raise AnnotationError(
        f"{data}: holds no caption file; expected dataset_*.json, annotations/captions_*.json, Flickr8k.token.txt, "
        f"captions.csv or captions.jsonl (data/README.md shows the layouts), or give the file itself"
    )


def _one_year(years: dict[Path, str], photos: Path) -> list[Path]:
    """Choose among COCO's caption files those of the one year whose photos are there."""
    distinct = sorted(set(years.values()))
    if len(distinct) > 1:
        distinct = [y for y in distinct if any((photos / f"{split}{y}").is_dir() for split in get_args(Split))]
    if len(distinct) == 1:
        return [path for path, year in years.items() if year == distinct[0]]
    raise AnnotationError(
        f"{photos}: 2014 and 2017 divide the same COCO photos differently, and the photos do not tell which of "
        f"{named(years)} is meant; give each year a folder of its own, or give one caption file"
    )


def _split_in(path: Path) -> Split | None:
    """Return the split that a file's name says, as in `captions_val2017.json`, `val.csv` or `my-train.jsonl`."""
    words = [_WORDS[word] for word in re.findall(r"[a-z]+", path.stem.lower()) if word in _WORDS]
    return words[-1] if words else None


# Reading -----------------------------------------------------------------------------------------------------------


def read(path: Path, images: Path | None, restval: str, found: Found, *, alone: bool) -> tuple[str, list[Photo]]:
    """Read one caption file of any kind: the data set's name, and its photos."""
    text = _text(path)
    split = _split_in(path)
    if text.lstrip()[0] not in "{[":
        if _TOKEN_LINE.fullmatch(_first_line(text.lstrip())):
            return "flickr8k", _read_flickr8k(path, text, images, found)
        rows = _csv_rows(path, text)
    else:
        document = _json(path, text)
        keys = set(document) if isinstance(document, dict) else set()
        if {"images", "annotations"} <= keys:
            return _read_coco(path, document, split, images, found)
        entries = document.get("images") if isinstance(document, dict) else None
        if isinstance(entries, list) and entries and isinstance(entries[0], dict) and "sentences" in entries[0]:
            said = document.get("dataset")
            name = said if isinstance(said, str) and said else path.stem.removeprefix("dataset_")
            return name, _read_karpathy(path, entries, restval, images, found)
        if not isinstance(document, _Lines) and not {"image", "caption"} <= keys:
            held = f"an object with {', '.join(map(repr, document))}" if keys else f"a {type(document).__name__}"
            raise AnnotationError(
                f"{path}: is JSON of no known kind ({held:.200}); expected COCO captions ('images' and 'annotations'), "
                f"a Karpathy split ('images' with 'sentences'), or lines with 'image' and 'caption'"
            )
        rows = iter(document if isinstance(document, _Lines) else [(1, document)])
    if alone and split == "train":
        split = None  # nothing else could be validated on, so a share of it is
    name = path.parent.name if path.stem in ("captions", *_WORDS) else path.stem
    return name, _read_rows(path, rows, split, images, found)


def _read_coco(
    path: Path, document: dict[str, Any], split: Split | None, images: Path | None, found: Found
) -> tuple[str, list[Photo]]:
    """Read official COCO captions, or a file of that form."""
    for key in ("images", "annotations"):
        if not isinstance(document[key], list):
            raise AnnotationError(f"{path}: {key!r} is {_shown(document[key])}; expected a list")
    for index, entry in enumerate(document["images"]):
        _field(entry, "id", (int, str), path, "images", index)
        _field(entry, "file_name", (str,), path, "images", index)
    for index, entry in enumerate(document["annotations"]):
        _field(entry, "image_id", (int, str), path, "annotations", index)
        _field(entry, "id", (int, str), path, "annotations", index)
        _field(entry, "caption", (str, type(None)), path, "annotations", index)
    first: dict[int | str, dict[str, Any]] = {}
    for annotation in document["annotations"]:
        if first.setdefault(annotation["id"], annotation) is not annotation:
            found.add("caption ids given twice", f"caption {annotation['id']} of image {annotation['image_id']}")
    of_image: dict[int | str, list[dict[str, Any]]] = defaultdict(list)
    for annotation in first.values():
        of_image[annotation["image_id"]].append(annotation)
    for image_id in of_image.keys() - {entry["id"] for entry in document["images"]}:
        for annotation in of_image[image_id]:
            found.add("captions for an unknown image", f"caption {annotation['id']} of image {image_id}")
    official = _COCO_NAME.fullmatch(path.name)
    year = official[2] if official else ""
    names = (f"{split}{year}", f"images/{split}{year}") if split else ()
    folders = _photo_folders(path, images, names)
    photos = []
    for entry in document["images"]:
        captions: list[str] = []
        for annotation in of_image.get(entry["id"], []):
            found.caption(annotation["caption"], f"image {entry['id']}", captions)
        photos.append(Photo(entry["id"], entry["file_name"], captions, split, folders))
    return (f"coco{year}" if official and year else path.stem), photos


def _read_karpathy(path: Path, entries: list[Any], restval: str, images: Path | None, found: Found) -> list[Photo]:
    """Read a split of Karpathy & Fei-Fei (2015), as used across the field: dataset_{coco,flickr8k,flickr30k}.json."""
    folders = _photo_folders(path, images, _FLICKR_FOLDERS)
    photos = []
    for index, entry in enumerate(entries):
        file = _field(entry, "filename", (str,), path, "images", index)
        given = _field(entry, "split", (str,), path, "images", index)
        if given == "restval" and restval == "exclude":
            continue
        split = "train" if given == "restval" else _split(given, f"{path}: images[{index}]")
        captions: list[str] = []
        for sentence in _field(entry, "sentences", (list,), path, "images", index):
            found.caption(
                _field(sentence, "raw", (str, type(None)), path, "sentences of images", index), file, captions
            )
        image_id = _field(entry, "cocoid" if "cocoid" in entry else "imgid", (int, str), path, "images", index)
        below = _field(entry, "filepath", (str, type(None)), path, "images", index) if "filepath" in entry else None
        photos.append(Photo(image_id, f"{below or '.'}/{file}".removeprefix("./"), captions, split, folders))
    return photos


def _read_flickr8k(path: Path, text: str, images: Path | None, found: Found) -> list[Photo]:
    """Read Flickr8k.token.txt and the lists of photos of each split that lie beside it."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_LINE_END.split(text), 1):
        if not line.strip():
            continue
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise AnnotationError(f"{path}: line {number} is {line[:60]!r}; expected 'NAME.jpg#0<tab>a caption'")
        found.caption(match[2], match[1], captions.setdefault(match[1], []))
    folders = _photo_folders(path, images, _FLICKR_FOLDERS)
    photos = []
    for word, split in {"train": "train", "dev": "val", "test": "test"}.items():
        listed = path.parent / f"Flickr_8k.{word}Images.txt"
        names = _text(listed).split() if listed.is_file() else []
        photos += [Photo(name, name, captions.get(name, []), cast(Split, split), folders) for name in names]
    if not photos:
        raise AnnotationError(
            f"{path.parent}: holds no Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt or Flickr_8k.testImages.txt, "
            f"which say what {path.name} is split into; put them beside it (they come in the same archive)"
        )
    for name in captions.keys() - {photo.file for photo in photos}:
        found.add("photos in no split list", name)
    return photos


def _read_rows(
    path: Path, rows: Iterable[tuple[int, Any]], split: Split | None, images: Path | None, found: Found
) -> list[Photo]:
    """Read rows of `image`, `caption` and perhaps `split`, with one caption in each."""
    folders = (*((str(images),) if images else ()), str(path.parent), str(path.parent / "images"))
    photos: dict[tuple[str, Split | None], Photo] = {}
    first_with_split: tuple[int, bool] | None = None
    for number, row in rows:
        image = Path(_field(row, "image", (str,), path, "line", number).strip()).as_posix()
        caption = _field(row, "caption", (str, type(None)), path, "line", number)
        said = _field(row, "split", (str, type(None)), path, "line", number) if "split" in row else None
        if first_with_split is None:
            first_with_split = (number, said is not None)
        elif first_with_split[1] != (said is not None):
            raise AnnotationError(
                f"{path}: of lines {first_with_split[0]} and {number} only one has a 'split'; give it in all or none"
            )
        mine = split if said is None else _split(said, f"{path}: line {number}")
        photo = photos.get((image, mine))
        if photo is None:
            photo = photos[image, mine] = Photo(image, image, [], mine, folders)
        found.caption(caption, f"{image} in line {number}", photo.captions)
    return list(photos.values())


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line number and the columns of each row of a CSV file with a header."""
    header = _first_line(text)
    for delimiter in ",\t;":
        columns = [column.strip().lower() for column in _cells(header, delimiter)]
        if {"image", "caption"} <= set(columns):
            break
    else:
        raise AnnotationError(
            f"{path}: its first line is {header[:100]!r}; expected a header with the columns 'image' and 'caption' "
            f"(or, of Flickr8k, lines as 'NAME.jpg#0<tab>a caption')"
        )
    # Strict: a quote that is never closed would else swallow the rest of the file as one caption.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        next(reader)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(columns):
                raise AnnotationError(
                    f"{path}: line {reader.line_num} has {len(cells)} columns where the header has {len(columns)}; "
                    f"put quotes around a caption with commas"
                )
            yield reader.line_num, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise AnnotationError(
            f"{path}: line {reader.line_num} is not CSV ({error}); close or double its quotes"
        ) from None


def _cells(line: str, delimiter: str) -> list[str]:
    """The columns of a line of CSV; none where it is no CSV."""
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # longer than a field may be, say
        return []


def _first_line(text: str) -> str:
    return _LINE_END.split(text, 1)[0]


class _Lines(list[tuple[int, Any]]):
    """The documents of a file with one JSON document in each line, with the number of each line."""


def _json(path: Path, text: str) -> Any:
    """Parse JSON, or JSON lines (then a `_Lines`)."""
    try:
        return _parsed(text, str(path))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or _LINE_END.search(text[: error.pos].strip()):
            cut = error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated")
            why = "ends in the middle; download or write it again" if cut else f"is not JSON ({error.msg})"
            raise AnnotationError(f"{path}: {why}: line {error.lineno}, column {error.colno}") from None
    lines = _Lines()
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip():
            try:
                lines.append((number, _parsed(line, f"{path}: line {number}")))
            except json.JSONDecodeError as error:
                raise AnnotationError(
                    f"{path}: line {number}, column {error.colno} is not JSON ({error.msg}); expected one object a line"
                ) from None
    return lines


def _parsed(text: str, where: str) -> Any:
    """Parse one JSON document.

    Raises:
        json.JSONDecodeError: it is not JSON.
        AnnotationError: it is, but no caption file holds such a document.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise AnnotationError(f"{where}: is nested too deep to be a caption file; give another file") from None
    except ValueError:  # a number of thousands of digits, which Python does not convert
        raise AnnotationError(f"{where}: holds a number with too many digits; give another file") from None


def _text(path: Path) -> str:
    """Return the contents of a text file, which is not empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AnnotationError(
            f"{path}: cannot be read ({error.strerror}); see to its permissions, or give another file"
        ) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AnnotationError(f"{path}: line {line} is not UTF-8; save the file in that encoding") from None
    if not text.strip():
        raise AnnotationError(f"{path}: is empty; expected captions")
    return text


def _field(entry: Any, key: str, kinds: tuple[type, ...], path: Path, where: str, index: int) -> Any:
    """Return `entry[key]`, which must be of one of `kinds`."""
    if isinstance(entry, dict) and key in entry and type(entry[key]) in kinds:
        return entry[key]
    place = f"line {index}" if where == "line" else f"{where}[{index}]"
    expected = (
        "an object"
        if not isinstance(entry, dict)
        else " or ".join({str: "a text", int: "a number", list: "a list"}.get(kind, "null") for kind in kinds)
    )
    if isinstance(entry, dict) and key not in entry:
        raise AnnotationError(
            f"{path}: {place} has no {key!r} but {', '.join(map(repr, entry)):.200}; expected {expected}"
        )
    subject, value = (f"{key!r} of {place}", entry[key]) if isinstance(entry, dict) else (place, entry)
    raise AnnotationError(f"{path}: {subject} is {_shown(value)}; expected {expected}")


def _shown(value: Any) -> str:
    """The beginning of a value, for a message."""
    try:
        return repr(str(value)[:60])
    except RecursionError:
        return f"a {type(value).__name__} that is nested deep"


def _split(said: str, where: str) -> Split:
    if said.strip().lower() not in _WORDS:
        raise AnnotationError(f"{where} has the split {_shown(said)}; expected one of {', '.join(_WORDS)}")
    return _WORDS[said.strip().lower()]


def _photo_folders(path: Path, images: Path | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return where the photos of a caption file may lie: the folder given, or the usual ones near the file."""
    base = images or _base(path)
    return tuple(str(base / name) for name in (*names, "images", "Images", ""))


def _base(path: Path) -> Path:
    """Return the folder of the data set that a caption file belongs to."""
    return path.parent.parent if path.parent.name in _CAPTION_FOLDERS else path.parent


def named(paths: Iterable[Path]) -> str:
    """The paths, for a message."""
    return ", ".join(map(str, paths))

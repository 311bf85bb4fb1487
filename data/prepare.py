"""Fetch, verify and lay out a data set: `python data/prepare.py coco` or `python data/prepare.py flickr8k`.

Run it again whenever it was stopped: downloads go on where they ended, an archive that is unpacked is not
fetched again, and a folder that was filled by hand is only verified.
"""

import argparse
import errno
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout, not installed

from captioner.datasets import annotations
from captioner.errors import CaptionerError

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 60.0  # seconds without a byte before a connection counts as lost
ATTEMPTS = 5  # connections in a row that bring nothing before giving up
PATIENCE = 1.0  # scales the pauses between connections
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Archive:
    """One zip file of a data set."""

    url: str
    contents: tuple[tuple[str, int], ...]  # files to take out of it: (pattern of their paths inside, their number)
    size: int | None = None  # bytes; None where nobody trustworthy states it
    checksum: str | None = None  # "md5:..." or "sha256:..."; None likewise

    @property
    def name(self) -> str:
        """The archive's file name."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class DataSet:
    """The archives to fetch, the folder that they go to by default, and the number of photos of each split."""

    folder: Path
    archives: tuple[Archive, ...]
    photos: dict[str, int]


# Where the checksums and sizes come from: no publisher of these archives states any, so they are those that projects
# which fetch them have recorded, each found in more than one. A file that differs is set aside, not deleted.
#   COCO 2014, md5: salesforce/LAVIS, lavis/datasets/download_scripts/download_coco.py (photos); PaddleNLP's COCO
#     captions (annotations; it is also the ETag of the server, which for such a file is its md5).
#   COCO 2017, md5: PaddlePaddle/PaddleDetection, dataset/coco/download_coco.py; NVIDIA's SSD example has the same.
#   COCO, sizes: logs of downloads from the official server, such as wget's "Length: 13510573713".
#   caption_datasets.zip, sha256 and size: several public projects that reproduce results on this split.
#   Flickr8k: none is known for these copies. They are verified by the size that the server states, by the CRC-32 of
#     every file in the zip, and by the numbers of photos and captions.
_COCO, _KARPATHY = "http://images.cocodataset.org", "https://cs.stanford.edu/people/karpathy/deepimagesent"
_FLICKR = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
_HERE = Path(__file__).resolve().parent

DATA_SETS = {
    "coco": DataSet(
        _HERE / "coco",
        (
            Archive(
                f"{_KARPATHY}/caption_datasets.zip",
                (("dataset_coco.json", 1),),
                36_745_453,
                "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
            ),
            Archive(
                f"{_COCO}/annotations/annotations_trainval2014.zip",
                (("annotations/captions_train2014.json", 1), ("annotations/captions_val2014.json", 1)),
                252_872_794,
                "md5:0a379cfc70b0e71301e0f377548639bd",
            ),
            Archive(
                f"{_COCO}/zips/val2014.zip",
                (("val2014/*.jpg", 40_504),),
                6_645_013_297,
                "md5:a3d79f5ed8d289b7a7554ce06a5782b3",
            ),
            Archive(
                f"{_COCO}/zips/train2014.zip",
                (("train2014/*.jpg", 82_783),),
                13_510_573_713,
                "md5:0da8c0bd3d6becc4dcb32757491aca88",
            ),
        ),
        {"train": 113_287, "val": 5_000, "test": 5_000},  # of the Karpathy split, "restval" being train
    ),
    "coco2017": DataSet(
        _HERE / "coco" / "2017",
        (
            Archive(
                f"{_COCO}/annotations/annotations_trainval2017.zip",
                (("annotations/captions_train2017.json", 1), ("annotations/captions_val2017.json", 1)),
                252_907_541,
                "md5:f4bbac642086de4f52a3fdda2de5fa2c",
            ),
            Archive(
                f"{_COCO}/zips/val2017.zip",
                (("val2017/*.jpg", 5_000),),
                815_585_330,
                "md5:442b8da7639aecaf257c1dceb8ba8c80",
            ),
            Archive(
                f"{_COCO}/zips/train2017.zip",
                (("train2017/*.jpg", 118_287),),
                19_336_861_798,
                "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
            ),
        ),
        {"train": 118_287, "val": 5_000},
    ),
    "flickr8k": DataSet(
        _HERE / "flickr8k",
        (
            Archive(
                f"{_FLICKR}/Flickr8k_text.zip",
                (
                    ("Flickr8k.token.txt", 1),
                    ("Flickr_8k.trainImages.txt", 1),
                    ("Flickr_8k.devImages.txt", 1),
                    ("Flickr_8k.testImages.txt", 1),
                ),
            ),
            Archive(f"{_FLICKR}/Flickr8k_Dataset.zip", (("Flicker8k_Dataset/*.jpg", 8_091),)),
        ),
        {"train": 6_000, "val": 1_000, "test": 1_000},
    ),
}


class UnreachableError(CaptionerError):
    """A server cannot be reached, or does not give the file."""


def prepare(data_set: DataSet, *, keep: bool = False, check: bool = False, say: Callable[[str], None] = print) -> None:
    """Make a data set complete in its folder, verify it, and say how many photos and captions there are.

    Args:
        data_set: The data set, and its folder.
        keep: Whether archives stay after they are unpacked (they are as large again as the photos).
        check: Whether only to verify what is there, and download nothing.
        say: Receives each line of what happens.

    Raises:
        CaptionerError: Something cannot be fetched, stored or verified; what is complete so far is kept.
    """
    folder = data_set.folder
    if not check and not _is_whole(data_set):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for archive in data_set.archives:
                if _is_unpacked(archive, folder):
                    say(f"{archive.name}: is unpacked already")
                    continue
                path = fetch(archive, folder, say)
                unpack(archive, path, folder, say)
                if not keep:
                    path.unlink()
        except UnreachableError as error:
            try:
                annotations.load(folder)
            except CaptionerError as incomplete:
                raise CaptionerError(f"{error}; and what is there is no complete data set ({incomplete})") from None
            say(f"{error}; what is there is used")
        except OSError as error:
            raise _storage_error(folder, error) from None
    loaded = annotations.load(folder)
    say(table(loaded))
    counts = {split: sum(e.split == split for e in loaded.examples) for split in get_args(annotations.Split)}
    there = {split: count for split, count in counts.items() if count}
    if there != data_set.photos:
        published = ", ".join(f"{split} {count:,}" for split, count in data_set.photos.items())
        say(f"note: these are not the published numbers of photos ({published})")
    if loaded.problems:
        say(loaded.problems.report())


def table(loaded: annotations.Annotations) -> str:
    """Return the numbers of photos and captions of each split as a small table."""
    rows = [("split", "photos", "captions")]
    for split in (*get_args(annotations.Split), "total"):
        examples = [example for example in loaded.examples if split in (example.split, "total")]
        if examples:
            rows.append((split, f"{len(examples):,}", f"{sum(len(e.captions) for e in examples):,}"))
    lines = [f"{name:<8}{photos:>10}{captions:>12}" for name, photos, captions in rows]
    return "\n".join([f"{loaded.name}: {', '.join(map(str, loaded.source))}", *lines])


def fetch(archive: Archive, folder: Path, say: Callable[[str], None]) -> Path:
    """Return the verified archive: the one that lies in the folder, or one that is downloaded, or completed, now."""
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    if not path.exists():
        _download(archive, part, say)
        part.replace(path)
    say(f"{archive.name}: verifying {path.stat().st_size:,} bytes")
    if archive.checksum:
        kind, _, expected = archive.checksum.partition(":")
        with path.open("rb") as file:
            digest = hashlib.new(kind, usedforsecurity=False)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise _set_aside(path, f"its {kind} is {digest.hexdigest()}, expected {expected}")
    elif not zipfile.is_zipfile(path):
        raise _set_aside(path, "it is not a whole zip file")
    return path


def _download(archive: Archive, part: Path, say: Callable[[str], None]) -> None:
    """Complete `part` from the archive's address, going on where it ends if the server can do that."""
    failures, reached = 0, False
    while True:
        have = part.stat().st_size if part.exists() else 0
        if have and have == archive.size:
            return
        headers = {"User-Agent": "captioner", **({"Range": f"bytes={have}-"} if have else {})}
        lost: Exception
        try:
            request = urllib.request.Request(archive.url, headers=headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                reached = True
                if have and response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    say(f"{archive.name}: the server cannot go on where a download ended; starting again")
                    have = 0
                length = response.headers.get("Content-Length")
                total = have + int(length) if length else None
                if archive.size and total and total != archive.size:
                    raise UnreachableError(
                        f"{archive.url}: has {total:,} bytes, expected {archive.size:,}; it has changed"
                    )
                _room_for(part, (total or 0) - have)
                say(f"{archive.name}: downloading {f'{total - have:,}' if total else 'an unknown number of'} bytes")
                got = _receive(response, part, have, total)
                if total is None or have + got == total:
                    return
                lost = ConnectionError(f"it ended after {have + got:,} of {total:,} bytes")
                failures = 0 if got else failures
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                    return  # all of it was there
                part.unlink()  # longer than the original: not a part of it
                continue
            raise UnreachableError(
                f"{archive.url}: the server answers {error.code} {error.reason}; {_by_hand(part)}"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            if getattr(error, "errno", None) in NO_ROOM or getattr(error, "filename", None):
                raise  # of our disk, not of the network
            if not reached:
                reason = getattr(error, "reason", error)
                raise UnreachableError(f"{archive.url}: cannot be reached ({reason}); {_by_hand(part)}") from None
            lost = error
            failures = 0 if part.exists() and part.stat().st_size > have else failures
        failures += 1
        if failures >= ATTEMPTS:
            raise UnreachableError(
                f"{archive.url}: the download stopped ({lost}); run again to go on, or {_by_hand(part)}"
            )
        time.sleep(min(2.0**failures, 30.0) * PATIENCE)


def _receive(response: http.client.HTTPResponse, part: Path, have: int, total: int | None) -> int:
    """Append what a server sends to `part`, or replace it where `have` is 0, and return how many bytes came."""
    got, told = 0, time.monotonic()
    with part.open("ab" if have else "wb") as file:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            got += len(chunk)
            if total and sys.stderr.isatty() and time.monotonic() - told > 1:
                told = time.monotonic()
                print(f"\r{part.name}: {(have + got) / total:.1%} of {total / 1e6:,.0f} MB ", end="", file=sys.stderr)
        file.flush()
        os.fsync(file.fileno())
    return got


def unpack(archive: Archive, path: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Take a data set's files out of a zip file; each file appears only when it is whole and its CRC is right."""
    try:
        with zipfile.ZipFile(path) as opened:
            wanted: list[tuple[zipfile.ZipInfo, str]] = []  # and where each goes
            for pattern, count in archive.contents:
                matching = [(info, name) for info in opened.infolist() if (name := _inside(info.filename, pattern))]
                if len(matching) != count:
                    raise _set_aside(path, f"it holds {len(matching):,} of {pattern}, expected {count:,}")
                wanted += matching
            missing = [(info, name) for info, name in wanted if not _same_size(folder / name, info.file_size)]
            say(f"{archive.name}: unpacking {len(missing):,} of {len(wanted):,} files")
            _room_for(folder, sum(info.file_size for info, _ in missing))
            for info, name in missing:
                if ".." in PurePosixPath(name).parts:
                    raise _set_aside(path, f"it holds {name!r}, which points out of the folder")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.part")
                try:
                    with opened.open(info) as source, temporary.open("wb") as file:
                        shutil.copyfileobj(source, file, CHUNK)
                    temporary.replace(target)
                finally:
                    temporary.unlink(missing_ok=True)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _set_aside(path, f"it is damaged ({error})") from None


def _is_whole(data_set: DataSet) -> bool:
    """Whether all is there, in any layout that can be loaded."""
    try:
        loaded = annotations.load(data_set.folder)
    except CaptionerError:
        return False
    return all(sum(e.split == split for e in loaded.examples) == n for split, n in data_set.photos.items())


def _is_unpacked(archive: Archive, folder: Path) -> bool:
    for pattern, count in archive.contents:
        below, _, name = pattern.rpartition("/")
        place = folder / below
        there = [entry.name for entry in os.scandir(place)] if place.is_dir() else []
        if sum(fnmatchcase(each, name) and not each.startswith(".") for each in there) < count:
            return False
    return True


def _inside(name: str, pattern: str) -> str:
    """Return the path of a file in a zip if it is one that is wanted, else "", whether or not all is in one folder."""
    top, _, below = name.partition("/")
    if fnmatchcase(name, pattern):
        return name
    return below if top != "__MACOSX" and fnmatchcase(below, pattern) else ""


def _same_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _room_for(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")


def _set_aside(path: Path, why: str) -> CaptionerError:
    bad = path.with_name(f"{path.name}.bad")
    path.replace(bad)
    return CaptionerError(f"{path}: {why}; it is set aside as {bad.name}, run again to download it afresh")


def _storage_error(folder: Path, error: OSError) -> CaptionerError:
    if error.errno in NO_ROOM:
        return CaptionerError(f"{folder}: the disk is full ({error.strerror}); free space and run again, it goes on")
    return CaptionerError(f"{error.filename or folder}: cannot be written ({error.strerror}); give another --folder")


def _by_hand(part: Path) -> str:
    return f"put {part.name.removesuffix('.part')} into {part.parent} by hand and run again (see data/README.md)"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, prepare, and return the exit status: 0 done, 2 not possible, 130 stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=("coco", "flickr8k"))
    parser.add_argument(
        "--year", choices=("2014", "2017"), default="2014", help="of COCO (default 2014, Karpathy split)"
    )
    parser.add_argument("--folder", type=Path, help="where it goes (default data/coco, data/coco/2017, data/flickr8k)")
    parser.add_argument("--keep", action="store_true", help="keep the archives after they are unpacked")
    parser.add_argument("--check", action="store_true", help="verify what is there; download nothing")
    parser.add_argument("--mirror", metavar="URL", help="fetch the archives, by their names, from this address")
    options = parser.parse_args(arguments)
    data_set = DATA_SETS[options.data_set + ("2017" if (options.data_set, options.year) == ("coco", "2017") else "")]
    if options.folder:
        data_set = replace(data_set, folder=options.folder)
    if options.mirror:
        moved = (replace(a, url=f"{options.mirror.rstrip('/')}/{a.name}") for a in data_set.archives)
        data_set = replace(data_set, archives=tuple(moved))
    try:
        prepare(data_set, keep=options.keep, check=options.check, say=lambda line: print(line, flush=True))
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

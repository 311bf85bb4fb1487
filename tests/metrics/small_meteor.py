"""A `pycocoevalcap` with a handful of words, so that METEOR can be tested in no time."""

import gzip
import zipfile
from types import SimpleNamespace

from captioner.metrics import meteor_index

SYNSETS = {"dog": "1 2", "canine": "2", "puppy": "3", "pup": "3", "goose": "4", "fowl": "4", "big": "5", "large": "5"}
EXCEPTIONS = {"goose": "geese", "ax": "axes", "axis": "axes"}
FUNCTION = ["a", "the", "of", ".", "is"]
PREFIXES = "# titles\nMr\nvs\ne.g\n\nNo #NUMERIC_ONLY# \n"
PARAPHRASES = [
    ("next to", "beside"),
    ("next to", "close to"),
    ("in front of", "before the"),
    ("beside", "next to"),
    ("tv", "television set"),
]


def install(folder, monkeypatch, paraphrases=PARAPHRASES):
    """Puts the package into a folder, makes it the one that is found, and gives it a cache of its own."""
    package = folder / "pycocoevalcap"
    (package / "meteor" / "data").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package / "meteor" / "meteor-1.5.jar", "w", zipfile.ZIP_DEFLATED) as jar:
        jar.writestr("synonym/english.synsets", pairs(SYNSETS))
        jar.writestr("synonym/english.exceptions", pairs(EXCEPTIONS))
        jar.writestr("function/english.words", "\n".join(FUNCTION))
        jar.writestr("nonbreaking/english.prefixes", PREFIXES)
    with gzip.open(package / "meteor" / "data" / "paraphrase-en.gz", "wt", encoding="utf-8") as table:
        table.writelines(f"0.5\n{phrase}\n{other}\n" for phrase, other in paraphrases)
    find(package, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return package / "meteor"


def find(package, monkeypatch):
    """Makes a folder the `pycocoevalcap` that is found; None: there is none."""
    spec = None if package is None else SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(meteor_index, "_package", lambda: spec)


def pairs(table):
    return "".join(f"{word}\n{rest}\n" for word, rest in table.items())

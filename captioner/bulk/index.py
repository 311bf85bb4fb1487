"""A library of captioned photos that can be searched: SQLite with a full-text index over all captions."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from captioner.bulk.journal import Journal, is_journal, name_of
from captioner.errors import CaptionerError

#: Words are compared by their stems ("dogs" finds "dog") and without accents. The text itself is in `photos`.
_BUILD = (
    "DROP TABLE IF EXISTS search",
    "CREATE VIRTUAL TABLE search USING fts5(best, others, content='', tokenize='porter unicode61')",
    "INSERT INTO search (rowid, best, others) SELECT number, json_extract(captions, '$[0][0]'), "
    "CASE json_array_length(captions) WHEN 1 THEN '' ELSE "
    "(SELECT group_concat(json_extract(value, '$[0]'), ' . ') FROM json_each(captions) WHERE key > 0) END "
    "FROM places JOIN photos USING (number) WHERE captions IS NOT NULL",
    "INSERT INTO search (search) VALUES ('optimize')",
)

#: Words that nearly every caption has; outside of phrases they tell nothing, and are left out of a query.
_COMMON = frozenset("a an the of on in at to with and is are it its by for from up".split())

#: So many of the photos that match are put in order: a common word is in the captions of hundreds of thousands.
_RANKED = 1000

_SEARCH = """
WITH best AS (SELECT rowid AS number FROM search WHERE search MATCH ?1 LIMIT ?3),
     any_ AS (SELECT rowid AS number FROM search WHERE search MATCH ?2 LIMIT ?3),
     matching AS (SELECT number, 0 AS rank FROM best UNION ALL
                  SELECT number, 1 FROM any_ WHERE number NOT IN (SELECT number FROM best))
SELECT id, image, json_extract(captions, '$[0][0]') FROM matching JOIN photos USING (number)
ORDER BY rank, json_extract(captions, '$[0][2]') DESC, number LIMIT ?4
"""


@dataclass(frozen=True)
class Hit:
    """A photo that a query found."""

    path: str  # absolute
    image: str  # as it was found
    caption: str


def build(journal: Journal) -> None:
    """Index the captions of a journal."""
    journal.index(_BUILD)


def search(library: Path, query: str, limit: int = 20) -> list[Hit]:
    """Find photos by the words of their captions, best first.

    A query is words, all of which a photo must have, in any form ("dogs running" finds "a dog runs"); "phrases in
    quotes"; OR and NOT between them; brackets. Photos whose best caption matches come before those of which another
    one does, and among them those of whose caption the model was surest. Where more than a thousand match, the order is
    one among the first thousand of the library.

    Args:
        library: file that `captioner caption --output LIBRARY.db` wrote.
        query: see above.
        limit: how many photos at most.

    Raises:
        CaptionerError: the library is not there, is in use or has no index, or the query cannot be understood.
    """
    words = understood(query)
    if not library.is_file():
        raise _no_library(library)
    base = sqlite3.connect(library, timeout=0)
    try:
        base.execute("PRAGMA query_only=1")
        if not is_journal(base):
            raise _no_library(library)
        found = base.execute(_SEARCH, [f"best : ({words})", words, _RANKED, limit]).fetchall()
    except sqlite3.Error as error:
        raise _explained(library, query, error) from None
    finally:
        base.close()
    return [Hit(name_of(path), name_of(image), caption) for path, image, caption in found]


def _no_library(library: Path) -> CaptionerError:
    return CaptionerError(f"{library}: is no library; make one: captioner caption FOLDER --output LIBRARY.db")


def _explained(library: Path, query: str, error: sqlite3.Error) -> CaptionerError:
    said = str(error)
    if "not a database" in said:
        return _no_library(library)
    if "locked" in said:
        return CaptionerError(f"{library}: is being written; search it when that is done")
    if "no such table" in said:
        return CaptionerError(f"{library}: has no index yet; finish it with the command that made it")
    if "fts5" in said or "syntax" in said or "no such column" in said or "unterminated" in said:
        return CaptionerError(
            f'{query!r}: cannot be understood; expected words, "phrases", OR, NOT and brackets, such as: '
            '"red ball" (dog OR cat) NOT car'
        )
    return CaptionerError(f"{library}: cannot be searched ({said}); fetch or make it again")


def understood(query: str) -> str:
    """A query in the words of FTS5: whatever a user types means its words, but for quotes, brackets, OR, AND and NOT.

    Raises:
        CaptionerError: it has no words.
    """
    parts = list(_parts(query))
    if not any(part.startswith('"') for part in parts):
        raise CaptionerError(f"{query!r}: has no words to search for; give some, such as: dog beach")
    telling = [part for part in parts if part.strip('"').lower() not in _COMMON]
    if not any(part.startswith('"') for part in telling):
        telling = parts
    joined: list[str] = []
    for part in telling:
        if joined and (joined[-1][0] in '")') and (part[0] in '"('):
            joined.append("AND")
        joined.append(part)
    return " ".join(joined)


def _parts(query: str) -> Iterator[str]:
    for phrase, bracket, word in re.findall(r'"([^"]*)"|([()])|([^\s()"]+)', query):
        if bracket or word in ("OR", "AND", "NOT"):
            yield bracket or word
        elif any(character.isalnum() for character in phrase or word):
            yield '"' + (phrase or word) + '"'

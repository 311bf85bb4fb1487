"""A library of captioned photos that can be searched: SQLite with a full-text index over all captions."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from captioner.bulk.journal import Journal, is_journal, name_of
from captioner.errors import CaptionerError

#: The index. Words are compared by their stems ("dogs" finds "dog") and without accents; `photos` has the text itself.
#: A photo has the row 2 * number for its best caption and, if it has several captions, 2 * number + 1 for all of them,
#: so that one search finds both and tells which it was.
_NEW = (
    "DROP TABLE IF EXISTS search",
    "CREATE VIRTUAL TABLE search USING fts5(text, content='', tokenize='porter unicode61')",
)

#: The photos of the library, with the row that the index has for each.
_PHOTOS = (
    "places JOIN photos USING (number) LEFT JOIN search_docsize AS row ON row.id = 2 * number "
    "WHERE captions IS NOT NULL"
)

#: A character that counts as a word and that nobody types: no phrase reaches from one caption into the next.
_BETWEEN = "\ue000"

_ADD = (
    "INSERT INTO search (rowid, text) "
    "SELECT 2 * number, json_extract(captions, '$[0][0]') FROM temp.added JOIN photos USING (number)",
    "INSERT INTO search (rowid, text) "
    "SELECT 2 * number + 1, "
    f"(SELECT group_concat(json_extract(value, '$[0]'), ' {_BETWEEN} ') FROM json_each(captions)) "
    "FROM temp.added JOIN photos USING (number) WHERE json_array_length(captions) > 1",
)

#: Words that nearly every caption has; outside of phrases they tell nothing, and are left out of a query.
_COMMON = frozenset("a an the of on in at to with and is are it its by for from up".split())

#: So many of the rows that match are put in order: a common word is in the captions of hundreds of thousands.
_RANKED = 1000

#: The share of rows that are out of date above which the index is made anew.
_MOST_STALE = 0.1

_SEARCH = """
WITH matching AS (SELECT rowid FROM search WHERE search MATCH ?1 AND rowid / 2 IN (SELECT number FROM places) LIMIT ?2),
     found AS (SELECT rowid / 2 AS number, MIN(rowid % 2) AS rank FROM matching GROUP BY rowid / 2)
SELECT id, image, json_extract(captions, '$[0][0]') FROM found JOIN photos USING (number)
ORDER BY rank, json_extract(captions, '$[0][2]') DESC, number LIMIT ?3
"""


@dataclass(frozen=True)
class Hit:
    """A photo that a query found."""

    path: str  # absolute
    image: str  # as it was found
    caption: str


def build(journal: Journal) -> None:
    """Index the captions of a journal: those that are new, or all of them if much of the index is out of date.

    Photos that are gone or were captioned again (under a new number) leave rows behind, which a search passes over.
    """
    journal.index(_update)


def _update(base: sqlite3.Connection) -> None:
    if not base.execute("SELECT 1 FROM sqlite_master WHERE name='search'").fetchone():
        _begin(base)
    (rows,) = base.execute("SELECT COUNT(*) FROM search_docsize WHERE id % 2 = 0").fetchone()
    photos, indexed = base.execute(f"SELECT COUNT(*), COUNT(row.id) FROM {_PHOTOS}").fetchone()
    is_new = rows == 0 or rows - indexed > photos * _MOST_STALE
    if is_new:
        _begin(base)
    base.execute(f"CREATE TEMP TABLE added AS SELECT number FROM {_PHOTOS} AND row.id IS NULL")
    for statement in _ADD:
        base.execute(statement)
    base.execute("DROP TABLE temp.added")
    if is_new:
        base.execute("INSERT INTO search (search) VALUES ('optimize')")


def _begin(base: sqlite3.Connection) -> None:
    for statement in _NEW:
        base.execute(statement)


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
        found = base.execute(_SEARCH, [words, _RANKED, limit]).fetchall()
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
    telling: list[str] = []
    for are_words, run in itertools.groupby(parts, lambda part: part.startswith('"')):
        together = list(run)
        told = [part for part in together if part.strip('"').lower() not in _COMMON]
        telling += told if are_words and told else together
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

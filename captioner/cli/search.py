"""`captioner search`: find photos by the words of their captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from captioner.cli import output
from captioner.cli.arguments import parse


@dataclass(frozen=True)
class SearchArguments:
    """Find photos by the words of their captions: dog beach, "red ball", (dog OR cat) NOT car."""

    # file that captioner caption FOLDER --output LIBRARY.db wrote
    library: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LIBRARY")]
    # words, in any form; "phrases", OR, NOT and brackets
    query: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="WORD ...")]
    limit: int = 20  # photos at most
    captions: bool = False  # print the captions too
    json: bool = False  # print a JSON object per photo
    open: Path | None = None  # write a page with the photos found to this HTML file, and show it in the browser


def command(arguments: Sequence[str], prog: str) -> int:
    """Search, print paths, best first, and return the exit status: 1 if nothing was found."""
    chosen = parse(SearchArguments, arguments, prog)
    from captioner.bulk.index import search

    query = " ".join(chosen.query)
    hits = search(chosen.library, query, chosen.limit)
    if chosen.open is not None:
        import webbrowser

        from captioner.bulk.gallery import page

        output.write(chosen.open, page(query, hits))
        webbrowser.open(chosen.open.resolve().as_uri())
    with output.writer(None) as out:
        for hit in hits:
            if chosen.json:
                row = {"path": hit.path, "image": hit.image, "caption": hit.caption}
                print(json.dumps(row, ensure_ascii=False), file=out)
            else:
                caption = f": {hit.caption}" if chosen.captions else ""
                print(output.one_line(hit.path) + caption, file=out)
    if not hits:
        output.say(f"no photo has a caption with these words: {query}")
    return 0 if hits else 1

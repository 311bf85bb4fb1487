"""Photos that a search found -> a page with thumbnails and captions, in one file without anything from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from urllib.parse import quote

from captioner import images
from captioner.bulk.index import Hit
from captioner.errors import ImageError

#: The longer side of a thumbnail, in pixels.
_SIDE = 480

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1200px; padding: 24px; }
h1 { font-size: 1.25rem; font-weight: 600; overflow-wrap: anywhere; }
ul { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); list-style: none;
     margin: 0; padding: 0; }
img, .none { aspect-ratio: 4 / 3; border-radius: 6px; display: block; object-fit: cover; width: 100%; }
.none { align-content: center; background: #8883; text-align: center; }
p { margin: 6px 0 0; }
small { opacity: .65; overflow-wrap: anywhere; }
"""


def page(query: str, hits: Sequence[Hit]) -> str:
    """An HTML page; photos that cannot be read any more are named without a thumbnail."""
    items = "\n".join(_item(hit) for hit in hits) or "<li>No photo has a caption with these words.</li>"
    title = html.escape(query)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title} <small>{len(hits)} photos</small></h1>\n<ul>\n{items}\n</ul>\n</body>\n</html>\n"
    )


def _item(hit: Hit) -> str:
    caption = html.escape(hit.caption)
    name = os.fsencode(hit.image.rsplit("/", 1)[-1]).decode("utf-8", "replace")
    thumbnail = _thumbnail(hit.path)
    shown = (
        f'<img src="data:image/jpeg;base64,{thumbnail}" alt="{caption}">'
        if thumbnail
        else '<div class="none">not readable any more</div>'
    )
    address = "file://" + quote(os.fsencode(hit.path))
    return f'<li><a href="{address}">{shown}</a><p>{caption}</p><small>{html.escape(name)}</small></li>'


def _thumbnail(path: str) -> str | None:
    """A photo as JPEG in base64; photos in shards are not looked up."""
    try:
        picture = images.thumbnail(path, _SIDE)
    except ImageError:
        return None
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=80)
    return base64.b64encode(jpeg.getvalue()).decode()

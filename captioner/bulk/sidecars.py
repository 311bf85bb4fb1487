"""Captions -> a file beside each photo: text, or XMP as photo managers read it. Photos themselves are never touched.

A sidecar takes its name when it is complete. One that is there already is replaced only if this program wrote it, or
if it is told to; an XMP sidecar is merged, and whatever else it says is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from captioner import files
from captioner.bulk.journal import Row
from captioner.errors import ImageError, printable

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_X = "adobe:ns:meta/"
_XMLNS = "http://www.w3.org/2000/xmlns/"
_XML = "http://www.w3.org/XML/1998/namespace"

#: The namespace of what this program says of itself in a sidecar.
NAMESPACE = "urn:captioner:ns:1.0/"

_EMPTY = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    f'<x:xmpmeta xmlns:x="{_X}"><rdf:RDF xmlns:rdf="{_RDF}"><rdf:Description rdf:about=""/></rdf:RDF></x:xmpmeta>\n'
    '<?xpacket end="w"?>'
)

#: Larger sidecars are left alone.
_LARGEST = 16 << 20


@dataclass(frozen=True)
class Rules:
    """How sidecars are named, and what happens to those that are there."""

    format: Literal["txt", "xmp"]
    names: Literal["photo.jpg.xmp", "photo.xmp"] = "photo.jpg.xmp"
    overwrite: bool = False  # replace captions that somebody else wrote
    skip_existing: bool = False  # leave them alone without a word
    model: str = ""  # whose captions they are


def write(rows: Iterable[Row], rules: Rules) -> Iterator[tuple[Row, ImageError]]:
    """Write a sidecar for each row.

    Yields:
        Photos whose sidecar could not be written, and why.
    """
    for row in rows:
        path = path_of(row.image, rules)
        try:
            new = (_text if rules.format == "txt" else _xmp)(path, row, rules)
            if new is not None:
                files.write(path, new, durable=False)
        except ImageError as error:
            yield row, error
        except OSError as error:
            yield row, ImageError(f"{path}: cannot be written ({error.strerror}); change its folder's permissions")


def path_of(image: str, rules: Rules) -> Path:
    """The sidecar of a photo."""
    if rules.format == "xmp" and rules.names == "photo.jpg.xmp":
        return Path(image + ".xmp")
    return Path(os.path.splitext(image)[0] + "." + rules.format)  # noqa: PTH122


def exists(image: str, rules: Rules) -> bool:
    """Whether a photo has a sidecar with a caption already."""
    path = path_of(image, rules)
    try:
        content = _read(path)
        if content is None:
            return False
        return rules.format == "txt" or _description(_parse(path, content)) is not None
    except (OSError, ImageError):
        return True


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return None
    if len(content) > _LARGEST:
        raise ImageError(f"{path}: is too large for a sidecar; move it away", "existing")
    return content


def _text(path: Path, row: Row, rules: Rules) -> bytes | None:
    """The content of a text sidecar; none if it stays as it is."""
    content = _read(path)
    new = (row.captions[0].text + "\n").encode()
    if content is None or rules.overwrite or content == new:
        return None if content == new else new
    if rules.skip_existing:
        return None
    raise ImageError(f"{path}: is there already; give --overwrite or --skip-existing", "existing")


def _xmp(path: Path, row: Row, rules: Rules) -> bytes | None:
    content = _read(path)
    document = _parse(path, content if content is not None else _EMPTY.encode())
    said = _description(document)
    mine = _said_by_captioner(document)
    name = printable(row.image.rsplit("/", 1)[-1])
    if said is not None:
        if mine is not None and mine.source != name and not rules.overwrite:
            raise ImageError(f"{path}: is the sidecar of {mine.source}; name sidecars photo.jpg.xmp", "existing")
        if (mine is None or said != mine.caption) and not rules.overwrite:
            if rules.skip_existing:
                return None
            raise ImageError(f"{path}: has a description already; give --overwrite or --skip-existing", "existing")
    best = row.captions[0]
    text = printable(best.text)
    signature = {"Caption": text, "Model": rules.model, "Score": f"{best.score:.4f}", "Source": name}
    if said == text and _is_signed(document, signature):
        return None
    _describe(document, text)
    _sign(document, signature)
    new: bytes = document.toxml(encoding="utf-8")
    if not (content or b"").lstrip(b"\xef\xbb\xbf").startswith(b"<?xml"):  # minidom writes a declaration always
        new = new.partition(b"?>")[2].lstrip(b"\n")
    return new


@dataclass(frozen=True)
class _Signature:
    """The caption that this program once wrote into a sidecar."""

    caption: str
    source: str  # name of the photo


def _parse(path: Path, content: bytes) -> minidom.Document:
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ImageError(f"{path}: has definitions of XML that no sidecar needs; move it away", "existing")
    try:
        document = minidom.parseString(content)
    except (ExpatError, ValueError, LookupError) as error:
        raise ImageError(f"{path}: is no XMP ({error}); move it away", "existing") from None
    if not document.getElementsByTagNameNS(_RDF, "RDF"):
        raise ImageError(f"{path}: is no XMP (it has no rdf:RDF); move it away", "existing")
    return document


def _descriptions(document: minidom.Document) -> list[minidom.Element]:
    (rdf, *_) = document.getElementsByTagNameNS(_RDF, "RDF")
    return [
        node
        for node in rdf.childNodes
        if node.nodeType == node.ELEMENT_NODE and (node.namespaceURI, node.localName) == (_RDF, "Description")
    ]


def _description(document: minidom.Document) -> str | None:
    """The description in the default language, or the first, if there is one that says something."""
    for holder in _descriptions(document):
        if attribute := holder.getAttributeNS(_DC, "description"):
            return attribute
        for element in _children(holder, _DC, "description"):
            items = [item for item in element.getElementsByTagNameNS(_RDF, "li") if _content(item)]
            items.sort(key=lambda item: item.getAttributeNS(_XML, "lang") != "x-default")
            text = _content(items[0]) if items else _content(element).strip()
            if text:
                return text
    return None


def _said_by_captioner(document: minidom.Document) -> _Signature | None:
    for holder in _descriptions(document):
        if holder.hasAttributeNS(NAMESPACE, "Caption"):
            return _Signature(holder.getAttributeNS(NAMESPACE, "Caption"), holder.getAttributeNS(NAMESPACE, "Source"))
    return None


def _describe(document: minidom.Document, text: str) -> None:
    """Set the description in the default language; those in other languages stay."""
    holders = _descriptions(document)
    for holder in holders:
        for element in _children(holder, _DC, "description"):
            alternatives = _children(element, _RDF, "Alt")
            if alternatives:
                defaults = [
                    item
                    for item in _children(alternatives[0], _RDF, "li")
                    if item.getAttributeNS(_XML, "lang") == "x-default"
                ]
                if defaults:
                    _set(document, defaults[0], text)
                else:
                    first = alternatives[0].firstChild
                    alternatives[0].insertBefore(_item(document, alternatives[0], text), first)
                return
            holder.removeChild(element)
        if holder.hasAttributeNS(_DC, "description"):
            holder.removeAttributeNS(_DC, "description")
    holder = holders[0] if holders else _new_holder(document)
    element = _append(document, holder, _DC, "dc", "description")
    alternatives_ = _append(document, element, _RDF, "rdf", "Alt")
    alternatives_.appendChild(_item(document, alternatives_, text))


def _is_signed(document: minidom.Document, values: dict[str, str]) -> bool:
    return any(
        all(holder.getAttributeNS(NAMESPACE, name) == value for name, value in values.items())
        for holder in _descriptions(document)
    )


def _sign(document: minidom.Document, values: dict[str, str]) -> None:
    holders = _descriptions(document)
    signed = [holder for holder in holders if holder.hasAttributeNS(NAMESPACE, "Caption")]
    holder = (signed or holders)[0]
    prefix = _prefix(holder, NAMESPACE, "captioner")
    for name, value in values.items():
        holder.setAttributeNS(NAMESPACE, f"{prefix}:{name}", value)


def _new_holder(document: minidom.Document) -> minidom.Element:
    (rdf, *_) = document.getElementsByTagNameNS(_RDF, "RDF")
    holder = _append(document, rdf, _RDF, "rdf", "Description")
    holder.setAttributeNS(_RDF, f"{_prefix(holder, _RDF, 'rdf')}:about", "")
    return holder


def _append(
    document: minidom.Document, parent: minidom.Element, namespace: str, prefix: str, name: str
) -> minidom.Element:
    element = document.createElementNS(namespace, f"{_prefix(parent, namespace, prefix)}:{name}")
    parent.appendChild(element)
    return element


def _item(document: minidom.Document, parent: minidom.Element, text: str) -> minidom.Element:
    item = document.createElementNS(_RDF, f"{_prefix(parent, _RDF, 'rdf')}:li")
    item.setAttributeNS(_XML, "xml:lang", "x-default")
    _set(document, item, text)
    return item


def _prefix(element: minidom.Element, namespace: str, wanted: str) -> str:
    """The prefix of a namespace at an element; it is declared there if it is not known."""
    taken: dict[str, str] = {}
    node: minidom.Node | None = element
    while isinstance(node, minidom.Element):
        for attribute in (node.attributes or {}).values():
            if attribute.prefix == "xmlns":
                taken.setdefault(attribute.localName, attribute.value)
        node = node.parentNode
    for prefix, known in taken.items():
        if known == namespace:
            return prefix
    while wanted in taken:
        wanted += "_"
    element.setAttributeNS(_XMLNS, f"xmlns:{wanted}", namespace)
    return wanted


def _children(element: minidom.Element, namespace: str, name: str) -> list[minidom.Element]:
    return [
        node
        for node in element.childNodes
        if isinstance(node, minidom.Element) and (node.namespaceURI, node.localName) == (namespace, name)
    ]


def _content(element: minidom.Element) -> str:
    return "".join(node.data for node in element.childNodes if isinstance(node, minidom.Text))


def _set(document: minidom.Document, element: minidom.Element, text: str) -> None:
    for node in list(element.childNodes):
        element.removeChild(node)
    element.appendChild(document.createTextNode(text))

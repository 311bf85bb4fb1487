"""Tokens as on the COCO caption server: Stanford's PTBTokenizer 3.4.1, lower case, with its punctuation removed.

A caption is read from left to right. At every place each rule that can begin there is tried; the one that reaches
furthest wins, what it must see behind the token included, and of equals the first. The reference works so too (it is
a lexer made by JFlex), which is why a list of rules, and not a chain of substitutions such as NLTK's
`TreebankWordTokenizer`, follows it to the last abbreviation; see docs/metrics.md. The rules were found by asking the
reference about every character, every word of up to four letters and many thousands of altered captions.

Most words need no rules at all: what a piece between spaces becomes is remembered, see `tokenize`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from captioner.metrics.characters import outline

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""What the server removes. Its brackets are lower-case by then and stay: `-lrb-` is a token, and is scored."""

# --- Pieces of patterns, over the outline of a caption (see `captioner.metrics.characters`) ---

_LETTER = r"(?:[A-Za-zÀà\u0300\u00AD]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_ALPHA = r"[A-Za-zÀà]"
_ALNUM = r"[A-Za-z0-9Àà٠]"
_DIGIT = r"[0-9٠]"
_SPACE = r"[ \u00A0\u2003\n]"
_APOSTROPHE = r"(?:['\u0092’]|&(?i:apos);)"
_ANY_APOSTROPHE = r"(?:['`\u0091\u0092‘’‛]|&(?i:apos);)"
_HYPHEN = r"[-_\u058A\u2010\u2011]"

_WORD = rf"{_LETTER}(?:{_LETTER}|{_DIGIT})*(?:[.!?]{_LETTER}(?:{_LETTER}|{_DIGIT})*)*"
_NUMBER = rf"(?:{_DIGIT}*(?:[.:,\u00AD\u066B\u066C]{_DIGIT}+)+|{_DIGIT}+)"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
_NOT = rf"[nN]{_ANY_APOSTROPHE}[tT]"
_ACRONYM = r"(?:[A-Za-z](?:\.[A-Za-z])*|(?i:canada|sino|korean|eu|japan|non)-(?i:u\.s)|(?i:u\.s\.-u\.(?:k|s\.s\.r)))"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"  # an acronym of at least two letters
_BEHIND_CLAUSE = r"[,;:\u3001]"
_THING = (
    rf"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"
    rf"(?:{_HYPHEN}(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+)*"
)
_ENTITY_AND = r"(?:&(?i:amp);)"
_NO_PATH = r' \t\n\f\r"<>|()'
_NO_ADDRESS = _NO_PATH + "{}"
_ADDRESS_END = rf"[^{_NO_ADDRESS}.!?,\-]"
_HOST = rf"[^{_NO_ADDRESS}'`!$,-_]"  # from comma to underscore: no digits, no dots, no capitals
_NO_MAIL = _NO_ADDRESS + "\u00a0"
_2_TO_3, _2_TO_4, _3_TO_4, _3_TO_5 = "[0-9]{2,3}", "[0-9]{2,4}", "[0-9]{3,4}", "[0-9]{3,5}"
_GAP = "[- \u00a0]"
_EYES, _NOSE, _MOUTH = "[:;=]", "[-o*']", r"[()DPdpO\\{@|\[\]]"
_EYE, _WIDE_EYE = "[-^x=~<>']", r"[\^x=~<>']"
_QUOTE = rf"(?:[`‘’‛“”‹›«»\u0091-\u0094]{{1,2}}|{_APOSTROPHE})"
_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_TAG = rf"<(?:[!?][A-Za-z\-][^>\n]*|{_NAME}(?: +(?:{_NAME}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?))* */?|/{_NAME}) *>"

# --- Words with rules of their own ---

# Abbreviations keep their full stop. What comes behind the first kind makes them win over `etc.a` as one word.
_CLOSING_ABBREVIATIONS = frozenset(
    # months, days, states
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn ct dak "
    "fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo "
    # companies, degrees, measures
    "inc co cos corp bldg blvd rd sr ltd plc rt bancorp bhd assn univ intl sys tel est ext sq jr bros "
    "ed.d ph.d esq etc al seq".split()
)
_CLOSING_CAPITALISED = frozenset(["Az", "Ark", "Del", "Ill", "La", "Mass", "Miss", "Ore", "Pa", "Tex", "Wash"])
_CLOSING_COMPANIES = re.compile("(?i:p?pt)[ey](?i:s?)")
_TITLES = frozenset(
    [
        "mr",
        "mrs",
        "ms",
        "dr",
        "drs",
        "prof",
        "profs",
        "sen",
        "sens",
        "rep",
        "reps",
        "atty",
        "attys",
        "lt",
        "col",
        "gen",
        "messrs",
        "gov",
        "govs",
        "adm",
        "rev",
        "maj",
        "sgt",
        "cpl",
        "pvt",
        "capt",
        "st",
        "ste",
        "ave",
        "pres",
        "lieut",
        "hon",
        "brig",
        "cmdr",
        "comdr",
        "pfc",
        "spc",
        "supt",
        "supts",
        "det",
        "mt",
        "ft",
        "adj",
        "adv",
        "asst",
        "assoc",
        "ens",
        "insp",
        "mlle",
        "mme",
        "msgr",
        "sfc",
        "sr",
        "vs",
        "alex",
        "wm",
        "jos",
        "cie",
        "cf",
        "treas",
        "ph",
        "invt",
        "elec",
        "natl",
        "dept",
        "blvd",
        "rd",
        "bldg",
        "a.k.a",
    ]
)
_TRADES = re.compile("(?i:m)[ft](?i:g)")
_ABBREVIATIONS_BEFORE_NUMBERS = frozenset(["ca", "fig", "figs", "prop", "no", "nos", "art", "bldg", "pp", "op"])

# After an acronym these begin a sentence: `I. The` is two of them, `I. Smith` is a name.
_OPENERS = (
    "A(?i:bout|ccording|dditionally|fter|n|s|t)?|B(?i:ut)|E(?i:arlier)|H(?i:er?|ere|owever)|I(?i:f|n|t)|L(?i:ast)|"
    r"M(?i:any|ore|r\.|s\.)|N(?i:ow)|O(?i:nce|ne|ther|ur)|S(?i:he|ince|o|ome|uch)|"
    "T(?i:hat|he|heir|hen|here|hese|hey|his)|W(?i:e|hat|hen|hile)|Y(?i:et|ou)"
)
_FILE_TYPES = (
    "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|"
    "wav|x|xml|zip"
)
_APOSTROPHE_WORDS = (
    rf"{_APOSTROPHE}[nN]{_APOSTROPHE}?",
    rf"[lLdDjJ]{_APOSTROPHE}",
    rf"(?i:dunkin|somethin|ol){_APOSTROPHE}",
    rf"{_APOSTROPHE}(?i:em|till?|cause)",
    rf"{_APOSTROPHE}[2-9]0[sS]",
    rf"[A-HJ-XZn]{_ANY_APOSTROPHE}{_ALPHA}{{2,}}",
    rf"{_ALPHA}+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z]{_ALPHA}*",
    r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
    rf"[oO]{_ANY_APOSTROPHE}[oO]",
)


@dataclass(frozen=True)
class _Rule:
    """One kind of token."""

    pattern: re.Pattern[str]  # the token is group 1; what follows the group is only looked at
    clean: Callable[[str], str]  # from the characters of the caption to the token
    keep: int = 0  # of the characters matched by group 1, how many at its end are left for the next token
    accept: Callable[[str], bool] | None = None  # what else the characters must fulfil
    first: str = "."  # what it can begin with: "a" a letter, "1" a digit, "<" a tag, "." the rest


def _plain(text: str) -> str:
    return text


def _soft(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _spaced(text: str) -> str:
    return text.replace(" ", "\u00a0").replace("(", "-LRB-").replace(")", "-RRB-")


def _ampersand(text: str) -> str:
    return re.sub("(?i)&amp;", "&", text)


_QUOTES = str.maketrans(
    dict.fromkeys("\u0091‘‛‹", "`")
    | dict.fromkeys("\u0092’›", "'")
    | dict.fromkeys("\u0093“«", "``")
    | dict.fromkeys("\u0094”»", "''")
)


def _quotes(text: str) -> str:
    return text.replace("&apos;", "'").translate(_QUOTES)


_REPLACEMENTS = {
    "¢": "cents", "£": "#", "¤": "$", "\u0080": "$", "₠": "$", "€": "$",
    "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-",
    "&quot;": "''", '"': "''",
}  # fmt: skip


def _replaced(text: str) -> str:
    return _REPLACEMENTS.get(text, text)


def _removed(text: str) -> str:
    return "."


def _is_closing(text: str) -> bool:
    stem = text[:-1]
    return (
        stem.lower() in _CLOSING_ABBREVIATIONS
        or stem[:1] + stem[1:].lower() in _CLOSING_CAPITALISED
        or _CLOSING_COMPANIES.fullmatch(stem) is not None
    )


def _is_title(text: str) -> bool:
    return text[:-1].lower() in _TITLES or _TRADES.fullmatch(text[:-1]) is not None


def _is_abbreviation_before_number(text: str) -> bool:
    return text[:-1].lower() in _ABBREVIATIONS_BEFORE_NUMBERS


@lru_cache(maxsize=1)
def _rules() -> dict[str, list[_Rule]]:
    """The rules for each kind of first character, the one that wins among equals first. Compiled on first use."""

    def rule(
        token: str,
        behind: str = "",
        clean: Callable[[str], str] = _plain,
        *,
        keep: int = 0,
        accept: Callable[[str], bool] | None = None,
        first: str = ".",
    ) -> _Rule:
        return _Rule(re.compile(f"({token}){behind}", re.DOTALL), clean, keep, accept, first)

    rules = (
        rule(r"[cC]\+\+|[cCfF]#", first="a"),
        rule(r"(?i:cannot|'twas)", keep=3, first="a."),
        rule(rf"{_APOSTROPHE}(?i:tis)|(?i:gonna|gotta|lemme|gimme|wanna)", keep=2, first="a."),
        rule(_TAG, clean=lambda text: text.replace(" ", "\u00a0"), first="<"),
        rule(r"&(?i:md|mdash|ndash);|[\u0096\u0097\u2013-\u2015]", clean=_removed),
        rule(_ENTITY_AND, clean=lambda text: "&"),
        rule(r"&(?:(?i:ht|tl|ur|lr|qc|ql|qr|odq|cdq)|#[0-9]+);"),
        # words, and what splits them
        rule(_WORD, _CLITIC, _soft, first="a."),
        rule(r"[A-Za-z\u00AD]*[A-MO-Za-mo-z]\u00AD*", _NOT, _soft, first="a."),
        rule(_WORD, clean=_soft, first="a."),
        *(rule(word, first="a.") for word in _APOSTROPHE_WORDS),
        rule(rf"[yY]{_APOSTROPHE}", _ALPHA, first="a"),
        # addresses
        rule(rf"(?i:https?)://[^{_NO_ADDRESS}]+{_ADDRESS_END}", first="a"),
        rule(
            rf"(?:(?i:www)\.(?:[^{_NO_ADDRESS}.!?,]+\.)+[a-zA-Z]{{2,4}}|(?:{_HOST}+\.)+(?i:com|net|org|edu))"
            rf"(?:/[^{_NO_PATH}]+{_ADDRESS_END})?",
            first="a1.",
        ),
        rule(
            rf"(?:&(?i:lt);|<)?[a-zA-Z0-9][^{_NO_MAIL}]*@(?:[^{_NO_MAIL}.]+\.)*[^{_NO_MAIL}.]+(?:&(?i:gt);|>)?",
            first="a1.",
        ),
        rule(r"@[a-zA-Z_][a-zA-Z_0-9]*"),
        rule(rf"#{_LETTER}+"),
        # what was split off
        rule(_CLITIC, r"[^A-Za-z]", _quotes),
        rule(_NOT, r"[^A-Za-z]", _quotes, first="a"),
        # numbers
        rule(rf"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}", first="1"),
        rule(rf"[-+]?{_NUMBER}", clean=_soft, first="1."),
        rule(r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)"),
        rule(rf"(?:{_DIGIT}{{1,4}}[- \u00A0])?{_DIGIT}{{1,4}}(?:\\?/|⁄){_DIGIT}{{1,4}}", clean=_spaced, first="1"),
        rule(r"[¼½¾⅓⅔]", clean=_replaced),
        rule(
            r"-(?i:rrb|lrb|rcb|lcb|rsb|lsb)-|(?i:c\.d\.s|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls)|"
            rf"(?i:cap{_APOSTROPHE}n|c{_APOSTROPHE}est)",
            clean=_ampersand,
            first="a.",
        ),
        rule(r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", first="a1"),
        rule(r"[A-Z]*\$|#", first="a."),
        rule(r"[¢£¤\u0080₠€]", clean=_replaced),
        # abbreviations
        rule(r"[A-Za-z]\.", rf"{_SPACE}+(?:{_OPENERS}|{_TAG}){_SPACE}", keep=1, first="a"),
        rule(rf"{_ACRONYM}\.", rf"{_SPACE}+(?:{_OPENERS}|{_TAG}){_SPACE}", first="a"),
        rule(r"[A-Za-z]+\.", rf"{_SPACE}?{_DIGIT}", accept=_is_abbreviation_before_number, first="a"),
        rule(r"(?i:p?t[ey]|co)\.", rf"{_SPACE}(?i:ltd|lim)", first="a"),
        rule(r"[A-Za-z]+\.", r"..", accept=_is_closing, first="a"),
        rule(r"[A-Za-z]+\.[A-Za-z]\.", r"..", accept=_is_closing, first="a"),
        rule(r"[A-Za-z]+(?:\.[A-Za-z])?\.", accept=_is_closing, first="a"),
        rule(r"[A-Za-z]+\.|(?i:a\.k\.a)\.", accept=_is_title, first="a"),
        rule(rf"{_ACRONYM}\.", first="a"),
        rule(_ACRONYM, _SPACE, first="a"),
        rule(rf"{_APOSTROPHE}[0-9][0-9]", _SPACE),
        rule(
            rf"(?:{_LETTER}|{_DIGIT})+(?:\.(?:{_LETTER}|{_DIGIT})+)*\.(?i:{_FILE_TYPES})",
            rf"(?:{_SPACE}|[.?!,])",
            first="a1.",
        ),
        rule(rf"{_WORD}\.", _BEHIND_CLAUSE, _soft, first="a."),
        # telephones
        rule(
            rf"(?:\({_2_TO_3}\)[ \u00A0]?|(?:\+\+?)?(?:{_2_TO_4}{_GAP})?{_2_TO_4}{_GAP}){_3_TO_4}{_GAP}?{_3_TO_5}|"
            rf"(?:(?:\+\+?)?{_2_TO_4}\.)?{_2_TO_4}\.{_3_TO_4}\.{_3_TO_5}",
            clean=_spaced,
            first="1.",
        ),
        # marks
        rule(r"\"|&(?i:quot);|''", clean=_replaced),
        rule(r"<|&(?i:lt);", clean=lambda text: "<"),
        rule(r">|&(?i:gt);", clean=lambda text: ">"),
        rule(rf"[<>]?{_EYES}{_NOSE}?{_MOUTH}", r"[^A-Za-z0-9]", _spaced),
        rule(rf"{_EYE}_{_EYE}|\({_EYE}[_.]?{_EYE}\)|\({_WIDE_EYE}-(?:{_WIDE_EYE}|`)\)", clean=_spaced, first="a."),
        rule(r"[(){}\[\]]", clean=_replaced),
        rule(r"-{3,4}", clean=_removed),
        rule(r"-+"),
        rule(r"\.{3,5}|…|\.[ \u00A0](?:\.[ \u00A0])+\.", clean=_removed),
        rule(r"@+|#+|_+|\*+|(?:\\\*){1,3}|[,;:\u3001]|[?!]+|[.§]|=|/"),
        # words with hyphens
        rule(rf"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:{_INITIALS}\.|[A-Za-z0-9\u00AD]+))+", clean=_soft, first="a1"),
        rule(
            rf"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:{_INITIALS}\.|[A-Za-z0-9\u00AD]+))+\.",
            _BEHIND_CLAUSE,
            _soft,
            first="a1",
        ),
        rule(rf"{_THING}\.", _BEHIND_CLAUSE, first="a1"),
        rule(_THING, first="a1"),
        rule(rf"[A-Z]+(?:(?:{_ENTITY_AND}|[+&])[A-Z]+)+\.", _BEHIND_CLAUSE, _ampersand, first="a"),
        rule(rf"[A-Z]+(?:(?:{_ENTITY_AND}|[+&])[A-Z]+)+", clean=_ampersand, first="a"),
        # quotes
        rule("'", rf"(?:{_ALPHA}[^ \u00A0\n]|[AaIiUu]{_SPACE})", _quotes),
        rule(_QUOTE, clean=_quotes),
        rule(_CLITIC, clean=_quotes),
        rule(_NOT, clean=_quotes, first="a"),
        rule(r"<<|>>"),
        rule(r"&(?i:nbsp);", clean=_removed),
        rule(r"[+%&~^|\\°⁄]"),
    )
    by_first = {first: [rule for rule in rules if first in rule.first] for first in "a1."}
    by_first["<"] = [rule for rule in rules if "<" in rule.first or "." in rule.first]
    return by_first


# --- Reading ---

_SPACES = re.compile("[ \u00a0\u2003]*")
_PLAIN_WORD = re.compile("[A-Za-zÀà]+(?= )")
_PLAIN_PIECE = re.compile("([A-Za-z]+)([.,!?;:]?)")
_JOINED_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_ABBREVIATIONS = (_is_closing, _is_title, _is_abbreviation_before_number)

# Where a rule may look across a space: tags, numbers in a row, full stops in a row, and letters and abbreviations
# whose full stop depends on the word behind
_OPEN = r"(?<![A-Za-z])(?:[A-Za-z]|(?i:ca|figs?|prop|nos?|art|bldg|pp|op|p?pt[ey]))\."
_NUMBERS_ACROSS = re.compile("[0-9][^ ]* +[0-9(+]")
_STOPS_ACROSS = re.compile(rf"\. +\.|{_OPEN} ")
_STOP_AT_END = re.compile(rf"{_OPEN}$")


def _lex(caption: str, following: str) -> list[str]:
    """The tokens of a caption, by the rules."""
    shape = f"{outline(caption)}\n{outline(following)}\n"
    rules = _rules()
    tokens: list[str] = []
    place = 0
    while place < len(caption):
        character = shape[place]
        if character == " ":
            place = _SPACES.match(shape, place).end()  # type: ignore[union-attr]  # it matches nothing at worst
            continue
        plain = _PLAIN_WORD.match(shape, place)
        if plain is not None:
            word = caption[place : plain.end()].lower()
            if word not in _JOINED_WORDS:
                tokens.append(word)
                place = plain.end()
                continue
        kind = "a" if character.isalpha() else "1" if character.isdecimal() else "."
        if character == "<" and shape.find(">", place) >= 0:  # else a row of opened tags would be read to the end each
            kind = "<"
        furthest, size, chosen = place, 1, None
        for rule in rules[kind]:
            match = rule.pattern.match(shape, place)
            if match is None or match.end() <= furthest:
                continue
            if rule.accept is None or rule.accept(match[1]):
                furthest, size, chosen = match.end(), match.end(1) - place, rule
        if chosen is not None:
            size -= chosen.keep
            tokens.append(chosen.clean(caption[place : place + size]).lower())
        place += size  # a character that begins no token vanishes
    if tokens:
        tokens[-1] = tokens[-1].rstrip()
    return [token for token in tokens if token not in PUNCTUATION]


@lru_cache(maxsize=1 << 16)
def _piece(text: str) -> tuple[str, ...]:
    """The tokens of what stands between two spaces."""
    plain = _PLAIN_PIECE.fullmatch(text)
    if plain is not None:
        word = plain[1].lower()
        dotted = plain[2] == "." and (len(word) == 1 or any(is_one(text) for is_one in _ABBREVIATIONS))
        if word not in _JOINED_WORDS and not dotted:
            return (word,)
    return tuple(_lex(text, "A "))


def tokenize(caption: str, *, following: str = "A ") -> list[str]:
    """Splits a caption into lower-case tokens without punctuation.

    Args:
        caption: any text. Line breaks count as spaces.
        following: how the next caption of the file begins, or "" for the last one. The reference reads a file of
            captions at a stretch, and takes a full stop after a letter for the end of a sentence when a word such as
            "A" or "The" comes next: `a sign that reads K.` ends in `k` there, and else in `k.`.

    Returns:
        The tokens; none for a caption without words. A token can hold a no-break space: `3 1/2` is one.
    """
    text = caption.rstrip(" ")
    if (
        not (text.isascii() and text.isprintable())
        or "<" in text
        or _NUMBERS_ACROSS.search(text)
        or (". " in text and _STOPS_ACROSS.search(text))
        or (following != "A " and text.endswith(".") and _STOP_AT_END.search(text, max(0, len(text) - 6)))
    ):
        return _lex(caption, following)
    tokens: list[str] = []
    for piece in text.split():
        tokens += _piece(piece)
    return tokens


def tokenize_all(captions: Sequence[str]) -> list[list[str]]:
    """Splits the captions of a file, each with a view of the next one, exactly as the reference does."""
    following = [*captions[1:], ""]
    return [tokenize(caption, following=following[number]) for number, caption in enumerate(captions)]


def split_words(tokens: Sequence[str]) -> Sequence[str]:
    """Tokens, split where they hold a space: to BLEU and CIDEr `3 1/2` is two words, to ROUGE-L it is one."""
    text = " ".join(tokens)
    return tokens if text.isascii() else text.split()

"""The rules by which the reference tokeniser tells words, numbers, addresses and marks apart.

Patterns are over the outline of a caption, see `captioner.metrics.characters`; how they are used, and where they come
from, is said in `captioner.metrics.tokenization`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

# --- Pieces of patterns ---

_LETTER = r"(?:[A-Za-zÀà\u0300\u00AD]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_ALPHA = r"[A-Za-zÀà]"
_ALNUM = r"[A-Za-z0-9Àà٠]"
_DIGIT = r"[0-9٠]"
_SPACE = r"[ \t\u00A0\u2003\n]"
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
_COMPOUND = (
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
    (
        "mr mrs ms dr drs prof profs sen sens rep reps atty attys lt col gen messrs gov govs adm rev maj sgt "
        "cpl pvt capt st ste ave pres lieut hon brig cmdr comdr pfc spc supt supts det mt ft adj adv asst "
        "assoc ens insp mlle mme msgr sfc sr vs alex wm jos cie cf treas ph invt elec natl dept blvd rd bldg "
        "a.k.a"
    ).split()
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
class Rule:
    """One kind of token."""

    pattern: re.Pattern[str]  # the token is group 1; what follows the group is only looked at
    clean: Callable[[str], str]  # from the characters of the caption to the token
    keep: int = 0  # of the characters matched by group 1, how many at its end are left for the next token
    accept: Callable[[str], bool] | None = None  # a condition on the matched characters
    first: str = "."  # the kind of its first character: "a" a letter, "1" a digit, "<" a tag, "." the rest


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


def is_abbreviation(text: str) -> bool:
    """Whether a word with a full stop behind it may be an abbreviation, which keeps the full stop."""
    return len(text) == 2 or _is_closing(text) or _is_title(text) or _is_abbreviation_before_number(text)


@lru_cache(maxsize=1)
def rules() -> dict[str, list[Rule]]:
    """The rules for each kind of first character, the one that wins among equals first. Compiled on first use."""

    def rule(
        token: str,
        behind: str = "",
        clean: Callable[[str], str] = _plain,
        *,
        keep: int = 0,
        accept: Callable[[str], bool] | None = None,
        first: str = ".",
    ) -> Rule:
        return Rule(re.compile(f"({token}){behind}", re.DOTALL), clean, keep, accept, first)

    every = (
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
        rule(rf"(?i:https?)://(?:[^{_NO_ADDRESS}]+{_ADDRESS_END}|\u0002)", first="a"),
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
        # the part that was split off
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
        rule(rf"{_COMPOUND}\.", _BEHIND_CLAUSE, first="a1"),
        rule(_COMPOUND, first="a1"),
        rule(rf"[A-Z]+(?:(?:{_ENTITY_AND}|[+&])[A-Z]+)+\.", _BEHIND_CLAUSE, _ampersand, first="a"),
        rule(rf"[A-Z]+(?:(?:{_ENTITY_AND}|[+&])[A-Z]+)+", clean=_ampersand, first="a"),
        # quotes
        rule("'", rf"(?:{_ALPHA}[^ \t\u00A0\n]|[AaIiUu]{_SPACE})", _quotes),
        rule(_QUOTE, clean=_quotes),
        rule(_CLITIC, clean=_quotes),
        rule(_NOT, clean=_quotes, first="a"),
        rule(r"<<|>>"),
        rule(r"&(?i:nbsp);", clean=_removed),
        rule(r"[+%&~^|\\°⁄]"),
    )
    by_first = {first: [one for one in every if first in one.first] for first in "a1."}
    by_first["<"] = [one for one in every if "<" in one.first or "." in one.first]
    return by_first

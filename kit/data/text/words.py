"""Words as the field's English pipelines count them: the tokens of spaCy's English tokenizer, punctuation included.

datatrove, and with it FineWeb's thresholds, count these tokens, so the same verdicts need the same tokens. They
depend on nothing but the piece between two spaces, and most pieces have been seen before: a process remembers
them, and a text becomes an array of token numbers without a loop over its words in Python.

The rules are those of spaCy 3.8 (Honnibal et al., spacy.io, `spacy.blank("en")`; MIT), written anew. Not covered: its
patterns for a few scripts' letters (any Unicode letter counts here), private address ranges in URLs, and
emoticons that are written with spaces. A test holds the tokens of real pages against it.
"""

from __future__ import annotations

import string
import unicodedata
from array import array
from typing import NamedTuple

import numpy as np
import regex

SOLO = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Scripts that write no spaces between words: kana, Han, Thai, Lao, Burmese, Khmer."""
UNSPACED = regex.compile(f"[{SOLO}]")
PLAIN = regex.compile(rf"[{SOLO}]|[^\W{SOLO}]+|[^\w\s]")
LONGEST_PIECE, LONGEST_SUFFIX = 300, 40
MOST_PIECES = 1 << 18
"""What a process remembers at most, about 60 MB; then it begins anew."""
QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
PUNCT = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
CURRENCY = "US$|C$|A$|" + "|".join("$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿")
UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa "
    "Pa mbar mb MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с "
    "км/ч кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ тб"
)
LETTER, UPPER = r"\p{L}", r"[\p{Lu}\p{Lo}]"
LOWER_OR_QUOTE, UPPER_OR_QUOTE = (rf"[{x}{regex.escape(QUOTES)}]" for x in (r"\p{Ll}\p{Lo}", r"\p{Lu}\p{Lo}"))


def _any(chars: str) -> str:
    return f"[{regex.escape(chars)}]"


def _one_of(words: str, between: str = " ") -> str:
    return "|".join(regex.escape(w) for w in words.split(between))


MARKS = rf"…|{_any(PUNCT)}|\.\.+|{_any(QUOTES)}"
PREFIX = regex.compile(rf"[§%=—–]|\+(?![0-9])|{MARKS}|{_one_of(CURRENCY, '|')}|\p{{So}}")
SUFFIX = regex.compile(
    rf"(?:{MARKS}|\p{{So}}|['’][sS]|[—–]|(?<=[0-9])(?:\+|{_one_of(CURRENCY, '|')}|{_one_of(UNITS)})"
    rf"|(?<=°[FfCcKk])\.|(?<=[0-9\p{{Ll}}\p{{Lo}}%²\-+{regex.escape(PUNCT + QUOTES)}])\.|(?<={UPPER}{UPPER})\.)$"
)
INFIX = regex.compile(
    rf"\.\.+|…|\p{{So}}|(?<=[0-9])[+\-*^](?=[0-9-])|(?<={LOWER_OR_QUOTE})\.(?={UPPER_OR_QUOTE})"
    rf"|(?<={LETTER}),(?={LETTER})|(?<=[\p{{L}}0-9])(?:-|–|—|--|---|——|~)(?={LETTER})"
    rf"|(?<=[\p{{L}}0-9])[:<>=/](?={LETTER})"
)
URL = regex.compile(
    r"(?:[\w+\-.]{2,}://)?(?:\S+(?::\S*)?@)?(?:(?:\d{1,3}\.){3}\d{1,3}"
    r"|(?:(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62})?[A-Za-z0-9\u00a1-\uffff]\.)+[\p{Ll}\p{Lo}]{2,63})"
    r"(?::\d{2,5})?(?:[/?#]\S*)?"
)
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
ENDS = frozenset(
    regex.findall(
        r"\p{Sentence_Terminal}", "".join(map(chr, range(0xD800))) + "".join(map(chr, range(0xE000, 0x20000)))
    )
)
"""Marks that end a sentence, in any script (Unicode's property)."""
SYMBOLS = (
    frozenset(
        string.punctuation
        + "«»´–—’“”„…∶━►、〈〉《》「」【】％（），１：；～ "
        + "".join(map(chr, (*range(32), *range(127, 160))))
    )
    | ENDS
)
"""Characters that make no word, as datatrove lists them."""
ABBREVIATIONS = """'S 's ‘S ‘s and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ma'am Ma'am o'clock O'clock lovin' Lovin'
havin' Havin' doin' Doin' goin' Goin' nothin' Nothin' nuthin' Nuthin' ol' Ol' somethin' Somethin' 'em 'll 'nuff 'd Mt. Ak. Ala.
Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass.
Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis.
a.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms.
p.m. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. °c. °f. °k. °C. °F. °K. ä. ö. ü. C++ <space> \\t \\n '' ' \\") —"""
EMOTICONS = """0_0 (: :-0 :X :-] (^_^) (._.) ^___^ ]= =D -_- 8-) <333 :-D 0.o <33 ;) :-/ [-: :} <.< V.V O_O [= :-))) =3 (-: :-x
XD ._. :> (-8 :] ;-) </3 ¯\\(ツ)/¯ ;_; ): :-p :o :-O >:( :o) ;D :-o O.O :') (>_<) :))) (o: :-} :)) xD :D )-: >.> v_v =( 8D (-_-)
(; XDD :-( (*_*) >:o =[ :'( :O :P :-X :p :-P :/ :((( :-((( :'-) -__- :x :| :-* :-)) ಠ︵ಠ :-) =| <3 o_0 =/ :* :3 (-; v.v V_V :((
o.0 >.< O.o (ಠ_ಠ) ^__^ ^_^ (╯°□°）╯︵┻━┻ :-> xDD 8-D :1 ಠ_ಠ =] @_@ O_o o_O 0.0 ><(((*> :0 ;-D [: :) 0_o o.O :-| (= =) (¬_¬) :(
:-3 8) o.o :'-( o_o :-(( :()"""
CONTRACTED = {
    "i": "'m 'm+a",
    "i you he she it we they": "'ll 'll+'ve 'd 'd+'ve",
    "i you we they": "'ve",
    "you we they": "'re",
    "he she it who what when where why how there that this": "'s",
    "who what when where why how there that this these those": "'ll 'll+'ve 'd 'd+'ve",
    "who what when where why how there that these those": "'re 've",
    "ca could do does did had may might must need ought sha should wo would": "n't n't+'ve",
    "could might must should would": "'ve",
    "ai are is was were have has dare": "n't",
}
"""Words and what may be joined to them, with its apostrophe or without."""
NOT_CONTRACTED = frozenset(("ill", "its", "hell", "shell", "shed", "were", "well", "whore"))
SPLIT = "y' all|y all|how 'd 'y|How 'd 'y|not 've|not ve|Not 've|Not ve|can not|Can not|gon na|Gon na|got ta|Got ta|let 's|Let 's|c'm on|C'm on"


def _specials() -> dict[str, tuple[str, ...]]:
    """Pieces whose tokens are said one by one, such as `don't`, `9am`, `Mr.` and `:-)`."""
    letters = [f"{c}." for c in "abcdefghijklmnopqrstuvwxyz"]
    exceptions = {s: (s,) for s in (*ABBREVIATIONS.split(), *EMOTICONS.split(), *letters)}
    parts = [tuple(form.split()) for form in SPLIT.split("|")]
    parts += [(str(h), half) for h in range(1, 13) for half in ("a.m.", "am", "p.m.", "pm")]
    for words, ends in CONTRACTED.items():
        joined = [tuple(e.split("+")) for e in ends.split()]
        for word in (form for w in words.split() for form in (w, w.title())):
            parts += [(word, *e) for e in joined]
            parts += [(word, *(form.replace("'", "") for form in e)) for e in joined]
    exceptions |= {"".join(p): p for p in parts}
    exceptions = {k: v for k, v in exceptions.items() if k.lower() not in NOT_CONTRACTED}
    curly = {
        k.replace("'", "’"): tuple(form.replace("'", "’") for form in v)
        for k, v in exceptions.items()
        if "'" in k
    }
    return exceptions | curly


def _affixes(piece: str) -> list[str]:
    """Tokens of a piece by its marks at both ends, then by those inside; specials that stand free are found."""
    before, after = [], []
    size = -1
    while piece and len(piece) != size:
        if piece in SPECIALS:
            break
        size = len(piece)
        head = PREFIX.match(piece)
        start = head.end() if head else 0
        if head and piece[start:] in SPECIALS:
            before.append(head[0])
            piece = piece[start:]
            break
        # no suffix is longer, but for a run of dots, and a search of the whole piece would take its length each time
        foot = SUFFIX.search(piece, max(start, len(piece) - LONGEST_SUFFIX))
        length = len(foot[0]) if foot else 0
        if foot and piece[:-length] in SPECIALS:
            after.append(foot[0])
            piece = piece[:-length]
            break
        if head:
            before.append(head[0])
        if foot:
            after.append(foot[0])
        piece = piece[start : len(piece) - length]
    return [*before, *_inside(piece), *after[::-1]]


def _inside(piece: str) -> list[str]:
    if piece in SPECIALS:
        return list(SPECIALS[piece])
    if not piece or URL.fullmatch(piece):
        return [piece] if piece else []
    tokens, start = [], 0
    for infix in INFIX.finditer(piece):
        if infix.start() == 0:
            continue
        tokens += [part for part in (piece[start : infix.start()], infix[0]) if part]
        start = infix.end()
    return tokens + ([piece[start:]] if start < len(piece) else [])


def split_piece(piece: str) -> tuple[str, ...]:
    """Tokens of one piece of text without white space.

    Two things are not spaCy's: in scripts that write no spaces every character is a token, as in the kit's
    n-grams; and a piece longer than any word is cut by a rule that takes time in proportion to its length.
    """
    if piece in SPECIALS:
        return SPECIALS[piece]
    if not UNSPACED.search(piece):
        if piece.isalpha():
            return (piece,)
        # most of what is new is a word with a mark behind it, which need not go through all the patterns
        word, mark = piece[:-1], piece[-1]
        if (
            word.isalpha()
            and word not in SPECIALS
            and (mark in ',;:!?)]"”’' or (mark == "." and word[-1].islower()))
        ):
            return (word, mark)
    else:
        return tuple(PLAIN.findall(piece))
    if len(piece) > LONGEST_PIECE:
        return (piece,) if "://" in piece else tuple(PLAIN.findall(piece))
    tokens = _affixes(piece)
    i = 0
    while i < len(tokens) - 1:  # marks that were taken apart may be an emoticon together
        for j in range(min(len(tokens), i + STARTS.get(tokens[i], 0)), i + 1, -1):
            whole = "".join(tokens[i:j])
            if JOINED.get(whole) == tuple(tokens[i:j]):
                tokens[i:j] = SPECIALS[whole]
                break
        i += 1
    return tuple(tokens)


SPECIALS: dict[str, tuple[str, ...]] = {}
JOINED = {s: tuple(_affixes(s)) for s in _specials() if not s.isalpha()}
STARTS: dict[str, int] = {}
"""Most tokens of what an emoticon's first token begins."""
for _first, *_more in JOINED.values():
    STARTS[_first] = max(STARTS.get(_first, 0), 1 + len(_more))
SPECIALS.update(_specials())


class Tokens(NamedTuple):
    """A text's tokens as numbers: equal numbers, equal tokens. Only good until the next call of `tokens`."""

    ids: np.ndarray
    pieces: np.ndarray
    """How many tokens each piece between spaces has."""
    traits: np.ndarray
    """One row a token: the columns `LENGTH`, `WORD`, `ALPHA`, `STOP`, `MARK`, `END`."""


LENGTH, WORD, ALPHA, STOP, MARK, END = range(6)
TRAITS = 6


class _Memory(dict):
    """Number of every piece seen so far, and in flat arrays its tokens; one for a process."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self.flat, self.starts, self.traits = array("q"), array("q", [0]), array("i")

    def __missing__(self, piece: str) -> int:
        for token in split_piece(piece):
            number = self.tokens.setdefault(token, len(self.tokens))
            if number * TRAITS == len(self.traits):
                self.traits.extend(_traits(token))
            self.flat.append(number)
        self.starts.append(len(self.flat))
        self[piece] = len(self)
        return self[piece]


def _traits(token: str) -> tuple[int, ...]:
    if token.isalpha() and token not in STOP_WORDS:
        return len(token), 1, 1, 0, 0, 0
    word = any(c not in SYMBOLS for c in token)
    alpha = token.isalpha() or any(map(str.isalpha, token))
    stop = 1 << STOP_WORDS.index(token) if token in STOP_WORDS else 0
    mark = all(unicodedata.category(c)[0] == "P" for c in token)
    return len(token), word, alpha, stop, mark or token in ENDS, token in ENDS


_memory = _Memory()


def tokens(text: str) -> Tokens:
    """The tokens of a text, in order; what it takes is looking up its pieces and a few array operations."""
    global _memory
    if len(_memory) > MOST_PIECES or len(_memory.flat) > 4 * MOST_PIECES:
        _memory = _Memory()
    pieces = text.split()
    numbers = np.fromiter(map(_memory.__getitem__, pieces), np.int64, len(pieces))
    starts, flat = (np.frombuffer(column, np.int64) for column in (_memory.starts, _memory.flat))
    traits = np.frombuffer(_memory.traits, np.int32)
    sizes = starts[numbers + 1] - starts[numbers]
    # where each token lies in `flat`: its piece's start there, plus how far into the piece it is
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    ids = flat[np.arange(total) + np.repeat(starts[numbers] - ends + sizes, sizes)]
    return Tokens(ids, sizes, traits.reshape(-1, TRAITS)[ids])


def word_count(text: str) -> int:
    """The value of `words` alone."""
    return int(tokens(text).traits[:, WORD].sum())

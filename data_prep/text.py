"""Text as people typed it: mis-decoded punctuation mended, invisible characters gone, white space plain.

Corpora carry traces of how they were stored: bytes of the Windows encoding read as Latin-1 (U+0092 where ’ was meant),
byte order marks, zero-width spaces, line separators inside a sentence. A tokenizer turns each into tokens that mean
nothing. All else stays as it is: case, quotes, emoji, accents, composed or not.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Format characters that are seen: number signs and the like of Arabic, Syriac and Kaithi, joiners of hieroglyphs.
_VISIBLE = frozenset("\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd").union(
    map(chr, range(0x0600, 0x0606)), map(chr, range(0x13430, 0x13456))
)
_JOINERS = re.compile("[\u200c\u200d]+")
_TAGS = re.compile("(?<=\U0001f3f4)([\U000e0020-\U000e007e]+\U000e007f)|[\U000e0020-\U000e007f]+")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_MISREAD_UTF8 = re.compile("\u00e2\u0080[\u0080-\u00bf]")
_VIRAMA = 9  # the canonical combining class of the signs that silence a vowel


def clean_text(text: str) -> tuple[str, list[str]]:
    """
    The text without the traces of its storage. Cleaning it again changes nothing.

    - U+0080 to U+009F become what the Windows encoding (cp1252) has there; the five that it leaves undefined go.
      Where three characters are the UTF-8 bytes of one punctuation mark (â, U+0080, U+0099 for ’), they become it.
    - All white space becomes single spaces, none at the ends.
    - Control and format characters, non-characters, lone surrogates and U+FFFD go. The two joiners U+200C and U+200D
      stay where they mean something: inside emoji and in scripts that join letters.

    Args:
        text: any string.

    Returns:
        The text, and a reason for each kind of change, such as "U+0092 was meant as ’."; none for plain white space
        (blanks, tabs, ends of lines).
    """
    if text.isprintable() and "\ufffd" not in text:  # nothing odd: all of it in one look, as most lines are
        return " ".join(text.split()), []
    reasons = []

    def note(replacement: str, reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return replacement

    def join_pair(match: re.Match) -> str:
        character = match[0].encode("utf-16", "surrogatepass").decode("utf-16")
        return note(character, f"the two surrogates of {_code(character)} were put together.")

    def decode(match: re.Match) -> str:
        character = match[0].encode("latin-1").decode("utf-8")
        return note(character, f"{' '.join(map(_code, match[0]))} was meant as {_code(character)}.")

    text = _MISREAD_UTF8.sub(decode, _SURROGATE_PAIR.sub(join_pair, text))
    table = {}
    for character in sorted(set(text)):
        replacement, reason = _replace(character)
        if replacement != character:
            table[ord(character)] = note(replacement, reason) if reason else replacement
    text = text.translate(table)

    # These two hang on their neighbours, so they are judged when all else is gone.
    def check_tags(match: re.Match) -> str:
        if match[1]:  # a flag such as Scotland's
            return match[0]
        return note("", "tag characters (U+E0020 to U+E007F) outside of a flag were removed.")

    def check_joiners(match: re.Match) -> str:
        before, after = text[max(match.start() - 1, 0) : match.start()], text[match.end() : match.end() + 1]
        useful = _joins(before) and (_joins(after) or unicodedata.combining(before) == _VIRAMA)
        if useful and len(match[0]) == 1:
            return match[0]
        for character in sorted(set(match[0][1:] if useful else match[0])):
            note("", f"{_code(character)} was removed.")
        return match[0][0] if useful else ""

    text = _TAGS.sub(check_tags, text)
    text = _JOINERS.sub(check_joiners, text)
    return " ".join(text.split()), reasons


@lru_cache(maxsize=4096)
def _replace(character: str) -> tuple[str, str | None]:
    """What stands for one character, itself included, and the reason if it is worth a line in the report."""
    code, category = ord(character), unicodedata.category(character)
    if 0x80 <= code <= 0x9F:
        try:
            meant = bytes([code]).decode("cp1252")
        except UnicodeDecodeError:
            return "", f"{_code(character)} was removed."
        return meant, f"{_code(character)} was meant as {meant}."
    if character in " \t\r\n":
        return " ", None
    if character.isspace():
        return " ", f"{_code(character)} became a space."
    if character == "\ufffd":
        return "", f"{_code(character)} was removed; the character that it took the place of is lost."
    if category == "Cs":
        return "", f"{_code(character)}, half of a character, was removed."
    if category == "Cn":  # not known to this Python, such as a new emoji, or a non-character
        no_character = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
        return ("", f"{_code(character)} was removed.") if no_character else (character, None)
    if category not in ("Cc", "Cf") or character in _VISIBLE or _JOINERS.match(character) or _TAGS.match(character):
        return character, None
    return "", f"{_code(character)} was removed."


def _joins(character: str) -> bool:
    """Whether a joiner next to it can mean something: it is an emoji, or of a script that comes after Cyrillic's."""
    if not character or ord(character) < 0x0590:
        return False
    category = unicodedata.category(character)
    return category[0] in "LM" or category in ("So", "Sk", "Sm", "Cn")


def _code(character: str) -> str:
    """`U+200B (zero width space)`."""
    name = unicodedata.name(character, "").lower()
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")

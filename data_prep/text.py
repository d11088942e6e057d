"""Clean text: fix mis-decoded punctuation, remove invisible characters and normalize whitespace.

Corpora have artifacts of their storage: bytes of the Windows encoding read as Latin-1 (U+0092 instead of ’), byte order
marks, zero-width spaces, line separators inside a sentence. A tokenizer would turn these into meaningless tokens.
Everything else stays unchanged: case, quotes, emoji, accents, composed and decomposed characters.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Visible format characters: number signs and similar signs of Arabic, Syriac and Kaithi, joiners of hieroglyphs.
_VISIBLE = frozenset("\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd").union(
    map(chr, range(0x0600, 0x0606)), map(chr, range(0x13430, 0x13456))
)
_JOINERS = re.compile("[\u200c\u200d]+")
_TAGS = re.compile("(?<=\U0001f3f4)([\U000e0020-\U000e007e]+\U000e007f)|[\U000e0020-\U000e007f]+")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_MISREAD_UTF8 = re.compile("\u00e2\u0080[\u0080-\u00bf]")
_VIRAMA = 9  # the canonical combining class of the signs that suppress a vowel


def clean_text(text: str) -> tuple[str, list[str]]:
    """
    Remove the artifacts of storage from a text. The function is idempotent.

    - U+0080 to U+009F become the characters with these codes in the Windows encoding (cp1252); the five undefined codes
      are removed. Three characters that are the UTF-8 bytes of one punctuation mark (â, U+0080, U+0099 for ’) become
      this mark.
    - Whitespace becomes single spaces, with none at the ends.
    - Control and format characters, non-characters, lone surrogates and U+FFFD are removed. The two joiners U+200C and
      U+200D stay where they are meaningful: inside emoji and in scripts that join letters.

    Args:
        text: any string.

    Returns:
        The clean text, and a reason for each kind of change, such as "U+0092 was meant as ’."; there is no reason for
        changes of plain whitespace (spaces, tabs, line ends).
    """
    if text.isprintable() and "\ufffd" not in text:  # fast path: most lines have no special characters
        return " ".join(text.split()), []
    reasons = []

    def note(replacement: str, reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return replacement

    def join_pair(match: re.Match) -> str:
        character = match[0].encode("utf-16", "surrogatepass").decode("utf-16")
        return note(character, f"the two surrogates of {_code(character)} were combined.")

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

    # Tags and joiners depend on their neighbors, so they are checked after all other characters are removed.
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
    """The replacement of a character (possibly the character itself), and the reason if it should be reported."""
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
        return "", f"{_code(character)} was removed; the original character is lost."
    if category == "Cs":
        return "", f"{_code(character)}, a lone surrogate, was removed."
    if category == "Cn":  # unassigned in this Python version, such as a new emoji, or a non-character
        no_character = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
        return ("", f"{_code(character)} was removed.") if no_character else (character, None)
    if category not in ("Cc", "Cf") or character in _VISIBLE or _JOINERS.match(character) or _TAGS.match(character):
        return character, None
    return "", f"{_code(character)} was removed."


def _joins(character: str) -> bool:
    """Whether a joiner next to this character can be meaningful: an emoji, or a letter after Cyrillic (from U+0590)."""
    if not character or ord(character) < 0x0590:
        return False
    category = unicodedata.category(character)
    return category[0] in "LM" or category in ("So", "Sk", "Sm", "Cn")


def _code(character: str) -> str:
    """The code and name of a character, such as `U+200B (zero width space)`."""
    name = unicodedata.name(character, "").lower()
    return f"U+{ord(character):04X}" + (f" ({name})" if name else "")

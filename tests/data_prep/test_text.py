"""Cleaning of text: every kind of storage artifact, and what must stay unchanged."""

import random
import re
import unicodedata

import pytest

from empathic.data_prep.text import clean_text

CP1252 = "€\x81‚ƒ„…†‡ˆ‰Š‹Œ\x8dŽ\x8f\x90‘’“”•–—˜™š›œ\x9džŸ"


def test_each_c1_character_becomes_what_windows_means_by_it():
    for code, meant in zip(range(0x80, 0xA0), CP1252, strict=True):
        text, reasons = clean_text(f"a{chr(code)}b")
        if ord(meant) == code:  # one of the five that Windows leaves undefined
            assert (text, reasons) == ("ab", [f"U+{code:04X} was removed."])
        else:
            assert (text, reasons) == (f"a{meant}b", [f"U+{code:04X} was meant as {meant}."])


def test_the_line_of_a_real_corpus_is_mended():
    text, reasons = clean_text("It\x92s \x93fine\x94\x85 \x97 isn\x92t it?")
    assert text == "It’s “fine”… — isn’t it?"
    # U+0085 is whitespace in Python, so it must be fixed before stripping. A reason is given once.
    assert [reason.split(" was meant as ")[1] for reason in reasons] == ["….", "’.", "“.", "”.", "—."]
    assert clean_text("Wait\x85")[0] == "Wait…"


def test_utf8_read_as_latin1_becomes_the_punctuation_it_was():
    text, reasons = clean_text("It\u00e2\u0080\u0099s â la carte")
    assert text == "It’s â la carte"
    assert len(reasons) == 1 and "U+2019" in reasons[0]
    assert clean_text("CAFÉ\x92S")[0] == "CAFÉ’S"  # C9 92 is a letter in UTF-8 too: not here


UNSEEN = """00 07 1B 7F AD 061C 200B 200C 200D 200E 202A 202E 2060 2066 FEFF FFF9 FFFD FFFE FDD0 1FFFF D800 DC92
E0001"""


@pytest.mark.parametrize("code", [int(code, 16) for code in UNSEEN.split()])
def test_a_character_that_is_not_seen_is_removed_and_named(code):
    text, reasons = clean_text(f"so{chr(code)}me")
    assert text == "some"
    assert len(reasons) == 1 and reasons[0].startswith(f"U+{code:04X}") and "removed" in reasons[0]


@pytest.mark.parametrize("code", [0x0B, 0x0C, 0x1C, 0x1F, 0xA0, 0x2003, 0x2028, 0x2029, 0x202F, 0x3000])
def test_a_separator_becomes_a_space_and_is_named(code):
    text, reasons = clean_text(f"one{chr(code)}two")
    assert text == "one two"
    assert len(reasons) == 1 and reasons[0].startswith(f"U+{code:04X}") and reasons[0].endswith("became a space.")


def test_plain_white_space_is_collapsed_without_a_word():
    assert clean_text(" \t one\r\n two \n\n three  ") == ("one two three", [])
    assert clean_text("one \u200b two") == ("one two", ["U+200B (zero width space) was removed."])
    assert clean_text("\u2028 \t")[0] == ""
    assert clean_text("") == ("", [])


@pytest.mark.parametrize(
    "text",
    [
        "She SAID: \"No?!\" 'It's' ‘fine’ “now” — naïve…",
        "cafe\u0301 and café",  # composed and decomposed characters stay unchanged
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f\u200d\U0001f525 \U0001f642\u200d\u2194\ufe0f",
        "\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 1\ufe0f\u20e3",
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # the flag of Scotland
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian, with a non-joiner
        "\u0d28\u0d4d\u200d \u0d35",  # Malayalam: a joiner after a virama ends the word
        "\u0601\u0663 \u06dd",  # Arabic signs that are visible format characters
        "日本語、한국어 [LAUGHTER] <MEM> \ue000",
    ],
)
def test_all_else_stays(text):
    assert clean_text(text) == (text, [])


def test_joiners_and_tags_go_where_they_mean_nothing():
    assert clean_text("\u0645\u200c mi\u200cx \u200d\U0001f469\u200d")[0] == "\u0645 mix \U0001f469"
    assert clean_text("\u0645\u200c\u200d\u200c\u06cc")[0] == "\u0645\u200c\u06cc"  # one is enough
    assert clean_text("\u0645\u200c\U000e0067\u06cc")[0] == "\u0645\u200c\u06cc"
    assert clean_text("a\u200cb c\u200cd") == ("ab cd", ["U+200C (zero width non-joiner) was removed."])  # once
    assert clean_text("a\U000e0067\U0001f3f4\U000e007f\U0001f3f4\U000e0067")[0] == "a\U0001f3f4\U0001f3f4"


def test_surrogates_are_put_together_or_removed():
    text, reasons = clean_text("hi \ud83d\ude00 \ude00")
    assert text == "hi \U0001f600"
    assert len(reasons) == 2
    text.encode()  # as Arrow will


def _random_texts():
    generator = random.Random(0)
    odd = [*range(0xA1), 0xE2, 0xAD, 0x61C, 0x645, 0x94D, 0x915, 0x180E, *range(0x2000, 0x2070), 0x2764, 0xFE0F, 0xFEFF]
    odd += [0xFFFD, 0xFFFE, 0xD83D, 0xDE00, 0x1F3F4, 0x1F469, 0xE0067, 0xE007F, *[0x200C, 0x200D, 0xE0067, 0x1F3F4] * 9]
    for _ in range(4000):
        yield "".join(chr(generator.choice(odd)) for _ in range(generator.randrange(12)))
    for _ in range(500):
        yield "".join(chr(generator.randrange(0x110000)) for _ in range(40))


def test_cleaning_twice_is_cleaning_once():
    for text in _random_texts():
        once, reasons = clean_text(text)
        assert clean_text(once) == (once, []), ascii(text)
        once.encode("utf-8")
        assert not [c for c in once if c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
        if not reasons:  # only plain whitespace changes silently
            assert " ".join(re.split("[ \t\r\n]+", text)).strip(" ") == once, ascii(text)

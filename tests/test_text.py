from __future__ import annotations

import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdops.report import printable
from sdops.text import count, duration, escaped, shorten, size, suggest


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (6_937_676_352, "6.94 GB"),
        (23_802_816_640, "23.8 GB"),
        (10**12, "1.00 TB"),
    ],
)
def test_size(nbytes, text):
    assert size(nbytes) == text


@given(st.integers(1000, 10**14))
def test_sizes_have_three_digits_and_are_near(nbytes):
    number, unit = size(nbytes).split()
    value = float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(value - nbytes) <= 0.0051 * nbytes
    assert re.fullmatch(r"\d\.\d\d|\d\d\.\d|\d{3}|\d+(?= TB)?", number)


def test_counts():
    assert [count(n, noun) for n, noun in ((1, "key"), (1131, "key"), (2, "copy"), (0, "tensor"), (2, "pass"))] == [
        "1 key",
        "1,131 keys",
        "2 copies",
        "0 tensors",
        "2 passes",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_long_texts_say_what_is_missing():
    assert shorten("abc", 3) == "abc"
    assert shorten("a" * 250, 200) == "a" * 199 + "… (+51 characters)"


def test_suggestions():
    assert suggest("wieghted-sum", ["weighted_sum", "ties"]) == "weighted_sum"
    assert suggest("zzz", ["weighted_sum", "ties"]) is None


@given(st.text())
def test_printable_text_stays_and_the_rest_is_escaped(text):
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize("bad", ["\x1b[31m", "\x9b31m", "\r", "\n", "\x00", "\u202e", "\u2066", "\udc80", "\u200b"])
def test_what_could_act_on_the_terminal_is_escaped(bad):
    assert printable(f"a{bad}b").startswith("a\\")


def test_escaped_text_stays_on_its_line_and_reads_back():
    text = "a\n\x1b[31m\u202e\U000e0001 é 😀"
    assert escaped(text) == "a\\u000a\\u001b[31m\\u202e\\U000e0001 é 😀"
    assert tomllib.loads(f'text = "{escaped(text)}"') == {"text": text}

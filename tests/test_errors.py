"""Errors are one line that a terminal may show."""

import pickle

import pytest

from captioner.errors import CaptionerError, CheckpointError, missing_extra, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, bücher, 写真", "plain text, bücher, 写真"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),
        ("\x9b31m", "\\x9b31m"),
        ("not UTF-8: \udcff", "not UTF-8: \\udcff"),
        ("\u2028", "\\u2028"),
        (3, "3"),
    ],
)
def test_texts_for_a_terminal(text, shown):
    assert printable(text) == shown
    assert str(CheckpointError(text)) == shown
    assert str(pickle.loads(pickle.dumps(CheckpointError(text)))) == shown


def test_a_missing_extra_says_how_to_get_it():
    error = missing_extra("train", "torch")
    assert type(error) is CaptionerError
    assert str(error) == "torch is not installed; pip install 'captioner[train]'"

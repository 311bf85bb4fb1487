"""Caption files that were cut, glued, nested and sprinkled with junk: they load, or are refused in one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from captioner.datasets.annotations import load
from captioner.errors import AnnotationError

CASES = 1500  # of each kind of file

COCO = json.dumps(
    {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"id": n, "image_id": 1 + n % 2, "caption": f"a cat {n}"} for n in range(4)],
    }
)
KARPATHY = json.dumps(
    {
        "dataset": "flickr8k",
        "images": [
            {"imgid": n, "filename": f"{n}.jpg", "filepath": "x", "split": split, "sentences": [{"raw": "a dog"}]}
            for n, split in enumerate(("train", "val", "restval"))
        ],
    }
)
LINES = "".join(json.dumps({"image": f"{n}.jpg", "caption": "two dogs", "split": "train"}) + "\n" for n in range(4))
CSV = 'image,caption,split\na.jpg,"a cat, asleep",train\nb.jpg,"a ""big"" dog",val\n'
TOKENS = "a.jpg#0\tA dog .\na.jpg#1\tA dog runs .\nb.jpg#0\tB .\n"

JUNK = (
    *(
        "\r",
        "\n",
        "\r\n",
        "\t",
        '"',
        "'",
        ",",
        ";",
        "#0\t",
        "{",
        "}",
        "[",
        "]",
        ":",
        "\\",
        "\\u0000",
        "\x00",
        "\x1b[2J",
    ),
    *("\u202e", "\u2028", "\ufeff", "\\ud83d", "null", "true", "NaN", "-Infinity", "1e999", "-1", "3.5", "../", "/"),
    *("9" * 4301, "1" * 5000, "[" * 3000, '{"a":' * 3000, "x" * 140_000, "[" * 980 + "]" * 980, '"a' * 300),
    *('"id"', '"image_id"', '"caption"', '"images"', '"split"', '"restval"', "été", "🐈", "a" * 300 + ".jpg"),
)


def delete(text: str, chance: random.Random) -> str:
    start = chance.randrange(len(text) + 1)
    return text[:start] + text[start + chance.randrange(1, 30) :]


def insert(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    return text[:at] + chance.choice(JUNK) + text[at:]


def replace(text: str, chance: random.Random) -> str:
    return insert(delete(text, chance), chance)


def repeat(text: str, chance: random.Random) -> str:
    start = chance.randrange(len(text) + 1)
    part = text[start : start + chance.randrange(1, 60)]
    return text[:start] + part * chance.randrange(2, 5) + text[start:]


def other_line_ends(text: str, chance: random.Random) -> str:
    return text.replace("\n", chance.choice(("\r", "\r\n", "\n\r", "\u2028")))


def other_value(text: str, chance: random.Random) -> str:
    """Replace a whole value of JSON, so that the document stays well-formed."""
    marks = [index for index, letter in enumerate(text) if letter == ":"]
    if not marks:
        return insert(text, chance)
    at = chance.choice(marks) + 1
    end = min((text.find(mark, at) for mark in ",}" if text.find(mark, at) >= 0), default=len(text))
    values = ("null", "[]", "{}", "0", "-1", "1.5", "true", '""', '"\\u0000"', '"\\ud800"', "9" * 4301, '"../x"', "[1]")
    return text[:at] + chance.choice((*values, "[" * 900 + "]" * 900)) + text[end:]


MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (
    delete, insert, replace, repeat, other_line_ends, other_value, other_value,
)  # fmt: skip


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions_val2017.json", COCO),
        ("dataset_flickr8k.json", KARPATHY),
        ("captions.jsonl", LINES),
        ("captions.csv", CSV),
        ("Flickr8k.token.txt", TOKENS),
    ],
)
def test_nothing_but_an_error_of_one_line_comes_out(tmp_path: Path, name: str, content: str, seed: int) -> None:
    chance = random.Random(f"{name} {seed}")
    path = tmp_path / name
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\nb.jpg\n")
    loaded = refused = 0
    for case in range(CASES):
        text = content
        for _ in range(chance.choice((1, 1, 2, 4))):
            text = chance.choice(MUTATIONS)(text, chance)
        data = text.encode("utf-8", "surrogatepass")
        if chance.random() < 0.05:
            data = data[: chance.randrange(len(data) + 1)] + bytes([chance.randrange(256)])
        path.write_bytes(data)
        said = ""
        try:
            found = load(path, check_images=case % 4 == 0, on_problem=chance.choice(("error", "skip")))
            loaded += 1
            assert all(example.captions and all(example.captions) for example in found.examples)
        except AnnotationError as error:
            refused += 1
            said = str(error)
        except Exception as error:  # the case, so that it can be repeated
            raise AssertionError(f"case {case} of {name}: {type(error).__name__}: {error}: {text[:300]!r}") from error
        assert said.isprintable(), (case, text[:300])
        assert len(said) < 3000
    assert loaded > CASES // 20
    assert refused > CASES // 20


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"images": [], "annotations": ' + "9" * 4301 + "}", "a number with too many digits; give another"),
        ("a.jsonl", '{"image": "a", "caption": "b"}\n{"image": ' + "1" * 5000 + "}", "line 2: holds a number with too"),
        ("a.json", "[" * 100_000, "nested too deep to be a caption file"),
        (
            "a.jsonl",
            '{"image": "a", "caption": "b"}\n' + '{"a":' * 100_000,
            "line 2: is nested too deep to be a caption",
        ),
        (
            "a.csv",
            "image,caption\na.jpg," + "x" * 140_000,
            "line 2 is not CSV (field larger than field limit",
        ),
        ("a.csv", "x" * 140_000, "expected a header with the columns 'image' and 'caption'"),
        ("a\u202eb\n.csv", "nothing", "a\\u202eb\\n.csv: its first line is 'nothing'"),
        ("a.csv", "image,caption\n\x1b[2J\u202e.jpg,a dog", "missing photos: 1 (e.g. \\x1b[2J\\u202e.jpg; looked in"),
    ],
)
def test_faults_that_were_found(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(AnnotationError) as caught:
        load(path)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end_is_read(tmp_path: Path, end: str) -> None:
    for name, content in (("a.csv", CSV), ("a.jsonl", LINES)):
        (tmp_path / name).write_bytes(content.replace("\n", end).encode())
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes(content.encode())
        one, other = (load(folder / name, check_images=False) for folder in (tmp_path, tmp_path / "b"))
        assert [e.captions for e in one.examples] == [e.captions for e in other.examples]


def test_without_a_look_at_the_photos_no_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "captions_val2017.json"
    path.write_text(COCO)
    monkeypatch.setattr("os.scandir", lambda *_: pytest.fail("reads a folder"))
    assert len(load(path, check_images=False).examples) == 2

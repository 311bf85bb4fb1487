"""The index of METEOR's data: its content, how it is made and kept, and damaged files."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import small_meteor

from captioner.metrics import meteor_index
from captioner.metrics.meteor_index import load


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return small_meteor.install(tmp_path, monkeypatch)


def files():
    return sorted(file.name for file in meteor_index.cache_folder().iterdir())


def test_synonyms_of_a_word_and_of_its_base_forms(folder):
    index = load()
    assert index.synsets("dog") == {1, 2}
    assert index.synsets("dogs") == index.synsets("dogged"[:3] + "ing") == {1, 2}
    assert index.synsets("puppies") == {3}
    assert index.synsets("geese") == {4}  # irregular
    assert index.synsets("gooses") == {4}
    assert index.synsets("bigger") == frozenset()  # neither `bigg` nor `bigge` is a word
    assert index.synsets("larger") == {5}
    assert index.synsets("axes") == frozenset()  # irregular, and its bases have no synonyms
    assert index.synsets("dogss") == index.synsets("unknown") == index.synsets("") == frozenset()
    assert index.function == set(small_meteor.FUNCTION)


def test_phrases_of_sentences_and_their_paraphrases(folder):
    index = load()
    sentences = [["next", "to", "a", "tv", "next", "to"], [], ["beside"], ["close"]]
    near, television, beside = (
        {number for number, *_ in index.phrases([words])[0]} for words in (["next", "to"], ["tv"], ["beside"])
    )
    found = index.phrases(sentences)
    assert [[(place, length) for _, place, length in row] for row in found] == [
        [(0, 2), (3, 1), (4, 2)],
        [],
        [(0, 1)],
        [],
    ]
    assert {found[0][0][0], found[0][2][0]} == near
    assert found[0][1][0] in television
    [(close, *_)] = index.phrases([["close", "to"]])[0]
    assert index.paraphrases(*near).tolist() == [*beside, close]  # in the order of the table
    assert index.paraphrases(close).tolist() == []


def test_made_once_with_progress(folder):
    steps = []
    load(lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] == (folder / "data" / "paraphrase-en.gz").stat().st_size
    [name] = files()
    assert name.startswith("meteor-")
    load(lambda done, total: pytest.fail("the index is there"))
    assert files() == [name]


def test_other_data_have_another_index(folder, tmp_path, monkeypatch):
    load()
    small_meteor.install(tmp_path, monkeypatch, [("tv", "telly")])
    index = load()
    assert len(files()) == 2
    assert len(index.phrase) == 2


def test_a_damaged_index_is_made_anew(folder):
    load()
    [name] = files()
    file = meteor_index.cache_folder() / name
    whole = file.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(damaged)
        assert load().synsets("dog") == {1, 2}
        assert len(file.read_bytes()) == len(whole)


def test_killed_in_the_middle_nothing_wrong_is_left(folder, tmp_path):
    """The process dies while it writes; the next one finds no index, and removes the rest when it is old."""
    program = (
        "import os, sys, types, numpy\n"
        "from captioner.metrics import meteor_index\n"
        f"spec = types.SimpleNamespace(submodule_search_locations=[{str(folder.parent)!r}])\n"
        "meteor_index._package = lambda: spec\n"
        "def die(file, **arrays):\n"
        "    file.write(b'half'); file.flush(); os._exit(9)\n"
        "numpy.savez = die\n"
        "meteor_index.load()\n"
    )
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ)).returncode == 9
    [part] = files()
    assert part.endswith(".part")
    assert load().synsets("dog") == {1, 2}
    assert len(files()) == 2
    old = time.time() - 2 * 3600
    os.utime(meteor_index.cache_folder() / part, (old, old))
    index = next(file for file in meteor_index.cache_folder().iterdir() if file.suffix == ".npz")
    index.unlink()
    load()
    assert files() == [index.name]


def test_two_at_once(folder):
    with ThreadPoolExecutor(8) as pool:
        assert {len(index.phrase) for index in pool.map(lambda _: load(), range(8))} == {7}
    assert len(files()) == 1


def test_what_is_missing_or_damaged_is_said_in_one_line(folder, tmp_path, monkeypatch):
    def complaint():
        with pytest.raises(ValueError, match=r"meteor|cannot be read|is missing") as caught:
            load()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    table, jar = folder / "data" / "paraphrase-en.gz", folder / "meteor-1.5.jar"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    assert "paraphrase-en.gz cannot be read" in complaint()
    table.write_bytes(b"no archive")
    assert "install it again: pip install" in complaint()
    table.unlink()
    assert "paraphrase-en.gz is missing" in complaint()
    table.write_bytes(whole)
    jar.write_bytes(b"no archive")
    assert "meteor-1.5.jar cannot be read" in complaint()
    small_meteor.find(None, monkeypatch)
    assert "which is not installed; install it: pip install 'captioner[meteor]'" in complaint()


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written .*set XDG_CACHE_HOME to a folder that can hold it"):
        load()


def test_a_table_that_ends_in_the_middle_of_a_pair(folder, tmp_path, monkeypatch):
    small_meteor.install(tmp_path, monkeypatch, [("tv", "telly"), ("a", "b\n0.5\nc")])
    with pytest.raises(ValueError, match="it ends in the middle of a pair"):
        load()


def test_blocks_of_any_size_give_the_same_index(folder, monkeypatch):
    whole = load()
    for size in (1, 7, 40):
        monkeypatch.setattr(meteor_index, "_BLOCK", size)
        arrays = meteor_index._phrase_arrays(folder / "data" / "paraphrase-en.gz", lambda done, total: None)
        for name, array in arrays.items():
            assert array.tolist() == getattr(whole, name).tolist(), (size, name)

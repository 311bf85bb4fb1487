"""`captioner caption` as it is typed: what it prints, where, and with which status it ends."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import isolated, make_model, make_photo  # noqa: F401

from captioner import Captioner, cli
from captioner.config import DecodingOptions

ROOT = Path(__file__).resolve().parents[2]
SAVED = DecodingOptions(max_words=5, min_words=2, beam_size=2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_model(options=SAVED).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    return [
        make_photo(folder / "one.png", (250, 0, 0)),
        make_photo(folder / "sub" / "two.jpg", (0, 250, 0)),
        make_photo(folder / "three – ü 犬.png", (9, 20, 200)),
    ]


def run(model: Path, *arguments: object) -> int:
    return cli.run("caption", [*map(str, arguments), "--model", str(model)], "caption.py")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that is all that was printed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def says(model: Path, photo: Path, **options: Any) -> str:
    captioner = Captioner.from_pretrained(model)
    return captioner.caption(photo, DecodingOptions(**{**SAVED.__dict__, **options})).text


# Captions ----------------------------------------------------------------------------------------------------------


def test_one_photo_is_one_sentence(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, photos[0]) == 0
    captured = capsys.readouterr()
    assert captured.out == says(model, photos[0]) + "\n"
    assert captured.err == ""


def test_several_photos_are_named(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *photos) == 0
    assert capsys.readouterr().out.splitlines() == [f"{photo}: {says(model, photo)}" for photo in photos]


def test_a_folder_with_all_that_is_in_it(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (photos[0].parent / "notes.txt").write_text("no photo")
    assert run(model, photos[0].parent) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == sorted(f"{photo}: {says(model, photo)}" for photo in photos)


def test_several_captions_a_photo(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, photos[0], "--num-captions", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    ranks = [re.search(r"  \(score (-\d+\.\d\d), log-probability (-\d+\.\d\d)\)$", line) for line in lines]
    scores = [float(rank[1]) for rank in ranks if rank]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


def test_rows_of_json(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *photos, "--format", "jsonl") == 0
    text = capsys.readouterr().out
    assert "ü 犬" in text  # as people read it
    assert [json.loads(line) for line in text.splitlines()] == [
        {"image": str(photo), "caption": says(model, photo)} for photo in photos
    ]
    assert run(model, photos[0], "--format", "jsonl", "--num-captions", 2) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert set(row) == {"image", "caption", "captions"}
    assert [set(each) for each in row["captions"]] == [{"caption", "logprob", "score"}] * 2
    assert row["captions"][0]["caption"] == row["caption"]


def test_a_file_takes_its_name_when_it_is_complete(
    model: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, part = tmp_path / "out.txt", tmp_path / "out.txt.part"
    output.write_text("of an earlier run")
    seen: list[tuple[str, int]] = []

    def look(name: object) -> str:
        seen.append((output.read_text(), len(part.read_text().splitlines())))
        return str(name)

    monkeypatch.setattr("captioner.cli.output.one_line", look)
    assert run(model, *photos, "--output", output) == 0
    assert seen == [("of an earlier run", 0), ("of an earlier run", 1), ("of an earlier run", 2)]  # row by row
    assert capsys.readouterr().out == ""
    assert output.read_text(encoding="utf-8") == "".join(f"{photo}: {says(model, photo)}\n" for photo in photos)
    assert not part.exists()


def test_what_was_written_stays_when_something_fails(
    model: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("captioner.cli.output.one_line", lambda text: str(text) if "one" in str(text) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, *photos, "--output", tmp_path / "out.txt")
    assert not (tmp_path / "out.txt").exists()
    assert len((tmp_path / "out.txt.part").read_text().splitlines()) == 1


@pytest.mark.parametrize("arguments", [(), ("--format", "jsonl")])
def test_rows_in_a_file(
    model: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    output = tmp_path / "out.jsonl"
    assert run(model, *photos, *arguments, "--output", output) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["3 photos captioned", f"{output}: 3 photos"]
    rows = output.read_bytes()
    assert [json.loads(line) for line in rows.splitlines()] == [
        {"image": str(photo), "caption": says(model, photo)} for photo in photos
    ]
    assert run(model, *photos, "--output", output) == 0  # once more
    assert capsys.readouterr().err.startswith("0 photos captioned, 3 done before\n")
    assert output.read_bytes() == rows
    assert run(model, *photos, "--output", output, "--beam-size", 1) == 2
    assert "out.jsonl.journal: was made with other options (beam_size 2, not 1); give the same" in one_line(capsys)
    assert run(model, *photos, "--output", output, "--beam-size", 1, "--overwrite") == 0
    assert run(model, "--list", "-", "--output", output) == 2


def test_a_file_of_another_kind_of_run_is_not_replaced(
    model: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.csv"
    output.write_text("of somebody else")
    assert run(model, *photos, "--output", output) == 2
    assert f"{output}: is there, and no journal says what is in it; give another --output, or --over" in one_line(
        capsys
    )
    assert output.read_text() == "of somebody else"
    assert run(model, *photos, "--output", output, "--overwrite") == 0
    assert output.read_text().startswith("image,caption\n")


def test_two_precisions_do_not_mix(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    output = photos[0].parent / "out.jsonl"
    assert run(model, photos[0], "--output", output, "--device", "cpu", "--precision", "fp32") == 0
    capsys.readouterr()
    assert run(model, *photos, "--output", output, "--device", "cpu", "--precision", "bf16") == 2
    assert "another engine or precision (torch, float32, not torch, bfloat16)" in one_line(capsys)
    assert run(model, *photos, "--output", output, "--device", "cpu", "--precision", "fp32") == 0


def test_sidecars(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, photos[0].parent, "--format", "txt") == 0
    assert photos[1].with_suffix(".txt").read_text() == says(model, photos[1]) + "\n"
    assert capsys.readouterr().err == "3 photos captioned\n"
    assert run(model, photos[0].parent, "--format", "xmp", "--sidecar-names", "photo.xmp", "--overwrite") == 0
    assert says(model, photos[1]) in photos[1].with_suffix(".xmp").read_text()


def test_formats_need_a_file(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, *photos, "--format", "csv") == 2
    assert one_line(capsys) == "error: csv is no format for the screen; give --output FILE"
    assert run(model, *photos, "--format", "txt", "--output", "x") == 2
    assert "txt sidecars lie beside the photos; leave out --output" in one_line(capsys)


def test_a_library_is_searched(
    model: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "photos.db"
    assert run(model, photos[0].parent, "--output", library) == 0
    capsys.readouterr()
    word = max(says(model, photos[0]).split(), key=len)
    assert cli.run("search", [str(library), word, "--captions"]) == 0
    assert f"{photos[0]}: {says(model, photos[0])}" in capsys.readouterr().out.splitlines()
    assert cli.run("search", [str(library), "zeppelin"]) == 1
    assert capsys.readouterr().err == "no photo has a caption with these words: zeppelin\n"
    assert cli.run("search", [str(tmp_path / "none.db"), "dog"]) == 2
    assert "none.db: is no library; make one: captioner caption FOLDER --output LIBRARY.db" in one_line(capsys)


def test_an_output_that_cannot_be_written(
    model: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, photos[0], "--output", tmp_path / "nothing" / "out.txt") == 2
    assert (
        one_line(capsys)
        == f"error: {tmp_path}/nothing/out.txt: cannot be written (No such file or directory); give another --output"
    )
    (tmp_path / "folder").mkdir()
    assert run(model, photos[0], "--output", tmp_path / "folder") == 2
    assert "folder: is a folder; give the name of a file" in one_line(capsys)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output in (tmp_path / ("x" * 300), tmp_path / "loop"):
        assert run(model, photos[0], "--output", output) == 2
        assert f"{output.name}: cannot be written" in one_line(capsys)
    assert run(model, photos[0], "--output", "/dev/null") == 0
    assert not Path("/dev/null").is_file()
    (tmp_path / "rows.part").write_text("of an earlier run")
    assert run(model, photos[0], "--output", tmp_path / "rows") == 2
    assert "rename or delete it" in capsys.readouterr().err
    assert (tmp_path / "rows.part").read_text() == "of an earlier run"


# Photos that cannot be captioned -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_a_bad_photo_among_good_ones(
    model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], form: str
) -> None:
    photos[1].write_bytes(photos[1].read_bytes()[:100])
    assert run(model, *photos, "--format", form) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    error, count = captured.err.splitlines()
    assert error.startswith(f"error: {photos[1]}: cannot be decoded")
    assert count == "2 of 3 photos captioned, 1 could not be read"


def test_only_bad_photos(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jpg").write_text("no photo")
    (tmp_path / "out.txt").write_text("of an earlier run")
    assert run(model, tmp_path / "text.jpg", "--output", tmp_path / "out.txt") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    not_written = f"{tmp_path}/out.txt is not written"
    assert captured.err.splitlines()[-1] == f"0 of 1 photos captioned, 1 could not be read; {not_written}"
    assert (tmp_path / "out.txt").read_text() == "of an earlier run"
    assert not (tmp_path / "out.txt.part").exists()


def test_a_photo_is_not_written_over(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = photos[1].read_bytes()
    assert run(model, *photos, "--output", photos[1]) == 2
    assert "is one of the photos; give another --output" in one_line(capsys)
    assert photos[1].read_bytes() == before


def test_words_that_cannot_be_had(
    model: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.txt"
    assert run(model, photos[0], "--required-words", "zebra", "--output", output) == 2
    assert "the vocabulary lacks 'zebra'" in one_line(capsys)
    assert list(tmp_path.glob("out*")) == []  # so that the next command is not refused
    twice = ("--required-words", "red red", "--no-repeat-ngram", 1)
    assert run(model, photos[0], *twice, "--format", "jsonl") == 0
    captured = capsys.readouterr()
    assert captured.err == f"{photos[0]}: found no caption with all required words; this is one without\n"
    assert json.loads(captured.out)["satisfied"] is False


def test_names_that_command_a_terminal(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a\nb.png", "c\x1b[31m.png"):
        make_photo(tmp_path / "photos" / name)
    (tmp_path / "photos" / "d\n.png").touch()
    assert run(model, tmp_path / "photos") == 1
    captured = capsys.readouterr()
    names = [line.split(": ")[0] for line in captured.out.splitlines()]
    assert [Path(name).name for name in names] == [r"a\nb.png", r"c\x1b[31m.png"]
    assert r"photos/d\n.png: " in captured.err


def test_no_photo_is_given(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model) == 2
    nothing = "nothing to caption; give photos or folders of photos, before the options: caption.py photo.jpg"
    assert one_line(capsys) == f"error: there is {nothing}"
    assert run(model, "") == 2
    assert nothing in one_line(capsys)


def test_a_name_that_begins_like_an_option(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_photo(tmp_path / "-dash.png")
    monkeypatch.chdir(tmp_path)
    assert run(model, "-dash.png") == 2
    hint = "put -- before it: caption.py -- -dash.png"
    assert one_line(capsys) == f"error: -dash.png: is a file whose name begins like an option; {hint}"
    assert cli.run("caption", ["--model", str(model), "--", "-dash.png"]) == 0
    assert capsys.readouterr().out == says(model, Path("-dash.png")) + "\n"


def test_folders_and_files_that_are_not_there(
    model: Path, tmp_path: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(model, photos[0], tmp_path / "empty") == 2
    assert f"{tmp_path}/empty: no photo in this folder; expected files ending in .avif, .bmp" in one_line(capsys)
    assert run(model, tmp_path / "nothing.jpg", photos[0]) == 2
    assert f"{tmp_path}/nothing.jpg: no such file or folder" in one_line(capsys)
    assert run(model, "https://example.org/a.jpg") == 2
    assert "a.jpg: is an address; fetch the photo first" in one_line(capsys)


def test_no_model(tmp_path: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nothing", photos[0]) == 2
    assert 'nothing: no such model; give the folder of one, use the one in the box ("mini")' in one_line(capsys)
    assert run(photos[0].parent, photos[0]) == 2
    assert "photos: not a saved model, it has no config.json" in one_line(capsys)


def test_weights_of_the_encoder_may_be_elsewhere(
    tmp_path: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from safetensors.torch import save_file

    model = make_model()
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    state = {name: tensor.contiguous() for name, tensor in model.engine.encoder.body.state_dict().items()}
    save_file(state, here)
    make_model(replace(model.engine.encoder.config, weights=str(here))).save_pretrained(tmp_path / "model")
    here.rename(there)
    assert run(tmp_path / "model", photos[0]) == 2
    assert "here.safetensors: no such weight file for tiny" in one_line(capsys)
    assert run(tmp_path / "model", photos[0], "--encoder.weights", there) == 0
    assert capsys.readouterr().out == f"{model.caption(photos[0])}\n"


# Options -----------------------------------------------------------------------------------------------------------


def test_an_option_overrides_the_models_own_and_the_others_stay(
    model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from captioner.bulk import pipeline

    used: list[DecodingOptions] = []
    stream = pipeline.caption

    def note(captioner: Captioner, items: Any, options: DecodingOptions, **settings: Any) -> Any:
        used.append(options)
        return stream(captioner, items, options, **settings)

    monkeypatch.setattr(pipeline, "caption", note)
    assert run(model, photos[0]) == 0
    assert run(model, photos[0], "--max-words", 3) == 0
    assert run(model, photos[0], "--beam-size", 3, "--forbidden-words", "red", "a") == 0
    assert used[0] == SAVED
    assert used[1] == DecodingOptions(**{**SAVED.__dict__, "max_words": 3})
    assert used[2] == DecodingOptions(**{**SAVED.__dict__, "beam_size": 3, "forbidden_words": ("red", "a")})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[1].split()) <= 3


def test_options_are_judged_with_the_models_own(
    tmp_path: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """And not with the defaults, of which a caption of 25 words would be too long, and a beam of 3 not for 2 groups."""
    make_model(options=DecodingOptions(max_words=30, beam_size=4)).save_pretrained(tmp_path / "long")
    assert run(tmp_path / "long", photos[0], "--min-words", 25, "--beam-groups", 2) == 0
    assert 25 <= len(capsys.readouterr().out.replace("n't", " n't").replace("'s", " 's").split()) <= 30


def test_options_that_contradict_the_models_own(
    model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, photos[0], "--min-words", 6) == 2
    assert "min_words is 6 and max_words 5; expected min_words <= max_words" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--beam-size", "0"), "beam_size is 0; expected 1 to 1000"),
        (("--temperature", "-1"), "temperature is -1.0; expected 0.001 to 1000"),
    ],
)
def test_options_out_of_range(
    model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], options: Sequence[str], said: str
) -> None:
    assert run(model, photos[0], *options) == 2
    assert said in one_line(capsys)


def test_main_runs_a_command(
    model: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["captioner", "caption", str(photos[0]), "--model", str(model)])
    assert cli.main() == 0
    assert capsys.readouterr().out == says(model, photos[0]) + "\n"


def test_the_search_can_be_shown(model: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, photos[0], "--explain") == 0
    text = capsys.readouterr().out
    assert "★ the caption" in text
    for word in says(model, photos[0]).split():
        assert word in text
    photos[1].write_text("no photo")
    capsys.readouterr()
    assert run(model, photos[1], photos[0], "--explain") == 1  # the others are shown all the same
    captured = capsys.readouterr()
    assert "two.jpg: not a photo" in captured.err
    assert "★ the caption" in captured.out
    assert run(model, photos[0], "--explain", "--output", "tree.txt") == 2
    assert "leave out --output" in capsys.readouterr().err


# As a process ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_output_that_nobody_reads_or_takes(model: Path, tmp_path: Path) -> None:
    """Processes at once: a reader that has enough, a file that is added to, a full disk, a name that is no text."""
    folder = tmp_path / "many"
    for number in range(30):
        make_photo(folder / f"{number:02}.png", (8 * number, 90, 90))
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/99 caf\xe9.png"))
    make_photo(folder / "new.png").rename(odd)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = f'"{sys.executable}" caption.py "{folder}" --model "{model}"'

    def start(more: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            ["bash", "-c", f"set -o pipefail; {command} {more}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    (tmp_path / "all").write_text("of earlier commands\n")
    pipe, full, names = start("| head -n 1"), start("> /dev/full"), start(f'--format jsonl --output "{tmp_path}/o"')
    more = start(f'--output /dev/stdout >> "{tmp_path}/all"')
    out, error = pipe.communicate(timeout=120)
    assert pipe.returncode == 0, error.decode()
    assert out.startswith(os.fsencode(folder / "00.png: "))
    assert error == b""

    _, error = more.communicate(timeout=120)
    assert more.returncode == 0, error.decode()
    first, *rows = (tmp_path / "all").read_bytes().splitlines()
    assert (first, len(rows)) == (b"of earlier commands", 31)

    out, error = full.communicate(timeout=120)
    assert full.returncode == 2
    assert error.decode() == "error: standard output cannot be written (No space left on device)\n"

    out, error = names.communicate(timeout=120)
    assert names.returncode == 0, error.decode()
    rows = [json.loads(line) for line in (tmp_path / "o").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 31
    assert os.fsencode(rows[-1]["image"]) == os.fsencode(odd)


def test_a_name_that_is_no_text_is_printed_as_it_is(
    model: Path, photos: list[Path], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(photos[0].parent) + b"/caf\xe9.png"))
    photos[0].rename(odd)
    assert run(model, odd, photos[1]) == 0
    assert os.fsencode(odd) in capfdbinary.readouterr().out

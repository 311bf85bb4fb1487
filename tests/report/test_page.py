"""`captioner report`: a page that holds everything it shows, of runs in any state."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made import good_caption, make_run

from captioner import cli

ROOT = Path(__file__).resolve().parents[2]
_VOID = {"meta", "img", "wbr", "path", "circle", "rect", "br"}


class Page(HTMLParser):
    """The texts of a page, its photos, and its addresses; unbalanced tags are refused."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "


def page_of(run: Path, *more: str) -> Page:
    """Make the page of a run."""
    output = run / "page.html"
    assert cli.run("report", [str(run), "--output", str(output), *more]) == 0
    return Page(output.read_text("utf-8"))


def said(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that is said about a request that is not possible."""
    assert cli.run("report", [str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line


# One run -----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "my-run")
    assert cli.run("report", [str(run)]) == 0
    assert capsys.readouterr().err == f"the page is in {run / 'report.html'}\n"
    page = Page((run / "report.html").read_text("utf-8"))
    text = said(page.text)
    assert "Finished: 4 of 4 epochs" in text
    assert "best CIDEr 0.500 epoch 3" in text
    assert "None: losses, gradients, learning rates and captions look as they should." in text
    for heading in ("CIDEr", "Loss, nats a word", "Other scores", "Learning rate", "Norm of the gradient"):
        assert heading in text
    assert "1 a dog 2–4 ★ a small dog runs" in text
    assert "the cat is here" in text
    assert "missing photos: 2 (left out), e.g. lost.jpg" in text
    assert "train.py flickr8k" in text
    assert page.tags.count("svg") == 6
    assert page.tags.count("img") == 12 + 8 + 8


def test_settings_that_differ_come_first(tmp_path: Path) -> None:
    text = said(page_of(make_run(tmp_path / "run")).text)
    changed, everything = text.split("All settings")
    changed = changed.split("Those that are not the default.")[1].replace(" ", "")
    assert "optimisation.epochs430optimisation.learning_rate0.0010.0005" in changed
    assert "batch_size" not in changed
    assert "batch_ size" in everything


def test_the_best_photos_come_before_the_worst(tmp_path: Path) -> None:
    def caption(photo: int, epoch: int) -> str:
        return good_caption(photo, epoch) if photo % 2 else f"nothing at all {photo}"

    text = said(page_of(make_run(tmp_path / "run", caption=caption)).text)
    best, worst = text.split("Best photos")[1].split("Worst photos")
    assert "nothing at all" not in best
    assert worst.count("nothing at all") == 8
    assert worst.count("0.00 nothing at all") == 8


def test_nothing_is_fetched_from_elsewhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = page_of(run)
    assert page.addresses
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & {*page.tags}
    html = (run / "page.html").read_text("utf-8")
    assert "default-src 'none'" in html
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert len(html) < 500_000


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&\x1b[31m\u202e\ud800"
    run = make_run(
        tmp_path / "a<b>&'run",
        caption=lambda photo, epoch: f"{evil} {photo}",
        names=lambda photo: f"<img src=x>\udce9{photo}.png",
        settings={"project": evil, "encoder": {"weights": "/x/<script>.pth"}},
    )
    environment = json.loads((run / "environment.json").read_text())
    environment["problems"] = [evil]
    environment["starts"][0] |= {"command": evil, evil: evil}
    (run / "environment.json").write_text(json.dumps(environment))
    for arguments in ((), ("--against", str(run))):
        page = page_of(run, *arguments)
        assert "script" not in page.tags
        assert "\x1b" not in page.text
        assert "<script>alert(1)</script>\"'&\\x1b[31m\\u202e\\ud800" in page.text
        assert "a<b>&'run" in page.text
    assert "<img src=x>\\udce9" in page.text


def test_photos_that_have_moved_are_said_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "photos").rename(tmp_path / "elsewhere")
    page = page_of(run)
    assert "img" not in page.tags
    assert page.text.count("cannot be read any more") == 1
    assert "photo0.png: no such file" in page.text
    assert page.text.count("photo not readable") == 28
    assert "a blue dog runs" in page.text


def test_a_run_that_still_trains(tmp_path: Path) -> None:
    text = said(page_of(make_run(tmp_path / "run", epochs=2)).text)
    assert "In training or stopped: 2 of 4 epochs, step 500, last record 20" in text


def test_before_the_first_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=1)
    shutil.rmtree(run / "last")
    shutil.rmtree(run / "captions")
    text = said(page_of(run).text)
    assert "In training or stopped: 0 of 4 epochs, step 240" in text
    assert "No validation captions are on record yet" in text
    assert "training loss" in text


def test_a_run_without_records(tmp_path: Path) -> None:
    """Of an earlier version, or just begun."""
    run = make_run(tmp_path / "run")
    for name in ("steps.jsonl", "validation.json", "environment.json"):
        (run / name).unlink()
    shutil.rmtree(run / "captions")
    text = said(page_of(run).text)
    assert "best CIDEr 0.500 epoch 3" in text
    assert text.count("Not on record.") == 2
    shutil.rmtree(run / "last")
    assert "Nothing is on record yet." in page_of(run).text


def test_after_a_kill(tmp_path: Path) -> None:
    """Half a line of a step, captions of an epoch that no checkpoint holds, a checkpoint that was being replaced."""
    run = make_run(tmp_path / "run", epochs=3)
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": 760, "epo')
    (run / "captions" / "0004.json").write_text("[]")
    (run / "last").rename(run / ".last.old")
    text = said(page_of(run).text)
    assert "3 of 4 epochs, step 740" in text


def test_many_epochs_do_not_make_the_page_long(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        epochs=60,
        of=60,
        val_loss=[3 - epoch / 100 for epoch in range(60)],
        cider=[epoch / 100 for epoch in range(60)],
        caption=lambda photo, epoch: f"a dog {photo} in epoch {epoch}",
    )
    page = page_of(run)
    samples, _ = page.text.split("Best photos")
    assert samples.count("in epoch 60") == 12
    assert samples.count("a dog 0 in epoch") == 8
    assert len((run / "page.html").read_text()) < 500_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("last/training.json", "{"),
        ("last/training.json", '{"epochs": [{"cider": "high", "val_loss": 1}]}'),
        ("last/training.json", '{"epochs": [{"cider": 1}]}'),
        ("last/training.json", '{"epochs": [], "best_epoch": 3}'),
        ("last/training.json", "[1, 2]"),
        ("captions/0003.json", "[{}]"),
        ("captions/0003.json", '[{"image_id": [], "caption": "", "logprob": 0, "finished": true}]'),
        ("captions/0003.json", '{"image_id": 1}'),
        ("validation.json", "7"),
        ("environment.json", '{"starts": 3}'),
        ("environment.json", "[" * 5000),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    assert error_of(capsys, run).startswith(f"error: {run / name}: damaged (")


def test_captions_of_other_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    (run / "validation.json").write_text('[{"image_id": 99, "path": "x.jpg", "captions": ["a dog"]}]')
    assert "40 captioned images have no references" in error_of(capsys, run)


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing: no such folder; give the --output of a training run" in error_of(capsys, tmp_path / "nothing")
    assert "not a training run, it has no config.json" in error_of(capsys, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "captioner"}')
    assert "not the settings of a training run (model_type is no setting" in error_of(capsys, tmp_path)
    run = make_run(tmp_path / "run")
    assert "cannot be written" in error_of(capsys, run, "--output", tmp_path / "no" / "page.html")
    assert "photos is -1; expected 0 or more" in error_of(capsys, run, "--photos", "-1")


# Two runs ----------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_photo_by_photo(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", photos=40)
    second = make_run(
        tmp_path / "second",
        photos=40,
        caption=lambda photo, epoch: good_caption(photo, epoch) if photo < 30 else f"nothing {photo}",
        settings={"optimisation": {"epochs": 4, "learning_rate": 0.002}, "seed": 7},
    )
    assert cli.run("report", [str(first), "--against", str(second)]) == 0
    page = Page((first / "comparison.html").read_text("utf-8"))
    text = said(page.text)
    assert "first against second" in text
    assert "on 40 validation photos that both have" in text
    assert "first is better in 10, second in 0, and 30 are equal" in text
    (row,) = re.findall(r" CIDEr (\d\.\d+) (\d\.\d+) \+(\d\.\d+) \+(\d\.\d+) … \+(\d\.\d+) (\S+) ", text)
    one, two, difference, low, high, p = map(float, row)
    assert difference == pytest.approx(one - two, abs=0.0011)
    assert 0 < low < difference < high
    assert p < 0.01
    wins, losses = text.split("Biggest wins of first")[1].split("Biggest losses of first")
    assert wins.count("nothing") == 8
    assert "second 0.00 nothing" in wins
    assert losses.split("Photo by photo")[0].count("runs") == 0
    settings = text.split("Settings that differ")[1].replace(" ", "")
    assert "optimisation.learning_rate0.0010.002seed07" in settings
    assert "output" not in settings
    assert not [address for address in page.addresses if not address.startswith(("data:image/jpeg;base64,", "#"))]


def test_runs_that_share_a_part_of_their_photos(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first", photos=40), make_run(tmp_path / "second", photos=30)
    text = said(page_of(first, "--against", str(second)).text)
    assert "on 30 validation photos that both have" in text
    assert "10 photos that only one has, or with other human captions, are left out" in text


def test_without_a_test(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = said(page_of(run, "--against", str(run), "--statistics.resamples", "0").text)
    assert "interval and p" not in text
    assert "Settings that differ None." in text


def test_runs_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, young = make_run(tmp_path / "first"), make_run(tmp_path / "young", epochs=0)
    assert f"{young}: has no validation captions on record" in error_of(capsys, first, "--against", young)
    other = make_run(tmp_path / "other")
    rows = json.loads((other / "validation.json").read_text())
    (other / "validation.json").write_text(json.dumps([row | {"captions": ["something else"]} for row in rows]))
    assert "have no validation photo in common" in error_of(capsys, first, "--against", other)


# What it needs -----------------------------------------------------------------------------------------------------


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "accelerate", "jaxtyping", "wandb", "nltk"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from captioner import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    for more in ([], ["--against", str(run)]):
        done = subprocess.run(
            [sys.executable, "-c", code, "report", str(run), *more],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


def test_without_jinja2_one_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    line = error_of(capsys, make_run(tmp_path / "run"))
    assert line == "error: jinja2 is not installed; pip install 'captioner[train]'"

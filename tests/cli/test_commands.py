"""All commands: their names, their help, the page about them, their standard streams.

`python tests/cli/test_commands.py` writes docs/commands.md anew.
"""

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from captioner import cli
from captioner.cli import output
from captioner.cli.arguments import SearchArguments, comments, search_options
from captioner.config import DecodingOptions, Statistics
from captioner.errors import CaptionerError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "commands.md"

#: What `--help` is asked of, on the page in this order.
HELPED = [("caption",), ("train",), ("train", "coco"), ("report",), ("evaluate",), ("search",), ("export",)]


def help_of(*command: str) -> str:
    """The text that `captioner COMMAND --help` prints in 100 columns."""
    text = io.StringIO()  # which has no encoding: tyro draws no boxes
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(text),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main([*command, "--help"])
    assert not ended.value.code
    return re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())


def options(text: str) -> dict[str, str]:
    """Option or positional argument -> its help."""
    found: dict[str, str] = {}
    for line in re.findall(r"^  (\S.*?| .*?) *$", text, re.MULTILINE):
        if match := re.match(r"(--?[a-z][\w.-]*|\[?[A-Z]{2,})", line):
            name, _, rest = line.partition("  ")
            found[match[0] if line.startswith("-") else name] = rest.strip()
        elif found and line.startswith("  "):
            found[list(found)[-1]] += f" {line.strip()}"
    return {name: said.strip() for name, said in found.items()}


def page() -> str:
    """The page about the commands."""
    lines = [
        "# Commands",
        "",
        "`captioner COMMAND`, `python -m captioner COMMAND`; `python caption.py` and `python train.py` in a checkout.",
        "",
        "| command | purpose |",
        "|---|---|",
        *(f"| [`captioner {name}`](#captioner-{name}) | {purpose} |" for name, purpose in cli.COMMANDS.items()),
        "",
        "Exit status: 0 all done; 1 done, but some photos could not be read (each is named with its reason); 2 the",
        "request is not possible (one line says why); 130 interrupted. A name that begins with a dash goes behind",
        "`--`: `captioner caption -- -dash.jpg`.",
    ]
    for command in HELPED:
        text = "\n".join(line.rstrip() for line in help_of(*command).strip().splitlines())
        lines += ["", f"## captioner {' '.join(command)}", "", "```text", text, "```"]
    return "\n".join(lines) + "\n"


def words(text: str) -> list[str]:
    """The words of a text, without the lines around them, which change with tyro's version."""
    return re.sub(r"-{3,}", " ", text).split()


# Help --------------------------------------------------------------------------------------------------------------


def test_the_page_has_every_command_and_option_as_their_help_has_them() -> None:
    """Write it anew with `python tests/cli/test_commands.py`."""
    assert words(PAGE.read_text("utf-8")) == words(page())


@pytest.mark.parametrize("command", HELPED)
def test_every_option_has_help(command: Sequence[str]) -> None:
    text = help_of(*command)
    found = options(text)
    if command == ("train",):  # which has presets
        assert "coloured shapes" in text
        return
    assert len(found) > 5
    for name, said in found.items():
        assert len(re.sub(r"\(default: .*\)|\(required\)", "", said).split()) >= 2, f"{name}: {said!r}"


def test_every_command_is_helped_and_has_a_module() -> None:
    assert {command for command, *_ in HELPED} == set(cli.COMMANDS)
    for name, purpose in cli.COMMANDS.items():
        assert purpose
        tree = ast.parse((ROOT / "captioner" / "cli" / f"{name}.py").read_text("utf-8"))
        assert "command" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_help_of_search_options_is_theirs() -> None:
    found, texts = options(help_of("caption")), comments(DecodingOptions)
    for name in DecodingOptions.__dataclass_fields__:
        assert found[f"--{name.replace('_', '-')}"] == f"{texts[name]} (default: the model's own)"
    assert comments(Statistics).keys() == Statistics.__dataclass_fields__.keys()


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_lists_the_commands(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    for command in cli.COMMANDS:
        assert command in (captured.err if status else captured.out)


# Parsing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("caption", "photo.jpg", "--no-such-option"),
        ("caption", "photo.jpg", "--beam-size", "many"),
        ("caption", "photo.jpg", "--format", "xml"),
        ("evaluate", "--split", "all"),
        ("export",),
        ("export", "mini", "--precision", "int4"),
        ("train",),
        ("train", "no-such-preset"),
        ("train", "shapes", "--optimisation.learning-rate", "fast"),
    ],
)
def test_arguments_that_cannot_be_parsed(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err
    assert "Traceback" not in captured.err


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["describe"]) == 2
    line = "captioner: 'describe' is no command; expected one of caption, train, report, evaluate, search, export\n"
    assert capsys.readouterr().err == line


def test_options_that_are_not_given_are_the_models_own() -> None:
    model = mock.Mock(options=DecodingOptions(beam_size=7, max_words=9))
    given: SearchArguments = {"max_words": 4}
    assert search_options(model, given) == DecodingOptions(beam_size=7, max_words=4)
    assert search_options(model, {}) == model.options
    with pytest.raises(CaptionerError, match="min_words is 10 and max_words 9"):
        search_options(model, {"min_words": 10})


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CaptionerError("no"), 2, "error: no\n"),
        (MemoryError(), 2, "error: there is too little memory; close other programs, or use a smaller model\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was saved is kept\n"),
        (BrokenPipeError(), 0, ""),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "error: torch is not installed; pip install 'captioner[train]'\n",
        ),
    ],
)
def test_errors_are_one_line(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from captioner.cli import export

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(export, "command", fail)
    assert cli.main(["export"]) == status
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from captioner.cli import export

    def fail(*_: object) -> int:
        raise ModuleNotFoundError("No module named 'captioner.nothing'", name="captioner.nothing")

    monkeypatch.setattr(export, "command", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["export"])


def test_extras_are_those_of_the_package() -> None:
    """What a missing module names is what pip knows."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for extra, modules in cli.EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        packages = {
            re.split(r"[><=\[\"]", part)[0].replace("-", "_").lower() for part in re.findall(r'"(.*?)"', listed)
        }
        assert set(modules) <= packages, extra


# Standard streams --------------------------------------------------------------------------------------------------


def test_lines_for_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a\nb\x1b[31m\u202egpj.exe \udce9 ü 犬"
    assert output.one_line(odd) == "a\\nb\\x1b[31m\\u202egpj.exe \udce9 ü 犬"
    output.say("red \x1b[31m")
    assert capsys.readouterr().err == "red \\x1b[31m\n"


def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("of an earlier run")
    path.chmod(0o444)
    with pytest.raises(CaptionerError, match=r"kept.txt: is read-only; change its permissions, or give another file"):
        output.write(path, "new")
    with pytest.raises(CaptionerError, match=r"is read-only"), output.writer(path):
        pass
    assert path.read_text() == "of an earlier run"
    assert [found.name for found in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "status", "out", "error"),
    [
        ("-m captioner --help", 0, "usage: captioner COMMAND", ""),
        ("-m captioner caption nothing.jpg >&-", 2, "", "error: standard output is closed; open it, or give a file"),
        ("-m captioner caption nothing.jpg 2>&-", 2, "", ""),
        ("-m captioner caption nothing.jpg 2> /dev/full", 2, "", ""),
        ("caption.py -- -dash.jpg", 2, "", "error: -dash.jpg: no such file or folder"),
        ("train.py nothing", 2, "", "nothing"),
    ],
)
def test_as_a_process(command: str, status: int, out: str, error: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" {command}'],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith(out)
    assert error in done.stderr
    assert not done.stdout or out
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

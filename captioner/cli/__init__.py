"""The commands: each parses its arguments, calls the library and prints; errors become one line and an exit status.

A command is a module of this package with a function `command(arguments, prog)`. It is imported when it is asked for.

Exit status: 0 all done; 1 done, but some photos could not be read; 2 the request is not possible; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from captioner.errors import CaptionerError, missing_extra

#: Each command with its purpose.
COMMANDS = {
    "caption": "write a sentence about each photo",
    "train": "train a model on photos and their captions",
    "report": "show a training run, or compare two, as one HTML page",
    "evaluate": "score a model, or files of results, against human captions",
    "search": "find photos by the words of their captions",
    "export": "make a trained model small and fast, and free of torch",
}

#: Modules that are not there after a plain `pip install captioner`, by the extra that installs them.
EXTRAS = {
    "train": ("accelerate huggingface_hub jaxtyping jinja2 nltk onnx pycocotools torch torchvision wandb".split()),
    "bulk": ["pyarrow"],
    "heic": ["pillow_heif"],
    "ray": ["ray"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `captioner COMMAND ...`, and return its exit status."""
    from captioner.cli import output

    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in COMMANDS:
        return run(name, rest)
    output.standard_streams()
    if name in ("", "-h", "--help"):
        listed = "\n".join(f"  {command:10}{purpose}" for command, purpose in COMMANDS.items())
        help_text = f"usage: captioner COMMAND [options]\n\n{listed}\n\ncaptioner COMMAND --help tells more"
        print(help_text, file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    output.say(f"captioner: {name!r} is no command; expected one of {', '.join(COMMANDS)}")
    return 2


def run(name: str, arguments: Sequence[str] | None = None, prog: str = "") -> int:
    """Run a command; errors that its user can mend become one line.

    Args:
        name: of the command.
        arguments: as typed after its name; by default those of this process.
        prog: what the help calls the program.

    Returns:
        The exit status.
    """
    from captioner.cli import output

    output.standard_streams()
    output.show_log(first_process())
    given = sys.argv[1:] if arguments is None else arguments
    try:
        status: int = import_module(f"captioner.cli.{name}").command(given, prog or f"captioner {name}")
    except CaptionerError as error:
        output.say(f"error: {error}")
        return 2
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
        if extra is None:
            raise
        output.say(f"error: {missing_extra(extra, module)}")
        return 2
    except MemoryError:
        output.say("error: there is too little memory; close other programs, or use a smaller model")
        return 2
    except KeyboardInterrupt:
        output.say("interrupted; what was saved is kept")
        return 130
    except BrokenPipeError:  # whoever read the output has enough
        output.drop()
        return 0
    return status


def first_process() -> bool:
    """Whether this process speaks for all that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"

"""Generate the small data set of coloured shapes: `python data/shapes.py DIR`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout, not installed

from captioner.datasets.shapes import generate
from captioner.errors import CaptionerError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, generate, and return the exit status: 0 done, 2 a setting or the folder is no good."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where images/ and captions.jsonl are written")
    parser.add_argument("--train", type=int, default=3000, help="pictures for training (default %(default)s)")
    parser.add_argument("--val", type=int, default=300, help="pictures for validation (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        generate(options.folder, train=options.train, val=options.val, size=options.size, seed=options.seed)
    except CaptionerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.folder}: {options.train} pictures for training and {options.val} for validation")
    return 0


if __name__ == "__main__":
    sys.exit(main())

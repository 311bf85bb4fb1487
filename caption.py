"""Caption photos: `python caption.py PHOTO ...`."""

import sys

from captioner.cli import run

if __name__ == "__main__":
    sys.exit(run("caption", prog="caption.py"))

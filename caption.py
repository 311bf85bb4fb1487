"""Caption photos: `python caption.py PHOTO ... --model DIR`."""

import sys

from captioner.cli import caption

if __name__ == "__main__":
    sys.exit(caption())

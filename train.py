"""Train a captioning model: `python train.py PRESET [options]`."""

import sys

from captioner.cli import train

if __name__ == "__main__":
    sys.exit(train())

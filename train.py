"""Train a captioning model: `python train.py PRESET [options]`."""

import sys

from captioner.cli import run

if __name__ == "__main__":
    sys.exit(run("train", prog="train.py"))

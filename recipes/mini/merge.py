"""Caption files in Karpathy's form -> one file of that form, which names the folder of each photo.

    python -m recipes.mini.merge merged.json FLICKR8K/dataset_flickr8k.json COCO_MINI/dataset_coco.json

Photos lie in `images/` beside their caption file. Splits stay as they are; each photo's number gets the name of its
data set before it, so that validation can be told apart ("coco-9", "flickr8k-0").
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def merge(files: list[Path]) -> dict[str, Any]:
    """One document of several."""
    images = []
    for file in files:
        document = json.loads(file.read_text(encoding="utf-8"))
        name, folder = document["dataset"], str((file.parent / "images").absolute())
        for image in document["images"]:
            number = f"{name}-{image.get('cocoid', image['imgid'])}"
            sentences = [{"raw": sentence["raw"]} for sentence in image["sentences"]]
            kept = {"filename": image["filename"], "split": image["split"], "sentences": sentences}
            images.append({"filepath": folder, "imgid": number, **kept})
    return {"dataset": "mini", "images": images}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(merge(arguments.files)), encoding="utf-8")


if __name__ == "__main__":
    main()

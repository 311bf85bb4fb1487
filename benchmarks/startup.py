"""The first caption: a whole process beside `import torch`, its memory, and the import of the half without torch.

    python -m benchmarks.startup [--photo FILE] [--rounds 9] [--install]

Each figure is of fresh processes, which take turns within a round; medians over rounds are printed. `--install` makes a
new virtual environment, installs the project into it as a user does (`pip install .`), and tells its size and the
seconds until the first caption.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ratio, report, seconds, take_turns

ROOT = Path(__file__).resolve().parents[1]
_HALF = "captioner.model, captioner.bulk.pipeline, captioner.evaluation, captioner.hub, captioner.images"


def process(*arguments: str) -> float:
    """Seconds that a new process of this Python takes."""
    return seconds(
        lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    )


def memory(*arguments: str) -> float:
    """Most memory that a new process of this Python had, in MB."""
    child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return usage.ru_maxrss / 1000


def install(photo: Path) -> dict[str, float]:
    """A new environment: its size in MB without pip, and the seconds from nothing to a caption."""
    with tempfile.TemporaryDirectory() as name:
        environment = Path(name) / "venv"
        python = str(environment / "bin" / "python")

        def first() -> None:
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", str(ROOT)], check=True, stderr=subprocess.DEVNULL)
            subprocess.run([python, str(ROOT / "caption.py"), str(photo)], cwd=name, check=True)

        taken = seconds(first)
        packages = next(environment.glob("lib/python*/site-packages"))
        size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file() and not path.is_symlink())
        pip = sum(path.stat().st_size for path in (packages / "pip").rglob("*") if path.is_file())
        if (packages / "torch").exists():
            raise SystemExit("torch was installed")
    return {"installed_mb": (size - pip) / 1e6, "nothing_to_caption_s": taken}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo; by default one of scikit-learn's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--install", action="store_true", help="measure an installation as well")
    arguments = parser.parse_args()
    photo = arguments.photo
    if photo is None:
        from benchmarks.pretrained import samples

        photo = samples()[-1]
    photo = photo.resolve()
    systems = {
        "caption": lambda: process("caption.py", str(photo)),
        "import_torch": lambda: process("-c", "import torch"),
        "import_half": lambda: process("-c", f"import {_HALF}"),
        "nothing": lambda: process("-c", "pass"),
    }
    systems["caption"]()
    systems["import_torch"]()
    found = take_turns(systems, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ours = {
        "caption_s": medians["caption"],
        "caption_peak_mb": memory("caption.py", str(photo)),
        "import_half_s": medians["import_half"] - medians["nothing"],
        **(install(photo) if arguments.install else {}),
    }
    for name, value in ours.items():
        print(f"{value:8.2f}  {name.replace('_', ' ')}")
    report(
        "one photo from the start of the process to its end, model in the box",
        ours=ours,
        peer={"import_torch_s": medians["import_torch"]},
        ratios={"caption_to_import_torch": ratio(found["caption"], found["import_torch"])},
    )


if __name__ == "__main__":
    main()

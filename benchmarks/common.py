"""What the benchmarks share: systems that take turns, an earlier commit as one of them, and the last line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any


def seconds(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def take_turns(systems: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure all systems once a round, so that a machine that is busy for a while is so for all of them.

    Args:
        systems: each gives its figure.
        rounds: how often.

    Returns:
        The figures of each system, round by round.
    """
    found: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        for name, measure in systems.items():
            found[name].append(measure())
        print(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.4g}" for name, values in found.items()))
    return found


def ratio(one: list[float], other: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


class Before:
    """An earlier commit of this project, in a process of its own: `benchmarks/before.py` run by that commit's code."""

    def __init__(self, checkout: Path, *arguments: str) -> None:
        script = Path(__file__).with_name("before.py").resolve()
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._answer() != "ready":
            raise SystemExit(f"{checkout}: cannot run the benchmark; give a checkout of the commit b0db82f")

    def __call__(self) -> float:
        """Have it work once; seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def report(
    what: str,
    *,
    ours: Mapping[str, Any],
    peer: Mapping[str, Any] | None = None,
    ceiling: Mapping[str, Any] | None = None,
    ratios: Mapping[str, float] | None = None,
) -> None:
    """Print one JSON object: the last line of every benchmark."""
    versions = {"python": platform.python_version()}
    for package in ("numpy", "onnxruntime", "pillow", "torch"):
        try:
            versions[package] = version(package)
        except ImportError:
            continue
    content = {
        "what": what,
        "ours": _rounded(ours),
        "peer": _rounded(peer or {}),
        "ceiling": _rounded(ceiling or {}),
        "ratios": _rounded(ratios or {}),
        "machine": machine(),
        "versions": versions,
    }
    print(json.dumps(content))


def machine() -> str:
    """The processor, in words."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}

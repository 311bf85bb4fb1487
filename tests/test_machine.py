"""A process uses the processors that it was given, and not those of the whole host."""

import os
from pathlib import Path

import pytest

from captioner import machine


def control_group(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "share"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pod/box\n", {"pod/box/cpu.max": "50000 100000\n", "pod/cpu.max": "150000 100000\n"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        ("2:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("nonsense\n", {"cpu.max": "200000 100000\n"}, None),
        ("0::/\n", {"cpu.max": "200000 0\n"}, None),
        ("0::/\n", {"cpu.max": "\n"}, None),
        ("", {}, None),
    ],
)
def test_share_of_a_container(tmp_path: Path, groups: str, files: dict[str, str], share: float | None) -> None:
    (tmp_path / "groups").write_text(groups)
    assert machine._container_share(tmp_path / "groups", control_group(tmp_path / "root", files)) == share


def test_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert machine._container_share(tmp_path / "nothing", tmp_path) is None


@pytest.mark.parametrize(("share", "expected"), [(None, 8), (64.0, 8), (2.0, 2), (1.5, 2), (0.1, 1)])
def test_the_smaller_of_both(monkeypatch: pytest.MonkeyPatch, share: float | None, expected: int) -> None:
    monkeypatch.setattr(machine, "_bound", lambda: 8)
    monkeypatch.setattr(machine, "_container_share", lambda *_: share)
    assert machine.processors() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_processors_that_a_process_is_bound_to() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.processors() == 1
    finally:
        os.sched_setaffinity(0, before)

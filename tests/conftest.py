"""What all tests share: the shapes of tensors are checked while they run, and the real data has one way in."""

import os
from pathlib import Path

# Before torch is imported. Threads only get in each other's way with models as small as those of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from beartype import beartype
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]


def checked(function):
    """Check the tensors that a function is given and returns; mypy checks the rest, and sees more of it."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if "Tensor" in str(hint)}
    return beartype(function)


# The modules that state shapes, before any of them is imported. jaxtyping imports the checker by its name.
_STATING = [path for path in (ROOT / "captioner").rglob("*.py") if "from jaxtyping" in path.read_text("utf-8")]
install_import_hook([".".join(path.relative_to(ROOT).with_suffix("").parts) for path in _STATING], "conftest.checked")


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="compare whole corpora with the references; takes minutes")


@pytest.fixture
def gpu():
    """The device of tests that are marked `gpu`."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    return torch.device("cuda")


@pytest.fixture
def shared():
    """The folder of real photos, captions and weights beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder

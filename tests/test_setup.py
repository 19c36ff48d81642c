"""The set-up: what is pinned, and what the built package holds."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, GROUPS = SETTINGS["project"], SETTINGS["dependency-groups"]


def distribution(requirement: str) -> str:
    """`Orbax_Checkpoint[x]>=0.12` → `orbax-checkpoint`."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~\[; ]", requirement)[0]).lower()


def pinned_in(file: str) -> list[str]:
    """The pinned requirements, each on one line."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


@pytest.fixture(scope="module")
def locked() -> list[str]:
    return pinned_in("requirements.lock")


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("requirements*.lock")))
def test_lock_pins_names_versions_hashes_and_nothing_else(file):
    pinned = re.compile(r"[a-z0-9-]+==[\w.]+( ; [^\\#]+?)?( +--hash=sha256:[0-9a-f]{64})+")
    assert [line for line in pinned_in(file) if not pinned.fullmatch(line)] == []


@pytest.mark.parametrize("group", GROUPS)
def test_lock_covers_what_its_group_asks_for(group):
    asked = dict(r.split("==") for r in GROUPS[group] if "==" in r)
    pinned = dict(line.split()[0].split("==") for line in pinned_in(f"requirements-{group}.lock"))
    for name, version in asked.items():
        assert pinned[distribution(name)] == version, "run `make lock`"
    assert {distribution(r) for r in GROUPS[group]} <= set(pinned), "run `make lock`"


def test_lock_covers_what_the_project_asks_for(locked):
    asked = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    missing = {distribution(r) for r in asked} - {distribution(line) for line in locked}
    assert missing == set(), "run `make lock`"


def test_lock_holds_the_oldest_and_the_newest_jax(locked):
    versions = [re.match(r"jax==(\S+) ; (.+?) +--hash", line) for line in locked]
    by_marker = {match[2]: match[1] for match in versions if match}
    assert by_marker["python_full_version < '3.12'"] == "0.10.2"
    assert by_marker["python_full_version >= '3.12'"].startswith("0.12.")


def test_built_package_holds_both_imports_and_their_data(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.split("/")[0] for name in names}
    assert folders == {
        "jaxformer",
        "jaxformer_kernels",
        f"jaxformer-{PROJECT['version']}.dist-info",
    }
    expected = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "jaxformer"), (ROOT / "kernels", "jaxformer_kernels"))
        for path in (base / package).rglob("*")
        if path.suffix in {".py", ".json"} or path.name == "py.typed"
    }
    assert expected <= names

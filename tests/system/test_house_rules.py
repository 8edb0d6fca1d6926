"""Rules of the house that a machine can check; import rules are in pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "flwr", "sklearn")

LOADED = """
import contextlib, io, sys
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    {work}
print(*sorted(set(sys.modules) & set({names!r})))
"""


def loaded(work: str, names: tuple[str, ...]) -> str:
    program = LOADED.format(work=work, names=names)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    # Weights are safetensors, records are JSON or YAML.
    assert not re.search(r"\bpickle\b|\btorch\.(load|save)\(|\bdill\b|allow_pickle=True", text)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert "import *" not in text
    assert text == "" or text.lstrip().startswith('"""')


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_past_59_lines(path: Path) -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, functions)]
    assert all(n.end_lineno is not None and n.end_lineno - n.lineno < 59 for n in found)


# Words by which prose reads as translated, where the field has one of its own.
TRANSLATED = re.compile(r"\bown\b|what goes|those that|is told|as it stands", re.IGNORECASE)


def test_docstrings_begin_in_the_fields_words() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for path in SOURCES:
        nodes = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, kinds)]
        for line in (ast.get_docstring(n) or "" for n in nodes):
            if TRANSLATED.search(line.partition("\n")[0]):
                found.append(f"{path.relative_to(ROOT)}: {line.partition(chr(10))[0]}")
    assert len(found) <= 10, "\n".join(found)


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import fedclip", (*HEAVY, "pydantic", "yaml", "rich")) == ""


def test_help_loads_nothing_heavy() -> None:
    work = "from fedclip.cli.main import main; sys.argv = ['fedclip', '--help']; main()"
    assert loaded(work, (*HEAVY, "pydantic", "yaml")) == ""


def test_validate_loads_no_torch() -> None:
    work = (
        "from fedclip.cli.main import main; "
        "sys.argv = ['fedclip', 'validate', 'configs/quickstart.yaml']; main()"
    )
    assert loaded(work, HEAVY) == ""


@pytest.mark.slow
def test_a_run_starts_without_what_it_needs_at_its_end() -> None:
    late = ("datasets", "flwr_datasets", "matplotlib", "pandas", "sklearn")
    assert loaded("import fedclip.experiment.run", late) == ""


def test_torchvision_is_no_dependency() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not re.search(r"(?m)^torchvision\b", pins)
    assert "://" not in pins
    assert re.search(r"(?m)^torch==\d", pins)


def test_the_root_holds_eight_modules_and_eleven_rooms() -> None:
    package = ROOT / "src" / "fedclip"
    modules = {path.stem for path in package.glob("*.py")}
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    root = "__init__ __main__ catalog records seeding errors device files"
    below = "cli config lora data models federated evaluation reports experiment adapters deploy"
    assert (modules, rooms) == (set(root.split()), set(below.split()))

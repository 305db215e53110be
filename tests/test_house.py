"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdops"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 420  # lines; 200 is the aim, and more than 400 needs a reason
SPEAKERS = {"commands/_console.py"}  # the only files that write to the terminal
SHELVES = ["adapters", "archs", "commands", "dialects", "embeddings", "formats", "layouts", "merges", "pipelines"]
SHELVES += ["custom_diffusion", "hypernetworks", "presets", "trainers"]
MACHINE_PATH = re.compile(r"(?<![\w.~/}>-])/(?:work|farm|root|tmp|mnt|(?:home|Users)/\w+)(?:/|\b)")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def shown(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def trees() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_file_says_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = docstring.partition("\n")[0]
    assert first
    assert len(first) <= 120


@pytest.mark.parametrize("path", [path for path in FILES if shown(path) not in SPEAKERS], ids=shown)
def test_only_the_console_speaks(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert "print" not in {func.id for func in calls if isinstance(func, ast.Name)}


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_shelf_says_its_contract(shelf):
    assert (import_module(f"sdops.{shelf}").__doc__ or "").startswith("SHELF: ")


def test_exported_names_exist():
    for name, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                exported = ast.literal_eval(node.value)
                module = import_module(name)
                assert len(exported) == len(set(exported)), name
                assert [item for item in exported if not hasattr(module, item)] == [], name


def test_no_module_imports_itself_through_others():
    known = trees()
    graph = {name: imports(tree, set(known)) - {name} for name, tree in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that a module imports when it is loaded itself."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= modules or {node.module}
    return found & known


def test_no_path_of_a_machine_is_kept():
    found = []
    for path in tracked_files():
        if path.suffix in {".gz", ".png", ".safetensors"} or path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["merge", "--help"], ["merge", "a", "-m", "tise"]])
def test_the_command_line_answers_without_torch_and_numpy(arguments):
    code = "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    modules = done.stdout.splitlines()[-1].split()
    assert "sdops.commands._app" in modules
    assert not {"torch", "numpy"} & set(modules)


def test_the_readme_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = {path.stem.replace("_", "-") for path in (PACKAGE / "commands").glob("[!_]*.py")} - {"main"}
    assert set(re.findall(r"`?\bmake ([\w-]+)`", text)) <= targets
    assert set(re.findall(r"^\s*(?:\$ )?sdops ([a-z][\w-]*)", text, re.MULTILINE)) <= commands
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (ROOT / link).exists()]
    assert links == []

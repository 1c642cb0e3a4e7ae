"""Which file may import which: downwards through the rooms, and never in a circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from paths import ROOT

pytestmark = pytest.mark.quick
# From the top of the house to its foundation. A file imports files of its own floor's room, or of floors below.
FLOORS = (
    {"command line"},
    {"commands"},
    {"face"},
    {"checking"},
    {"publishing", "serving", "training"},
    {"evaluation"},
    {"registry"},
    {"travelling"},
)
ROOMS_OF_ROOT = {
    "__main__": "command line",
    "cli": "command line",
    "__init__": "face",
    "registration": "face",
    "refresh": "publishing",
    "published": "registry",
    "registry": "registry",
    "families": "registry",
    "files": "registry",
    "checkpoints": "registry",
    "layouts": "registry",
    "layouts_speculators": "registry",
    "qwen3_configs": "registry",
    "kinds": "registry",
    "catalogue": "registry",
    "versions": "registry",
}
PLACED = re.compile(r"`(\w+)(?:\.\w+)?` (?:in|of) `([\w/.]+\.py)`")
"""How a page says that a name is in a file: `NAME` in `file.py`."""
PACKAGES = ("checking", "commands", "evaluation", "publishing", "serving", "training")
FILES = [path for folder in (".", *PACKAGES) for path in sorted((ROOT / folder).glob("*.py"))]


def room(path: Path) -> str:
    """The room of a file: its package, or what it is to the root."""
    if path.parent != ROOT:
        return path.parent.name
    return ROOMS_OF_ROOT.get(path.stem, "travelling")


def floor(path: Path) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(path) in rooms)


class Imports(ast.NodeVisitor):
    """The files of ours that a file imports, at its head or inside a function.

    What stands under `if TYPE_CHECKING:` counts too. The `__init__.py` files of the folders that a file lies in do not.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: set[Path] = set()
        self.visit(ast.parse(path.read_text()))

    def visit_Import(self, node: ast.Import) -> None:
        assert not [alias.name for alias in node.names if alias.name.split(".")[0] == "dflash_hub"], self.path

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level or (node.module or "").split(".")[0] != "dflash_hub", self.path
        if node.level:
            folder = self.path.parents[node.level - 1]
            module = folder.joinpath(*(node.module or "").split("."))
            self.found |= {file_of(module, alias.name) for alias in node.names}


def file_of(module: Path, name: str) -> Path:
    """The file that `from module import name` runs: a submodule of that name, else the module itself."""
    for file in (module / f"{name}.py", module.with_suffix(".py"), module / "__init__.py"):
        if file in FILES:
            return file
    raise AssertionError(f"{module} is no file of this package")


@pytest.fixture(scope="module")
def graph() -> dict[Path, set[Path]]:
    return {path: Imports(path).found for path in FILES}


def test_no_files_import_each_other_in_a_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


def test_imports_run_downwards(graph):
    wrong = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path, others in graph.items()
        for other in others
        if room(path) != room(other) and floor(path) >= floor(other)
    ]
    assert wrong == []


def test_no_command_lies_outside_the_commands(graph):
    """Neither typer nor a console is needed by what others build upon."""
    for path in FILES:
        if room(path) not in ("commands", "command line"):
            heads = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            assert not [head for head in heads if (head or "").split(".")[0] in ("typer", "rich")], path


def test_what_contributors_are_sent_to_is_there():
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md", *(ROOT / "docs" / "ideas").glob("*.md")]
    text = " ".join(" ".join(page.read_text().split()) for page in pages)
    placed = PLACED.findall(text)
    assert len(placed) >= 15
    assert [path.name for path in FILES if path.parent == ROOT and f"`{path.name}`" not in text] == []
    for name, file in placed:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{name} is not in {file}"

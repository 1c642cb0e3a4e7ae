"""What README and docs show: Python runs, commands and their options exist, and the recorded terminal is clean."""

import ast
import importlib.util
import re
import shlex
import shutil
import socket
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import typer
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from typer.testing import CliRunner

from dflash_hub import cli
from dflash_hub.registry import CATALOGUE
from paths import ROOT, TINY

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
TARGET, DRAFT = "Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16"
"""What the README loads. The tests' Hub has the built-in pair under these names."""
CHECKED = ("dflash_hub", "transformers", "torch")
"""What pages import and every test can import. A client of a server is another matter."""
COMMANDS = typer.main.get_command(cli.app)


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of code of a page, in these languages."""
    found = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [code for language, code in found if language in languages]


def shell_lines(page: Path) -> list[list[str]]:
    """The words of every line that a page gives to a shell, without comments."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture
def served(hub):
    """The built-in pair on the Hub, under the names that the README loads."""
    spec = next(spec for spec in CATALOGUE if spec.repo_id == DRAFT)
    for name, folder in ((TARGET, "target"), (DRAFT, "draft")):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=TINY / folder)
    repository = hub.state.repos["models", DRAFT]
    repository.tags[spec.revision] = repository.branches["main"]
    yield hub
    for name in (TARGET, DRAFT):  # which other tests know as the real ones
        shutil.rmtree(Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}", ignore_errors=True)


# Python ---------------------------------------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs(served, capsys):
    code = "".join(blocks(ROOT / "README.md", "python"))
    assert "custom_generate=draft.speculate" in code
    assert "custom_generate=dflash_generate" in code
    exec(code, {})
    assert capsys.readouterr().out.startswith("def quicksort(items):")
    assert {TARGET, DRAFT} == {rid for path in served.calls() for rid in (TARGET, DRAFT) if rid in path[1]}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")  # pages leave it out
def test_the_python_of_the_docs_runs_on_the_built_in_pair(monkeypatch):
    """Of pages that need more than the pair, only what they import is checked, below."""
    monkeypatch.chdir(ROOT)
    namespace = {}
    proposer, lookup = blocks(ROOT / "docs/decoding.md", "python")[1::2]
    (repeat,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    for code in (proposer, lookup, repeat):
        exec(code, namespace)
    assert len(namespace["statistics"].acceptance_by_position) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_python_of_a_page_imports_exists(page):
    for code in blocks(page, "python", "py"):
        tree = ast.parse(code)
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        tree.body = [node for node in imports if (node.module or "").partition(".")[0] in CHECKED]
        exec(compile(tree, str(page), "exec"), {})


# Shell ----------------------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> None:
    """Parse the words after `dflash-hub`, as the command line would; an error says what does not exist."""
    start = next((at for at, word in enumerate(words) if not word.startswith("-")), len(words))
    assert set(words[:start]) <= flags_of(COMMANDS)
    if words[start:]:
        name, *options = words[start:]
        check_flags(name, options)
        COMMANDS.commands[name].make_context(name, options)


def check_flags(name: str, words: list[str]) -> None:
    """Check that a command has the options among these words. Those with a parser of their own name them elsewhere."""
    command = COMMANDS.commands[name]
    known = flags_of(command) | {"--help"}
    if command.context_settings.get("allow_extra_args"):
        known |= {"--" + option.replace("_", "-") for option in cli.option_names([name])}
    assert {word for word in words if word.startswith("--")} <= known, name


def flags_of(command) -> set[str]:
    """The options of a command, or of all commands together."""
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def pip_install(words: list[str]) -> None:
    """Check what pip is given: nothing is installed in a test."""
    project = (ROOT / "pyproject.toml").read_text()
    for word in words[1:]:
        name, _, extra = word.rstrip("]").partition("[")
        if not word.startswith("-"):
            assert name == "dflash-hub"
            assert not extra or re.search(rf"^{extra} = \[", project, re.MULTILINE)


def run_make(words: list[str]) -> None:
    """Check that make knows what it is to make: the tests are this run, and `test_package.py` runs the demo."""
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


CHECKS = {"dflash-hub": parse, "pip": pip_install, "make": run_make}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_exists_with_its_options(page):
    for words in shell_lines(page):
        if "|" in words:
            words = words[words.index("|") + 1 :]
        if ">" in words:
            words = words[: words.index(">")]
        assert words[0] in CHECKS, f"{words[0]}: say in CHECKS how such a line is checked"
        CHECKS[words[0]](words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_the_text_of_a_page_exists(page):
    """Such lines may leave out what they are not about, so only the names of commands and flags are checked."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for line in re.findall(r"`dflash-hub ([^`]+)`", text):
        name, *words = line.split()
        if name.startswith("-"):
            assert name in flags_of(COMMANDS)
        else:
            check_flags(name, words)


def test_what_the_readme_generates_from_a_shell_is_generated(served):
    """The lines that train are parsed above, and run by `test_notebooks.py`, where they end soon."""
    (words,) = [words for words in shell_lines(ROOT / "README.md") if words[1:2] == ["generate"]]
    done = CliRunner().invoke(cli.app, [*words[1:], "--max-new-tokens", "24"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "tokens a cycle" in done.stderr


# The recorded terminal ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    """The script that records."""
    spec = importlib.util.spec_from_file_location("record", ROOT / "docs" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recorded_terminal_shows_the_demo_and_nothing_of_the_machine(record):
    drawn = record.PICTURE.read_text(encoding="utf-8")
    text = "".join(ET.fromstring(drawn).itertext()).replace("\xa0", " ")
    assert str(record.PICTURE.relative_to(ROOT)) in (ROOT / "README.md").read_text()
    assert len(drawn) < 100_000
    for words in ("$ dflash-hub demo", "times as fast", "tokens per cycle", "The two texts are", "identical"):
        assert words in text
    assert socket.gethostname() not in drawn
    assert not re.search(r"/(tmp|root|home|usr|opt|work|Users)/|https?://(?!www\.w3\.org)", drawn)


def test_a_terminal_is_recorded_with_its_colours(record):
    code = "import sys; print(sys.stdout.isatty(), '\\x1b[1;32mgreen\\x1b[0m')"
    screen = record.run_in_terminal([sys.executable, "-c", code])
    assert screen == "True \x1b[1;32mgreen\x1b[0m\n"
    drawn = record.picture("dflash-hub demo", screen)
    assert "green" in "".join(ET.fromstring(drawn).itertext())
    with pytest.raises(RuntimeError, match="ended with 3"):
        record.run_in_terminal([sys.executable, "-c", "raise SystemExit(3)"])

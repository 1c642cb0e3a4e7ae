"""What is shipped: every file in every kind of install, and nothing that travels leaning on what does not."""

import ast
import fcntl
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

import dflash_hub
from paths import ROOT, TINY

LATER = ("dflash2", "dspark", "domino")
"""The kinds of drafts that have files of their own."""
TRAVELLING = sorted(path for name in ("dflash", *LATER) for path in ROOT.glob(f"*{name}.py"))
DATA_FILES = ["drafts.json", "evaluation/prompts.jsonl", "py.typed"]
DATA_FILES += ["hub_repo/README.md", "hub_repo/.gitattributes"]
DATA_FILES += [str(path.relative_to(ROOT)) for path in TINY.rglob("*.*") if path.suffix != ".pyc"]
ROOMS = ("checking", "commands", "evaluation", "publishing", "serving", "training")
CODE_FILES = [str(path.relative_to(ROOT)) for room in (".", *ROOMS) for path in (ROOT / room).glob("*.py")]
DATA_FILES += [str(path.relative_to(ROOT)) for path in (ROOT / "evaluation" / "page").iterdir()]


def test_the_public_names_are_these():
    assert dflash_hub.__all__ == [
        "DFLASH_DRAFT_REGISTRY",
        "DFlash2Config",
        "DFlash2DraftModel",
        "DFlashConfig",
        "DFlashDraftModel",
        "DFlashDraftSpec",
        "DSparkConfig",
        "DSparkDraftModel",
        "DecodeStatistics",
        "DominoConfig",
        "DominoDraftModel",
        "Qwen3DFlash2DraftModel",
        "Qwen3DFlashDraftModel",
        "Qwen3DSparkModel",
        "__version__",
        "build_target_layer_ids",
        "dflash_generate",
        "load_draft",
        "lookup_generate",
        "register_dflash_draft",
        "resolve_dflash_draft_spec",
    ]
    assert all(getattr(dflash_hub, name) is not None for name in dflash_hub.__all__)


@pytest.mark.quick
def test_the_travelling_files_are_these():
    names = (
        "acceptance_ adaptive_ attention_ cache_ calls_ compat_ configuration_ costs_ custom_generate_ drafter_ "
        "execution_ experience_ families_ findings_ generate_ generation_ layouts_ lookup_ modeling_ outputs_ "
        "past_key_values_ proposals_ recording_ repository_ sampling_ selfcheck_ sequences_ support_ taps_ target_ "
        "trees_ weights_"
    )
    later = {f"{part}{kind}.py" for kind in LATER for part in ("", "configuration_", "modeling_")}
    first = {"dflash.py", *(f"{name}dflash.py" for name in names.split())}
    assert {path.name for path in TRAVELLING} == first | later


@pytest.mark.quick
@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_travelling_files_import_only_each_other_and_what_every_transformers_has(path):
    text = path.read_text()
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "packaging", *sys.stdlib_module_names}
    # What a DFlash 1 draft needs, every repository has; the rest is with drafts of its kind alone.
    others = [name for name in LATER if name not in path.stem]
    siblings = {sibling.stem for sibling in TRAVELLING if not any(name in sibling.stem for name in others)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            assert node.module is not None
            assert (node.module in siblings) if node.level else (node.module.split(".")[0] in allowed)
    # transformers finds relative imports by this pattern in the raw text, strings and comments included.
    found = re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)
    assert set(found) <= siblings


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """An sdist, and a wheel built from that sdist, once for all workers.

    setuptools collects an sdist in the folder that it packs, so one build at a time.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    with (ROOT / "pyproject.toml").open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_the_wheel_built_from_the_sdist_holds_every_file(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    missing = [name for name in [*CODE_FILES, *DATA_FILES] if f"dflash_hub/{name}" not in names]
    assert missing == []
    assert not [name for name in names if "tests/" in name or ".venv" in name]


def test_the_sdist_holds_the_tests_and_what_they_need(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    for name in ("tests/conftest.py", "tests/data/golden/qwen3-full/golden.safetensors", "constraints.txt", "LICENSE"):
        assert name in names


INSTALLED = "import dflash_hub; print(dflash_hub.__file__); from dflash_hub.cli import main; main()"
ALONE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path[:] = [{site!r}, *(path for path in sys.path if path.startswith(({borrowed!r}, sys.base_prefix)))]
assert "transformers" not in sys.modules
"""


def test_the_wheel_installs_and_its_demo_runs_elsewhere(built, tmp_path, servers):
    """In an environment that borrows torch and transformers from this one, from another folder.

    A new process runs a command that needs neither; the demo is forked from one that has imported torch.
    """
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    site = next(home.glob("lib/python*/site-packages"))
    zipfile.ZipFile(built[1]).extractall(site)
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed)
    command = [home / "bin" / "python", "-I", "-c", INSTALLED, "drafts", "--target", "qwen3-4b"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    words = ("dflash-hub", "demo", "--prompts", "1", "--capture", "off")
    shown = servers.compilers.run(*words, code=ALONE.format(site=str(site), borrowed=borrowed) + INSTALLED)
    for done, said in ((listed, "z-lab/Qwen3-4B-DFlash-b16"), (shown, "identical")):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(home))
        assert said in done.stdout
        assert not re.findall("(?i)warning|traceback", done.stderr), done.stderr


def test_importing_it_costs_no_more_than_automodel_and_our_own_files(servers):
    code = """
import sys
from transformers import AutoModel, AutoConfig
before = {*sys.modules}
import dflash_hub
print(*sys.modules.keys() - before)
"""
    extra = set(servers.torch.run(code=code).stdout.split())
    assert "dflash_hub" in extra
    foreign = {name for name in extra if not name.startswith(("dflash_hub", "__editable__"))}
    assert foreign == set()


@pytest.mark.parametrize(
    ("server", "first"), [("compilers", "dflash_hub.configuration_dflash2"), ("models", "dflash_hub")]
)
def test_the_auto_classes_know_drafts_whichever_is_imported_first(servers, server, first):
    code = f"""if True:
        import sys
        assert ("transformers" in sys.modules) == {server == "models"}
        import {first}
        from transformers import AutoConfig, AutoModel, CONFIG_MAPPING
        from dflash_hub import DFlash2Config, DFlash2DraftModel, DSparkConfig
        from dflash_hub.configuration_dflash import EXTENSIONS
        assert CONFIG_MAPPING["dflash2"] is DFlash2Config
        assert AutoModel._model_mapping[DFlash2Config] is DFlash2DraftModel
        assert DSparkConfig in AutoModel._model_mapping
        assert EXTENSIONS.other_layouts and EXTENSIONS.write_card
    """
    done = getattr(servers, server).run(code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.quick
def test_importing_it_registers_config_and_model_together():
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("dflash", block_size=4, mask_token_id=1, target_layer_ids=[0], hidden_size=32)
    assert type(config) is dflash_hub.DFlashConfig
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    assert type(AutoModel.from_config(config)) is dflash_hub.DFlashDraftModel
    assert AutoModel._model_mapping[dflash_hub.DFlashConfig] is dflash_hub.DFlashDraftModel
    assert dflash_hub.DFlashConfig._auto_class == "AutoConfig"
    assert dflash_hub.DFlashDraftModel._auto_class == "AutoModel"


def test_the_changelog_tells_of_this_version():
    assert f"## {dflash_hub.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert dflash_hub.__version__ in (ROOT / "configuration_dflash.py").read_text()

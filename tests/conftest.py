"""A Hub of our own for the whole run: the variables are read when huggingface_hub is imported, so they come first."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap

from hubserver import HubServer
from paths import TINY

if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before the tests could point it at their own server")

HUB = HubServer().start()
HOME = tempfile.mkdtemp(prefix="dflash-hub-tests-")
for key in [key for key in os.environ if key.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_"))]:
    del os.environ[key]
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HOME,
    "HF_TOKEN": "hf_test",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models; more threads only wait for each other


class _NoPackages:
    """The repository root is the package; as a pytest.Package it would be imported again, under the folder's name."""

    @staticmethod
    def pytest_collect_directory(path, parent):
        return pytest.Dir.from_parent(parent, path=path)


def pytest_configure(config):
    config.pluginmanager.register(_NoPackages())


@pytest.fixture
def hub():
    """The Hub, empty."""
    for store in (HUB.state.repos, HUB.state.lfs, HUB.state.log, HUB.state.fail):
        store.clear()
    return HUB


@pytest.fixture
def repo_id(request):
    """A repository id of this test's own: no cache and no imported module is shared between tests."""
    return "tester/" + re.sub(r"[^\w.-]+", "-", request.node.name)[:80].strip("-")


@pytest.fixture
def fresh_process():
    """Run code in a process that cannot import dflash_hub, and give its output; with `fails`, its errors."""

    def run(code: str, fails: bool = False, block: bool = True, **env: str) -> str:
        prefix = "import sys; sys.modules['dflash_hub'] = None\n" if block else ""
        command = [sys.executable, "-I", "-c", prefix + textwrap.dedent(code)]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture(scope="session")
def tiny_target():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY / "target").eval()


@pytest.fixture
def tiny_draft():
    from dflash_hub import DFlashDraftModel

    return DFlashDraftModel.from_pretrained(TINY / "draft").eval()


def pytest_sessionfinish(session, exitstatus):
    HUB.stop()
    shutil.rmtree(HOME, ignore_errors=True)

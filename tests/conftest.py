"""A Hub of our own for the whole run: the variables are read when huggingface_hub is imported, so they come first."""

import atexit
import gc
import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from forked import Servers, remember_imports
from hubserver import HubServer
from paths import ROOT, TINY

if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before the tests could point it at their own server")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Called last of all at the end: Python would take three seconds to free what was imported.
    atexit.register(os._exit, 0)

MEMORY, LEFT = Path("/dev/shm"), "dflash-hub-tests-of-"


def scratch() -> Path | None:
    """A folder in memory for all temporary files, where writing takes a quarter of the time; None without the room.

    Who sets TMPDIR keeps it. Workers share that of the process that started them.
    """
    if {"TMPDIR", "PYTEST_XDIST_WORKER"} & os.environ.keys() or not MEMORY.is_dir():
        return None
    for left in MEMORY.glob(f"{LEFT}*"):  # of a run that was killed
        if not Path("/proc", left.name.removeprefix(LEFT)).exists():
            shutil.rmtree(left, ignore_errors=True)
    takes_programs = os.access(MEMORY, os.W_OK) and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    if not takes_programs or shutil.disk_usage(MEMORY).free < 4e9:
        return None
    folder = MEMORY / f"{LEFT}{os.getpid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # What torch has compiled stays for the next run.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


SCRATCH = scratch()
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
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets tells another host what it loads
    "OMP_NUM_THREADS": "1",  # of processes that tests start; more threads only wait for each other
}

import pytest  # noqa: E402


class _NoPackages:
    """The repository root is the package; as a pytest.Package it would be imported again, under the folder's name."""

    @staticmethod
    def pytest_collect_directory(path, parent):
        return pytest.Dir.from_parent(parent, path=path)


def pytest_configure(config):
    config.pluginmanager.register(_NoPackages())
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # until everything is imported: what imports leave is no garbage
        import torch

        torch.set_num_threads(1)  # tiny models; more threads only wait for each other


def pytest_collection_finish():
    """Leave all that was imported out of later collections of garbage, each of which would look through it."""
    gc.freeze()
    gc.enable()
    if "transformers" in sys.modules:
        remember_imports()


def pytest_runtest_logfinish():
    """Do likewise with what a test leaves: Trainer collects all garbage, each time for a fifth of a second."""
    gc.freeze()


@pytest.fixture
def hub():
    """The Hub, empty."""
    for store in (HUB.state.repos, HUB.state.lfs, HUB.state.log, HUB.state.fail, HUB.state.renamed):
        store.clear()
    return HUB


@pytest.fixture(autouse=True)
def chains_unless_costs_are_known(request, monkeypatch):
    """Measure and read no costs: what is chosen by them depends on time, and so would all counts of cycles."""
    if request.path.stem not in ("test_adaptive", "test_cuda", "test_cli"):
        monkeypatch.setattr("dflash_hub.adaptive_dflash.MEASURED_FROM", 2**62)
        monkeypatch.setattr("dflash_hub.adaptive_dflash.known_costs", lambda state, mode: None)


@pytest.fixture
def unchecked(monkeypatch):
    """Compare no block with the target's own forward before the first token, as any draft that is new would.

    `test_decode.py`, `test_families.py`, `test_generate.py` and more have that check in every decode.
    """
    monkeypatch.setattr("dflash_hub.generate_dflash.check_alone", lambda *given: None)


@pytest.fixture
def repo_id(request):
    """A repository id of this test's own: no cache and no imported module is shared between tests."""
    return "tester/" + re.sub(r"[^\w.-]+", "-", request.node.name)[:80].strip("-")


OFFLINE = "import huggingface_hub.constants; huggingface_hub.constants.HF_HUB_OFFLINE = True\n"
"""What HF_HUB_OFFLINE does when huggingface_hub is imported."""
ELSEWHERE = """
for module in [*sys.modules.values()]:
    for name, value in [*vars(module or sys).items()]:
        if isinstance(value, str) and value.startswith({before!r}):
            setattr(module, name, value.replace({before!r}, {now!r}))
"""
"""What HF_ENDPOINT and HF_HOME do then, in every module that read them or made paths of them."""


@pytest.fixture(scope="session")
def servers():
    """Processes that fork, for tests that need a process of their own."""
    started = Servers()
    yield started
    started.stop()


@pytest.fixture
def fresh_process(servers):
    """Run code in a process that cannot import dflash_hub, and give its output; with `fails`, its errors.

    It is forked from one that has imported transformers. What variables say that are read then, it is told.
    """

    def run(code: str, fails: bool = False, block: bool = True, **env: str) -> str:
        prefix = "import sys\n"
        if block:
            prefix += "sys.modules['dflash_hub'] = None\n"
        if env.get("HF_HUB_OFFLINE"):
            prefix += OFFLINE
        assert env.keys() <= {"HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HF_HOME"}, env
        for name in env.keys() & {"HF_ENDPOINT", "HF_HOME"}:
            prefix += ELSEWHERE.format(before=os.environ[name], now=env[name])
        done = servers.models.run(code=prefix + textwrap.dedent(code), **env)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    return run


PROBE = """
import runpy, sys
for module in list(sys.modules.values()):
    if "HF_MODULES_CACHE" in vars(module):
        module.HF_MODULES_CACHE = {modules!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def apart():
    """The layouts that `forked_probe` leaves to a new process."""
    return set()


@pytest.fixture
def forked_probe(servers, monkeypatch, apart):
    """Let the probe, which every push and refresh runs twice, run in a fork and not in a process of its own."""
    run_anything = subprocess.run

    def run(command, **options):
        if "probe.py" not in str(command[-2]) or Path(command[-1]).name in apart:
            return run_anything(command, **options)
        assert options["env"]["HF_HUB_OFFLINE"] == "1"
        code = OFFLINE + PROBE.format(modules=options["env"]["HF_MODULES_CACHE"])
        return servers.models.run(*map(str, command[-2:]), code=code)

    monkeypatch.setattr(subprocess, "run", run)


TRAIN = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import training_run; training_run.main()"
UNDRAWN = "from dflash_hub.training import progress; progress.draw = lambda *given: False; "


@pytest.fixture
def undrawn(monkeypatch):
    """Save checkpoints without a plot, which takes as long as several steps; `test_train_command.py` has plots."""
    from dflash_hub.training import progress

    monkeypatch.setattr(progress, "draw", lambda *given: False)


@pytest.fixture
def train_apart(servers):
    """Run `training_run.py` as a program; its losses, figures and weights, or None where it was killed by `signal`.

    Several processes find each other by the variables that torchrun would set.
    """

    def run(folder, *words: str, processes: int = 1, signal: int = 0, **args) -> dict | None:
        words = ("training_run.py", str(folder), "--args", json.dumps(args), *words)
        variables = [{}]
        if processes > 1:
            alike = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            variables = [alike | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(processes))]
        for running in [servers.training.start(*words, code=UNDRAWN + TRAIN, **env) for env in variables]:
            done = running.wait()
            assert done.returncode == -signal, done.stdout + done.stderr
        return None if signal else json.loads((folder / "result.json").read_text())

    return run


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def tiny_target():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY / "target").eval()


@pytest.fixture
def tiny_draft():
    from dflash_hub import DFlashDraftModel

    return DFlashDraftModel.from_pretrained(TINY / "draft").eval()


def pytest_sessionfinish(session, exitstatus):
    atexit.register(gc.unfreeze)  # at the end of Python, nanobind asks what has been left
    HUB.stop()
    shutil.rmtree(HOME, ignore_errors=True)


def pytest_unconfigure():
    if SCRATCH is not None:
        shutil.rmtree(SCRATCH, ignore_errors=True)

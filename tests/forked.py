"""Processes for tests, forked from one that has imported torch: what they import besides is theirs alone.

Importing torch and transformers takes three seconds, more than most tests. So one process imports them once, and forks
for each test that needs a process of its own. It has never imported dflash_hub, unless it is asked to.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

COMPILERS = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp")
MODELS = ("transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3", "safetensors.torch")
"""What everyone imports who loads and runs a model by name."""
TRAINING = (*MODELS, "transformers.trainer", "accelerate", "datasets", "dflash_hub.training.trainer")
TRAINING += ("dflash_hub.cli", "dflash_hub.commands.training_run", "dflash_hub.publishing.push")
TRAINING += ("dflash_hub.training.feature_setup", "dflash_hub.training.feature_writer", "typer.testing", "pytest")
TRAINING += ("matplotlib.projections", "matplotlib.backends.backend_agg")  # for the plot of a saved draft


class Done(NamedTuple):
    """What a process left: its exit status, negative for a signal, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class ForkServer:
    """A process that has imported `modules`, under `env`, and forks for each `run`."""

    def __init__(self, modules: tuple[str, ...] = ("torch",), env: dict[str, str] | None = None):
        self.folder = tempfile.mkdtemp(prefix="forked-")
        self.address = os.path.join(self.folder, "0")
        self.servers = 0
        command = [sys.executable, "-I", __file__, self.address, *modules]
        environment = os.environ | (env or {})
        # A group of its own, to be ended together.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
        self.lifeline = self.process.stdin

    def fork(self, modules: tuple[str, ...], **env: str) -> "ForkServer":
        """A server that goes on from this one, with more modules and other variables."""
        other = object.__new__(ForkServer)
        self.servers += 1
        other.folder, other.address, other.servers = self.folder, f"{self.address}.{self.servers}", 0
        other.process = None
        _ask(self.address, {"serve": other.address, "modules": modules, "env": env})
        return other

    def run(self, *words: str, code: str = "", **env: str) -> Done:
        """Run `code`, or the script `words[0]` with the other words as its arguments, as `__main__`."""
        return self.start(*words, code=code, **env).wait()

    def start(self, *words: str, code: str = "", **env: str) -> "Running":
        """Begin what `run` does, and do not wait for it."""
        self.servers += 1
        output = f"{self.address}.{self.servers}"
        return Running(_send(self.address, {"words": words, "code": code, "env": env, "output": output}), output)

    def stop(self) -> None:
        """End this server and all that were forked from it."""
        self.lifeline.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # a process forked from this one still holds the lifeline
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Running:
    """A process that was started."""

    def __init__(self, connection: socket.socket, output: str):
        self.connection, self.output = connection, Path(output)

    def wait(self) -> Done:
        """What it left once it has ended; an error after five minutes."""
        status = _answer(self.connection)["status"]
        written = [self.output.with_name(self.output.name + end) for end in (".stdout", ".stderr")]
        texts = [path.read_text(errors="replace") for path in written]
        for path in written:
            path.unlink()
        return Done(status, *texts)


def _send(address: str, request: dict[str, Any]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(300)
    for _ in range(15_000):  # the server may still be importing
        try:
            connection.connect(address)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            select.select([], [], [], 0.02)
    else:
        raise RuntimeError("No process to fork from has started within five minutes; its errors are above")
    connection.sendall(json.dumps(request).encode())
    connection.shutdown(socket.SHUT_WR)
    return connection


def _answer(connection: socket.socket) -> dict[str, Any]:
    with connection:
        return _received(connection)


def _received(connection: socket.socket) -> dict[str, Any]:
    return json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))


def _ask(address: str, request: dict[str, Any]) -> dict[str, Any]:
    return _answer(_send(address, request))


class Servers:
    """The servers of one run of tests, each started when it is first used."""

    @cached_property
    def torch(self) -> ForkServer:
        """It has imported torch alone."""
        return ForkServer()

    @cached_property
    def compilers(self) -> ForkServer:
        """It has imported what transformers imports of torch besides, which is half of its time."""
        return self.torch.fork(COMPILERS)

    @cached_property
    def models(self) -> ForkServer:
        """It has imported what loads and runs a model."""
        return self.compilers.fork(MODELS)

    @cached_property
    def training(self) -> ForkServer:
        """It has imported dflash_hub and what trains a draft; it is offline."""
        return self.models.fork(TRAINING, HF_HUB_OFFLINE="1")

    def stop(self) -> None:
        """End those that were started."""
        if "torch" in vars(self):
            self.torch.stop()


def remember_imports() -> None:
    """Read once what a file imports; who saves or loads a draft asks it of all files that travel."""
    from transformers import dynamic_module_utils

    for name in ("get_imports", "get_relative_imports"):
        setattr(dynamic_module_utils, name, _remembered(getattr(dynamic_module_utils, name)))


def _remembered(read: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    found: dict[bytes, list[str]] = {}

    def once(path: Any) -> list[str]:
        text = Path(path).read_bytes()
        if text not in found:
            found[text] = read(path)
        return [*found[text]]

    return once


# In the server -------------------------------------------------------------------------------------------------------


def serve(address: str, modules: list[str]) -> None:
    """Import `modules`, then fork for each request until the test process has gone."""
    gc.disable()
    for name in modules:
        import_module(name)
    if MODELS[0] in modules:
        prepare_loading()
    for left in list(weakref.finalize._registry):
        left.atexit = False  # else each fork takes all of torch's operators back at its end, which takes 50 ms
    gc.freeze()  # what is forked need not look through it for garbage
    gc.enable()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)  # written to when a child has ended
    signal.signal(signal.SIGCHLD, lambda *given: None)
    asking: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([sys.stdin, listener, ended], [], [])
        if sys.stdin in ready:
            return _reap(asking, 0)
        if ended in ready:
            os.read(ended, 4096)
            _reap(asking)
        if listener in ready:
            connection, _ = listener.accept()
            request = _received(connection)
            child = os.fork()
            if child == 0:
                _leave(ended, wake, listener, *asking.values())
                handle(request, connection)
            if "serve" in request:
                connection.close()
            else:
                asking[child] = connection


def _leave(ended: int, wake: int, *sockets: socket.socket) -> None:
    """Give up what is the server's alone."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for one in sockets:
        one.close()
    os.close(ended)
    os.close(wake)


def prepare_loading() -> None:
    """Do what every process that loads a model would do anew: a third of its time, and more with code from a Hub."""
    from transformers import conversion_mapping, dynamic_module_utils

    remember_imports()
    for path in Path(__file__).parents[1].glob("*dflash.py"):
        dynamic_module_utils.get_imports(path)
    conversion_mapping.get_checkpoint_conversion_mapping("qwen3")


def _reap(asking: dict[int, socket.socket], options: int = os.WNOHANG) -> None:
    """Report how children have ended to those who asked for them; with no options, wait for all children."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, options))[0]:
            if connection := asking.pop(ended[0], None):
                with connection, contextlib.suppress(BrokenPipeError):
                    connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(ended[1])}).encode())


def handle(request: dict[str, Any], connection: socket.socket) -> None:
    """Do in a fork what was asked for: run a program, or become a server."""
    if "serve" in request:
        os.environ.update(request["env"])
        if "HF_HUB_OFFLINE" in request["env"] and "huggingface_hub.constants" in sys.modules:
            sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True  # it read the variable when it was imported
        connection.sendall(b"{}")
        connection.close()
        serve(request["serve"], request["modules"])
        os._exit(0)
    connection.close()
    execute(request)


def execute(request: dict[str, Any]) -> None:
    """Run the program of a request as `__main__`, and exit as Python would."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request["output"] + f".{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    words = request["words"]
    sys.argv[:] = words or ["-c"]
    code = request["code"] or Path(words[0]).read_text(encoding="utf-8")
    main = sys.modules["__main__"] = ModuleType("__main__")
    status = 0
    try:
        exec(compile(code, "<program>", "exec"), main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # which -I passes over
    serve(sys.argv[1], sys.argv[2:])

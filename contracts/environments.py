"""Make an environment for each program that reads drafts, with the code of its release.

`make contracts` runs it before the tests of this folder. The environments lie in the folder that DFLASH_CONTRACTS
names, or in ~/.cache/dflash-hub/contracts, and take about 4 GB. One is made anew when its pins change. Nothing of a
reader's code is part of this repository: it is unpacked from the archive that pip downloads, without what needs a GPU.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("DFLASH_CONTRACTS") or Path.home() / ".cache" / "dflash-hub" / "contracts")
TORCH = "torch==2.13.0"
"""All environments share it, since it is large. A build for CPUs will do; pip's own settings choose it."""


@dataclass(frozen=True)
class Reader:
    """A program that reads drafts.

    Args:
        release: its archive on PyPI.
        unpacked: patterns of the files of the archive that are unpacked.
        parents: folders at the head of their names that are dropped.
        is_source: whether the archive is the source distribution, not the wheel.
        besides: further archives, unpacked like it, of packages that would bring more than is needed.
    """

    release: str
    unpacked: tuple[str, ...]
    parents: int = 0
    is_source: bool = False
    besides: tuple[str, ...] = ()


_LLAMA_CPP = "llama_cpp_python-*/vendor/llama.cpp"
READERS = {
    "speculators": Reader("speculators==0.9.0", ("*",), besides=("hs-connectors==0.9.0",)),
    "vllm": Reader("vllm==0.33.0", ("vllm/*.py", "*.dist-info/*")),
    "sglang": Reader("sglang==0.5.23", ("sglang/srt/*.py",)),
    "nemo": Reader("nemo-automodel==0.7.0", ("nemo_automodel/*.py",)),
    "llama_cpp": Reader(
        "llama-cpp-python==0.3.36",
        (f"{_LLAMA_CPP}/conversion/*", f"{_LLAMA_CPP}/gguf-py/gguf/*", f"{_LLAMA_CPP}/convert_hf_to_gguf.py"),
        parents=3,
        is_source=True,
    ),
}
"""The readers by the name of their environment, their file in `requirements` and their script in `readers`.

Of NeMo only training is compared, by `benchmarks/train.py --against nemo`.
"""


def python(name: str) -> Path | None:
    """The interpreter of a reader's environment; None if it has not been made, or with other pins."""
    home = FOLDER / name
    marker = home / "made_from"
    if not marker.exists() or marker.read_text() != pins(name):
        return None
    return home / "bin" / "python"


def pins(name: str) -> str:
    """All that an environment is made from."""
    requirements = (HERE / "requirements" / f"{name}.txt").read_text()
    return f"{TORCH}\n{READERS[name]}\n{requirements}"


def make(name: str) -> None:
    """Make a reader's environment."""
    home = FOLDER / name
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(f"{home / 'reader'}\n{shared_torch()}\n")
    pip = [home / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", HERE / "requirements" / f"{name}.txt"], check=True)
    unpack(READERS[name], home / "reader")
    (home / "made_from").write_text(pins(name))


def shared_torch() -> Path:
    """The folder of torch, which is installed if it is missing."""
    folder = FOLDER / TORCH
    if not (folder / "torch").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", folder, TORCH, "numpy==2.2.6"], check=True)
    return folder


def unpack(reader: Reader, folder: Path) -> None:
    """Download the archive of a reader, and unpack what is used of it."""
    kind = ["--no-binary" if reader.is_source else "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as archives:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, *kind, "--dest", archives, reader.release, *reader.besides], check=True)
        for archive in Path(archives).iterdir():
            for name, content in files_of(archive, reader.unpacked):
                path = folder.joinpath(*PurePosixPath(name).parts[reader.parents :])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)


def files_of(archive: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a wheel or a source distribution that match a pattern."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if not name.endswith("/") and matches(name, patterns):
                    yield name, wheel.read(name)
        return
    with tarfile.open(archive) as source:
        for member in source:
            if member.isfile() and matches(member.name, patterns):
                yield member.name, source.extractfile(member).read()


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(READERS)}; all by default")
    for name in parser.parse_args().names or READERS:
        if python(name) is None:
            print(f"{name}: {FOLDER / name} is made", flush=True)
            make(name)

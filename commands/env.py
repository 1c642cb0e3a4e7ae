# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub env`: print what a bug report needs."""

import json
import os
import platform
import sys
from typing import Annotated, Any

import typer

from ..versions import __version__, version_of
from .screen import variables

_PACKAGES = (
    "torch",
    "transformers",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "typer",
    "accelerate",
    "datasets",
    "peft",
    "torchao",
    "compressed-tensors",
    "bitsandbytes",
    "triton",
)
_VARIABLES = ("HF_", "TRANSFORMERS_", "DFLASH_", "TORCH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Print what a bug report needs: versions, machine, GPUs and settings; tokens are left out."""
    found = describe()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        typer.echo(f"{name}: {value}")


def describe() -> dict[str, Any]:
    """Return what a bug report needs, by its name."""
    found: dict[str, Any] = {"dflash-hub": __version__}
    for name in _PACKAGES:
        found[name] = version_of(name) or "not installed"
    found["python"] = f"{platform.python_version()} ({sys.executable})"
    found["system"] = f"{platform.platform()}, {os.cpu_count()} processors"
    found.update(_devices())
    for name, value in sorted(variables().items()):
        if name.startswith(_VARIABLES):
            secret = any(word in name for word in _SECRET)
            found[name] = "set, not shown" if secret else value
    return found


def _devices() -> dict[str, Any]:
    """Return what torch runs on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"devices": f"torch cannot be imported: {error}"}
    if torch.backends.mps.is_available():
        return {"devices": "mps"}
    if not torch.cuda.is_available():
        return {"devices": f"cpu, {torch.get_num_threads()} threads"}
    names = []
    for number in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(number)
        names.append(f"{one.name} with {one.total_memory / 2**30:.0f} GiB")
    return {"devices": ", ".join(names), "CUDA": torch.version.cuda}

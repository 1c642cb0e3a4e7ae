# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Tell the versions of this package and of others, without importing torch."""

import re
from importlib import metadata
from pathlib import Path


def _own_version() -> str:
    """Return the version that `configuration_dflash.py` has; that file travels, and imports torch."""
    text = (Path(__file__).parent / "configuration_dflash.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)
    if found is None:
        raise ImportError(
            "configuration_dflash.py has no line __version__; install dflash-hub again."
        )
    return found.group(1)


__version__ = _own_version()


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write files so that whoever reads them sees the old one or the new one, whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, partial: str | None = None) -> Iterator[Path]:
    """Give the path of a file to write; after the block it takes the place of `path`, or is removed at an error.

    Args:
        partial: the name of the file to write; it lies beside `path`. Trainer pushes no name with _.
    """
    written = path.with_name(partial or f"_{path.name}.partial")
    try:
        yield written
        os.replace(written, path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by one with this content."""
    with replacing(path) as partial:
        partial.write_bytes(content)

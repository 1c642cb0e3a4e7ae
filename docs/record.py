# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Record what README and notebooks show, from real runs on the built-in pair.

    python docs/record.py                # dflash-hub demo, into docs/images/terminal.svg
    python docs/record.py --notebooks    # the outputs of notebooks/*.ipynb; needs pip install nbclient ipykernel

The picture is drawn as a dark window, which reads well on light and dark pages. It loads nothing from elsewhere.
"""

import argparse
import os
import pty
import re
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "terminal.svg"
SESSION = ("demo",)
COLUMNS = 92
VARIABLES = {
    "COLUMNS": str(COLUMNS),
    "TERM": "xterm-256color",
    "HF_HUB_OFFLINE": "1",
    "CI": "1",  # without spinners and bars, which redraw their lines
}
CODES = re.compile(r"\x1b\[[?0-9;]*[a-zA-Z]")
"""What a terminal takes for colours and for its cursor."""
FRAME = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
line-height: {line_height}px; }}
.{unique_id}-title {{ font-family: system-ui, sans-serif; font-size: 16px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's frame, without the fonts that it would load from the web."""


def main() -> None:
    """Record what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", action="store_true", help="the notebooks' outputs")
    if parser.parse_args().notebooks:
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            record_notebook(path)
        return
    screen = run_in_terminal([sys.executable, "-m", "dflash_hub", *SESSION])
    PICTURE.write_text(picture(" ".join(("dflash-hub", *SESSION)), screen), encoding="utf-8")


def run_in_terminal(command: list[str]) -> str:
    """Run a command in a terminal of its own, and return what it wrote there, with its colours.

    Raises:
        RuntimeError: it failed.
    """
    mine, theirs = pty.openpty()
    variables = {**os.environ, **VARIABLES}
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.DEVNULL, env=variables
    ) as process:
        os.close(theirs)
        written = b"".join(chunks(mine))
    os.close(mine)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{written.decode()}")
    return written.decode().replace("\r\n", "\n")


def chunks(terminal: int):
    """Yield what is written to a terminal, until its last writer has gone."""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # how Linux says that there is no writer left
            return
        if not chunk:
            return
        yield chunk


def picture(command: str, screen: str) -> str:
    """Return an SVG of a window in which `command` was typed and wrote `screen`."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(screen.rstrip("\n")))
    drawn = console.export_svg(title=command, theme=MONOKAI, code_format=FRAME, unique_id="t")
    return "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"


def record_notebook(path: Path) -> None:
    """Run a notebook in a folder of its own, and save what its cells print."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.update(VARIABLES)
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [] if cell.source.startswith("%pip") else printed(cell.outputs)
    nbformat.write(notebook, path)


def printed(outputs: list) -> list:
    """Return what was printed as one text, without notes and codes of a terminal."""
    import nbformat

    texts = [output.text for output in outputs if output.get("name") == "stdout"]
    text = CODES.sub("", "".join(texts)).replace("\r\n", "\n")
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return [nbformat.v4.new_output("stream", text=lines)] if lines else []


if __name__ == "__main__":
    main()

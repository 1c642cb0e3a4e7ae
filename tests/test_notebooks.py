"""The notebooks: every cell runs, on the built-in pair, and what is saved with them is free of this machine."""

import json
import re
import shlex

import pytest
from typer.testing import CliRunner

from dflash_hub import cli
from dflash_hub.registry import load_draft
from paths import ROOT

NOTEBOOKS = {
    "train_your_own": r"1\.\d\d tokens a cycle before, [3-8]\.\d\d after",
    "use_a_published_draft": "the same text: True",
    "which_draft": r"tiny_pair/draft2 +prose +\d",
}
"""What each notebook prints in the end, on the built-in pair."""


def cells(name: str) -> list[dict]:
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(source: str, namespace: dict) -> None:
    """Run a cell as Jupyter would. `%pip` installs nothing here: `test_readme.py` checks what such lines name."""
    if source.startswith("!"):
        for line in source.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line.removeprefix("!").format_map(namespace))
            assert program == "dflash-hub"
            done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
            assert done.exit_code == 0, done.output
    elif not source.startswith("%pip "):
        exec(source, namespace)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, hub, repo_id, monkeypatch, tmp_path, capsys):
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what its settings depend on
    namespace = {"__name__": "__main__"}
    for cell in cells(name):
        run("".join(cell["source"]).replace("REPO = None", f"REPO = {repo_id!r}"), namespace)
    assert re.search(NOTEBOOKS[name], capsys.readouterr().out)
    if "REPO" in namespace:
        assert load_draft(repo_id).config.block_size == load_draft("my-draft").config.block_size


def test_notebooks_are_saved_with_their_outputs_and_without_traces_of_a_machine():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == NOTEBOOKS.keys()
    for name, printed in NOTEBOOKS.items():
        outputs = [output for cell in cells(name) for output in cell["outputs"]]
        assert {output["output_type"] for output in outputs} == {"stream"}
        text = "\n".join("".join(output["text"]) for output in outputs)
        assert re.search(printed, text), name
        assert not re.search(r"\x1b|/(tmp|root|home|usr|opt|work|Users)/", text), name

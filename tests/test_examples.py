"""The scripts of `examples/`, as a user runs them: on the built-in pair, from any folder."""

import runpy

import pytest

from paths import ROOT

EXAMPLES = {
    "batch": "the target's own texts: True",
    "chat": "> def read(path):",
    "decode_statistics": "DFlash2DraftModel: 3.93 tokens a cycle",
    "grammar": "'stable': False",
    "lora": "The adapter changes the text: True",
    "sampling": "--- seed 1, ",
    "streaming": '"""Return a list of all list',
}
"""What each script prints, among other things."""
NEEDS = {"grammar": ("xgrammar", "grammar"), "lora": ("peft", "peft")}
"""The package that a script imports besides, and the extra that installs it."""


def test_every_example_is_run_here():
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == EXAMPLES.keys() | {"warm_start"}, "that one trains for ten minutes, so it is run by hand"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, capsys, tmp_path, monkeypatch):
    if name in NEEDS:
        package, extra = NEEDS[name]
        pytest.importorskip(package, reason=f"pip install dflash-hub[{extra}]")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert EXAMPLES[name] in capsys.readouterr().out

"""Drafts of every kind, written by this package in each of its layouts, for other programs to read."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from jobs import DRAFTS, LAYOUTS, Job, built, text  # noqa: E402
from paths import TINY  # noqa: E402


class _NoPackages:
    """The repository root is the package; as a pytest.Package it would be imported again, under the folder's name."""

    @staticmethod
    def pytest_collect_directory(path, parent):
        return pytest.Dir.from_parent(parent, path=path)


def pytest_configure(config):
    config.pluginmanager.register(_NoPackages())
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY / "target").eval()


@pytest.fixture(scope="session")
def job(target, tmp_path_factory):
    """A folder with all drafts in all layouts that can express them, and a text to run them on."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "out").mkdir()
    (folder / "target").symlink_to(TINY / "target")
    drafts = {name: built(target, name) for name in DRAFTS}
    for layout, names in LAYOUTS.items():
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a program computes otherwise
                drafts[name].save_pretrained(folder / "drafts" / layout / name, layout=layout)
    save_file(text(target), folder / "inputs.safetensors")
    return Job(folder, drafts)

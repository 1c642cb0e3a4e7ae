"""The drafts that other programs read, and how one is run on all of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import environments
import tiny

HERE = Path(__file__).parent
WHOLE, SLIDING = "full_attention", "sliding_attention"
WINDOW = 64
"""Wider than the texts, since programs count the end of a window differently."""
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
DRAFTS = {
    "plain": {},
    "causal": {"is_causal": True},
    "sliding": {"layer_types": [SLIDING] * 2, "sliding_window": WINDOW},
    "sliding-bidirectional": {"layer_types": [SLIDING] * 2, "sliding_window": WINDOW, "is_causal": False},
    "mixed": {"layer_types": [SLIDING, WHOLE], "sliding_window": WINDOW},
    "mixed-bidirectional": {"layer_types": [SLIDING, WHOLE], "sliding_window": WINDOW, "is_causal": False},
    "anchored": {"layer_types": [SLIDING] * 2, "sliding_window": 8, "window_from_anchor": True, "is_causal": False},
    "anchored-causal": {"layer_types": [SLIDING] * 2, "sliding_window": 8, "window_from_anchor": True},
    "yarn": {"rope_parameters": YARN},
    "reduced": {"draft_vocab_size": 100, "has_own_lm_head": True},
    "dflash2": tiny.SECOND,
    "dflash2-scaled": dict(tiny.SECOND, output_multiplier=0.5, final_logit_softcapping=20.0),
    "dspark": tiny.DSPARK,
    "dspark-gated": dict(tiny.DSPARK, markov_head_type="gated"),
    "dspark-reduced": dict(tiny.DSPARK, draft_vocab_size=100, has_own_lm_head=True),
    "dspark-no-bias": {"markov_rank": 0},
    "domino": tiny.DOMINO,
}
"""The drafts by name, and how their config differs from that of the first."""


def _but(*names: str) -> list[str]:
    return [name for name in DRAFTS if name not in names]


LAYOUTS = {
    "engines": _but("anchored", "anchored-causal"),
    "speculators": _but(
        *("causal", "sliding", "sliding-bidirectional", "mixed", "mixed-bidirectional", "dflash2-scaled", "domino")
    ),
    "muse": ["plain", "sliding-bidirectional", "mixed-bidirectional", "yarn"],
}
"""The layouts that other programs read, and the drafts that each can express."""


def windows(config) -> list[int | None]:
    """The window of each layer of a draft; None for full layers."""
    found = {SLIDING: config.sliding_window}
    return [found.get(kind) for kind in config.layer_types]


def built(target, name: str):
    """One of `DRAFTS`, random."""
    draft = tiny.draft(target, mask_token_id=3, **DRAFTS[name])
    draft.card_metadata = {"base_model": "org/target"}
    if draft.config.draft_vocab_size:
        tiny.reduce(draft, tuple(range(0, 500, 5)))
    return draft


class Job:
    """The drafts, by name, and the folder where they lie."""

    def __init__(self, folder: Path, drafts: dict):
        self.folder, self.drafts = folder, drafts
        self.answers: dict[str, dict] = {}

    def read_by(self, reader: str, layout: str, name: str) -> dict:
        """What a reader says of a draft. It is started once, and reads all drafts."""
        if reader not in self.answers:
            self.answers[reader] = run(reader, self.folder)
        return self.answers[reader][f"{layout}/{name}"]

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "inputs.safetensors")


def run(reader: str, folder: Path) -> dict:
    """Let a reader read all drafts of a job."""
    interpreter = environments.python(reader)
    if interpreter is None:
        pytest.skip(
            f"the environment of {environments.READERS[reader].release} is not in {environments.FOLDER}: "
            "`make contracts` makes it, from PyPI"
        )
    script = HERE / "readers" / f"read_{reader}.py"
    hidden = ("PYTHON", "HF_", "TRANSFORMERS_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([interpreter, script, folder], capture_output=True, text=True, env=env, cwd=folder)
    (folder / "out" / f"{reader}.log").write_text(done.stderr)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def text(target) -> dict[str, torch.Tensor]:
    """A random text, what a draft with taps 0 and 2 sees of the target in it, and where a block begins."""
    ids = torch.randint(0, target.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(5))
    states = target(ids, output_hidden_states=True).hidden_states
    features = torch.cat([states[1], states[3]], dim=-1)  # outputs of the layers 0 and 2
    return {"input_ids": ids, "features": features, "anchor": torch.tensor([20])}

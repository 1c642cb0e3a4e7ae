# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""NeMo AutoModel: `components.speculative.dflash.core.DFlashTrainerModule`, as `recipes.llm.train_dflash` calls it."""

import importlib.util
import sys
import types
from pathlib import Path

import stepping
import torch
from transformers import Qwen3Config

# Its folder of data sets imports readers of images and audio; the step needs none of them.
NAME = "nemo_automodel.components.datasets.llm"
spec = importlib.util.find_spec("nemo_automodel")
assert spec is not None
assert spec.submodule_search_locations
empty = types.ModuleType(NAME)
empty.__path__ = [str(Path(spec.submodule_search_locations[0], "components", "datasets", "llm"))]
sys.modules[NAME] = empty

from nemo_automodel.components.speculative.dflash.core import DFlashTrainerModule  # noqa: E402
from nemo_automodel.components.speculative.dflash.draft_qwen3 import (  # noqa: E402
    Qwen3DFlashDraftModel,
)

given = stepping.options()
config = Qwen3Config(
    vocab_size=given.vocab,
    num_target_layers=given.body["num_hidden_layers"],
    block_size=given.block,
    dflash_config={"mask_token_id": 0, "target_layer_ids": given.taps, "block_size": given.block},
    **given.body | {"num_hidden_layers": given.layers},
)
config._attn_implementation = given.their_attention or "sdpa"
draft = Qwen3DFlashDraftModel(config).float().train()
if given.checkpointing:
    draft.gradient_checkpointing_enable()
embed = torch.nn.Embedding(given.vocab, given.body["hidden_size"]).requires_grad_(False)
head = torch.nn.Linear(given.body["hidden_size"], given.vocab, bias=False).requires_grad_(False)
head.weight = embed.weight
module = DFlashTrainerModule(
    draft,
    head,
    embed,
    mask_token_id=0,
    block_size=given.block,
    attention_backend=config._attn_implementation,
    num_anchors=given.anchors,
    loss_decay_gamma=7.0,
)
drawn = stepping.inputs(given)
every = torch.ones_like(drawn["ids"])


def loss() -> torch.Tensor:
    """Return the loss of the next step."""
    return module(drawn["ids"], drawn["features"], every.float()).loss


stepping.serve(draft, loss)

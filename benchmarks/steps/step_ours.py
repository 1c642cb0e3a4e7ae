# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""dflash-hub: `training.objective.Objective`, with the target's features given."""

import itertools

import stepping
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dflash_hub import DFlashDraftSpec
from dflash_hub.training.blocks import PackedBatch, draw_anchors
from dflash_hub.training.memory import checkpoint_layers
from dflash_hub.training.mix import Mix
from dflash_hub.training.objective import Objective, Recipe, TargetOutput

given = stepping.options()
config = AutoConfig.for_model(
    "qwen3", vocab_size=given.vocab, tie_word_embeddings=True, **given.body
)
target = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
fields = {"mask_token_id": 0, "block_size": given.block, "num_hidden_layers": given.layers}
draft = DFlashDraftSpec("benchmark").build(
    config, target_layer_ids=given.taps, dtype=torch.float32, **fields
)
draft.train()
if given.checkpointing:
    checkpoint_layers(draft)
objective = Objective(draft.config, target, Recipe(mix=Mix.parse(given.loss)))
draft.set_attn_implementation(objective.attention(torch.device("cpu")))
drawn = stepping.inputs(given)
every = torch.ones_like(drawn["ids"])
batch = PackedBatch(drawn["ids"], every.bool(), every)
output = TargetOutput(drawn["features"], drawn["last"] if objective.needs_target else None)
objective.target.run = lambda batch, last_hidden_state: output
steps = itertools.count()


def loss() -> torch.Tensor:
    """Return the loss of the next step."""
    blocks = objective.blocks(batch, draw_anchors(batch, given.anchors, 0, next(steps)))
    return objective(draft, blocks).loss / objective.divisor(blocks)


stepping.serve(draft, loss)

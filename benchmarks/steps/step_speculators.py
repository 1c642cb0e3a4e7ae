# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""speculators: the forward of `models.dflash.core.DFlashDraftModel`, as `train.trainer.Trainer` calls it.

Its losses are those that it has for machines without a GPU, and its attention is SDPA, the faster of the two that run
on one (the other is `eager`). It has no cross-entropy of the text's token: `ce` is that of the target's likeliest.
"""

import tempfile

import stepping
import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash.core import DFlashDraftModel
from transformers import AutoModelForCausalLM, Qwen3Config

LOSSES = {"ce=1": "ce", "kl=1": "kl_div", "tv=1": "tv"}

given = stepping.options()
text = {"vocab_size": given.vocab, "tie_word_embeddings": True, **given.body}
with tempfile.TemporaryDirectory() as folder:
    target = AutoModelForCausalLM.from_config(Qwen3Config(**text), dtype=torch.float32)
    target.save_pretrained(folder)
    del target
    draft = DFlashDraftModel.from_training_args(
        Qwen3Config(**text | {"num_hidden_layers": given.layers}),
        verifier_name_or_path=folder,
        target_layer_ids=given.taps,
        draft_vocab_size=given.vocab,
        block_size=given.block,
        mask_token_id=0,
        draft_attn_impl=given.their_attention or "sdpa",
    )
draft.float().train()
if given.checkpointing:
    draft.gradient_checkpointing_enable()
drawn = stepping.inputs(given)
every = torch.ones_like(drawn["ids"])
losses = resolve_loss_config(LOSSES[given.loss], "eager")


def loss() -> torch.Tensor:
    """Return the loss of the next step."""
    return draft(
        hidden_states=drawn["features"],
        input_ids=drawn["ids"],
        loss_mask=every,
        verifier_last_hidden_states=drawn["last"],
        document_ids=torch.zeros_like(drawn["ids"]),
        loss_config=losses,
        max_anchors=given.anchors,
    )[1]


stepping.serve(draft, loss)

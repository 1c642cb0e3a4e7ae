"""speculators: `convert.dflash.DFlashConverter` reads the engines layout, `SpeculatorModel` its own layout.

Both are then run by `DFlashDraftModel._backbone_forward` and the heads of their kind. The text is in
`inputs.safetensors`: `input_ids [1, N]`, `features [1, N, F]` and `anchor [1]`, where the block begins. Hidden states
and logits of the block go to `out/<layout>-<name>.safetensors`. Then the draft is saved, in `saved/<layout>/<name>`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.convert.dflash.converter import DFlashConverter

from answers import JOB, answer

INPUTS = load_file(JOB / "inputs.safetensors")
TARGET = str(JOB / "target")


def read(folder: Path) -> dict:
    """Load a draft and run it; return what its config says."""
    if folder.parent.name == "engines":
        converted = JOB / "converted" / folder.name
        DFlashConverter().convert(folder, converted, base_model=TARGET)
        folder, layout = converted, "engines"
    else:
        layout = folder.parent.name
    config = SpeculatorModelConfig.from_pretrained(folder)
    # the draft names a target on the Hub
    config.speculators_config.verifier.name_or_path = TARGET
    config.transformer_layer_config._attn_implementation = "eager"
    model = SpeculatorModel.from_pretrained(folder, config=config).float().eval()
    save_file(run(model), JOB / "out" / f"{layout}-{folder.name}.safetensors")
    model.save_pretrained(JOB / "saved" / layout / folder.name)
    return {
        "class": type(model).__name__,
        "layer_ids": model.target_layer_ids,
        "mask_token_id": model.mask_token_id,
        "block_size": model.block_size,
        "sample_from_anchor": config.sample_from_anchor,
        "proposed": config.speculators_config.proposal_methods[0].speculative_tokens,
        "sliding": model.sliding_window_indices,
    }


@torch.no_grad()
def run(model) -> dict[str, torch.Tensor]:
    """Hidden states and logits of the block at the anchor; with a Markov head, given the tokens of the text."""
    ids, anchor = INPUTS["input_ids"], int(INPUTS["anchor"])
    chosen = torch.zeros_like(ids)
    chosen[0, anchor] = 1  # the only position that may be an anchor
    outputs = model._backbone_forward(
        hidden_states=INPUTS["features"],
        input_ids=ids,
        loss_mask=chosen,
        verifier_last_hidden_states=torch.zeros(*ids.shape, model.hidden_size),
        document_ids=torch.zeros_like(ids),
        max_anchors=1,
    )
    hidden, logits = outputs[:2]
    results = {"hidden": hidden[0], "logits": logits[0]}
    block = ids[:, anchor : anchor + model.block_size]
    if getattr(model, "markov_head", None) is not None:
        bias = model.markov_head.block_bias(prev_token_ids=block, hidden_states=hidden)
        results["corrected"] = (logits + bias)[0]
    if getattr(model, "confidence_head", None) is not None:
        embeds = model.markov_head.prev_embeddings(block)
        results["confidence"] = model.confidence_head(torch.cat([hidden, embeds], dim=-1))[0]
    if getattr(model, "candidate_selector", None) is not None:
        _, scores = model.candidate_selector.select(logits, hidden, block)
        results["selected"] = scores[0]
    return {name: tensor.contiguous() for name, tensor in results.items()}


answer(read)

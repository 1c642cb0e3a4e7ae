"""speculators 0.9.0 reads our drafts, and computes what we compute.

The engines layout goes through `convert/dflash/converter.py::DFlashConverter`; its own layout is loaded by
`model.py::SpeculatorModel.from_pretrained`. Both are run by `models/dflash/core.py::_backbone_forward`.
"""

import pytest
import torch
from safetensors.torch import load_file

from dflash_hub import load_draft
from jobs import LAYOUTS

CLOSE = dict(rtol=0, atol=2e-5)
SEEN = {"class": "DFlashDraftModel", "layer_ids": [1, 3], "mask_token_id": 3, "block_size": 5}
CLASSES = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "dspark": "DSparkDraftModel"}


@torch.no_grad()
def ours(draft, target, inputs) -> dict[str, torch.Tensor]:
    """Hidden states and logits of the block at the anchor, of all its positions."""
    anchor, size = int(inputs["anchor"]), draft.config.block_size
    text = inputs["input_ids"]
    block = torch.full((1, size), draft.config.mask_token_id)
    block[0, 0] = text[0, anchor]
    embeds = target.get_input_embeddings()(block)
    states = draft(noise_embeds=embeds, context_hidden_states=inputs["features"][:, :anchor]).last_hidden_state
    logits = draft.draft_logits(states, draft.lm_head or target.lm_head)
    results = {"hidden": states[0], "logits": logits[0]}
    before = text[:, anchor : anchor + size]
    if getattr(draft, "markov_head", None) is not None:
        results["corrected"] = draft.corrected_logits(logits, states, before)[0]
        confidence = draft.confidence_logits(states, before)
        if confidence is not None:
            results["confidence"] = confidence[0]
    if draft.config.model_type == "dflash2":
        selector = draft.candidate_selector
        scores, candidates = logits.topk(selector.top_k)
        gates = selector.gates(states, before[..., None])
        pairs = (gates * torch.nn.functional.embedding(candidates, selector.successor_codebook)).sum(-1)
        results["selected"] = (scores + pairs)[0]
    return results


def compare(job, target, layout: str, name: str) -> None:
    """What it computes is what our draft computes, and so is what we compute with the draft that it saves."""
    theirs = load_file(job.folder / "out" / f"{layout}-{name}.safetensors")
    expected = ours(job.drafts[name], target, job.inputs)
    assert theirs.keys() == expected.keys()
    back = load_draft(job.folder / "saved" / layout / name).eval()
    again = ours(back, target, job.inputs)
    for part, tensor in expected.items():
        for found in (theirs[part], again[part]):
            torch.testing.assert_close(found, tensor, **CLOSE, msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.parametrize("name", ["plain", "sliding", "mixed", "yarn"])
def test_its_converter_takes_the_engines_layout_and_computes_the_same(job, target, name):
    found = job.read_by("speculators", "engines", name)
    assert found | SEEN == found
    assert found["proposed"] == 4
    compare(job, target, "engines", name)


@pytest.mark.parametrize("name", LAYOUTS["speculators"])
def test_its_classes_load_its_layout_and_compute_the_same(job, target, name):
    found = job.read_by("speculators", "speculators", name)
    config = job.drafts[name].config
    assert found | SEEN | {"class": CLASSES[config.model_type]} == found
    assert found["sample_from_anchor"] is config.sample_from_anchor
    assert found["proposed"] == config.block_size - (not config.sample_from_anchor)
    compare(job, target, "speculators", name)


@pytest.mark.parametrize("name", ["dflash2", "dspark", "domino"])
def test_its_converter_refuses_other_kinds(job, name):
    assert "Unexpected keys" in job.read_by("speculators", "engines", name)["error"]

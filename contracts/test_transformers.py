"""The installed transformers loads the Muse layout by its class `MuseGlimmerAssistantModel`, without code of ours."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, DynamicCache

import tiny
from jobs import LAYOUTS
from test_speculators import CLOSE


def loaded(job, name: str):
    folder = job.folder / "drafts" / "muse" / name
    config = AutoConfig.from_pretrained(folder)
    model, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "MuseGlimmerAssistantModel"
    assert not info["missing_keys"] | info["unexpected_keys"], info
    assert [config.target_layer_ids, config.mask_token_id, config.block_size] == [[0, 2], 3, 5]
    return model.eval()


@pytest.mark.parametrize("name", LAYOUTS["muse"])
@torch.no_grad()
def test_its_class_computes_the_same_hidden_states(job, target, name):
    assistant, draft = loaded(job, name), job.drafts[name]
    features = job.inputs["features"][:, :20]
    embeds = target.get_input_embeddings()(torch.tensor([[7, 3, 3, 3, 3]]))
    positions = torch.arange(25)[None]
    cache = {tiny.CACHE: DynamicCache()}
    theirs = assistant(noise_embeds=embeds, context_hidden_states=features, position_ids=positions, **cache)
    ours = draft(noise_embeds=embeds, context_hidden_states=features)
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, **CLOSE)


@pytest.mark.parametrize("name", LAYOUTS["muse"])
def test_its_own_loop_gives_the_greedy_text(job, target, name):
    ids = job.inputs["input_ids"][:, :20]
    text = target.generate(
        ids, assistant_model=loaded(job, name), speculation_type="dflash", max_new_tokens=30, do_sample=False
    )
    assert torch.equal(text, tiny.greedy(target, ids, 30))

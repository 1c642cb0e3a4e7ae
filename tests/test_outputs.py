"""What `generate` returns besides the text, and prompts of embeddings, are those of plain `generate`."""

import pytest
import torch
from torch.nn.functional import pad

import tiny
from dflash_hub import DecodeStatistics

pytestmark = pytest.mark.usefixtures("unchecked")

NEW = 12


def both(target, inputs, asked):
    """The results of plain `generate` and of ours, whose proposals are partly right, and its statistics."""
    plain = target.generate(**inputs, **asked)
    text = plain if isinstance(plain, torch.Tensor) else plain.sequences
    before = 0 if "input_ids" in inputs else inputs["inputs_embeds"].shape[1]
    expected = pad(text, (before, tiny.VOCAB))
    statistics = DecodeStatistics()
    ours = target.generate(
        **inputs,
        **asked,
        custom_generate=tiny.draft(target).speculate,
        proposer=tiny.partly_right(expected),
        statistics=statistics,
    )
    return plain, ours, statistics


@pytest.mark.parametrize(("rows", "eos"), [(1, None), (3, 7)])
@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3_text", "gemma4_text-shared", "gpt_oss", "qwen3_next", "lfm2", "nemotron_h"]
)
def test_hidden_states_and_attentions_of_every_step_are_those_of_plain_generate(family, rows, eos):
    target = tiny.target(family)
    target.set_attn_implementation("eager")
    asked = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": eos}
    asked |= {"output_hidden_states": True, "output_attentions": True, "output_scores": True, "pad_token_id": 0}
    plain, ours, statistics = both(target, tiny.batch(9, (0, 2, 4)[:rows]), asked)
    assert torch.equal(ours.sequences, plain.sequences)
    assert 1 < statistics.acceptance_length < 5
    for name in ("hidden_states", "attentions", "scores"):
        torch.testing.assert_close(ours[name], plain[name], atol=2e-3, rtol=2e-3)


def test_hidden_states_that_are_not_returned_are_not_asked_for():
    target = tiny.target("qwen3")
    asked = {"max_new_tokens": NEW, "do_sample": False, "output_hidden_states": True}
    plain, ours, _ = both(target, tiny.batch(9, (0,)), asked)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("family", "rows", "with_ids"),
    [
        ("qwen3", 1, True),
        ("qwen3", 3, False),
        ("gemma3_text", 1, False),
        ("gemma3_text", 3, True),
        ("qwen3_next", 1, True),
        ("qwen3_next", 3, False),
    ],
)
def test_a_prompt_may_be_embeddings(family, rows, with_ids):
    target, inputs = tiny.target(family), tiny.batch(9, (0, 2, 4)[:rows])
    ids = inputs.pop("input_ids")
    embeds = target.get_input_embeddings()(ids).detach()
    inputs["inputs_embeds"] = embeds + 0.3 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
    asked = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 7 if rows > 1 else None, "pad_token_id": 0}
    if with_ids:
        inputs["input_ids"] = ids
        asked["repetition_penalty"] = 1.3  # of the ids, not of what the embeddings mean
    plain, ours, statistics = both(target, inputs, asked)
    assert torch.equal(ours, plain)
    assert 1 < statistics.acceptance_length < 5


def test_a_returned_cache_of_embeddings_carries_on():
    target, inputs = tiny.target("qwen3"), tiny.batch(9, (0,))
    embeds = target.get_input_embeddings()(inputs.pop("input_ids")).detach()
    asked = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    plain, ours, _ = both(target, {"inputs_embeds": embeds, **inputs}, asked)
    lengths = [found[tiny.CACHE].get_seq_length() for found in (plain, ours)]
    assert lengths[0] == lengths[1]
    for mine, theirs in zip(ours[tiny.CACHE].layers, plain[tiny.CACHE].layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=2e-3, rtol=2e-3)


def test_embeddings_beside_a_cache_that_is_not_empty_are_refused():
    target, ids = tiny.target("qwen3"), tiny.prompt(9)
    cache = target(ids)[tiny.CACHE]
    embeds = target.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="inputs_embeds and a cache that is not empty"):
        target.generate(
            inputs_embeds=embeds, custom_generate=tiny.draft(target).speculate, max_new_tokens=5, **{tiny.CACHE: cache}
        )


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_next"])
def test_attentions_after_a_cache_cover_what_plain_generate_has_cached(family):
    target = tiny.target(family)
    target.set_attn_implementation("eager")
    found = []
    for ours in ({}, {"custom_generate": tiny.draft(target).speculate}):
        asked = {"do_sample": False, "return_dict_in_generate": True, "output_attentions": True, **ours}
        first = target.generate(**tiny.batch(20, (0, 3)), max_new_tokens=4, **asked)
        ids = torch.cat([first.sequences, tiny.prompt(3).expand(2, -1)], dim=1)
        mask = torch.nn.functional.pad(tiny.batch(20, (0, 3))["attention_mask"], (0, 7), value=1)
        asked |= {"attention_mask": mask, "max_new_tokens": 5, tiny.CACHE: first[tiny.CACHE]}
        found.append(target.generate(ids, **asked))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for mine, theirs in zip(found[1].attentions, found[0].attentions, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one[1:, ..., 3:], other[1:, ..., 3:], atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(one[:1], other[:1], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("longer", ["attention_mask", "input_ids"])
def test_embeddings_of_another_length_than_mask_or_ids_are_refused(longer):
    target = tiny.target("qwen3")
    embeds = target.get_input_embeddings()(tiny.prompt(5)).detach()
    other = {"attention_mask": torch.ones(1, 9, dtype=torch.long)} if longer == "attention_mask" else {}
    other |= {"input_ids": tiny.prompt(9)} if longer == "input_ids" else {}
    with pytest.raises(ValueError, match=r"inputs_embeds has 5 positions, and (attention_mask|position_ids) covers 9"):
        target.generate(inputs_embeds=embeds, **other, custom_generate=tiny.draft(target).speculate, max_new_tokens=5)


def test_a_draft_has_the_counts_of_its_last_decode_and_times_only_where_they_were_asked_for():
    target = tiny.target("qwen3")
    draft, inputs, timed = tiny.draft(target), tiny.batch(9, (0, 2)), DecodeStatistics()
    asked = inputs | {"max_new_tokens": 12, "do_sample": False, "custom_generate": draft.speculate}
    assert draft.statistics == DecodeStatistics()
    target.generate(**asked)
    counted = draft.statistics
    assert counted.cycles
    assert not counted.decode_seconds
    target.generate(**asked, statistics=timed)
    assert draft.statistics is timed
    assert timed.decode_seconds > 0
    assert (counted.committed, counted.proposed) == (timed.committed, timed.proposed)
    draft.spec_generate(target, inputs["input_ids"], max_new_tokens=5, stop_token_ids=None)
    assert sum(draft.statistics.committed) < sum(timed.committed)

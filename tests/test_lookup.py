"""Look-ups propose what followed the same tokens before; the text stays the target's own."""

import copy
import pickle
import random

import pytest
import torch
from transformers import DynamicCache, LogitsProcessorList

import tiny
from dflash_hub import DecodeStatistics, lookup_generate
from dflash_hub.attention_dflash import BlockMasks
from dflash_hub.generate_dflash import LookupGenerate
from dflash_hub.lookup_dflash import LookupProposer, SuffixIndex
from dflash_hub.proposals_dflash import Proposal

pytestmark = pytest.mark.usefixtures("unchecked")

FAMILIES = ("qwen3", "gemma3_text", "qwen3_next", "qwen3_moe", "lfm2")


class Sizes(DecodeStatistics):
    """Counts that also remember the size of every block, and what each row accepted of it."""

    def __init__(self):
        super().__init__()
        self.blocks = []

    def add_cycle(self, counts, size):
        super().add_cycle(counts, size)
        self.blocks.append((size, [accepted for accepted, committed in counts if committed]))

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)

    @property
    def rejected(self) -> int:
        return sum(size - 1 - accepted for size, rows in self.blocks for accepted in rows)


class AnchorAlone:
    """Proposes nothing."""

    def append_context(self, features, first_slot):
        pass

    def propose(self, state):
        return Proposal(state.anchor)

    def commit(self, features, slots):
        pass


def compared(model, inputs, **options):
    """The statistics of a decode whose outputs are those of plain `generate`."""
    asked = {"max_new_tokens": 32, "do_sample": False} | options
    expected = model.generate(**inputs, **copy.deepcopy(asked))
    statistics = Sizes()
    text = model.generate(**inputs, **asked, custom_generate=lookup_generate, statistics=statistics)
    assert torch.equal(text, expected)
    assert tiny.as_found(model)
    return statistics


def one_row(ids) -> dict:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def repeating_batch(pads) -> dict:
    inputs = tiny.batch(24, pads)
    inputs["input_ids"] = inputs["input_ids"][:, :6].repeat(1, 4)
    return inputs


@torch.no_grad()
def counting():
    """A target that writes n + 1 after n."""
    model = tiny.target("qwen3")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding[0] = torch.randn(len(embedding[0]), generator=torch.Generator().manual_seed(0))  # padding had none
    embedding.div_(embedding.norm(dim=1, keepdim=True))
    head.copy_(embedding.roll(1, dims=0))
    embedding.mul_(1e5)
    return model


def longest_match(text, count, shortest, longest):
    """By comparing every earlier end with the end of the text: the length, and what followed the latest such end."""
    best = (shortest - 1, 0)
    for end in range(1, len(text)):
        length = 0
        while length < min(longest, end) and text[end - 1 - length] == text[-1 - length]:
            length += 1
        if length >= shortest:
            best = max(best, (length, end))
    if not best[1]:
        return None
    followed = list(text)
    for offset in range(count):
        followed.append(followed[best[1] + offset])
    return best[0], followed[len(text) :]


@pytest.mark.quick
@pytest.mark.parametrize(("shortest", "longest"), [(3, 32), (1, 4), (2, 2)])
def test_the_index_finds_what_a_search_of_the_whole_text_finds(shortest, longest):
    chance = random.Random(shortest)
    lengths = set()
    for _ in range(60):
        index, vocabulary = SuffixIndex(shortest, longest), chance.choice((1, 2, 4, 9))
        while len(index.tokens) < 60:
            index.extend([chance.randrange(vocabulary) for _ in range(chance.choice((0, 1, 2, 7)))])
            match = index.find(9)
            found = None if match is None else (match.length, match.tokens)
            assert found == longest_match(index.tokens, 9, shortest, longest)
            lengths.add(found and found[0])
    assert {None, shortest, longest} <= lengths


@pytest.mark.quick
def test_tokens_whose_runs_share_a_hash_are_no_match():
    """In Python, -1 and -2 have one hash; ids are never negative, but other runs may share one."""
    index = SuffixIndex()
    index.extend([5, 6, -1, 8, 5, 6, -2])
    assert hash((5, 6, -1)) == hash((5, 6, -2))
    assert index.find(4) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_targets_own(family):
    """Of a prompt that repeats itself and of one that does not; some proposals are accepted and others rejected."""
    model = tiny.target(family)
    repeating = compared(model, one_row(tiny.prompt(4, seed=5).repeat(1, 7)))
    no_token_twice = torch.randperm(tiny.VOCAB, generator=torch.Generator().manual_seed(5))[None]
    once = compared(model, one_row(no_token_twice))
    assert repeating.accepted + once.accepted > 2
    assert repeating.rejected
    assert once.rejected
    assert once.blocks[0] == (1, [0])


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_rows_of_a_padded_batch_find_their_own_matches(family):
    model = tiny.target(family)
    statistics = compared(model, repeating_batch(pads=(0, 19, 7)))
    assert statistics.accepted > 5
    assert statistics.rejected


def test_each_rows_text_is_indexed_without_its_padding():
    """A padding token that is written is a token like any other."""
    model, inputs, made = tiny.target("qwen3"), repeating_batch(pads=(0, 19, 7)), []
    more = {"custom_generate": lookup_generate, "proposer": lambda own: made.append(own) or own}
    texts = model.generate(**inputs, max_new_tokens=12, do_sample=False, **more)
    for row, (text, mask) in enumerate(zip(texts, inputs["attention_mask"], strict=True)):
        known = made[0].lookup.indices[row].tokens
        assert known == [*text[:24][mask.bool()].tolist(), *text[24:].tolist()][: len(known)]
        assert len(known) > mask.sum()


def test_widths_grow_with_what_is_accepted_and_end_with_the_text():
    """A text that counts: what followed before is right, until the prompt has a slip."""
    model = counting()
    ids = torch.tensor([[*range(12), 0, 1, 2, 9, 10, 11, 0, 1]])
    statistics = compared(model, one_row(ids), max_new_tokens=100)
    sizes = [size for size, _ in statistics.blocks]
    # 0, 1, 2 was followed by 9, and 3 is right.
    assert sizes == [8, 4, 8, 16, 32, 64]
    assert [rows[0] for _, rows in statistics.blocks] == [0, 3, 7, 15, 31, 63]


class Wrong(LookupProposer):
    """Proposes another token than that which follows, wherever it finds something."""

    def __init__(self, longest):
        super().__init__()
        self.lookup.longest = longest

    def propose(self, state):
        proposal = super().propose(state)
        steps = torch.arange(1, proposal.size)
        return Proposal(torch.cat([state.anchor, (state.anchor + steps + 1) % tiny.VOCAB], dim=1))


@pytest.mark.parametrize(("longest", "sizes"), [(32, {4}), (4, {1})])
def test_after_rejections_only_long_matches_are_proposed(longest, sizes):
    model, ids = counting(), torch.arange(24)[None] % tiny.VOCAB
    statistics = Sizes()
    more = {"proposer": lambda own: Wrong(longest), "statistics": statistics}
    asked = one_row(ids) | {"max_new_tokens": 30, "do_sample": False}
    text = model.generate(**asked, custom_generate=lookup_generate, **more)
    assert torch.equal(text, torch.arange(54)[None] % tiny.VOCAB)
    assert [size for size, _ in statistics.blocks[:5]] == [8, 4, 4, 4, min(sizes)]
    assert {size for size, _ in statistics.blocks[4:-3]} == sizes


def test_sampled_text_is_that_of_the_same_noise_without_proposals():
    model = tiny.target("qwen3")
    inputs = repeating_batch(pads=(0, 5))
    asked = inputs | {"max_new_tokens": 40, "do_sample": True, "temperature": 0.1, "custom_generate": lookup_generate}
    texts, statistics = [], Sizes()
    for more in ({"proposer": lambda own: AnchorAlone()}, {"statistics": statistics}):
        torch.manual_seed(5)
        texts.append(model.generate(**asked, **more))
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.generate(**asked | {"do_sample": False, "temperature": None}))
    assert statistics.accepted
    assert statistics.rejected


class Counted:
    """A processor that is not transformers' own, so it is called for each committed token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores - self.calls % 3 * (input_ids[:, -1:] == torch.arange(scores.shape[1]))


class Streamed:
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.tokens.append("end")


@pytest.mark.parametrize("model", [tiny.target("qwen3")], ids=["qwen3"])
@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 5},
        {"eos_token_id": 7, "pad_token_id": 0},
        {"logits_processor": LogitsProcessorList([Counted()])},
        {"min_new_tokens": 12, "eos_token_id": 2, "pad_token_id": 0},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_generate_hold(model, option):
    inputs = repeating_batch(pads=(0, 5))
    compared(model, inputs, **option)


def test_streamers_and_outputs_are_those_of_plain_generate():
    model, ids = tiny.target("qwen3"), tiny.prompt(6).repeat(1, 4)
    asked = one_row(ids) | {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    found, streamers = [], [Streamed(), Streamed()]
    for streamer, more in zip(streamers, ({}, {"custom_generate": lookup_generate}), strict=True):
        found.append(model.generate(**asked, **more, streamer=streamer, output_scores=True, output_hidden_states=True))
    assert streamers[0].tokens == streamers[1].tokens
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert torch.allclose(torch.stack(found[0].scores), torch.stack(found[1].scores), atol=1e-3)
    layers = [torch.cat([step[-1] for step in one.hidden_states], dim=1) for one in found]
    assert torch.allclose(*layers, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_caches_go_in_and_come_out(family):
    """A turn with a draft, one without, and one with the draft again, whose context is still with the cache."""
    model = tiny.target(family)
    draft = tiny.draft(model)
    ways = [draft.speculate, lookup_generate, draft.speculate]
    texts = []
    for turns in ([None] * len(ways), ways):
        cache, text = DynamicCache(config=model.config), tiny.prompt(9).repeat(1, 2)
        for way in turns:
            asked = one_row(text) | {"max_new_tokens": 12, "do_sample": False, tiny.CACHE: cache}
            text = model.generate(**asked, custom_generate=way) if way else model.generate(**asked)
            assert cache.get_seq_length() == text.shape[1] - 1
            text = torch.cat([text, tiny.prompt(2)], dim=1)
        texts.append(text)
        context = getattr(cache, "dflash", None)
    assert torch.equal(*texts)
    hidden = context.hidden[0]
    assert not hidden[:29].any(), "what the draft read"
    assert not hidden[-13:].any(), "what the draft read"
    assert hidden[29:-14].any(), "what it was not shown"


def test_a_target_without_a_draft_taps_nothing_and_is_checked_before_the_first_token(monkeypatch):
    model, ids = tiny.target("qwen3"), tiny.prompt(6).repeat(1, 4)
    function = LookupGenerate()
    session = function.session(model)
    assert session.target.taps.ids == ()
    assert session.drafter is None
    monkeypatch.setattr(
        BlockMasks, "visible_slots", lambda self, where, *kind: torch.ones(1, self.size, where.shape[1]) > 0
    )
    with pytest.raises(ValueError, match="A block over dflash-hub's cache"):
        model.generate(**one_row(ids), max_new_tokens=4, custom_generate=function)


def test_look_ups_may_propose_beside_a_draft():
    model, ids = tiny.target("qwen3"), tiny.prompt(6).repeat(1, 4)
    statistics = Sizes()
    more = {"proposer": lambda chain: LookupProposer(), "statistics": statistics}
    draft = tiny.draft(model)
    asked = one_row(ids) | {"max_new_tokens": 30, "do_sample": False}
    text = model.generate(**asked, custom_generate=draft.speculate, **more)
    assert torch.equal(text, tiny.greedy(model, ids, 30))
    assert statistics.accepted


def test_the_function_is_called_by_users_too_and_survives_a_pickle():
    model, ids = tiny.target("qwen3"), tiny.prompt(6).repeat(1, 4)
    again = pickle.loads(pickle.dumps(lookup_generate))
    text = again(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert torch.equal(text, tiny.greedy(model, ids, 20))

"""The text is the target's own, token for token; only the time falls."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tiny
from dflash_hub import DecodeStatistics, DFlashDraftModel
from dflash_hub.attention_dflash import BlockMasks, MaskKind
from dflash_hub.proposals_dflash import Proposal, accept, ancestors, paths
from dflash_hub.support_dflash import TESTED
from paths import DATA

RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "nemotron_h")


def speculative(target, draft, ids, new, **kwargs):
    """The text by `generate` with the draft, and the statistics."""
    statistics = kwargs.pop("statistics", None) or DecodeStatistics()
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False} | kwargs
    return target.generate(ids, custom_generate=draft.speculate, statistics=statistics, **given), statistics


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen3-full", "qwen3-sliding"])
def test_tokens_and_cycles_are_those_of_the_original_code(name):
    home = DATA / "golden" / name
    data = load_file(home / "golden.safetensors")
    draft = DFlashDraftModel.from_pretrained(home / "draft")
    target = AutoModelForCausalLM.from_pretrained(home / "target")
    new = data["greedy_ids"].shape[1] - data["prompt_ids"].shape[1]
    text, statistics = speculative(target, draft, data["prompt_ids"], new, eos_token_id=None)
    assert torch.equal(text, data["generated_ids"])
    assert torch.equal(text, data["greedy_ids"])
    if "committed_per_cycle" in data:
        committed = data["committed_per_cycle"].tolist()
        assert statistics.committed[:-1] == committed[: len(statistics.committed) - 1]
        assert len(committed) - len(statistics.committed) in (0, 1)


def test_every_tested_family_is_answered_for():
    tested = {tiny.FAMILIES[name].get("model_type", name) for name in tiny.FAMILIES}
    assert tested <= TESTED


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_text_is_the_targets_own_through_rejections_and_full_acceptances(family):
    """One row, prompts of 1 and 300 tokens, blocks of 16 and 5: proposals partly right, and once the draft's own."""
    new = 13
    target = tiny.target(family)
    committed, tokens = set(), set()
    for length, block in ((1, 16), (300, 5)):
        ids = tiny.prompt(length, seed=length)
        expected = tiny.greedy(target, ids, new)
        assert len(set(expected[0, length:].tolist())) > 1
        tokens |= set(expected[0, length:].tolist())
        draft = tiny.draft(target, block_size=block)
        if length == 300:
            assert torch.equal(speculative(target, draft, ids, 4)[0], expected[:, :304])
        text, statistics = speculative(target, draft, ids, new, proposer=tiny.partly_right(expected, seed=length + 1))
        assert torch.equal(text, expected)
        assert min(statistics.committed) < block
        committed |= {block - count for count in statistics.committed}
    assert 0 in committed, "no block was accepted whole"
    assert len(tokens) > 6, "a text of a few tokens proves nothing"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_padded_batch_gives_every_row_the_text_that_plain_generate_gives_it(family):
    """By the draft's own proposals, and by better ones, in blocks of 16 and 2 by turns."""
    target = tiny.target(family)
    inputs = tiny.batch(20, pads=(0, 19, 7, 13))
    block, new = ((2, 10), (16, 18))[[*tiny.FAMILIES].index(family) % 2]
    asked = {"max_new_tokens": new, "do_sample": False}
    expected = target.generate(**inputs, **asked)
    assert len(set(expected[:, 20:].flatten().tolist())) > 4
    assert len(set(map(tuple, expected[:, 20:].tolist()))) > 2
    draft, statistics = tiny.draft(target, block_size=block), DecodeStatistics()
    short = target.generate(**inputs, **asked | {"max_new_tokens": 5}, custom_generate=draft.speculate)
    assert torch.equal(short, expected[:, :25])
    ways = {"custom_generate": draft.speculate, "statistics": statistics, "proposer": tiny.partly_right(expected)}
    assert torch.equal(target.generate(**inputs, **asked, **ways), expected)
    assert {1, block} <= set(statistics.committed)


@pytest.mark.parametrize("layers", ["full", "sliding, causal", "sliding, not causal"])
def test_the_drafts_own_window_may_be_crossed(layers):
    target = tiny.target("qwen3")
    fields = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "is_causal": "not" not in layers}
    draft = tiny.draft(target, **({} if layers == "full" else fields))
    ids = tiny.prompt(30)
    text = draft.spec_generate(target=target, input_ids=ids, max_new_tokens=24, stop_token_ids=None, temperature=0.0)
    assert torch.equal(text, tiny.greedy(target, ids, 24))


@pytest.mark.parametrize("layers", ["full", "sliding, causal", "sliding, not causal", "causal", "eager"])
def test_what_the_draft_proposes_is_what_its_plain_forward_says(layers):
    """Over columns, with padding and windows and rejected context, against a forward without any cache."""
    target = tiny.target("qwen3")
    sliding = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}
    draft = tiny.draft(
        target, is_causal=" not" not in layers and "causal" in layers, **sliding if "sl" in layers else {}
    )
    if layers == "eager":
        draft.set_attn_implementation("eager")
    inputs = tiny.batch(14, pads=(0, 5))
    texts = target.generate(**inputs, max_new_tokens=14, do_sample=False)
    embed, seen = target.get_input_embeddings(), []

    @torch.no_grad()
    def plain(row: int, column: int) -> torch.Tensor:
        ids = texts[row : row + 1, (0, 5)[row] : column]
        states = target(ids, output_hidden_states=True).hidden_states
        context = torch.cat([states[1], states[3]], dim=-1)
        block = torch.tensor([[int(texts[row, column])] + [3] * 4])
        return target.lm_head(draft(embed(block), context).last_hidden_state[:, 1:])[0]

    class Watched(tiny.Steered):
        """Looks at what the draft gives before it is proposed."""

        def propose(self, state):
            drafter, context = self.chain.drafter, self.chain.draft_state
            output = drafter.draft_block(context, state.anchor, state.slots, max(state.last_slots) + drafter.size)
            with state.target.attention.uninstalled(), drafter.attention.uninstalled():
                for row, slot in enumerate(state.slots.tolist()):
                    if (row, slot) not in seen:  # rows that have ended stay where they are
                        seen.append((row, slot))
                        assert torch.allclose(output.logits[row], plain(row, slot), atol=1e-4)
            return self.chain.propose(state)

    more = {"custom_generate": draft.speculate, "proposer": lambda chain: Watched(chain, None)}
    assert torch.equal(target.generate(**inputs, max_new_tokens=14, do_sample=False, **more), texts)
    assert len(seen) > 16


@pytest.mark.quick
def test_a_real_trained_pair_agrees_with_plain_greedy_and_accepts(tiny_target, tiny_draft):
    ids = torch.tensor([[40, 41, 42, 43, 44, 45, 46, 47]])
    text, statistics = speculative(tiny_target, tiny_draft, ids, 64, eos_token_id=None)
    expected = tiny_target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, eos_token_id=None
    )
    assert torch.equal(text, expected)
    assert statistics.acceptance_length > 1.2


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_the_same_draft_runs_in_transformers_own_loop(family):
    target = tiny.target(family)
    draft, ids = tiny.draft(target), tiny.prompt(9)
    text = target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=draft,
        speculation_type="dflash",
        max_new_tokens=10,
        do_sample=False,
    )
    assert torch.equal(text, tiny.greedy(target, ids, 10))


def test_buffers_grow_over_long_texts(monkeypatch):
    monkeypatch.setattr("dflash_hub.cache_dflash.BUCKET", 16)
    target = tiny.target("gemma3_text")
    inputs = tiny.batch(20, pads=(0, 9, 3, 15))
    expected = target.generate(**inputs, max_new_tokens=50, do_sample=False)
    draft = tiny.draft(target)
    assert torch.equal(
        target.generate(**inputs, max_new_tokens=50, do_sample=False, custom_generate=draft.speculate), expected
    )


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "nemotron_h"])
def test_long_prompts_are_prefilled_in_parts(family, monkeypatch):
    monkeypatch.setattr("dflash_hub.sequences_dflash.PREFILL_CHUNK", 16)
    target = tiny.target(family)
    draft = tiny.draft(target)
    ids = tiny.prompt(70)
    assert torch.equal(speculative(target, draft, ids, 6)[0], tiny.greedy(target, ids, 6))
    inputs = tiny.batch(40, pads=(0, 30, 7, 13))
    expected = target.generate(**inputs, max_new_tokens=6, do_sample=False)
    text = target.generate(**inputs, max_new_tokens=6, do_sample=False, custom_generate=draft.speculate)
    assert torch.equal(text, expected)
    lengths = []
    hook = (
        target.get_decoder()
        .layers[0]
        .register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    )
    speculative(target, draft, ids, 2)
    hook.remove()
    assert lengths[:5] == [16, 16, 16, 16, 6]


def test_only_the_last_position_of_a_prompt_goes_through_the_head():
    target = tiny.target("qwen3")
    draft, widths = tiny.draft(target), []
    speculative(target, draft, tiny.prompt(50), 8)  # checks itself
    hook = target.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    speculative(target, draft, tiny.prompt(50), 8)
    hook.remove()
    assert widths[0] == 1
    assert set(widths[1:]) <= {4, 5}


@pytest.mark.parametrize(("window", "from_anchor"), [(None, False), (7, False), (7, True), (2, True)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("as_tree", [False, True])
def test_masks_that_are_moved_on_equal_masks_that_are_built_there(window, from_anchor, causal, as_tree):
    torch.manual_seed(0)
    padding_mask = torch.zeros(3, 120, dtype=torch.bool)
    padding_mask[1, :6] = padding_mask[2, 3] = True
    slots = torch.tensor([9, 12, 20])
    masks = BlockMasks(padding_mask, slots, size=5)
    kind = MaskKind(window, causal, 2, torch.float32, torch.device("cpu"), from_anchor)
    masks.get(kind)
    for _ in range(15):
        slots = slots + torch.randint(0, 6, (3,))
        masks.move(slots, masks.chain if as_tree else None)
        fresh = BlockMasks(padding_mask, slots, size=5).get(kind)
        assert torch.equal(masks.get(kind), fresh)
        assert fresh.shape == (3, 1, 10, 120)


def test_a_mask_of_chains_is_moved_on_by_five_kernels():
    slots, kernels = torch.tensor([9]), []
    masks = BlockMasks(torch.zeros(1, 40, dtype=torch.bool), slots, size=5)
    masks.get(MaskKind(None, True, 2, torch.float32, torch.device("cpu")))

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view:
                kernels.append(str(function))
            return function(*args, **kwargs or {})

    slots = slots + 3
    with Counted():
        masks.move(slots)
    assert len(kernels) == 5, kernels


def test_a_mask_shows_what_the_definition_of_a_window_says():
    padding_mask = torch.zeros(1, 16, dtype=torch.bool)
    padding_mask[0, 0] = True
    start, size = 8, 3
    for window, from_anchor in ((None, False), (4, False), (4, True), (1, True)):
        for causal in (True, False):
            masks = BlockMasks(padding_mask, torch.tensor([start]), size)
            shown = masks.get(MaskKind(window, causal, 1, torch.float32, padding_mask.device, from_anchor))
            for query in range(size):
                for column in range(16):
                    distance = start + query - column
                    visible = column != 0 and (distance >= 0 if causal else column < start + size)
                    if from_anchor:
                        visible = visible and start - column <= window
                    elif window is not None:
                        visible = visible and abs(distance) < window
                    assert (shown[0, 0, query, column] == 0) == visible


def test_nothing_is_copied_but_what_a_block_writes():
    """The buffers of a text stay where they are while it grows inside them."""
    target, where = tiny.target("qwen3"), set()
    draft = tiny.draft(target)

    class Watched(tiny.Steered):
        def propose(self, state):
            for cache in (state.target_state.cache, self.chain.draft_state.cache):
                where.update((id(cache), layer.keys.data_ptr()) for layer in cache.slot_layers.values())
            return self.chain.propose(state)

    speculative(target, draft, tiny.prompt(9), 30, proposer=lambda chain: Watched(chain, None))
    assert len(where) == 4 + 2


TREE = torch.tensor([[-1, 0, 0, 1, 1, 2]])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("tokens", "choices", "parents", "accepted", "committed"),
    [
        ([7, 1, 2, 3], [1, 2, 3, 4], None, 3, [1, 2, 3, 4]),
        ([7, 1, 2, 3], [1, 2, 9, 4], None, 2, [1, 2, 9]),
        ([7, 1, 2, 3], [1, 9, 3, 4], None, 1, [1, 9]),
        ([7, 1, 2, 3], [9, 2, 3, 4], None, 0, [9]),
        ([7, 1, 2, 3], [9, 9, 3, 4], None, 0, [9]),
        ([7, 1, 2, 3], [1, 2, 9, 4], torch.tensor([[-1, 0, 1, 2]]), 2, [1, 2, 9]),
        ([7, 1, 2, 3, 4, 5], [2, 0, 5, 0, 0, 6], TREE, 2, [2, 5, 6]),
        ([7, 1, 2, 3, 4, 5], [1, 4, 5, 0, 8, 6], TREE, 2, [1, 4, 8]),
        ([7, 1, 2, 3, 4, 5], [9, 4, 5, 0, 8, 6], TREE, 0, [9]),
        ([7, 1, 2, 3, 4, 5], [2, 4, 9, 0, 8, 6], TREE, 1, [2, 9]),
    ],
)
def test_acceptance_keeps_the_drafted_tokens_before_the_first_mismatch(tokens, choices, parents, accepted, committed):
    choices = torch.tensor([choices])
    count, path = accept(Proposal(torch.tensor([tokens]), parents), choices)
    assert count.tolist() == [accepted]
    assert choices.gather(1, path)[0, : accepted + 1].tolist() == committed


@pytest.mark.parametrize(
    ("family", "block"), [("qwen3", 4), ("qwen3", 6), ("qwen3", 9), ("gemma3_text", 9), ("gpt_oss", 4)]
)
def test_a_tree_of_proposals_runs_in_the_same_loop(family, block):
    """Two branches from the anchor: one that is right for a while, one that is wrong at once; another tree per row."""
    target = tiny.target(family)
    inputs = tiny.batch(12, pads=(0, 5, 9, 2))
    expected = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    turn = []

    def branch(proposal, state):
        turn.append(len(turn) % 3)
        tokens, parents = proposal.tokens[:, :1].repeat(1, 6), torch.empty(len(proposal.tokens), 6, dtype=torch.long)
        for row, slot in enumerate(state.last_slots):
            truth = torch.nn.functional.pad(expected[row, slot + 1 : slot + 4], (0, 3))[:3]
            other = (truth + 1) % tiny.VOCAB
            deep = turn[-1] == 1 or (row + turn[-1]) % 2  # which branch is right, and how far, differs by row
            one, two = (other, truth) if deep else (truth, other)
            order = [one[0], two[0], one[1], two[1], two[2] if deep else other[2]]
            tokens[row, 1:] = torch.stack(order)
            parents[row] = torch.tensor([-1, 0, 0, 1, 2, 4])
            if row % 2:  # the same branches, the other one first
                tokens[row, 1:] = torch.stack([two[0], one[0], two[1], two[2] if deep else other[2], one[1]])
                parents[row] = torch.tensor([-1, 0, 0, 1, 3, 2])
        return Proposal(tokens, parents)

    draft, statistics = tiny.draft(target, block_size=block), DecodeStatistics()
    more = {"max_new_tokens": 24, "do_sample": False, "custom_generate": draft.speculate, "statistics": statistics}
    more["proposer"] = tiny.steered(branch)
    assert torch.equal(target.generate(**inputs, **more), expected)
    assert {3, 4} <= set(statistics.committed)


def test_ancestors_and_paths_of_a_tree_say_the_same():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 9, 17):
        parents = torch.tensor([[-1, *(int(torch.randint(0, p, (), generator=generator)) for p in range(1, size))]] * 2)
        lineage = ancestors(parents)
        for row, row_paths in enumerate(paths(parents)):
            for position, path in enumerate(row_paths):
                assert lineage[row, position].nonzero()[:, 0].tolist() == path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64, "target_hidden_size": 32}, "hidden_size is 64 in the draft, but the target has 32"),
        ({"target_hidden_size": 48}, r"fc width \(taps x tap width\) is 96 in the draft, but the target has 64"),
        ({"vocab_size": 99}, "vocab_size is 99 in the draft, but the target has 12"),
        (
            {"mask_token_id": 12, "vocab_size": None},
            "mask_token_id is 12 in the draft, but the target has 12 embed",
        ),
        ({"num_target_layers": 9}, "num_target_layers is 9 in the draft, but the target has 4 layers"),
        (
            {"target_layer_ids": [0, 6], "num_target_layers": None},
            "last tapped layer is 6 in the draft, but the target has 4 layers",
        ),
    ],
)
def test_a_draft_for_another_target_is_refused_with_both_numbers(fields, message):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **fields)
    with pytest.raises(ValueError, match=message):
        draft.spec_generate(target, tiny.prompt(6), max_new_tokens=4)
    with pytest.raises(ValueError, match=message):
        speculative(target, draft, tiny.prompt(6), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": tiny.prompt(6)[:, :0]}, r"shape \(1, 0\)"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": "hot"}, "temperature is hot"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be an int"),
        ({"stop_token_ids": [None]}, r"stop_token_ids is \[None\]"),
        ({"stop_token_ids": "</s>"}, "stop_token_ids is '</s>'"),
        ({"input_ids": [[1, 2]]}, "input_ids is list; pass a tensor"),
        ({"target": "Qwen/Qwen3-4B"}, "target is 'Qwen/Qwen3-4B'; pass the loaded target"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    target = tiny.target("qwen3")
    call = {"target": target, "input_ids": tiny.prompt(6), "max_new_tokens": 4}
    with pytest.raises(ValueError, match=message):
        tiny.draft(target).spec_generate(**(call | arguments))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "mamba2",
            {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
            "mamba2 keeps state that cannot be put",
        ),
    ],
)
def test_a_target_that_is_not_answered_for_is_refused_by_name(family, fields, message):
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(tiny.SMALL | fields)))
    with pytest.raises(ValueError, match=message):
        speculative(target, tiny.draft(target), tiny.prompt(6), 4)


def test_a_family_that_is_not_tested_decodes_after_its_self_check_or_is_refused_where_that_is_asked_for(monkeypatch):
    from dflash_hub import support_dflash

    said: list[str] = []
    monkeypatch.setattr(support_dflash, "TESTED", support_dflash.TESTED - {"olmo2"})
    monkeypatch.setattr(support_dflash.logger, "warning_once", said.append)
    target = tiny.scaled(AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **tiny.SMALL)).eval(), "olmo2")
    draft, ids = tiny.draft(target), tiny.prompt(20)
    for _ in range(2):
        assert torch.equal(speculative(target, draft, ids, 20)[0], tiny.greedy(target, ids, 20))
    assert len(said) == 1
    assert "olmo2 is not a family that the tests decode. The self-check passed" in said[0]
    with pytest.raises(ValueError, match=r"olmo2 is not a family that the tests decode, and strict"):
        speculative(target, draft, ids, 4, strict=True)
    monkeypatch.setenv("DFLASH_STRICT", "1")
    with pytest.raises(ValueError, match=r"olmo2 is not a family that the tests decode, and .* DFLASH_STRICT"):
        speculative(target, draft, ids, 4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_target_whose_rotary_frequencies_move_with_the_length_is_refused_by_name(kind):
    target = tiny.target("llama")
    target.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ValueError, match=f"rotary embeddings of type {kind}"):
        tiny.draft(target).spec_generate(target, tiny.prompt(6), max_new_tokens=4)


def test_an_encoder_decoder_target_is_refused():
    shape = dict(vocab_size=24, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **shape))
    with pytest.raises(ValueError, match="no decoder-only language model"):
        tiny.draft(tiny.target("qwen3")).spec_generate(t5, tiny.prompt(6))


@pytest.mark.parametrize(
    ("family", "moment", "error"),
    [
        ("qwen3", "prompt", KeyboardInterrupt),
        ("qwen3", "draft", torch.OutOfMemoryError),
        ("qwen3", "verify", torch.OutOfMemoryError),
        ("qwen3", "told", KeyboardInterrupt),
        ("qwen3_next", "prompt", KeyboardInterrupt),
        ("qwen3_next", "verify", torch.OutOfMemoryError),
    ],
)
def test_the_target_is_left_as_it_was_found_also_after_an_error(family, moment, error, monkeypatch):
    target = tiny.target(family)
    draft, ids = tiny.draft(target), tiny.prompt(6)
    expected = tiny.greedy(target, ids, 8)
    before = set(vars(target))
    where = {"prompt": (target.lm_head, 1), "draft": (draft.norm, 2), "verify": (target.model.layers[1].mlp, 3)}
    module, moments = where.get(moment, (target.lm_head, 99))
    honest, calls = module.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == moments:
            raise error
        return honest(*args, **kwargs)

    class Streamer:
        def put(self, value):
            if moment == "told" and value.numel() == 1:
                raise error

        def end(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(module, "forward", forward)
        with pytest.raises(error):
            speculative(target, draft, ids, 8, streamer=Streamer())
    assert tiny.as_found(target)
    assert set(vars(target)) == before
    assert torch.equal(tiny.greedy(target, ids, 8), expected)
    assert torch.equal(speculative(target, draft, ids, 8)[0], expected)


def test_logits_that_are_not_numbers_are_an_error_and_no_token():
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    with torch.no_grad():
        target.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits of Qwen3ForCausalLM are NaN"):
        speculative(target, draft, tiny.prompt(6), 10)
    assert tiny.as_found(target)


def test_a_draft_that_is_all_nan_costs_time_and_nothing_else():
    target = tiny.target("qwen3")
    draft, ids = tiny.draft(target), tiny.prompt(6)
    with torch.no_grad():
        draft.norm.weight.fill_(float("nan"))
    assert torch.equal(speculative(target, draft, ids, 20)[0], tiny.greedy(target, ids, 20))


def test_statistics_of_blocks_of_several_sizes_add_up():
    target, statistics = tiny.target("qwen3"), DecodeStatistics()
    ids = tiny.prompt(9)
    better = tiny.greedy(target, ids, 20)
    for block in (3, 8, 2):
        draft = tiny.draft(target, block_size=block)
        speculative(target, draft, ids, 20, statistics=statistics, proposer=tiny.partly_right(better))
    assert len(statistics.accepted_at) == 7
    assert sum(statistics.committed) == 3 * 19


class Anything:
    """A proposer that proposes one token over and over, in place of the anchor too; now more of them, now fewer."""

    def __init__(self):
        self.turn = 0

    def append_context(self, features, first_slot):
        pass

    def propose(self, state):
        self.turn += 1
        return Proposal(torch.full((len(state.anchor), 2 + 3 * (self.turn % 3)), 7))

    def commit(self, features, slots):
        pass


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_the_text_is_the_targets_own_whatever_is_proposed(family):
    target = tiny.target(family)
    inputs = tiny.batch(12, pads=(0, 5, 9, 2))
    draft, statistics = tiny.draft(target), DecodeStatistics()
    more = {"custom_generate": draft.speculate, "statistics": statistics, "proposer": lambda chain: Anything()}
    expected = target.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert torch.equal(target.generate(**inputs, max_new_tokens=30, do_sample=False, **more), expected)
    assert len(set(statistics.committed)) > 1


def test_the_statistics_add_up():
    target = tiny.target("gemma3_text")
    inputs = tiny.batch(9, pads=(0, 3, 5))
    statistics = DecodeStatistics()
    draft = tiny.draft(target)
    more = {"custom_generate": draft.speculate, "statistics": statistics, "max_new_tokens": 30, "do_sample": False}
    target.generate(**inputs, **more)
    assert sum(statistics.committed) == 3 * 29
    assert statistics.cycles == max(statistics.cycles, len(statistics.committed) // 3)
    assert statistics.acceptance_length == pytest.approx(3 * 29 / len(statistics.committed))
    assert len(statistics.accepted_at) == 4
    assert statistics.accepted_at == sorted(statistics.accepted_at, reverse=True)
    own = len(statistics.committed)
    assert sum(statistics.accepted_at) + own >= 3 * 29
    seconds = (statistics.prefill_seconds, statistics.draft_seconds, statistics.verify_seconds, statistics.rest_seconds)
    assert all(second > 0 for second in seconds)
    assert 0 < statistics.acceptance_by_position[0] < 1


def test_statistics_print_as_a_short_table_and_stay_what_they_are():
    statistics = DecodeStatistics()
    assert "nothing was decoded yet" in str(statistics)
    statistics.add_cycle([(3, 4)], 4)
    statistics.add_cycle([(0, 1)], 4)
    statistics.verify_seconds, statistics.plain_seconds = 0.5, 0.12
    assert repr(statistics).splitlines() == [
        "acceptance length          2.50 tokens a cycle (5 tokens, 2 cycles)",
        "accepted by position       50% 50% 50%",
        "tokens per second          10.0",
        "times plain steps of ours  1.20, estimated",
        "seconds                    prefill 0.000, draft 0.000, verify 0.500, rest 0.000",
    ]
    assert pickle.loads(pickle.dumps(statistics)) == copy.deepcopy(statistics) == statistics

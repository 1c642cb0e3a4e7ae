"""Drafts in the speculators layout: what they compute, decode and store is what that project's own classes do.

The goldens speculators-sliding and speculators-dflash2 are of random weights, run by the classes of speculators 0.9.0
(`_backbone_forward` of a whole text, with three anchors in place of random ones). Its other goldens come with a target
and a plain decoding loop around the model.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from dflash_hub import DecodeStatistics, DFlash2Config, DFlashConfig, DFlashDraftModel, load_draft
from dflash_hub.cache_dflash import rewindable_cache
from dflash_hub.drafter_dflash import Walk
from dflash_hub.layouts import layout_findings, variant_of
from dflash_hub.publishing.probe import digests
from dflash_hub.training.blocks import Blocks, PackedBatch
from dflash_hub.training.objective import Objective, Recipe
from paths import DATA, ROOT
from test_hub import load_elsewhere
from test_sampling import Plain, sample

GOLDEN = DATA / "golden"
DECODED = ["speculators-reduced", "speculators-dspark", "speculators-dspark-bonus"]
FULL, SLIDING = "full_attention", "sliding_attention"


def golden(name: str):
    return load_file(GOLDEN / name / "golden.safetensors"), GOLDEN / name / "draft"


def changed(source, folder, **changes):
    """A copy of a draft with changes in its config.json; a change to None removes the key."""
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        shutil.copyfile(path, folder / path.name)
    content = config_with(source, **changes)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def config_with(source=GOLDEN / "speculators-reduced" / "draft", **changes) -> dict:
    content = json.loads((source / "config.json").read_text())
    body = changes.pop("transformer_layer_config", {})
    content |= changes
    content["transformer_layer_config"] |= body
    return {key: value for key, value in content.items() if value is not None}


def restored(source, folder, **tensors):
    """A copy of a draft with tensors added or replaced; a tensor that is None is removed."""
    changed(source, folder)
    held = load_file(source / "model.safetensors") | tensors
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recorded(drafted: list):
    """The keyword `proposer`, which appends every drafted block to `drafted`."""

    def change(proposal, state):
        drafted.append(proposal.tokens[:, 1:].tolist())
        return proposal

    return tiny.steered(change)


# The original implementation --------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", DECODED)
@torch.no_grad()
def test_states_logits_and_walk_are_those_of_the_original_code(name):
    data, home = golden(name)
    draft = load_draft(home)
    noise, context = data["noise_embeds"], data["context_features"]
    states = draft(noise, context, position_ids=data["position_ids"]).last_hidden_state
    torch.testing.assert_close(states, data["hidden"], atol=2e-5, rtol=0)
    cache, half = rewindable_cache(draft.config), context.shape[1] // 2
    draft(noise, context[:, :half], past_key_values=cache)
    cache.crop(-noise.shape[1])
    cached = draft(noise, context[:, half:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(cached, data["hidden"], atol=2e-5, rtol=0)
    torch.testing.assert_close(draft.draft_logits(states, draft.lm_head), data["base_logits"], atol=2e-5, rtol=0)
    states = states[:, -draft.config.num_drafted :]
    logits = draft.logits(states, draft.lm_head)
    assert logits.shape[-1] == draft.config.vocab_size
    assert torch.equal(draft.target_ids, data["draft_to_target_ids"])
    known = logits[..., draft.target_ids]
    assert torch.equal(logits.isfinite().sum(-1), torch.full(logits.shape[:2], known.shape[-1]))
    target = AutoModelForCausalLM.from_pretrained(home.parent / "target")
    walk = Walk(data["block_input_ids"][:, :1], target.get_input_embeddings())
    choice = draft.select_tokens(logits, states, walk)
    assert torch.equal(choice.tokens, data["walk_ids"])
    if "confidence_probs" in data:
        chances = data["confidence_probs"][:, -draft.config.num_drafted :]
        torch.testing.assert_close(choice.confidence, chances, atol=2e-5, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize("name", DECODED)
def test_drafted_and_committed_tokens_are_those_of_the_original_code_in_every_cycle(name):
    data, home = golden(name)
    draft, target = load_draft(home), AutoModelForCausalLM.from_pretrained(home.parent / "target")
    prompt, drafted, statistics = data["prompt_ids"], [], DecodeStatistics()
    asked = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
    asked["max_new_tokens"] = data["greedy_ids"].shape[1] - prompt.shape[1]
    text = target.generate(
        prompt, **asked, custom_generate=draft.speculate, statistics=statistics, proposer=recorded(drafted)
    )
    assert torch.equal(text, data["generated_ids"])
    assert torch.equal(text, data["greedy_ids"])
    committed, cycles = data["committed_per_cycle"].tolist(), len(drafted)
    assert cycles in (len(committed), len(committed) - 1)  # that loop also runs a cycle after a whole text
    assert statistics.committed[:-1] == committed[: cycles - 1]  # the last ends with the text
    assert torch.equal(torch.tensor(drafted)[:, 0], data["cycle_draft_ids"][:cycles])


@torch.no_grad()
def blocks_after(draft, data) -> torch.Tensor:
    """The states `[A, Q, H]` of a block after each anchor, one after the other."""
    states = []
    for noise, anchor in zip(data["noise_embeds"], data["anchors"].tolist(), strict=True):
        states.append(draft(noise[None], data["context_features"][:, :anchor]).last_hidden_state[0])
    return torch.stack(states)


@pytest.mark.parametrize("non_causal", [False, True])
@torch.no_grad()
def test_windows_are_counted_from_the_anchor_in_the_model_and_in_training(non_causal, tmp_path):
    """Blocks of 6 and a window of 4: from each position, the last two would see no context."""
    data, home = golden("speculators-sliding")
    draft = load_draft(changed(home, tmp_path / "draft", sliding_window_non_causal=non_causal))
    config = draft.config
    assert (config.layer_types, config.sliding_window, config.window_from_anchor) == ([SLIDING, FULL], 4, True)
    assert config.is_causal == (False if non_causal else [True, False])
    expected = data["hidden_non_causal" if non_causal else "hidden"]
    torch.testing.assert_close(blocks_after(draft, data), expected, atol=2e-5, rtol=0)
    logits = data["logits_non_causal" if non_causal else "logits"]
    torch.testing.assert_close(draft.lm_head(expected), logits, atol=2e-5, rtol=0)

    target = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **tiny.SMALL))
    one = torch.ones_like(data["input_ids"])
    blocks = Blocks(PackedBatch(data["input_ids"], one.bool(), one), data["anchors"][None], config.block_size)
    objective = Objective.__new__(Objective)  # its masks alone, of a draft that is not trained
    objective.config, objective.recipe, objective.target = config, Recipe(attention="dense"), target
    states = objective.states(draft, blocks, data["noise_embeds"].flatten(0, 1)[None], data["context_features"])
    torch.testing.assert_close(states[0].view_as(expected), expected, atol=2e-5, rtol=0)

    config.window_from_anchor = False
    assert float((blocks_after(draft, data) - expected).abs().max()) > 1e-2


@torch.no_grad()
def test_a_dflash_2_draft_computes_and_chooses_what_the_original_code_does():
    data, home = golden("speculators-dflash2")
    draft = load_draft(home)
    assert draft.config.model_type == "dflash2"
    assert (draft.config.is_causal, draft.config.window_from_anchor) == (False, True)
    states = blocks_after(draft, data)
    torch.testing.assert_close(states, data["hidden"], atol=2e-5, rtol=0)
    head = torch.nn.Linear(32, 24, bias=False)
    head.weight.copy_(data["lm_head"])
    logits = draft.logits(states, head)
    torch.testing.assert_close(logits, data["logits"], atol=2e-5, rtol=0)
    anchors = data["input_ids"][0, data["anchors"]][:, None]
    assert torch.equal(draft.select_tokens(logits[:, 1:], states[:, 1:], Walk(anchors)).tokens, data["walk_ids"])


# Its config.json --------------------------------------------------------------------------------------------------


def read(**changes):
    return DFlashConfig.from_dict(config_with(**changes))


SLIDES = {"layer_types": [SLIDING, FULL], "sliding_window": 9, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"sample_from_anchor": None}, {"sample_from_anchor": False, "num_drafted": 7}),
        ({"sample_from_anchor": True}, {"sample_from_anchor": True, "num_drafted": 8}),
        ({"draft_vocab_size": 24}, {"draft_vocab_size": None, "has_own_lm_head": False}),
        ({"draft_vocab_size": None}, {"draft_vocab_size": None}),
        ({"target_hidden_size": 96}, {"target_hidden_size": 96}),
        ({"architectures": ["DFlashSpeculator"], "auto_map": None}, {"model_type": "dflash"}),
        ({"architectures": None}, {"model_type": "dflash"}),
        ({"sliding_window_non_causal": True}, {"is_causal": False, "window_from_anchor": False}),
        ({"sliding_window_non_causal": None}, {"is_causal": False}),
        ({"transformer_layer_config": SLIDES}, {"is_causal": [True, False], "window_from_anchor": True}),
        (
            {"transformer_layer_config": SLIDES, "sliding_window_non_causal": None},
            {"is_causal": [True, False], "sliding_window": 9},
        ),
        (
            {"transformer_layer_config": SLIDES, "sliding_window_non_causal": True},
            {"is_causal": False, "window_from_anchor": True},
        ),
        ({"window_from_anchor": False, "transformer_layer_config": SLIDES}, {"window_from_anchor": False}),
        # transformers 4 wrote the rotary base beside the scaling
        (
            {"transformer_layer_config": {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        ),
        # one dict for each type of layer: that of the sliding ones is used for all
        (
            {
                "transformer_layer_config": {
                    "rope_parameters": {FULL: {"rope_theta": 7.0}, SLIDING: {"rope_theta": 9.0}}
                }
            },
            {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
        ),
        # copied from a target; Qwen3's rotary embeddings rotate all channels anyway
        (
            {"transformer_layer_config": {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.25}}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        ),
    ],
    ids=str,
)
def test_the_keys_of_older_and_newer_files_are_read_as_that_project_reads_them(changes, fields):
    config = read(**changes)
    assert {field: getattr(config, field) for field in fields} == fields


DSPARK = GOLDEN / "speculators-dspark" / "draft"


def test_a_dspark_draft_that_does_not_say_what_its_anchor_predicts_asks_for_it(tmp_path):
    folder = changed(DSPARK, tmp_path / "draft", sample_from_anchor=None)
    words = r"sample_from_anchor.*7 speculative_tokens for a block_size of 7.*sample_from_anchor=False.*=True"
    with pytest.raises(ValueError, match=words) as caught:
        load_draft(folder)
    assert [str(caught.value)] == [
        str(finding.error()) for finding in layout_findings(config_with(DSPARK, sample_from_anchor=None))
    ]
    assert load_draft(folder, sample_from_anchor=True).config == load_draft(DSPARK).config
    assert load_draft(folder, sample_from_anchor=False).config.num_drafted == 6
    assert not list(layout_findings(config_with(DSPARK)))


def test_a_dspark_draft_has_a_confidence_head_unless_its_file_says_otherwise(tmp_path):
    folder = changed(DSPARK, tmp_path / "draft", enable_confidence_head=None, confidence_head_with_markov=None)
    assert load_draft(folder).config == load_draft(DSPARK).config
    with pytest.raises(ValueError, match="confidence_head"):
        load_draft(changed(DSPARK, tmp_path / "none", enable_confidence_head=False))


@pytest.mark.parametrize("kind", ["eagle3", "peagle", "xpress", "mtp", ["dflash"], 3])
def test_other_kinds_of_drafts_in_this_layout_are_refused_by_name(kind):
    words = rf"of the kind {kind!r} \(speculators_model_type\)".replace("[", r"\[")
    with pytest.raises(ValueError, match=words) as caught:
        read(speculators_model_type=kind)
    assert "it must be one of dflash, dspark, dflash2" in str(caught.value)
    assert [str(caught.value)] == [
        str(finding.error()) for finding in layout_findings(config_with(speculators_model_type=kind))
    ]


PARTLY = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 7.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"speculators_model_type": None},
            "has transformer_layer_config of the.*speculators_model_type is None; it must be one",
        ),
        (
            {"transformer_layer_config": {"hidden_size": None}},
            "hidden_size .transformer_layer_config.hidden_size is None",
        ),
        ({"transformer_layer_config": {"head_dim": "32"}}, "head_dim is '32' .transformer_layer_config.head_dim"),
        ({"transformer_layer_config": {"rope_parameters": None}}, "no transformer_layer_config.rope_scaling"),
        ({"transformer_layer_config": {"rope_parameters": PARTLY}}, "rope_parameters.partial_rotary_factor is 0.5"),
        (
            {"transformer_layer_config": SLIDES | {"sliding_window": None}},
            "transformer_layer_config.sliding_window is None",
        ),
        (
            {"transformer_layer_config": SLIDES | {"use_sliding_window": False}},
            "transformer_layer_config.use_sliding_window is False",
        ),
        ({"aux_hidden_state_layer_ids": [0, 2]}, "target_layer_ids is .0, 2. .aux_hidden_state_layer_ids.*from 1 up"),
        ({"aux_hidden_state_layer_ids": [6, 2]}, "ascending"),
        ({"sliding_window_non_causal": 1}, "sliding_window_non_causal is 1"),
        ({"draft_vocab_size": 25}, "draft_vocab_size is 25; it must be at most vocab_size, 24"),
    ],
    ids=str,
)
def test_what_is_missing_or_wrong_is_named_where_it_stands(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_a_config_is_read_by_the_class_of_its_kind_alone():
    second = config_with(GOLDEN / "speculators-dflash2" / "draft")
    assert (variant_of(second), variant_of(config_with())) == ("dflash2", "dflash")
    with pytest.raises(ValueError, match=r"DFlash 2 draft .speculators_model_type is 'dflash2'.*DFlash2DraftModel"):
        DFlashConfig.from_dict(second)
    with pytest.raises(ValueError, match=r"DFlash draft .speculators_model_type is 'dflash'.*DFlashDraftModel"):
        DFlash2Config.from_dict(config_with())
    with pytest.raises(ValueError, match="draft_vocab_size is 17; it must be vocab_size, 24, because the selector"):
        DFlash2Config.from_dict(second | {"draft_vocab_size": 17})


# Its tensors ------------------------------------------------------------------------------------------------------

REDUCED = GOLDEN / "speculators-reduced" / "draft"


def stored_ids() -> tuple[torch.Tensor, torch.Tensor]:
    held = load_file(REDUCED / "model.safetensors")
    return held["d2t"], held["t2d"]


def test_tensors_of_the_target_that_training_stored_are_passed_over(tmp_path, caplog):
    extra = {"verifier_lm_head.weight": torch.zeros(17, 64), "verifier_norm.weight": torch.ones(64)}
    draft = load_draft(restored(REDUCED, tmp_path / "draft", **extra))
    assert digests(draft) == digests(load_draft(REDUCED))
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_any_type_of_integers_are_read(dtype, tmp_path):
    ids, _ = stored_ids()
    draft = load_draft(restored(REDUCED, tmp_path / "draft", d2t=ids.to(dtype)), dtype=torch.bfloat16)
    assert draft.target_ids.tolist() == (ids + torch.arange(17)).tolist()
    assert (draft.dtype, draft.lm_head.weight.dtype) == (torch.bfloat16, torch.bfloat16)


IDS, KNOWN = stored_ids()
FLIPPED = KNOWN ^ (torch.arange(24) == 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"d2t": IDS.flip(0)}, "d2t of .* leads to tokens from .*they must ascend, from 0 to 23"),
        ({"d2t": IDS + 9, "t2d": None}, "they must ascend, from 0 to 23"),
        ({"d2t": IDS - 9, "t2d": None}, "they must ascend, from 0 to 23"),
        ({"d2t": IDS[:-1]}, r"d2t: \(16,\) in the file, \(17,\) here"),
        ({"d2t": IDS.float()}, r"has ids that are no integers: d2t \(F32\)"),
        ({"d2t": None}, "lacks tensors, which would be random: d2t"),
        ({"lm_head.weight": None}, "lacks tensors, which would be random: lm_head.weight"),
        ({"t2d": FLIPPED}, "t2d of .* is True for .* tokens, which are not the 17"),
    ],
    ids=str,
)
def test_ids_that_cannot_be_those_of_a_reduced_vocabulary_are_refused(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_draft(restored(REDUCED, tmp_path / "draft", **tensors))


def test_older_files_that_know_all_tokens_hold_ids_that_say_so(tmp_path):
    """speculators before 0.6 stored them, and 0.5 to 0.8 the target's embedding and head."""
    whole = changed(REDUCED, tmp_path / "whole", draft_vocab_size=24)
    ids = {"d2t": torch.zeros(24, dtype=torch.long), "t2d": torch.ones(24, dtype=torch.bool)}
    parts = {"lm_head.weight": torch.randn(24, 64), "embed_tokens.weight": torch.randn(24, 64)}
    draft = load_draft(restored(whole, tmp_path / "older", **ids, **parts))
    assert (draft.config.has_own_embed_tokens, draft.config.has_own_lm_head) == (True, True)
    assert draft.target_ids is None
    assert torch.equal(draft.lm_head.weight, parts["lm_head.weight"])
    for wrong in ({"d2t": ids["d2t"] + 1}, {"t2d": KNOWN}):
        with pytest.raises(ValueError, match="draft_vocab_size"):
            load_draft(restored(whole, tmp_path / "wrong", **(ids | parts | wrong)))


# Parts of the draft's own -----------------------------------------------------------------------------------------


def reduced(target, known=(1, 2, 4, 5, 7, 9, 11), **fields):
    draft = tiny.draft(target, draft_vocab_size=len(known), **fields)
    draft.d2t.copy_(torch.tensor(known) - torch.arange(len(known)))
    return draft


def own_parts(target, seed: int = 4):
    draft = tiny.draft(target, has_own_embed_tokens=True, has_own_lm_head=True)
    torch.manual_seed(seed)
    for module in (draft.embed_tokens, draft.lm_head):
        module.weight.data = 3 * torch.randn_like(module.weight)
    return draft


MADE = {
    "a reduced vocabulary": reduced,
    "an embedding and a head": own_parts,
    "the anchor predicts": lambda target: tiny.draft(target, sample_from_anchor=True),
    "dflash2, the anchor predicts": lambda target: tiny.draft(target, sample_from_anchor=True, **tiny.SECOND),
    "a window from the anchor": lambda target: tiny.draft(
        target, layer_types=[SLIDING, FULL], sliding_window=3, window_from_anchor=True
    ),
}


GREEDY = tiny.batch(12, pads=(0, 11, 5)) | {"max_new_tokens": 14, "do_sample": False, "repetition_penalty": 1.3}
SAMPLED = tiny.batch(12, pads=(0, 11, 5)) | {"max_new_tokens": 7, "top_p": 0.8, "bad_words_ids": [[5], [1, 2]]}
ELSEWHERE = """
    import json, sys
    from transformers import AutoModel
    sys.path.insert(0, {root!r})
    from probe import digests
    load = lambda name: AutoModel.from_pretrained({folder!r} + "/" + name, trust_remote_code=True)
    print(json.dumps({{name: digests(load(name)) for name in {names!r}}}))
"""


@pytest.fixture(scope="module")
def texts():
    """A target, and its own texts: greedy and sampled."""
    target = tiny.target("qwen3")
    return target, target.generate(**GREEDY), sample(target, Plain(), 5, **SAMPLED)


@pytest.mark.parametrize("how", MADE)
def test_text_stays_the_targets_own(how, texts):
    """Greedy by the draft's own proposals and by better ones; sampled, with processors; the rows are padded."""
    target, greedy, sampled = texts
    draft = MADE[how](target)
    for proposer in (None, tiny.partly_right(greedy)):
        statistics = DecodeStatistics()
        ways = {"custom_generate": draft.speculate, "statistics": statistics, "proposer": proposer}
        assert torch.equal(target.generate(**GREEDY, **ways), greedy)
    assert max(statistics.committed) == draft.config.num_drafted + 1
    for sampling in ("greedy", "coupled"):
        assert torch.equal(sample(target, draft.speculate, 5, draft_sampling=sampling, **SAMPLED), sampled)


def test_what_was_saved_loads_equal_and_drafts_the_same_without_the_package(texts, tmp_path, fresh_process):
    target, expected = texts[0], {}
    for how, make in MADE.items():
        draft = make(target)
        draft.save_pretrained(tmp_path / how)
        again = load_draft(tmp_path / how)
        assert again.config == draft.config
        expected[how] = digests(draft)
        assert digests(again) == expected[how]
        blocks = []
        for one in (draft, again):
            blocks.append([])
            asked = {"max_new_tokens": 5, "do_sample": False, "custom_generate": one.speculate}
            target.generate(**tiny.batch(9, pads=(0, 3)), **asked, proposer=recorded(blocks[-1]))
        assert blocks[0] == blocks[1]
    found = fresh_process(ELSEWHERE.format(root=str(ROOT / "publishing"), folder=str(tmp_path), names=[*MADE]))
    assert json.loads(found.splitlines()[-1]) == expected


def test_a_reduced_vocabulary_proposes_its_own_tokens_alone():
    target, drafted = tiny.target("qwen3"), []
    known = (0, 3, 4, 10)
    draft = reduced(target, known)
    asked = tiny.batch(9, pads=(0, 3)) | {"max_new_tokens": 10}
    for sampling in ("greedy", "coupled"):
        ways = {"custom_generate": draft.speculate, "draft_sampling": sampling, "do_sample": sampling == "coupled"}
        target.generate(**asked, **ways, proposer=recorded(drafted))
    tokens = {token for block in drafted for row in block for token in row}
    assert len(tokens) > 1
    assert tokens <= {*known}


@torch.no_grad()
def test_blocks_are_embedded_without_the_scale_of_the_targets_embedding():
    """Gemma multiplies its embeddings; speculators trains on their bare rows, stored or not."""
    assert load_draft(REDUCED).config.unscaled_embeddings
    target, blocks = tiny.target("gemma3_text"), []
    own = tiny.draft(target, has_own_embed_tokens=True)
    own.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
    for draft in (own, tiny.draft(target, unscaled_embeddings=True), tiny.draft(target)):
        draft.load_state_dict(own.state_dict(), strict=False)
        blocks.append([])
        asked = {"max_new_tokens": 6, "do_sample": False, "custom_generate": draft.speculate}
        target.generate(**tiny.batch(9, pads=(0, 3)), **asked, proposer=recorded(blocks[-1]))
    assert blocks[0] == blocks[1] != blocks[2]


@pytest.mark.parametrize("rows", [10, 16])
@pytest.mark.parametrize("how", ["a reduced vocabulary", "an embedding and a head"])
def test_a_target_with_tokens_added_or_padding_taken_away_keeps_its_text(how, rows):
    """Draft and target know 12 tokens; then the target has others at the end than the draft's own parts."""
    target = tiny.target("qwen3")
    draft = MADE[how](target)
    target.resize_token_embeddings(rows, mean_resizing=False)
    inputs = tiny.batch(12, pads=(0, 11, 5))
    inputs["input_ids"].clamp_(max=9)
    settings = inputs | {"max_new_tokens": 7, "temperature": 2.0}
    plain = sample(target, Plain(), 5, **settings)
    for sampling in ("greedy", "coupled"):
        assert torch.equal(sample(target, draft.speculate, 5, draft_sampling=sampling, **settings), plain)


@torch.no_grad()
def test_a_drafts_own_embedding_and_head_make_its_proposals():
    target, drafted = tiny.target("qwen3"), []
    draft, ids = own_parts(target), tiny.prompt(9)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False}
    text = target.generate(ids, **asked, custom_generate=draft.speculate, proposer=recorded(drafted))
    output = target(ids, output_hidden_states=True)
    features = torch.cat([output.hidden_states[layer + 1] for layer in draft.config.target_layer_ids], dim=-1)
    block = torch.tensor([[int(text[0, 9]), *[draft.config.mask_token_id] * 4]])
    states = draft(draft.embed_tokens(block), features).last_hidden_state[:, 1:]
    assert draft.lm_head(states).argmax(-1).tolist() == drafted[0]
    states = draft(target.get_input_embeddings()(block), features).last_hidden_state[:, 1:]
    assert draft.lm_head(states).argmax(-1).tolist() != drafted[0]


def test_parts_that_equal_the_targets_give_their_memory_back_and_are_stored_all_the_same(tmp_path):
    target = tiny.target("qwen3")
    draft = own_parts(target)
    theirs = (target.get_input_embeddings(), target.get_output_embeddings())
    draft.embed_tokens.weight.data = theirs[0].weight.data.clone()
    before = digests(draft)
    target.generate(tiny.prompt(5), max_new_tokens=8, do_sample=False, custom_generate=draft.speculate)
    assert draft.embed_tokens.weight.data_ptr() == theirs[0].weight.data_ptr()
    assert draft.lm_head.weight.data_ptr() != theirs[1].weight.data_ptr()  # it differs
    draft.save_pretrained(tmp_path)
    assert digests(load_draft(tmp_path)) == before
    with torch.no_grad():
        load_draft(tmp_path).embed_tokens.weight.add_(1)
    assert torch.equal(draft.embed_tokens.weight, theirs[0].weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"vocab_size": None, "has_own_lm_head": True},
            "vocab_size is None; it must be the target's, because has_own_lm_head",
        ),
        (
            {"vocab_size": None, "draft_vocab_size": 9},
            "vocab_size is None; it must be the target's, because has_own_lm_head",
        ),
        ({"draft_vocab_size": 13}, "draft_vocab_size is 13; it must be at most vocab_size, 12"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0; it must be an int from 1"),
        ({"sample_from_anchor": 1}, "sample_from_anchor is 1; it must be True or False"),
        ({"window_from_anchor": None}, "window_from_anchor is None; it must be True or False"),
    ],
    ids=str,
)
def test_contradicting_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.draft(tiny.target("qwen3"), **fields)


def test_the_engines_layout_refuses_what_engines_cannot_do_and_stores_the_rest(tmp_path):
    target = tiny.target("qwen3")
    refused = {"a window from the anchor": "window_from_anchor", "the anchor predicts": "sample_from_anchor"}
    for how, field in refused.items():
        with pytest.raises(ValueError, match=rf'{field} is True.*layout="hub"'):
            MADE[how](target).save_pretrained(tmp_path, layout="engines")
    remarks = {
        "a reduced vocabulary": "draft_vocab_size is 7, of 12",
        "an embedding and a head": "an embedding or a head of its own",
    }
    for how, remark in remarks.items():
        draft = MADE[how](target)
        with pytest.warns(UserWarning, match=remark):
            draft.save_pretrained(tmp_path, layout="engines")
        again = DFlashDraftModel.from_pretrained(tmp_path)
        assert again.config == draft.config
        assert digests(again) == digests(draft)


# Its repositories -------------------------------------------------------------------------------------------------


def test_a_draft_of_this_layout_is_saved_as_a_whole_repository_of_ours(tmp_path, fresh_process):
    draft = load_draft(REDUCED)
    assert draft.card_known == {"base_model": "example/tiny-target"}
    draft.save_pretrained(tmp_path)
    assert "base_model: example/tiny-target" in (tmp_path / "README.md").read_text()
    _, found = load_elsewhere(fresh_process, str(tmp_path))
    assert found == digests(draft)
    again = load_draft(tmp_path)
    assert again.config == draft.config


def test_it_loads_from_the_hub_by_the_calls_that_the_manual_names(hub, repo_id, tmp_path):
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=REDUCED)
    digest = digests(load_draft(REDUCED))
    assert digests(load_draft(repo_id)) == digest
    assert digests(DFlashDraftModel.from_pretrained(repo_id)) == digest
    with pytest.raises(ValueError, match="model_type"):
        AutoConfig.from_pretrained(repo_id)

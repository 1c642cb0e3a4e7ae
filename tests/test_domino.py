"""Domino: what differs from DFlash 1, and that all else holds for it too."""

import json
import warnings

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tiny
from dflash_hub import (
    DecodeStatistics,
    DFlash2DraftModel,
    DFlashConfig,
    DFlashDraftModel,
    DFlashDraftSpec,
    DominoConfig,
    DominoDraftModel,
    load_draft,
)
from dflash_hub.drafter_dflash import Walk
from dflash_hub.modeling_domino import PrefixGRU
from dflash_hub.publishing.probe import digests
from paths import DATA
from test_sampling import Plain, sample

pytestmark = pytest.mark.usefixtures("unchecked")

GOLDEN = {"shifted, prefix 1": DATA / "golden" / "domino-a", "not shifted, prefix 0": DATA / "golden" / "domino-b"}
FILES = {"configuration_domino.py", "modeling_domino.py", "domino.py"}
# The second convention: the anchor's position predicts nothing, and every token is corrected.
PLAIN = tiny.DOMINO | {"sample_from_anchor": False, "pure_draft_prefix_len": 0}


@pytest.fixture(scope="module")
def pair():
    target = tiny.target("qwen3")
    return target, tiny.draft(target, **tiny.DOMINO)


# The original implementation --------------------------------------------------------------------------------------


def golden(home):
    """Its data and draft, and its target, whose text goes on after its end token."""
    target = AutoModelForCausalLM.from_pretrained(home / "target")
    target.generation_config.eos_token_id = None
    return load_file(home / "golden.safetensors"), load_draft(home / "draft"), target


@pytest.mark.quick
@pytest.mark.parametrize("home", GOLDEN.values(), ids=GOLDEN)
@torch.no_grad()
def test_logits_and_tokens_are_those_of_the_original_code(home):
    data, draft, target = golden(home)
    embed, count = target.get_input_embeddings(), draft.config.num_drafted
    states, base = data["hidden"], draft.logits(data["hidden"], target.lm_head)
    torch.testing.assert_close(base, data["base_logits"], atol=2e-5, rtol=0)
    scored = base[:, -count:], states[:, -count:]
    taught = draft.corrected_logits(*scored, data["teacher_ids"][:, :count], embed)
    torch.testing.assert_close(taught, data["teacher_logits"][:, -count:], atol=2e-5, rtol=0)
    anchor = data["block_input_ids"][:, :1]
    path = draft.select_tokens(*scored, Walk(anchor, embed)).tokens
    assert torch.equal(path, data["walk_ids"])
    assert not torch.equal(path, scored[0].argmax(-1))  # some tokens are others than those of the logits alone
    walked = draft.corrected_logits(*scored, torch.cat([anchor, path[:, :-1]], dim=1), embed)
    torch.testing.assert_close(walked, data["walk_logits"], atol=2e-5, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize("home", GOLDEN.values(), ids=GOLDEN)
def test_text_and_drafts_of_every_cycle_are_those_of_the_original_code(home):
    data, draft, target = golden(home)
    prompt, committed = data["prompt_ids"], data["committed_per_cycle"].tolist()
    drafted, statistics = [], DecodeStatistics()
    keep = tiny.steered(lambda proposal, state: drafted.append(proposal.tokens[:, 1:]) or proposal)
    ways = {"custom_generate": draft.speculate, "statistics": statistics, "proposer": keep}
    # The first token is the prefill's, and the original's last cycle ran beyond its text.
    asked = {"max_new_tokens": 1 + sum(committed), "do_sample": False}
    text = target.generate(prompt, attention_mask=torch.ones_like(prompt), **asked, **ways)
    expected = data["generated_ids"]
    assert torch.equal(text[:, : expected.shape[1]], expected)
    assert torch.equal(expected, data["greedy_ids"])
    assert statistics.committed == committed
    assert torch.equal(torch.cat(drafted), data["cycle_draft_ids"])


# The model ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_prefix_is_torchs_gru_with_its_names(pair):
    ours = PrefixGRU(pair[1].config)
    theirs = torch.nn.GRU(32, 10, bias=False, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    embeds = 3 * torch.randn(4, 9, 32)
    state, found = ours.initial_state((4,)), []
    for step in embeds.unbind(1):
        state = ours.step(step, state)
        found.append(state)
    torch.testing.assert_close(torch.stack(found, dim=1), theirs(embeds)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pair_scale", [1.0, 0.5])
@pytest.mark.parametrize("prefix", [0, 1, 3, 9])
@torch.no_grad()
def test_a_token_is_the_best_by_its_score_and_the_scaled_correction_of_those_before(pair, prefix, pair_scale):
    """Against the definition, with torch's GRU over the whole text again for each token."""
    target, _ = pair
    draft = tiny.draft(target, **tiny.DOMINO | {"pure_draft_prefix_len": prefix})
    gru = torch.nn.GRU(32, 10, bias=False, batch_first=True)
    gru.load_state_dict(draft.prefix_gru.state_dict())
    (first, second), embed = (draft.embed_proj[index].weight for index in (0, 2)), target.get_input_embeddings()
    scores, states, text = 0.5 * torch.randn(3, 5, tiny.VOCAB), torch.randn(3, 5, 32), torch.tensor([[1], [5], [0]])
    anchor = text
    for position in range(5):
        read = gru(embed(text))[0][:, -1]
        added = torch.nn.functional.silu(torch.cat([states[:, position], read], dim=-1) @ first.T) @ second.T
        total = scores[:, position] + (pair_scale * added if position >= prefix else 0)
        text = torch.cat([text, total.argmax(-1, keepdim=True)], dim=1)
    path = draft.select_tokens(scores, states, Walk(anchor, embed, pair_scale)).tokens
    assert torch.equal(path, text[:, 1:])
    assert torch.equal(path, scores.argmax(-1)) == (prefix == 9)


def test_correction_and_state_have_the_dtypes_of_the_original(pair):
    """The correction in that of the logits; the target's embeddings in that of the draft."""
    target = pair[0]
    draft = tiny.draft(target, **tiny.DOMINO).to(torch.bfloat16)
    logits, states = torch.randn(1, 5, tiny.VOCAB), torch.randn(1, 5, 32, dtype=torch.bfloat16)
    embed, before = target.get_input_embeddings(), torch.tensor([[1, 2, 3, 4, 5]])
    for dtype in (torch.float32, torch.bfloat16):
        found = draft.corrected_logits(logits.to(dtype), states, before, embed)
        assert found.dtype == dtype
        assert draft.select_tokens(logits.to(dtype), states, Walk(before[:, :1], embed)).tokens.shape == (1, 5)


def test_a_walk_without_embeddings_is_refused(pair):
    with pytest.raises(ValueError, match="pass Walk"):
        pair[1].select_tokens(torch.randn(1, 5, tiny.VOCAB), torch.randn(1, 5, 32), Walk(torch.tensor([[1]])))


@pytest.mark.parametrize("fields", [tiny.DOMINO, PLAIN], ids=["shifted", "not shifted"])
def test_a_head_that_is_padded_beyond_the_vocabulary_is_no_trouble(fields):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **fields)
    target.resize_token_embeddings(tiny.VOCAB + 4)
    target.config.vocab_size = tiny.VOCAB  # as of targets whose rows are padded
    inputs, asked = tiny.batch(9, pads=(0, 3)), {"max_new_tokens": 16, "do_sample": False}
    plain = target.generate(**inputs, **asked)
    assert torch.equal(target.generate(**inputs, **asked, custom_generate=draft.speculate), plain)


# Decoding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "block"),
    [
        ("qwen3", tiny.DOMINO, 7),
        ("qwen3", PLAIN, 2),
        ("gemma3_text", tiny.DOMINO, 5),  # sliding layers, and embeddings that are scaled
        ("qwen3_next", PLAIN, 6),  # recurrent layers
    ],
)
def test_text_is_the_targets_own_alone_and_in_padded_batches(family, fields, block):
    target = tiny.target(family)
    draft = tiny.draft(target, block_size=block, **fields)
    inputs, asked = tiny.batch(9, pads=(0, 3, 5)), {"max_new_tokens": 20, "do_sample": False}
    plain, statistics = target.generate(**inputs, **asked), DecodeStatistics()
    ways = {"custom_generate": draft.speculate, "statistics": statistics}
    one = {name: value[:1] for name, value in inputs.items()}
    assert torch.equal(target.generate(**one, **asked, **ways), plain[:1])
    ways["proposer"] = tiny.partly_right(pad(plain, (0, 20)))
    assert torch.equal(target.generate(**inputs, **asked, **ways), plain)
    assert {1, 1 + draft.config.num_drafted} <= set(statistics.committed)
    assert tiny.as_found(target)


@pytest.mark.parametrize("fields", [tiny.DOMINO, PLAIN], ids=["shifted", "not shifted"])
@torch.no_grad()
def test_what_is_proposed_is_what_the_plain_forward_chooses_by_the_scaled_embeddings_of_its_target(fields):
    target = tiny.target("gemma3_text")
    draft, proposals = tiny.draft(target, **fields), []
    keep = tiny.steered(lambda proposal, state: proposals.append(proposal) or proposal)
    ids = tiny.prompt(11)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    text = target.generate(ids, **asked, custom_generate=draft.speculate, proposer=keep)
    hidden = target(text, output_hidden_states=True).hidden_states
    features = torch.cat([hidden[1], hidden[3]], dim=-1)
    anchor, embed = text[:, 11:12], target.get_input_embeddings()
    noise_ids = torch.cat([anchor, torch.full((1, draft.block_size - 1), 3)], dim=1)
    states = draft(embed(noise_ids), features[:, :11]).last_hidden_state[:, -draft.config.num_drafted :]
    expected = draft.select_tokens(target.lm_head(states), states, Walk(anchor, embed)).tokens
    assert proposals[0].tokens[0].tolist() == [int(anchor), *expected[0].tolist()]


@pytest.mark.parametrize("setting", [{"temperature": 0.7, "top_k": 0}, {"repetition_penalty": 1.4, "top_k": 5}])
def test_sampled_text_is_that_of_plain_sampling_with_the_same_noise(pair, setting):
    target, draft = pair
    inputs, texts = tiny.batch(9, pads=(0, 3, 1)) | {"max_new_tokens": 20}, []
    for how, sampling in ((Plain(), None), (draft.speculate, "greedy"), (draft.speculate, "coupled")):
        ways = {"draft_sampling": sampling} if sampling else {}
        texts.append(sample(target, how, 3, **inputs, **setting, **ways))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert len(set(texts[0][0, 9:].tolist())) > 4


def test_transformers_own_loop_runs_it_without_the_correction_where_it_reads_the_right_positions(pair):
    target, _ = pair
    ids = tiny.prompt(9)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    own = {"assistant_model": tiny.draft(target, **PLAIN), "speculation_type": "dflash"}
    assert torch.equal(target.generate(ids, **asked, **own), target.generate(ids, **asked))
    with pytest.raises(ValueError, match=r"with sample_from_anchor.*custom_generate=draft\.speculate"):
        target.generate(ids, **asked, **own | {"assistant_model": pair[1]})


# Loading and saving -------------------------------------------------------------------------------------------------


def published(who: str, **changes) -> dict:
    """A config.json as one of its writers has it, with changes of its dflash_config; None removes a key."""
    home = GOLDEN["not shifted, prefix 0" if who == "SpecForge" else "shifted, prefix 1"]
    config = json.loads((home / "draft" / "config.json").read_text())
    if who == "older":
        config["dflash_config"]["projector_type"] = "causal_v5"
    if who == "Model Optimizer":
        del config["auto_map"]
        config["dflash_config"]["causal"] = False
    nested = config["dflash_config"] | changes
    return config | {"dflash_config": {key: value for key, value in nested.items() if value is not None}}


@pytest.mark.quick
@pytest.mark.parametrize("who", ["author", "older", "SpecForge", "Model Optimizer"])
def test_the_layouts_of_its_writers_are_read(who, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published(who)))
    config = DominoConfig.from_pretrained(tmp_path)
    head = (config.emb_dim, config.gru_hidden_dim, config.pure_draft_prefix_len, config.sample_from_anchor)
    assert head == ((16, 24, 0, False) if who == "SpecForge" else (20, 40, 1, True))
    assert config.num_drafted == (5 if who == "SpecForge" else 8)
    if who == "SpecForge":  # its class says what it is
        assert DominoConfig.from_dict(published(who, projector_type=None)) == config


@pytest.mark.parametrize("who", ["author", "SpecForge"])
def test_a_qwen3_config_that_was_loaded_is_read_as_its_file_and_of_a_new_one_nothing_is_guessed(who, tmp_path):
    sliding = {"layer_types": ["sliding_attention"] * (2 if who == "author" else 3), "sliding_window": 8}
    content = published(who) | sliding | {"use_sliding_window": True}
    (tmp_path / "config.json").write_text(json.dumps(content))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.model_type == "qwen3"
    assert DominoDraftModel(read).config == DominoConfig.from_pretrained(tmp_path)
    assert DominoDraftModel(read).config.is_causal is True
    for name in ("gru_hidden_dim", "pure_draft_prefix_len"):
        lacking = published(who, **{name: None})
        new = AutoConfig.for_model(**lacking | {"architectures": None})
        with pytest.raises(ValueError, match=f"does not say {name}"):
            DominoDraftModel(new)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias_gate": True}, "a gate on Domino's correction"),
        ({"use_bias_norm": True}, "a norm of Domino's correction"),
        ({"shift_label": None}, r"does not say sample_from_anchor.*supply it: .*sample_from_anchor=\.\.\.\)"),
        ({"pure_draft_prefix_len": None}, r"supply it: from_pretrained\(\.\.\., pure_draft_prefix_len=\.\.\.\)"),
        ({"gru_hidden_dim": None}, "does not say gru_hidden_dim"),
        ({"emb_dim": 8}, "contradicts itself about emb_dim: emb_dim is 20 but dflash_config.emb_dim is 8"),
        ({"pure_draft_prefix_len": -1}, "pure_draft_prefix_len is -1"),
        ({"projector_type": "lilicorr"}, "a head of its own"),
        ({"conv_kernel_size": 2}, "describes a DFlash 2 draft"),
    ],
)
def test_what_it_cannot_run_or_does_not_know_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        DominoConfig.from_dict(published("author", **changes))


def test_a_convention_that_the_file_lacks_is_the_callers_and_a_vocabulary_is_needed():
    for shifted in (True, False):
        config = DominoConfig.from_dict(published("author", shift_label=None), sample_from_anchor=shifted)
        assert config.sample_from_anchor is shifted
    for field, value in (("vocab_size", None), ("draft_vocab_size", 9)):
        with pytest.raises(ValueError, match=f"^{field} is {value}; it must be "):
            tiny.draft(tiny.target("qwen3"), **tiny.DOMINO | {field: value})


def test_one_kind_read_as_the_other_is_refused_saying_what_reads_it(tmp_path, pair):
    for reader in (DFlashConfig, DFlash2DraftModel.config_class):
        with pytest.raises(ValueError, match=r"describes a Domino draft.*DominoDraftModel\.from_pretrained"):
            reader.from_dict(published("author"))
    for layout in ("hub", "engines"):
        tiny.draft(pair[0]).save_pretrained(tmp_path / layout, layout=layout)
        with pytest.raises(ValueError, match=r"describes a DFlash draft.*DFlashDraftModel\.from_pretrained"):
            DominoDraftModel.from_pretrained(tmp_path / layout)


@pytest.mark.parametrize("home", GOLDEN.values(), ids=GOLDEN)
@pytest.mark.filterwarnings("ignore:Of the serving engines")
@pytest.mark.filterwarnings("ignore:.*SGLang")
def test_both_layouts_bring_back_the_draft_and_the_second_is_the_published_one(home, tmp_path):
    draft, config = load_draft(home / "draft"), DominoConfig.from_pretrained(home / "draft")
    for layout in ("hub", "engines"):
        draft.save_pretrained(tmp_path / layout, layout=layout)
        found = load_draft(tmp_path / layout)
        assert type(found) is DominoDraftModel
        assert found.config == config
        assert digests(found) == digests(draft)
        assert set(load_file(tmp_path / layout / "model.safetensors")) == set(
            load_file(home / "draft" / "model.safetensors")
        )
    written = json.loads((tmp_path / "engines" / "config.json").read_text())
    original = json.loads((home / "draft" / "config.json").read_text())
    assert original["dflash_config"].items() <= written["dflash_config"].items()
    assert written["emb_dim"] == original["emb_dim"]
    assert (written["architectures"], written["model_type"]) == (["DFlashDraftModel"], "qwen3")
    assert written["auto_map"] == {"AutoModel": "domino.DominoDraftModel"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (tiny.DOMINO, ["vLLM and llama.cpp cannot load them", "drafts 4 tokens per cycle, and not 5"]),
        (tiny.DOMINO | {"sample_from_anchor": False}, ["vLLM and llama.cpp cannot load them"]),
        (PLAIN, ["vLLM and llama.cpp cannot load them", "pure_draft_prefix_len is 0, but SGLang"]),
    ],
)
def test_what_engines_do_otherwise_is_named_at_saving_and_on_the_card(fields, expected, pair, tmp_path):
    draft = tiny.draft(pair[0], **fields)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draft.save_pretrained(tmp_path, layout="engines")
    named = [str(warning.message) for warning in caught if "SGLang" in str(warning.message)]
    card = ModelCard.load(tmp_path / "README.md").text
    assert len(named) == len(expected)
    for words, remark in zip(expected, named, strict=True):
        assert words in remark
        assert remark in card
    drafted = draft.config.num_drafted
    assert f"proposes a block of {drafted} tokens" in card
    assert "Domino" in card
    assert "vllm serve" not in card
    assert "\n\n\n" not in card


def test_a_published_draft_is_used_without_the_package_from_both_branches(hub, repo_id, pair, tmp_path, fresh_process):
    from test_dflash2 import check_strangers

    target, draft = pair
    target.save_pretrained(tmp_path / "target")
    with pytest.warns(UserWarning, match="SGLang"):
        draft.push_to_hub(repo_id)
    for revision in ("main", "engines"):
        files = set(HfApi().list_repo_files(repo_id, revision=revision))
        assert {*FILES, "dflash.py", "modeling_dflash.py", "custom_generate/generate.py"} <= files
        assert "dflash2.py" not in files
        assert digests(load_draft(repo_id, revision=revision)) == digests(draft)
    check_strangers(fresh_process, repo_id, tmp_path / "target", draft)
    assert type(AutoModel.from_pretrained(repo_id)) is DominoDraftModel  # no code of the repository runs
    assert type(AutoConfig.from_pretrained(repo_id)) is DominoConfig


# Building and training ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_fresh_draft_decodes(pair):
    target, _ = pair
    shape = {"mask_token_id": 3, "target_layer_ids": [0, 2], "num_hidden_layers": 2, "block_size": 6}
    draft = DFlashDraftSpec("fresh").build(target.config, "domino", **shape).eval()
    assert (draft.config.emb_dim, draft.config.gru_hidden_dim) == (256, 1024)
    assert (draft.config.num_drafted, draft.config.pure_draft_prefix_len) == (6, 1)
    for name, weight in draft.named_parameters():
        assert weight.std() > 0 or weight.ndim == 1, name
    ids = tiny.prompt(9)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = target.generate(ids, **asked)
    assert torch.equal(target.generate(ids, **asked, custom_generate=draft.speculate), plain)


def test_a_dflash_1_repository_carries_nothing_of_domino(tmp_path, pair):
    draft = tiny.draft(pair[0])
    assert type(draft) is DFlashDraftModel
    draft.save_pretrained(tmp_path)
    assert not FILES & {path.name for path in tmp_path.iterdir()}

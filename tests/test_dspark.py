"""DSpark: its heads and its walk by the original code, and that all else holds for it too."""

import copy
import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tiny
from dflash_hub import (
    DecodeStatistics,
    DFlashConfig,
    DFlashDraftModel,
    DFlashDraftSpec,
    DSparkConfig,
    DSparkDraftModel,
    load_draft,
)
from dflash_hub.drafter_dflash import Drafter, Walk
from dflash_hub.layouts_dflash import engines_remarks
from dflash_hub.publishing.probe import digests
from paths import DATA
from test_sampling import Plain, sample

pytestmark = pytest.mark.usefixtures("unchecked")

GOLDEN = DATA / "golden"
CASES = ("dspark-a", "dspark-b", "dspark-rank0")
OWN_FILES = {"configuration_dspark.py", "modeling_dspark.py", "dspark.py"}
VARIANTS = {
    "vanilla": tiny.DSPARK,
    "gated": tiny.DSPARK | {"markov_head_type": "gated", "confidence_head_with_markov": False},
    "rnn": tiny.DSPARK | {"markov_head_type": "rnn"},
    "rank 0": {"markov_rank": 0},
    "bonus anchor": tiny.DSPARK | {"sample_from_anchor": False},
    "reduced": tiny.DSPARK | tiny.REDUCED,
}


def draft_for(target, fields, **more):
    draft = tiny.draft(target, **fields | more)
    return tiny.reduce(draft) if draft.config.draft_vocab_size else draft


def golden(name: str):
    data = load_file(GOLDEN / name / "golden.safetensors")
    target = AutoModelForCausalLM.from_pretrained(GOLDEN / name / "target")
    target.generation_config.eos_token_id = None
    return data, load_draft(GOLDEN / name / "draft"), target


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


# The original implementation --------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_walk_and_confidence_are_those_of_the_original_code(name):
    data, draft, target = golden(name)
    assert type(draft) is DSparkDraftModel
    assert draft.config.num_drafted == draft.config.block_size
    states, anchor = data["hidden"], data["block_input_ids"][:, :1]
    base = draft.draft_logits(states, draft.lm_head or target.lm_head)
    close(base, data["base_logits"])
    close(draft.corrected_logits(base, states, data["teacher_ids"]), data["teacher_logits"])
    choice = draft.select_tokens(base, states, Walk(anchor))
    assert torch.equal(choice.tokens, data["walk_ids"])
    before = torch.cat([anchor, choice.tokens[:, :-1]], dim=1)
    close(draft.corrected_logits(base, states, before), data["walk_logits"])
    if "confidence" not in data:
        assert choice.confidence is None
        return
    close(choice.confidence, data["confidence_probs"])
    close(draft.confidence_logits(states, before), data["confidence"])
    close(draft.confidence_logits(states, data["teacher_ids"]), data["teacher_confidence"])


@pytest.mark.quick
@pytest.mark.parametrize("name", CASES)
def test_every_cycle_of_a_decode_is_that_of_the_original_code(name):
    data, draft, target = golden(name)
    prompt, expected = data["prompt_ids"], data["generated_ids"]
    seen, statistics = [], DecodeStatistics()
    asked = {"max_new_tokens": expected.shape[1] - prompt.shape[1], "do_sample": False}
    ways = {"custom_generate": draft.speculate, "statistics": statistics}
    ways["proposer"] = tiny.steered(lambda proposal, state: seen.append(proposal) or proposal)
    text = target.generate(prompt, attention_mask=torch.ones_like(prompt), **asked, **ways)
    assert torch.equal(text, expected)
    assert torch.equal(text, data["greedy_ids"])
    committed = data["committed_per_cycle"].tolist()
    assert statistics.committed[:-1] == committed[:-1]
    assert statistics.committed[-1] <= committed[-1]  # the original's last cycle may go on beyond the limit
    for proposal, drafted in zip(seen, data["cycle_draft_ids"], strict=True):
        assert torch.equal(proposal.tokens[0, 1:], drafted)
    for proposal, logits in zip(seen, data.get("cycle_confidence", ()), strict="cycle_confidence" in data):
        close(proposal.confidence[0], logits.sigmoid())


# The heads ----------------------------------------------------------------------------------------------------------


def by_definition(draft, state, token, memory):
    """The bias of one position, and the memory after it, by the published formulas."""
    head = draft.markov_head
    known, kind = head.markov_w1.weight[token], draft.config.markov_head_type
    if kind == "gated":
        gate = torch.sigmoid(head.gate_proj(torch.cat([state, known])))
        known = gate * known
    if kind == "rnn":
        gate, candidate, output = head.joint_proj(torch.cat([memory, known, state])).chunk(3)
        memory = gate.sigmoid() * memory + (1 - gate.sigmoid()) * candidate.tanh()
        known = output.tanh()
    return head.markov_w2.weight @ known, memory


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "rank 0"])
@torch.no_grad()
def test_the_walk_goes_token_by_token_and_its_logits_are_those_that_training_sees(variant, scale):
    draft = draft_for(tiny.target("qwen3"), VARIANTS[variant])
    torch.manual_seed(0)
    count = draft.config.num_drafted
    states, anchor = torch.randn(3, count, 32), torch.tensor([[1], [5], [0]])
    own = torch.randn(3, count, draft.config.draft_vocab_size or tiny.VOCAB)
    ids = torch.arange(tiny.VOCAB) if draft.target_ids is None else draft.target_ids
    choice = draft.select_tokens(draft.over_target_vocabulary(own), states, Walk(anchor, pair_scale=scale))
    before = torch.cat([anchor, choice.tokens[:, :-1]], dim=1)
    corrected = draft.corrected_logits(own / scale, states, before) * scale
    for row in range(3):
        memory = torch.zeros(draft.config.markov_rank)
        for place in range(count):
            bias, memory = by_definition(draft, states[row, place], before[row, place], memory)
            close(corrected[row, place], own[row, place] + scale * bias)
            assert choice.tokens[row, place] == ids[corrected[row, place].argmax()]
    assert not torch.equal(choice.tokens, draft.over_target_vocabulary(own).argmax(-1))
    assert choice.confidence.shape == (3, count)
    assert 0 < choice.confidence.min() < choice.confidence.max() < 1


def test_a_fresh_draft_has_no_bias_and_drafts_as_its_body_does():
    target = tiny.target("qwen3")
    draft = DFlashDraftSpec("fresh").build(
        target.config, "dspark", mask_token_id=3, target_layer_ids=[0, 2], num_hidden_layers=2, block_size=6
    )
    assert type(draft) is DSparkDraftModel
    assert draft.config.sample_from_anchor
    scores, states, anchor = torch.randn(2, 6, tiny.VOCAB), torch.randn(2, 6, 32), torch.tensor([[1], [2]])
    assert torch.equal(draft.select_tokens(scores, states, Walk(anchor)).tokens, scores.argmax(-1))
    assert draft.markov_head.markov_w1.weight.std() > 0
    assert not draft.markov_head.markov_w2.weight.any()


@pytest.mark.parametrize(("rank", "width"), [(8, 40), (0, 32)])
def test_the_confidence_head_reads_the_token_before_where_there_is_a_bias(rank, width):
    draft = tiny.draft(tiny.target("qwen3"), markov_rank=rank, enable_confidence_head=True)
    assert draft.config.confidence_head_with_markov == bool(rank)
    assert (draft.markov_head is None) == (not rank)
    assert draft.confidence_head.proj.in_features == width
    states, before = torch.randn(2, 5, 32), torch.randint(0, tiny.VOCAB, (2, 5))
    other = (before + 1) % tiny.VOCAB
    same = torch.equal(draft.confidence_logits(states, before), draft.confidence_logits(states, other))
    assert same == (not rank)


@pytest.mark.parametrize("rows", [tiny.VOCAB + 4, tiny.VOCAB - 2])
def test_a_head_that_is_padded_beyond_the_vocabulary_or_lacks_the_padding_is_no_trouble(rows):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **tiny.DSPARK)
    target.resize_token_embeddings(rows)
    target.config.vocab_size = min(rows, tiny.VOCAB)
    if rows > tiny.VOCAB:
        with torch.no_grad():
            target.lm_head.weight[-1] = 3 * target.lm_head.weight[4]  # the last row is written now and then
    inputs = tiny.batch(9, pads=(0, 3))
    inputs["input_ids"] = inputs["input_ids"] % 10
    asked = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(**inputs, **asked)
    assert plain.max() == rows - 1 or rows < tiny.VOCAB
    assert torch.equal(target.generate(**inputs, **asked, custom_generate=draft.speculate), plain)


def test_an_embedding_and_a_head_that_equal_the_targets_use_its_memory():
    _, draft, target = golden("dspark-a")
    assert draft.lm_head.weight.data_ptr() != target.lm_head.weight.data_ptr()
    drafter = Drafter(draft.eval(), target)
    assert drafter.head is draft.lm_head
    for own, theirs in ((draft.embed_tokens, target.model.embed_tokens), (draft.lm_head, target.lm_head)):
        assert own.weight.data_ptr() == theirs.weight.data_ptr()
    other = copy.deepcopy(draft)
    with torch.no_grad():
        other.lm_head.weight[3, 5] += 1e-3
    Drafter(other, target)
    assert other.lm_head.weight.data_ptr() != target.lm_head.weight.data_ptr()


# Decoding -----------------------------------------------------------------------------------------------------------


ROWS = tiny.batch(9, pads=(0, 3, 5)) | {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture(scope="module")
def plain():
    """Family -> the target and its own text of the rows."""
    targets = {family: tiny.target(family) for family in ("qwen3", "gemma3_text", "qwen3_5_text")}
    return {family: (target, target.generate(**ROWS)) for family, target in targets.items()}


@pytest.mark.parametrize(
    ("family", "variant"),
    [*(("qwen3", variant) for variant in VARIANTS), ("gemma3_text", "reduced"), ("qwen3_5_text", "rnn")],
)
def test_text_is_the_targets_own_alone_and_in_padded_batches(family, variant, plain):
    target, text = plain[family]
    draft = draft_for(target, VARIANTS[variant])
    statistics = DecodeStatistics()
    ways = {"custom_generate": draft.speculate, "statistics": statistics}
    one = {name: ROWS[name][:1] for name in ("input_ids", "attention_mask")}
    assert torch.equal(target.generate(**ROWS | one, **ways), text[:1])
    ways["proposer"] = tiny.partly_right(torch.nn.functional.pad(text, (0, 20)))
    assert torch.equal(target.generate(**ROWS, **ways), text)
    assert {1, 1 + draft.config.num_drafted} <= set(statistics.committed)
    assert tiny.as_found(target)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_proposed_is_what_the_heads_choose(variant):
    """The engine's proposal equals the walk over the plain forward's states: taps, positions and slots are right."""
    target = tiny.target("qwen3")
    draft = draft_for(target, VARIANTS[variant])
    proposals, ids = [], tiny.prompt(11)
    keep = tiny.steered(lambda proposal, state: proposals.append(proposal) or proposal)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    text = target.generate(ids, **asked, custom_generate=draft.speculate, proposer=keep)
    hidden = target(text, output_hidden_states=True).hidden_states
    features = torch.cat([hidden[1], hidden[3]], dim=-1)
    anchor, head = text[:, 11:12], draft.lm_head or target.lm_head
    noise_ids = torch.cat([anchor, torch.full((1, draft.config.block_size - 1), 3)], dim=1)
    states = draft(target.get_input_embeddings()(noise_ids), features[:, :11]).last_hidden_state
    states = states[:, 0 if draft.config.sample_from_anchor else 1 :]
    expected = draft.select_tokens(draft.logits(states, head), states, Walk(anchor))
    assert proposals[0].tokens[0].tolist() == [int(anchor), *expected.tokens[0].tolist()]
    if draft.confidence_head is not None:
        close(proposals[0].confidence, expected.confidence)


def test_sampled_text_is_that_of_plain_sampling_with_the_same_noise():
    target = tiny.target("qwen3")
    asked = tiny.batch(9, pads=(0, 3)) | {"max_new_tokens": 20, "temperature": 0.7, "top_k": 5}
    plain = sample(target, Plain(), 3, **asked)
    for variant in ("rnn", "reduced"):
        draft = draft_for(target, VARIANTS[variant])
        for sampling in ("greedy", "coupled"):
            assert torch.equal(sample(target, draft.speculate, 3, draft_sampling=sampling, **asked), plain), variant
    assert len(set(plain[0, 9:].tolist())) > 4


def test_a_walk_coupled_to_the_noise_is_accepted_more_often():
    """A trained draft in small: its logits and its bias add up to the target's own logits."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper

    from dflash_hub.sampling_dflash import PositionNoise, Sampler

    draft = tiny.draft(tiny.target("qwen3"), **tiny.DSPARK)
    logits, states = torch.randn(1, 64, tiny.VOCAB), torch.zeros(1, 64, 32)
    anchor = torch.tensor([[1]])
    sampler = Sampler(LogitsProcessorList([TemperatureLogitsWarper(1.7)]), PositionNoise(5), coupled=True)
    choices, _ = sampler.sample(logits, [0])
    before = torch.cat([anchor, choices[:, :-1]], dim=1)
    with torch.no_grad():
        own = logits - draft.markov_head.biases(states, before)
        scores, pair_scale = sampler.draft_scores(own, [0])
        assert torch.equal(draft.select_tokens(scores, states, Walk(anchor, pair_scale=pair_scale)).tokens, choices)
        alone = draft.select_tokens(own, states, Walk(anchor)).tokens
    assert (alone == choices).float().mean() < 0.8


def test_a_cache_of_an_earlier_turn_is_continued():
    target = tiny.target("qwen3")
    draft, ids = tiny.draft(target, **tiny.DSPARK), tiny.prompt(9)
    asked = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    ways = {"custom_generate": draft.speculate}
    first = target.generate(ids, attention_mask=torch.ones_like(ids), **asked, **ways)
    more = torch.cat([first.sequences, tiny.prompt(5, seed=8)], dim=1)
    whole = target.generate(more, attention_mask=torch.ones_like(more), **asked)
    cache = {tiny.CACHE: first.past_key_values}
    again = target.generate(more, attention_mask=torch.ones_like(more), **asked, **cache, **ways)
    assert torch.equal(again.sequences, whole.sequences)


def test_transformers_own_loop_refuses_what_predicts_from_its_anchor_and_runs_the_rest():
    target, ids = tiny.target("qwen3"), tiny.prompt(9)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    native = {"speculation_type": "dflash"}
    for field, draft in {
        "sample_from_anchor": tiny.draft(target, **tiny.DSPARK),
        "has_own_lm_head": tiny.draft(target, **tiny.REDUCED),
    }.items():
        with pytest.raises(ValueError, match=rf"with {field}.*custom_generate=draft\.speculate"):
            target.generate(ids, **asked, **native, assistant_model=draft)
    other = draft_for(target, VARIANTS["bonus anchor"])
    text = target.generate(ids, **asked, **native, assistant_model=other)
    assert torch.equal(text, target.generate(ids, **asked))


# Files --------------------------------------------------------------------------------------------------------------


def stored(folder, rename, **changes):
    """The golden draft b in a folder, its tensors renamed and its config.json changed; a value of None takes it out."""
    source = GOLDEN / "dspark-b" / "draft"
    tensors = load_file(source / "model.safetensors")
    save_file(
        {rename(name): value for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    content = json.loads((source / "config.json").read_text())
    content["dflash_config"] |= changes.pop("dflash_config", {})
    content |= changes
    for level in (content, content["dflash_config"]):
        for name in [name for name, value in level.items() if value is None]:
            del level[name]
    (folder / "config.json").write_text(json.dumps(content))
    return folder


ON_TOP = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov", "auto_map")


def test_a_file_with_the_architecture_that_engines_know_loads_as_the_same_draft(tmp_path):
    """As SpecForge's normaliser writes it; tests/test_dialects.py has other projects' files."""
    draft = load_draft(GOLDEN / "dspark-b" / "draft")
    found = load_draft(stored(tmp_path, str, architectures=["Qwen3DSparkModel"]))
    assert digests(found) == digests(draft)
    assert found.config == draft.config


@pytest.mark.filterwarnings("ignore:.*SGLang")
@pytest.mark.parametrize("variant", ["rnn", "bonus anchor", "reduced"])  # others in test_convert.py
def test_saved_and_loaded_in_both_layouts_it_is_the_same_draft(tmp_path, variant):
    draft = draft_for(tiny.target("qwen3"), VARIANTS[variant])
    for layout in ("hub", "engines"):
        draft.save_pretrained(tmp_path / layout, layout=layout)
        loaded = load_draft(tmp_path / layout)
        assert type(loaded) is DSparkDraftModel
        assert digests(loaded) == digests(draft)
        for name in {*DSparkConfig.own_fields()} - {"dtype"}:
            assert getattr(loaded.config, name) == getattr(draft.config, name), name
        assert {path.name for path in (tmp_path / layout).iterdir()} >= OWN_FILES


@pytest.mark.filterwarnings("ignore:.*SGLang")
@pytest.mark.parametrize("name", CASES)
def test_engines_find_the_names_that_they_read(tmp_path, name):
    draft = load_draft(GOLDEN / name / "draft")
    draft.save_pretrained(tmp_path, layout="engines")
    published = load_file(GOLDEN / name / "draft" / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == published.keys()
    content = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((GOLDEN / name / "draft" / "config.json").read_text())
    assert content["architectures"] == ["Qwen3DSparkModel"]
    assert content["model_type"] == "qwen3"
    assert content["auto_map"] == {"AutoModel": "dspark.DSparkDraftModel"}
    assert content["sample_from_anchor"] is True
    for key in set(ON_TOP) & set(original) - {"auto_map"}:
        assert content[key] == content["dflash_config"][key] == original[key]


@pytest.mark.parametrize(
    ("variant", "remark"),
    [
        ("vanilla", None),
        ("gated", "vLLM (0.33) and llama.cpp run vanilla alone"),
        ("rank 0", "markov_rank is 0: SGLang (0.5.23) refuses"),
        ("reduced", "draft_vocab_size is 9, of 12 tokens of the target"),
    ],
)
def test_the_card_tells_what_it_is_and_what_an_engine_does_not_run(tmp_path, variant, remark):
    draft = draft_for(tiny.target("qwen3"), VARIANTS[variant])
    assert len(engines_remarks(draft.config)) == (remark is not None)
    draft.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for text in ("[DSpark](", "| 5, and as many drafted tokens |", '"method": "dspark"', "DSPARK", remark or ""):
        assert text in card


@pytest.mark.filterwarnings("ignore:.*SGLang")
def test_a_published_draft_is_used_by_a_stranger_from_both_branches(hub, repo_id, tmp_path, fresh_process):
    from test_dflash2 import check_strangers

    target = tiny.target("qwen3")
    draft = draft_for(target, VARIANTS["reduced"])
    target.save_pretrained(tmp_path / "target")
    draft.push_to_hub(repo_id)
    for revision in ("main", "engines"):
        files = set(HfApi().list_repo_files(repo_id, revision=revision))
        assert {*OWN_FILES, "dflash.py", "modeling_dflash.py", "custom_generate/generate.py"} <= files
        assert digests(load_draft(repo_id, revision=revision)) == digests(draft)
    check_strangers(fresh_process, repo_id, tmp_path / "target", draft)
    assert type(AutoModel.from_pretrained(repo_id)) is DSparkDraftModel
    assert type(AutoConfig.from_pretrained(repo_id)) is DSparkConfig


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"markov_rank": -1}, "markov_rank is -1; it must be an int from 0"),
        ({"markov_head_type": "ngram"}, "markov_head_type is 'ngram'; it must be one of vanilla, gated, rnn"),
        ({"vocab_size": None}, "vocab_size is None; it must be the target's, because markov_rank is 8"),
        ({"markov_rank": 0, "confidence_head_with_markov": True}, "markov_rank is 0; it must be above 0"),
        ({"markov_head_type": "rnn", "sample_from_anchor": False}, "sample_from_anchor is False; it must be True"),
    ],
)
def test_fields_that_make_no_sense_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.draft(tiny.target("qwen3"), **tiny.DSPARK | fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Gemma4DSparkModel"]}, "Gemma 4's own layers"),
        ({"architectures": ["K3DSparkModel"]}, "MLA attention"),
        ({"dflash_config": {"attention_mode": "mla"}}, "MLA attention"),
        ({"dflash_config": {"conv_kernel_size": 2}}, "a DFlash 2 draft"),
        ({"markov_rank": 13}, "contradicts itself about markov_rank"),
        ({"markov_rank": None, "dflash_config": {"markov_rank": None}}, "does not say markov_rank"),
        ({"dflash_config": {"markov_head_type": "conv"}}, "markov_head_type is 'conv'"),
    ],
)
def test_configs_that_cannot_be_run_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_draft(stored(tmp_path, str, **changes))


def test_one_kind_read_as_the_other_is_refused_saying_what_reads_it(tmp_path):
    with pytest.raises(ValueError, match=r"describes a DSpark draft.*DSparkDraftModel\.from_pretrained"):
        DFlashConfig.from_pretrained(GOLDEN / "dspark-rank0" / "draft")
    tiny.draft(tiny.target("qwen3")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"describes a DFlash draft.*DFlashDraftModel\.from_pretrained"):
        DSparkDraftModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"confidence_head_with_markov": True}, r"confidence_head.proj.weight: \(1, 64\) in the file, \(1, 76\) here"),
        ({"enable_confidence_head": False}, "has tensors that this model does not know.*confidence_head.proj"),
        ({"markov_head_type": "vanilla"}, "has tensors that this model does not know.*markov_head.gate_proj"),
        ({"markov_head_type": "rnn"}, "lacks tensors, which would be random: markov_head.joint_proj"),
    ],
)
def test_tensors_that_are_not_those_of_the_config_are_refused(tmp_path, fields, message):
    shutil.copytree(GOLDEN / "dspark-b" / "draft", tmp_path / "draft")
    with pytest.raises(ValueError, match=message):
        load_draft(tmp_path / "draft", **fields)


def test_a_dflash_repository_carries_nothing_of_it(tmp_path):
    draft = tiny.draft(tiny.target("qwen3"))
    assert type(draft) is DFlashDraftModel
    draft.save_pretrained(tmp_path)
    assert not OWN_FILES & {path.name for path in tmp_path.iterdir()}

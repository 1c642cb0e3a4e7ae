"""DFlash 2: what differs from DFlash 1, and that all else holds for it too."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tiny
from dflash_hub import (
    DecodeStatistics,
    DFlash2Config,
    DFlash2DraftModel,
    DFlashConfig,
    DFlashDraftModel,
    DFlashDraftSpec,
    load_draft,
    resolve_dflash_draft_spec,
)
from dflash_hub.drafter_dflash import Walk
from dflash_hub.kinds import KINDS
from dflash_hub.publishing import publish
from dflash_hub.publishing.probe import digests
from dflash_hub.registry import CATALOGUE, drafts_for
from dflash_hub.training import loss as loss_module
from dflash_hub.training.blocks import PackedBatch
from dflash_hub.training.metrics import Metrics
from dflash_hub.training.objective import Objective, Recipe
from paths import DATA, ROOT

pytestmark = pytest.mark.usefixtures("unchecked")

GOLDEN = DATA / "golden" / "dflash2"
PUBLISHED = DATA / "published_configs"
SECOND_FILES = {"configuration_dflash2.py", "modeling_dflash2.py", "dflash2.py"}


@pytest.fixture(scope="module")
def pair():
    target = tiny.target("qwen3")
    return target, tiny.draft(target, **tiny.SECOND)


# The original implementation --------------------------------------------------------------------------------------


@pytest.mark.quick
def test_candidates_and_path_are_those_of_the_original_code():
    data = load_file(GOLDEN / "golden.safetensors")
    draft = DFlash2DraftModel.from_pretrained(GOLDEN / "draft")
    logits = data["selector_logits"]
    assert torch.equal(logits.topk(draft.config.selector_top_k).indices, data["selector_candidate_ids"])
    path = draft.select_tokens(logits, data["selector_hidden"], Walk(data["selector_anchor_ids"][:, None])).tokens
    assert torch.equal(path, data["selector_path"])
    assert not torch.equal(path, logits.argmax(-1))  # the selector chose otherwise than each position by itself


@pytest.mark.quick
def test_generated_tokens_are_those_of_the_original_code():
    data = load_file(GOLDEN / "golden.safetensors")
    draft = DFlash2DraftModel.from_pretrained(GOLDEN / "draft")
    target = AutoModelForCausalLM.from_pretrained(GOLDEN / "target")
    prompt, expected = data["prompt_ids"], data["generated_ids"]
    text = draft.spec_generate(target, prompt, max_new_tokens=expected.shape[1] - prompt.shape[1])
    assert torch.equal(text, expected)
    assert torch.equal(text, data["greedy_ids"])


# The model ----------------------------------------------------------------------------------------------------------


def test_a_fresh_draft_is_a_dflash_1_draft_with_the_same_weights(monkeypatch):
    target = tiny.target("qwen3")
    spec, shape = DFlashDraftSpec("fresh"), {"mask_token_id": 3, "target_layer_ids": [0, 2], "num_hidden_layers": 2}
    first = spec.build(target.config, **shape).eval()
    second = spec.build(target.config, "dflash2", conv_group_size=8, selector_rank=6, selector_top_k=4, **shape).eval()
    assert type(second) is DFlash2DraftModel
    missing, unexpected = second.load_state_dict(first.state_dict(), strict=False)
    assert not unexpected
    assert all("conv" in name or "selector" in name for name in missing)
    noise, context = torch.randn(2, 16, 32), torch.randn(2, 9, 64)
    states = [draft(noise, context).last_hidden_state for draft in (first, second)]
    torch.testing.assert_close(*states, atol=1e-6, rtol=0)
    scores, anchor = target.lm_head(states[0][:, 1:]), torch.tensor([[1], [2]])
    picked = [draft.select_tokens(scores, states[0][:, 1:], Walk(anchor)).tokens for draft in (first, second)]
    assert torch.equal(*picked)
    committed = []
    for draft in (first, second):
        statistics = DecodeStatistics()
        ways = {"custom_generate": draft.speculate, "statistics": statistics}
        target.generate(**tiny.batch(9, pads=(0, 3)), max_new_tokens=16, do_sample=False, **ways)
        committed.append(statistics.committed)
    assert committed[0] == committed[1]


@pytest.mark.parametrize("taps", [1, 2, 3])
@torch.no_grad()
def test_a_convolution_reads_its_own_block_and_zeros_before_it(taps):
    """Against the definition, spelled out: three blocks of 5, one after the other, and each of them alone."""
    config = tiny.draft(tiny.target("qwen3"), **tiny.SECOND | {"conv_kernel_size": taps}).config
    from dflash_hub.modeling_dflash2 import DynamicConv

    torch.manual_seed(0)
    conv = DynamicConv(config)
    for weight in conv.parameters():
        torch.nn.init.normal_(weight)
    states, groups = torch.randn(2, 15, 32), 32 // 8
    found, corrections = conv.before(states)
    again = conv.after(states, corrections)
    projected = conv.kernel_projection(states).view(2, 15, 2, taps, groups)
    for side, result in enumerate((found, again)):
        for row, place, channel in ((0, 0, 3), (0, 5, 31), (1, 7, 8), (1, 14, 0), (0, 10, 17)):
            expected = 0.0
            for tap in range(taps):
                if place % 5 >= tap:
                    kernel = conv.base_kernel[side, tap, channel] + projected[row, place, side, tap, channel // 8]
                    expected += kernel * states[row, place - tap, channel]
            assert result[row, place, channel] == pytest.approx(float(expected), abs=1e-5)
    alone = torch.cat([conv.before(states[:, start : start + 5])[0] for start in (0, 5, 10)], dim=1)
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@torch.no_grad()
def test_the_walk_is_the_one_that_goes_step_by_step(pair, weight):
    selector = pair[1].candidate_selector
    torch.manual_seed(0)
    scores, states, anchor = torch.randn(3, 7, tiny.VOCAB), torch.randn(3, 7, 32), torch.tensor([[1], [5], [0]])
    path, before = [], anchor[:, 0]
    for position in range(7):
        unary, candidates = scores[:, position].topk(4)
        gate = selector.predecessor_codebook[before] * selector.hidden_projection(states[:, position])
        pairs = unary + weight * (selector.successor_codebook[candidates] * gate[:, None]).sum(-1)
        before = candidates.gather(1, pairs.argmax(-1, keepdim=True))[:, 0]
        path.append(before)
    candidates, totals = selector.pairs(scores, states, Walk(anchor, pair_scale=weight))
    found = candidates.gather(-1, selector.path(totals)[..., None])[..., 0]
    assert torch.equal(found, torch.stack(path, dim=1))
    assert not torch.equal(found, scores.argmax(-1))


def test_a_head_that_is_padded_beyond_the_vocabulary_is_no_trouble():
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **tiny.SECOND)
    target.resize_token_embeddings(tiny.VOCAB + 4)
    target.config.vocab_size = tiny.VOCAB  # as of targets whose rows are padded
    inputs = tiny.batch(9, pads=(0, 3))
    asked = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(**inputs, **asked)
    assert torch.equal(target.generate(**inputs, **asked, custom_generate=draft.speculate), plain)


def test_logits_are_multiplied_then_capped_and_embeddings_scaled(pair):
    target, _ = pair
    fields = {"output_multiplier": 0.5, "final_logit_softcapping": 3.0, "input_embedding_scale": 2.0}
    draft = tiny.draft(target, **tiny.SECOND, **fields)
    plain = tiny.draft(target, **tiny.SECOND)
    states = torch.randn(2, 4, 32)
    expected = 3.0 * torch.tanh(0.5 * target.lm_head(states) / 3.0)
    torch.testing.assert_close(draft.logits(states, target.lm_head), expected)
    noise, context = torch.randn(1, 5, 32), torch.randn(1, 6, 64)
    torch.testing.assert_close(
        draft(noise, context).last_hidden_state, plain(2 * noise, context).last_hidden_state, atol=1e-5, rtol=1e-5
    )


# Decoding -----------------------------------------------------------------------------------------------------------


# Dense, with scaled embeddings and windows, with latent heads, and recurrent.
FAMILIES = ("qwen3", "gemma3_text", "deepseek_v3", "qwen3_next")


@pytest.mark.parametrize(("family", "block"), [*((family, 7) for family in FAMILIES), ("qwen3", 2)])
def test_text_is_the_targets_own_alone_and_in_padded_batches(family, block):
    target = tiny.target(family)
    draft = tiny.draft(target, block_size=block, **tiny.SECOND)
    inputs = tiny.batch(9, pads=(0, 3, 5, 1))
    asked = {"max_new_tokens": 14, "do_sample": False}
    plain = target.generate(**inputs, **asked)
    statistics = DecodeStatistics()
    ways = {"custom_generate": draft.speculate, "statistics": statistics}
    assert torch.equal(target.generate(**inputs, **asked, **ways), plain)
    ways["proposer"] = tiny.partly_right(torch.nn.functional.pad(plain, (0, 40)))
    assert torch.equal(target.generate(**inputs, **asked, **ways), plain)
    assert {1, block} <= set(statistics.committed)
    one = {name: value[:1] for name, value in inputs.items()}
    assert torch.equal(target.generate(**one, **asked, **ways), plain[:1])
    assert tiny.as_found(target)


def test_what_is_proposed_is_what_the_selector_walks(pair):
    """The engine's proposal equals the walk over the plain forward's states: taps, positions and anchor are right."""
    target, draft = pair
    proposals = []
    keep = tiny.steered(lambda proposal, state: proposals.append(proposal) or proposal)
    ids = tiny.prompt(11)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    text = target.generate(ids, **asked, custom_generate=draft.speculate, proposer=keep)
    hidden = target(text, output_hidden_states=True).hidden_states
    features = torch.cat([hidden[1], hidden[3]], dim=-1)
    size, anchor = draft.config.block_size, text[:, 11:12]
    noise_ids = torch.cat([anchor, torch.full((1, size - 1), 3)], dim=1)
    states = draft(target.get_input_embeddings()(noise_ids), features[:, :11]).last_hidden_state[:, 1:]
    expected = draft.select_tokens(target.lm_head(states), states, Walk(anchor)).tokens
    assert proposals[0].tokens[0].tolist() == [int(anchor), *expected[0].tolist()]


@pytest.mark.parametrize("draft_sampling", ["greedy", "coupled"])
@pytest.mark.parametrize(
    "setting", [{"temperature": 0.7, "top_k": 0}, {"top_k": 5, "top_p": 0.9}, {"repetition_penalty": 1.4, "top_k": 0}]
)
def test_sampled_text_is_that_of_plain_sampling_with_the_same_noise(pair, setting, draft_sampling, monkeypatch):
    """Every token that the draft proposes is either drawn by the target too, or replaced by what it drew."""
    target, draft = pair
    inputs, texts = tiny.batch(9, pads=(0, 3)), []
    for way in (draft, tiny.draft(target, seed=9)):  # any other draft: the text is the target's
        torch.manual_seed(3)
        asked = {"max_new_tokens": 12, "do_sample": True, "draft_sampling": draft_sampling, **setting}
        texts.append(target.generate(**inputs, **asked, custom_generate=way.speculate))
    assert torch.equal(*texts)
    assert len(set(texts[0][0, 9:].tolist())) > 4


def test_a_walk_coupled_to_the_noise_is_accepted_more_often(pair):
    """A trained draft in small: the target's own distribution for logits, and a selector that adds nothing."""
    draft = pair[1]
    from transformers import LogitsProcessorList, TemperatureLogitsWarper

    from dflash_hub.sampling_dflash import PositionNoise, Sampler

    logits = torch.randn(1, 64, tiny.VOCAB)
    sampler = Sampler(LogitsProcessorList([TemperatureLogitsWarper(1.7)]), PositionNoise(5), coupled=True)
    choices, _ = sampler.sample(logits, [0])
    states, anchor = torch.zeros(1, 64, 32), torch.tensor([[1]])
    scores, pair_scale = sampler.draft_scores(logits, [0])
    assert pair_scale == pytest.approx(1 / 1.7)
    coupled = draft.select_tokens(scores, states, Walk(anchor, pair_scale=pair_scale)).tokens
    alone = draft.select_tokens(logits, states, Walk(anchor)).tokens
    assert torch.equal(coupled, choices)
    assert (alone == choices).float().mean() < 0.8


def test_three_sampled_tokens_are_distributed_as_generate_distributes_them(monkeypatch):
    """8,000 triples with the draft and without, as in the sampling tests; right code fails once in 10,000 seeds."""
    from test_sampling import small_pair, triples, two_sample_excess

    target, draft = small_pair(monkeypatch, **tiny.SECOND)
    asked = {"top_k": 5, "top_p": 0.9, "temperature": 1.3}
    torch.manual_seed(1)
    plain = triples(target, **asked)
    torch.manual_seed(0)
    assert two_sample_excess(plain, triples(target, **asked, custom_generate=draft.speculate)) < 0


def test_transformers_own_loop_runs_it_without_the_selector(pair):
    target, draft = pair
    ids = tiny.prompt(9)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    ours = target.generate(ids, **asked, assistant_model=draft, speculation_type="dflash")
    assert torch.equal(ours, target.generate(ids, **asked))


# Training -----------------------------------------------------------------------------------------------------------


def plain_losses(draft, target, states, rows, anchors, gamma: float):
    """Mean losses of the draft's logits and of the selector, position by position, by what the definition says."""
    from test_training import counted_places

    selector, sums = draft.candidate_selector, torch.zeros(4)
    for row, number, step, place in counted_places(rows, anchors, states.shape[2]):
        state, label = states[row, number, step], rows.input_ids[row, place]
        logits = target.lm_head(state)
        weight = torch.exp(torch.tensor(-(step - 1) / gamma))
        parts = [weight * cross_entropy(logits[None], label[None]), weight, weight * 0, weight * 0]
        candidates = logits.topk(draft.config.selector_top_k).indices
        if label in candidates:
            before = selector.predecessor_codebook[rows.input_ids[row, place - 1]]
            gate = before * selector.hidden_projection(state)
            scores = logits[candidates] + selector.successor_codebook[candidates] @ gate
            parts[2:] = [weight * cross_entropy(scores[None], (candidates == label).nonzero()[0]), weight]
        sums = sums + torch.stack(parts)
    return sums[0] / sums[1], sums[2] / sums[3]


def original_losses(draft, target, states, tokens, counted, gamma: float):
    """The same by the reference implementation's lines (NeMo AutoModel, `dflash2_core.py`), on whole tensors.

    states `[B, A, Q, H]`, tokens `[B, A, Q]`, counted `[B, A, Q]`: the positions that are supervised.
    """
    selector, pred_mask = draft.candidate_selector, counted[:, :, 1:].float()
    pred_hidden, pred_targets = states[:, :, 1:], tokens[:, :, 1:]
    logits = target.lm_head(pred_hidden)

    def mean(scores, labels, mask):
        nll = cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none").view_as(mask)
        weights = mask * torch.exp(-torch.arange(mask.shape[-1]) / gamma)
        return (nll * weights).sum() / (weights.sum() + 1e-6)

    base_loss = mean(logits, pred_targets, pred_mask)
    unary, candidate_ids = torch.topk(logits, selector.top_k, dim=-1)
    gates = selector.predecessor_codebook[tokens[:, :, :-1]] * selector.hidden_projection(pred_hidden)
    scores = unary + (selector.successor_codebook[candidate_ids] @ gates[..., None])[..., 0]
    found = candidate_ids == pred_targets[..., None]
    selector_mask = pred_mask * found.any(-1)
    return base_loss, mean(scores, found.int().argmax(-1), selector_mask)


def test_loss_and_gradients_are_those_of_the_original_and_of_the_plain_reference(pair, monkeypatch):
    """Of the states and of everything in the selector; chunks are smaller than the positions, and a block is empty."""
    from test_training import packed

    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 5 * tiny.VOCAB)
    target, draft = pair
    rows, anchors = packed((30,), (12,)), torch.tensor([[2, 18, 28], [8, 10, -1]])
    objective = Objective(draft.config, target, Recipe(gamma=3.0, attention="dense", selector_weight=0.7))
    blocks = objective.blocks(rows, anchors)
    features = objective.target.run(rows, last_hidden_state=False).features
    states = objective.states(draft, blocks, objective.noise_embeds(blocks), features).detach()
    monkeypatch.setattr(objective, "states", lambda *inputs: leaf)
    results = []
    for how in ("ours", "plain", "original"):
        leaf = states.clone().requires_grad_()
        draft.zero_grad()
        whole = leaf.unflatten(1, (-1, 5))
        if how == "ours":
            output = objective(draft, blocks)
            loss = output.loss / blocks.weights(3.0).sum()
        elif how == "plain":
            base, selector = plain_losses(draft, target, whole, rows, anchors, 3.0)
            loss = base + 0.7 * selector
        else:
            losses = original_losses(draft, target, whole, blocks.tokens, blocks.block_loss_mask, 3.0)
            loss = losses[0] + 0.7 * losses[1]
        loss.backward()
        learned = [weight.grad.clone() for weight in draft.candidate_selector.parameters()]
        results.append([loss.detach(), leaf.grad, *learned])
    for ours, *others in zip(*results, strict=True):
        for expected in others:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    metrics = Metrics.of(output.counts.over_rows(), output.sums.detached())
    assert metrics.base_loss == pytest.approx(float(base.detach()), rel=1e-5)
    assert metrics.selector_loss == pytest.approx(float(selector.detach()), rel=1e-5)
    assert 0 < metrics.candidate_recall < 1  # else both ways of dividing were the same
    draft.zero_grad()


@pytest.mark.quick
def test_on_the_originals_data_the_loss_is_the_originals():
    """Its draft and target on its own text, in blocks one token apart."""
    data = load_file(GOLDEN / "golden.safetensors")
    draft = DFlash2DraftModel.from_pretrained(GOLDEN / "draft")
    target = AutoModelForCausalLM.from_pretrained(GOLDEN / "target")
    text = data["generated_ids"]
    rows = PackedBatch(text, torch.ones_like(text).bool(), torch.ones_like(text))
    objective = Objective(draft.config, target, Recipe(attention="dense"))
    blocks = objective.blocks(rows, torch.arange(1, text.shape[1] - 1)[None])
    features = objective.target.run(rows, last_hidden_state=False).features
    with torch.no_grad():
        states = objective.states(draft, blocks, objective.noise_embeds(blocks), features)
        size = draft.config.block_size
        whole = (states.unflatten(1, (-1, size)), blocks.tokens, blocks.block_loss_mask)
        base, selector = original_losses(draft, target, *whole, objective.gamma)
        output = objective(draft, blocks)
        right = target.lm_head(whole[0]).argmax(-1) == blocks.tokens
    metrics = Metrics.of(output.counts.over_rows(), output.sums)
    assert metrics.base_accuracy == pytest.approx(float(right[blocks.block_loss_mask].float().mean()))
    assert 0 < metrics.base_accuracy != metrics.accuracy
    assert float(output.loss / blocks.weights(objective.gamma).sum()) == pytest.approx(float(base + selector), rel=1e-5)
    assert 0 < float(output.sums.head_weight) < float(output.sums.weight)


def test_training_reports_recall_and_selector_accuracy_and_learns_every_part(tmp_path):
    import training_run

    trainer = training_run.trainer(tmp_path, tiny.SECOND, max_steps=12, learning_rate=3e-3)
    before = digests(trainer.model)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line in lines:
        assert line["accuracy"] == pytest.approx(line["candidate_recall"] * line["selector_accuracy"])
        assert 0 < line["candidate_recall"] < 1
        assert line["loss"] == pytest.approx(line["base_loss"] + line["selector_loss"], rel=1e-4)
        assert line["base_accuracy"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"]
    after = digests(trainer.model)
    assert all(after[name] != before[name] for name in after)
    trainer.save_model(str(tmp_path / "saved"))
    assert digests(load_draft(tmp_path / "saved")) == after


def test_the_held_out_loss_does_not_depend_on_the_batch_and_is_the_sum_of_its_parts(tmp_path):
    import training_run

    found = []
    for size in (1, 5):
        trainer = training_run.trainer(tmp_path, tiny.SECOND, per_device_eval_batch_size=size, selector_loss_weight=0.5)
        found.append(trainer.evaluate(trainer.train_dataset))
    for key in ("eval_loss", "eval_base_loss", "eval_selector_loss", "eval_base_accuracy"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)
        assert found[0][key] > 0
    assert found[0]["eval_loss"] == pytest.approx(found[0]["eval_base_loss"] + 0.5 * found[0]["eval_selector_loss"])


def test_a_batch_of_several_in_a_step_has_its_own_mean_of_the_selector(tmp_path):
    """Its loss is that of the batch alone, times its share of the weights of the step."""
    import training_run

    trainer = training_run.trainer(tmp_path, tiny.SECOND, gradient_accumulation_steps=2)
    first, second, *_ = trainer.get_train_dataloader()
    whole = trainer._get_num_items_in_batch([first, second], torch.device("cpu"))
    share = trainer._get_num_items_in_batch([first], torch.device("cpu")) / whole
    assert 0 < share < 1
    of_step = trainer.compute_loss(trainer.model, first, num_items_in_batch=whole)
    torch.testing.assert_close(of_step, trainer.compute_loss(trainer.model, first) * share)


@pytest.mark.parametrize("options", [{"bf16": True}, {"loss": "ce=0.5,kl=0.5"}, {"selector_loss_weight": 0.0}], ids=str)
def test_options_of_the_trainer_hold_for_it_too(tmp_path, options):
    import training_run

    trainer = training_run.trainer(tmp_path, tiny.SECOND, **options)
    trainer.train()
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert trainer.state.log_history[-2]["loss"] < 8


# On the Hub ---------------------------------------------------------------------------------------------------------

STRANGER = """
    import json, sys, torch
    from transformers import AutoModel, AutoModelForCausalLM
    sys.path.insert(0, {root!r})
    from probe import digests
    target = AutoModelForCausalLM.from_pretrained({target!r})
    ids = torch.tensor([[1, 5, 2, 8, 3, 3, 1]])
    ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    own, found = target.generate(ids, **ask), []
    for revision in ("main", "engines"):
        draft = AutoModel.from_pretrained({repo!r}, revision=revision, trust_remote_code=True)
        text = target.generate(ids, custom_generate=draft.speculate, **ask)
        found.append([type(draft).__module__, type(draft).__name__, torch.equal(own, text), digests(draft)])
    text = target.generate(ids, custom_generate={repo!r}, trust_remote_code=True, **ask)
    print(json.dumps([*found, torch.equal(own, text)]))
"""


def check_strangers(fresh_process, repo_id, target, draft) -> None:
    """One process without the package loads both branches, decodes with both, and with the repository by its name."""
    code = STRANGER.format(root=str(ROOT / "publishing"), repo=repo_id, target=str(target))
    *branches, by_name = json.loads(fresh_process(code).splitlines()[-1])
    assert by_name
    for module, name, same, found in branches:
        assert module.startswith("transformers_modules.")
        assert name == type(draft).__name__
        assert same
        assert found == digests(draft)


def test_a_published_draft_is_used_by_a_stranger_from_both_branches(
    hub, repo_id, pair, tmp_path, fresh_process, forked_probe
):
    target, draft = pair
    target.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    publish(tmp_path / "draft", repo_id)
    for revision in ("main", "engines"):
        files = set(HfApi().list_repo_files(repo_id, revision=revision))
        assert {*SECOND_FILES, "dflash.py", "modeling_dflash.py", "custom_generate/generate.py"} <= files
        assert digests(load_draft(repo_id, revision=revision)) == digests(draft)
    check_strangers(fresh_process, repo_id, tmp_path / "target", draft)
    by_auto = AutoModel.from_pretrained(repo_id)  # without trust: no code of the repository runs
    assert type(by_auto) is DFlash2DraftModel
    assert type(AutoConfig.from_pretrained(repo_id)) is DFlash2Config


def test_a_dflash_1_repository_carries_nothing_of_dflash_2(tmp_path):
    tiny.draft(tiny.target("qwen3")).save_pretrained(tmp_path)
    assert not SECOND_FILES & {path.name for path in tmp_path.iterdir()}


def test_tensor_names_are_exactly_the_published_ones(tmp_path, pair):
    published = set(load_file(GOLDEN / "draft" / "model.safetensors"))
    draft = DFlash2DraftModel.from_pretrained(GOLDEN / "draft")
    for layout in ("hub", "engines"):
        draft.save_pretrained(tmp_path / layout, layout=layout)
        assert set(load_file(tmp_path / layout / "model.safetensors")) == published
    config = json.loads((tmp_path / "engines" / "config.json").read_text())
    original = json.loads((GOLDEN / "draft" / "config.json").read_text())
    assert config["architectures"] == ["DFlash2DraftModel"]
    assert config["model_type"] == "qwen3"
    assert original["dflash_config"].items() <= config["dflash_config"].items()
    assert config["is_causal"] is False
    assert DFlash2Config.from_pretrained(tmp_path / "engines") == DFlash2Config.from_pretrained(tmp_path / "hub")


def test_published_configs_are_read_and_written_back():
    for name, block, taps in (
        ("z-lab__Qwen3.8-27B-DFlash2", 8, [5, 19, 33, 47, 61]),
        ("z-lab__Muse-Glimmer-30B-DFlash2", 16, [1, 13, 25, 37, 49]),
        ("incoai__GLM-5.3-Flash-DFlash2", 8, [5, 14, 24, 33, 42]),
    ):
        config = DFlash2Config.from_pretrained(PUBLISHED / f"{name}.json")
        assert (config.block_size, config.target_layer_ids) == (block, taps)
        added = (config.conv_kernel_size, config.conv_group_size, config.selector_rank, config.selector_top_k)
        assert added == (2, 16, 256, 16)
        assert config.is_causal is False
        muse = "Muse" in name
        assert config.output_multiplier == (pytest.approx(0.19611613513818404) if muse else 1.0)
        assert config.final_logit_softcapping == (20.0 if muse else None)


# The registry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("Qwen/Qwen3.8-27B", "z-lab/Qwen3.8-27B-DFlash2"),
        ("Qwen/Qwen3.6-35B-A3B", "incoai/Qwen3.6-35B-A3B-DFlash2"),
        ("meta-models/Muse-Glimmer-30B", "z-lab/Muse-Glimmer-30B-DFlash2"),
        ("zai-org/GLM-5.3-Flash", "incoai/GLM-5.3-Flash-DFlash2"),
    ],
)
def test_a_target_with_both_gets_its_dflash_2_draft(target, draft):
    known = drafts_for(target)
    spec = resolve_dflash_draft_spec(list(known[0].architectures), target=target)
    assert (spec.repo_id, spec.draft_cls) == (draft, DFlash2DraftModel)


def test_every_kind_of_draft_in_the_catalogue_has_its_class():
    for spec in CATALOGUE:
        kind = KINDS.get(spec.details["variant"])
        assert spec.draft_cls is (DFlashDraftModel if kind is None else kind.model_class)
    assert sum(spec.draft_cls is DFlash2DraftModel and not spec.unsupported for spec in CATALOGUE) >= 9


def test_a_spec_loads_either_kind_and_load_draft_tells_them_apart(tmp_path, pair):
    target, draft = pair
    draft.save_pretrained(tmp_path / "second", layout="engines")
    tiny.draft(target).save_pretrained(tmp_path / "first")
    assert digests(DFlashDraftSpec(str(tmp_path / "second"), DFlash2DraftModel).load()) == digests(draft)
    assert type(load_draft(tmp_path / "first")) is DFlashDraftModel
    assert type(load_draft(tmp_path / "second")) is DFlash2DraftModel


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conv_group_size": 7}, "conv_group_size is 7; it must divide hidden_size, 32"),
        ({"conv_kernel_size": 0}, "conv_kernel_size is 0"),
        ({"selector_top_k": 13}, "selector_top_k is 13; it must be from 1 to vocab_size, 12"),
        ({"selector_rank": 0}, "selector_rank is 0"),
        ({"vocab_size": None}, "vocab_size is None; it must be the target's"),
        ({"output_multiplier": 0.0}, "output_multiplier is 0.0"),
        ({"input_embedding_scale": -1.0}, "input_embedding_scale is -1.0"),
    ],
)
def test_fields_that_make_no_sense_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.draft(tiny.target("qwen3"), **tiny.SECOND | fields)


def golden_config(**changes) -> dict:
    config = json.loads((GOLDEN / "draft" / "config.json").read_text())
    config["dflash_config"] |= changes.pop("dflash_config", {})
    return config | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dflash_config": {"projector_type": "domino"}}, "a Domino draft"),
        ({"dflash_config": {"markov_rank": 256}}, "a DSpark draft"),
        ({"architectures": ["DFlash2BeamDraftModel"]}, "beam head"),
        ({"dflash_config": {"selector_rank": None}}, "does not say selector_rank"),
        ({"conv_group_size": 32}, "contradicts itself about conv_group_size"),
        ({"dflash_config": {"conv_group_size": 48}}, "conv_group_size is 48; it must divide hidden_size"),
    ],
)
def test_configs_that_cannot_be_run_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        DFlash2Config.from_dict(golden_config(**changes))


def test_one_kind_read_as_the_other_is_refused_saying_what_reads_it(tmp_path, pair):
    target, draft = pair
    with pytest.raises(ValueError, match=r"describes a DFlash 2 draft.*DFlash2DraftModel\.from_pretrained"):
        DFlashConfig.from_dict(golden_config())
    for layout in ("hub", "engines"):
        tiny.draft(target).save_pretrained(tmp_path / layout, layout=layout)
        with pytest.raises(ValueError, match=r"describes a DFlash draft.*DFlashDraftModel\.from_pretrained"):
            DFlash2DraftModel.from_pretrained(tmp_path / layout)
    draft.save_pretrained(tmp_path / "second")
    with pytest.raises(ValueError, match="describes a DFlash 2 draft"):
        DFlashDraftModel.from_pretrained(tmp_path / "second")


def test_a_config_without_its_tensors_and_tensors_without_their_config_are_refused(tmp_path, pair):
    target, draft = pair
    tensors = draft.state_dict()
    draft.save_pretrained(tmp_path / "bare")
    save_file(
        {name: value for name, value in tensors.items() if "selector" not in name},
        tmp_path / "bare" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="lacks tensors, which would be random: candidate_selector"):
        load_draft(tmp_path / "bare")
    tiny.draft(target).save_pretrained(tmp_path / "first")
    save_file(tensors, tmp_path / "first" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has tensors that this model does not know"):
        load_draft(tmp_path / "first")


def test_positions_that_are_no_whole_blocks_are_refused(pair):
    with pytest.raises(ValueError, match="noise_embeds has 7 positions, which are no whole blocks of 5"):
        pair[1](torch.randn(1, 7, 32), torch.randn(1, 3, 64))


def test_an_unknown_variant_is_refused(pair):
    with pytest.raises(ValueError, match="variant is 'dflash3'; it must be one of dflash, "):
        DFlashDraftSpec("fresh").build(pair[0].config, "dflash3", mask_token_id=3)

"""Drafts that choose tokens one after another learn with the tokens of the text before; the loss is the original's."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy, cross_entropy
from transformers import AutoModelForCausalLM

import tiny
import training_run
from dflash_hub import DFlashDraftSpec, load_draft
from dflash_hub.evaluation import compare
from dflash_hub.publishing.probe import digests
from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments
from dflash_hub.training import loss as loss_module
from dflash_hub.training.blocks import PackedBatch
from dflash_hub.training.loss import LossInputs, weighted_loss
from dflash_hub.training.mix import Mix
from dflash_hub.training.objective import Objective, Recipe
from dflash_hub.training.weights import FixedWeights
from paths import DATA
from test_training import assert_same_as_decoding, packed

pytestmark = pytest.mark.usefixtures("undrawn")

VARIANTS = {
    "dspark": tiny.DSPARK,
    "dspark, gated": tiny.DSPARK | {"markov_head_type": "gated", "confidence_head_with_markov": False},
    "dspark, rnn": tiny.DSPARK | {"markov_head_type": "rnn"},
    "dspark, rank 0": {"markov_rank": 0, "enable_confidence_head": True},
    "dspark, bonus anchor": tiny.DSPARK | {"sample_from_anchor": False},
    "domino": tiny.DOMINO,
    "domino, not shifted": tiny.DOMINO | {"sample_from_anchor": False, "pure_draft_prefix_len": 0},
    "dflash from the anchor": {"sample_from_anchor": True},
}


def corrected(draft, target, logits, states, predecessors):
    """The draft's own logits of a block whose tokens are known."""
    if draft.config.model_type == "domino":
        return draft.corrected_logits(logits, states, predecessors, target.get_input_embeddings())
    return draft.corrected_logits(logits, states, predecessors) if hasattr(draft, "markov_head") else logits


def plain_loss(draft, target, states, rows, anchors, mix: Mix, share: float):
    """The loss of all blocks `states [B, A, Q, H]`, one after the other: total, of the confidence, sum of weights."""
    total = confidence = weights = 0.0
    final = target.get_decoder()(input_ids=rows.input_ids).last_hidden_state
    first, count = 1 - draft.config.sample_from_anchor, draft.config.num_drafted
    for row, columns in enumerate(anchors.tolist()):
        for number, column in enumerate(columns):
            ids, own = rows.input_ids[row], states[row, number, first:][None]
            before = torch.nn.functional.pad(ids[column : column + count], (0, count))[:count][None]
            base = target.lm_head(own)
            logits = corrected(draft, target, base, own, before)
            chances = None
            if getattr(draft, "confidence_head", None) is not None:
                chances = draft.confidence_logits(own, before).sigmoid()[0]
            for step in range(count):
                place = column + 1 + step
                if column < 0 or place >= len(ids) or rows.documents[row, place] != rows.documents[row, column]:
                    continue
                theirs = target.lm_head(final[row, place - 1]).softmax(-1)
                weight = torch.exp(torch.tensor(-step / 3.0))
                parts = []
                for scores in (base[0, step], logits[0, step]):
                    distance = (scores.softmax(-1) - theirs).abs().sum() / 2
                    parts.append(mix.ce * cross_entropy(scores, ids[place]) + mix.tv * distance)
                if chances is not None:
                    confidence += weight * binary_cross_entropy(chances[step], 1 - distance.detach())
                total += weight * (share * parts[0] + (1 - share) * parts[1])
                weights += weight
    return total, confidence, weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_those_of_the_plain_reference(variant, monkeypatch):
    """Of states and heads, with chunks smaller than the positions, short and empty blocks, halfway through the run."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 6 * tiny.VOCAB)
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **VARIANTS[variant])
    rows, anchors = packed((30,), (12,)), torch.tensor([[2, 18, 27], [8, 10, -1]])
    mix = Mix(ce=0.4, tv=0.6)
    objective = Objective(draft.config, target, Recipe(mix, gamma=3.0, attention="dense", base_until=0.8))
    blocks = objective.blocks(rows, anchors)
    features = objective.target.run(rows, last_hidden_state=False).features
    states = objective.states(draft, blocks, objective.noise_embeds(blocks), features).detach()
    results = []
    for how in ("ours", "plain"):
        draft.zero_grad()
        leaf = states.clone().requires_grad_()
        monkeypatch.setattr(objective, "states", lambda *inputs, leaf=leaf: leaf)
        if how == "ours":
            output = objective(draft, blocks, progress=0.6)
            total, confidence, weights = output.sums.base, output.sums.head, objective.divisor(blocks)
            loss = output.loss / weights
        else:
            share = 0.25 if draft.config.model_type == "domino" else 0.0
            found = plain_loss(draft, target, leaf.unflatten(1, (-1, 5)), rows, anchors, mix, share)
            total, confidence, weights = found
            loss = (total + confidence) / weights
        loss.backward()
        learned = [weight.grad for name, weight in draft.named_parameters() if "layers" not in name]
        learned = [gradient.clone() for gradient in learned if gradient is not None]
        results.append([*(torch.as_tensor(one).detach() for one in (total, confidence, weights)), leaf.grad, *learned])
    assert len(results[0]) == len(results[1])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    draft.zero_grad()


@pytest.mark.parametrize("variant", ["domino", "dspark, bonus anchor"])
def test_a_block_with_given_tokens_has_the_states_of_that_block_alone(variant):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **VARIANTS[variant])
    rows, anchors = packed((30,)), torch.tensor([[2, 18, 27]])
    objective = Objective(draft.config, target, Recipe(attention="dense", given_prefix=0.9))
    blocks = objective.blocks(rows, anchors, (0, 1))
    features = objective.target.run(rows, last_hidden_state=False).features
    states = objective.states(draft, blocks, objective.noise_embeds(blocks), features)
    noise = target.get_input_embeddings()(blocks.noise_ids(3))
    for number, column in enumerate(anchors[0].tolist()):
        part = slice(5 * number, 5 * number + 5)
        alone = draft(noise[:, part], features[:, :column]).last_hidden_state
        torch.testing.assert_close(states[:, part], alone, rtol=1e-4, atol=1e-4)
    output = objective(draft, blocks)
    assert torch.isfinite(output.loss)
    assert output.counts.total.sum() == blocks.block_loss_mask.sum()


@pytest.mark.parametrize("variant", ["dspark", "domino, not shifted"])
def test_training_and_decoding_give_the_same_states(variant):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **VARIANTS[variant])
    assert_same_as_decoding(draft, target, packed((9, 21, 10)), torch.tensor([[0, 8, 25, 32]]))


# The originals ---------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", ["dspark-a", "dspark-b", "dspark-rank0", "domino-a", "domino-b"])
@torch.no_grad()
def test_on_the_originals_data_the_loss_is_the_originals(name):
    """Its states, tokens, weights and target logits, through our chunks. Its labels are not the tokens of its text."""
    data = load_file(DATA / "golden" / name / "golden.safetensors")
    draft = load_draft(DATA / "golden" / name / "draft")
    target = AutoModelForCausalLM.from_pretrained(DATA / "golden" / name / "target")
    kind = "domino" if "domino" in name else "dspark"
    recipe = Recipe(Mix.parse("ce" if kind == "domino" else "ce=0.1,tv=1.8"), attention="dense")
    objective = Objective(draft.config, target, recipe)
    labels, first = data["loss_target_ids"], 1 - draft.config.sample_from_anchor
    text = torch.cat([data["teacher_ids"], labels[:, -1:]], dim=1) if not first else data["teacher_ids"]
    weights = (
        data["loss_weights"]
        if kind == "domino"
        else data["loss_mask"] * torch.exp(-torch.arange(labels.shape[1]) / 4.0)
    )
    mask = weights.bool()
    supervised = torch.nn.functional.pad(mask[:, first:], (1, 0), value=True)
    rows = PackedBatch(text, supervised, torch.ones_like(text))
    blocks = objective.blocks(rows, torch.zeros(len(text), 1, dtype=torch.long))
    progress = 1 - float(data.get("loss_lambda", 0.0))
    heads = objective.head_inputs(draft, blocks, data["hidden"], progress)
    assert torch.equal(blocks.block_loss_mask[:, 0], mask)
    head = draft.lm_head or target.lm_head
    inputs = LossInputs(
        head,
        labels[mask],
        FixedWeights(weights[mask]),
        objective.mix,
        (lambda part: data["loss_target_logits"][mask][part]) if kind == "dspark" else None,
        heads.correction,
        wants_overlap=heads.confidence is not None,
    )
    loss = weighted_loss(data["hidden"][mask], inputs, 4)
    sums = objective._sums(loss, heads)
    total = (sums.base + sums.head) / weights.sum()
    torch.testing.assert_close(total, data["loss_total"], rtol=1e-5, atol=1e-5)
    if heads.confidence is not None:
        torch.testing.assert_close(sums.head / weights.sum(), data["loss_confidence"], rtol=1e-5, atol=1e-5)


# Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dspark, rnn", "domino"])
def test_every_part_learns_and_the_held_out_loss_is_the_sum_of_its_parts(tmp_path, variant):
    trainer = training_run.trainer(tmp_path, VARIANTS[variant], max_steps=6, confidence_loss_weight=0.5)
    before = digests(trainer.model)
    trainer.train()
    after = digests(trainer.model)
    assert all(after[name] != before[name] for name in after)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert set(trainer.kind.metrics) <= set(lines[0])
    found = trainer.evaluate(trainer.train_dataset)
    if "eval_confidence_loss" in found:
        assert 0 < found["eval_confidence_loss"] < found["eval_loss"]
    assert "and 0.5 times the confidence's" in trainer._loss_summary() or variant == "domino"


def test_two_processes_are_one_with_twice_the_batch(tmp_path, train_apart):
    options = {"packing": False, "max_steps": 3}
    fields = ("--fields", json.dumps(VARIANTS["dspark, rnn"]))
    one = training_run.trainer(tmp_path / "one", VARIANTS["dspark, rnn"], per_device_train_batch_size=4, **options)
    one.train()
    options |= {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    two = train_apart(tmp_path / "two", *fields, processes=2, **options)
    losses = [line["loss"] for line in one.state.log_history if "loss" in line]
    assert list(two["losses"].values()) == pytest.approx(losses, rel=1e-4)
    weights = one.model.state_dict()
    for name, values in load_file(tmp_path / "two" / "draft" / "model.safetensors").items():
        torch.testing.assert_close(values, weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("variant", "head"), [("dspark", {"markov_rank": 16}), ("domino", {"gru_hidden_dim": 32})])
def test_a_trained_draft_accepts_more_than_an_untrained_one_and_decodes_exactly(tiny_target, tmp_path, variant, head):
    """It learns two texts of the target by heart."""
    shape = {"block_size": 7, "num_hidden_layers": 1, "target_layer_ids": [1, 2, 4], "mask_token_id": 1}
    torch.manual_seed(0)
    draft = DFlashDraftSpec("tiny").build(tiny_target.config, variant, **shape, **head)
    prompt = torch.tensor([[40, 41, 42, 43], [90, 91, 92, 93]])
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
    text = tiny_target.generate(prompt, **asked, eos_token_id=None).tolist()
    rows = [{"input_ids": ids, "supervised": [0] * 4 + [1] * 24} for ids in text]
    options = training_run.SMALL | {"max_steps": 16, "learning_rate": 1.5e-2, "num_anchors": 20}
    trainer = DFlashTrainer(draft, tiny_target, DFlashTrainingArguments(str(tmp_path), **options), rows)

    def acceptance_length() -> float:
        result = compare(draft.eval(), tiny_target, prompt, 20)
        assert result.identical
        return result.acceptance_length

    before = acceptance_length()
    trainer.train()
    assert acceptance_length() > before + 0.3

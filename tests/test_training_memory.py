"""What a training step needs: as its formula says, less with checkpointing, fewer bits, or a target that is cut."""

import copy
import functools
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from dflash_hub import DFlashDraftSpec
from dflash_hub.kinds import KINDS
from dflash_hub.training import DFlashTrainingArguments, memory
from dflash_hub.training.blocks import PackedBatch, draw_anchors
from dflash_hub.training.loading import QUANTIZATIONS, is_cut
from dflash_hub.training.memory import StepShape, Tracker, memory_of_step
from dflash_hub.training.objective import FrozenTarget, Objective, Recipe
from dflash_hub.training.setup import TrainOptions, build
from paths import ROOT, TINY

SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4000}
pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = {"markov_rank": 16, "enable_confidence_head": True, "emb_dim": 16, "gru_hidden_dim": 32, "selector_rank": 16}
EIGHT = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
EIGHT |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}


def built(kind: str):
    """A target and a draft of this kind, of which activations take more than weights."""
    config = AutoConfig.for_model("qwen3", **SHAPE)
    target = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fields = {name: SMALL[name] for name in KINDS[kind].head_fields if name in SMALL}
    fields |= {"mask_token_id": 1, "block_size": 8, "num_hidden_layers": 2, "target_layer_ids": [1, 2]}
    return target, DFlashDraftSpec("x").build(config, kind, dtype=torch.float32, **fields).train()


def step(draft, target, anchors: int) -> tuple[int, int, float]:
    """Run a step: the bytes kept by the draft's forward, those at the peak, and the loss."""
    ids = torch.arange(256)[None]
    batch = PackedBatch(ids, torch.ones_like(ids).bool(), torch.ones_like(ids))
    objective = Objective(draft.config, target, Recipe())
    draft.set_attn_implementation(objective.attention(ids.device))
    blocks = objective.blocks(batch, draw_anchors(batch, anchors, 0, 0))
    with Tracker() as tracker:
        loss = objective(draft, blocks).loss / objective.divisor(blocks)
        kept = tracker.now
        loss.backward()
    return kept, tracker.peak, float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient_and_the_formula_tells_what_a_step_needs(kind):
    torch.manual_seed(0)
    target, draft = built(kind)
    losses, kept, gradients = [], [], []
    for checkpointing in (False, True):
        if checkpointing:
            memory.checkpoint_layers(draft)
        found, peak, loss = step(draft, target, anchors=48)
        if checkpointing == (kind in ("dflash2", "domino")):  # two kinds of each will do
            shape = StepShape(length=256, anchors=48, checkpointing=checkpointing)
            expected = max(memory_of_step(draft, target, shape).phases.values())
            assert expected == pytest.approx(peak, rel=0.15)
        losses.append(loss)
        kept.append(found)
        gradients.append({name: weight.grad.clone() for name, weight in draft.named_parameters()})
        draft.zero_grad()
    assert losses[1] == losses[0]
    assert kept[1] < kept[0] / 3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


FLAGS = {
    "--gradient-checkpointing": ("checkpointing", bool),
    "--optim": ("optim", str),
    "--per-device-train-batch-size": ("rows", int),
    "--target-quantization": ("target_bits", lambda name: QUANTIZATIONS[name].bits),
    "--cut-target": (None, bool),
}


def test_the_table_of_the_docs_is_what_the_formula_gives(monkeypatch):
    """Every figure, and the cards that have a tenth of their memory left."""
    once = functools.cache(lambda rows, on: simulated(draft, target, StepShape(**common, rows=rows, checkpointing=on)))
    simulated, common = memory._simulated, {"on_gpu": True, "mixed": True}
    monkeypatch.setattr(memory, "_simulated", lambda draft, target, shape: once(shape.rows, shape.checkpointing))
    targets = {}
    with torch.device("meta"):
        for layers in (36, 34):
            config = AutoConfig.for_model("qwen3", **EIGHT | {"num_hidden_layers": layers})
            targets[layers] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        target = targets[36]
        draft = DFlashDraftSpec("x").build(target.config, mask_token_id=1)
    assert max(draft.config.target_layer_ids) == 33
    text = (ROOT / "docs/training.md").read_text()
    table = text.partition("| options of an 8B target")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == 6
    options: dict[str, str] = {}
    for words, *figures in rows:
        options |= dict(re.findall(r"(--[a-z-]+) (\w+)", words))
        given = {FLAGS[name][0]: FLAGS[name][1](value) for name, value in options.items() if FLAGS[name][0]}
        used = targets[34] if "--cut-target" in options else target
        found = memory_of_step(draft, used, StepShape(**common, **given))
        sizes = [*found.lasting.values(), max(found.phases.values()), found.peak]
        cards = [card for card in (24, 48, 80) if found.peak <= 0.9 * card * 2**30]
        assert figures == [*(f"{size / 2**30:.1f}" for size in sizes), ", ".join(map(str, cards))]


def options_for(tmp_path, **changes):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": ' + str(list(range(2, 90))) + "}\n")
    shape = {"mask_token_id": 1, "block_size": 8, "num_layers": 1, "target_layer_ids": [1, 2]}
    return TrainOptions(str(TINY / "target"), str(rows), **shape | changes)


ARGUMENTS = {"use_cpu": True, "report_to": "none", "max_steps": 2, "max_length": 96, "disable_tqdm": True}


def test_a_target_is_loaded_and_run_up_to_its_last_tap(tmp_path, tiny_target):
    """The layers above are absent; taps, loss and weights are those of a run with the whole target."""
    ends = []
    for cut in (False, True):
        args = DFlashTrainingArguments(str(tmp_path / "out"), save_strategy="no", **ARGUMENTS)
        trainer = build(options_for(tmp_path, cut_target=cut), args)
        assert is_cut(trainer.target) is cut
        assert len(trainer.target.model.layers) == tiny_target.config.num_hidden_layers
        trainer.train()
        ends.append({name: weight.clone() for name, weight in trainer.model.state_dict().items()})
    assert sum(weight.numel() for layer in trainer.target.model.layers[3:] for weight in layer.parameters()) == 0
    for name, weight in ends[0].items():
        assert torch.equal(ends[1][name], weight)
    with pytest.raises(ValueError, match="without the layers above its last tap"):
        trainer.target(torch.tensor([[5]]))


def test_layers_above_the_last_tap_run_only_where_the_loss_needs_them():
    target, ran = tiny.target("qwen3"), []
    target.model.layers[3].register_forward_hook(lambda *args: ran.append(1))
    ids = torch.arange(1, 12)[None]
    batch = PackedBatch(ids, torch.ones_like(ids).bool(), torch.ones_like(ids))
    frozen = FrozenTarget(target, [0, 2])
    features = frozen.run(batch, last_hidden_state=False).features
    assert ran == []
    assert torch.equal(frozen.run(batch, last_hidden_state=True).features, features)
    assert ran == [1]


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"variant": "dspark", "markov_rank": 8}, {}, "loss of this dspark draft, ce=0.1,tv=1.8, needs the target"),
        ({}, {"loss": "kl"}, "loss of this dflash draft, kl=1, needs the target"),
        ({}, {"eval_acceptance_prompts": 2}, "eval_acceptance_prompts decodes with the whole target"),
    ],
)
def test_a_target_of_which_more_is_needed_is_not_cut(tmp_path, options, arguments, message):
    args = DFlashTrainingArguments(str(tmp_path), **ARGUMENTS, **arguments)
    with pytest.raises(ValueError, match=message):
        build(options_for(tmp_path, cut_target=True, **options), args)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_draft_is_trained_for_a_target_in_fewer_bits(tmp_path, name, tiny_target):
    """Its features are nearly those of the target in float32, and its weights take what the formula says."""
    library = QUANTIZATIONS[name].library
    pytest.importorskip(library, reason=f"{library} is not installed")
    args = DFlashTrainingArguments(str(tmp_path / "out"), save_strategy="no", **ARGUMENTS)
    trainer = build(options_for(tmp_path, target_quantization=name), args)
    trainer.train()
    found = memory.bytes_of(trainer.target)
    expected = memory.bytes_of(tiny_target) - memory._saved_bytes(tiny_target, QUANTIZATIONS[name].bits)
    assert found == pytest.approx(expected, rel=0.03)
    ids = torch.arange(5, 60)[None]
    batch = PackedBatch(ids, torch.ones_like(ids).bool(), torch.ones_like(ids))
    own = trainer.objective.target.run(batch, False).features
    exact = FrozenTarget(copy.deepcopy(tiny_target), [1, 2]).run(batch, False).features
    assert 0 < float((own - exact).norm() / exact.norm()) < (0.2 if name == "4bit" else 0.03)


def test_an_unknown_quantisation_is_refused_by_name(tmp_path):
    args = DFlashTrainingArguments(str(tmp_path), **ARGUMENTS)
    with pytest.raises(ValueError, match="target_quantization is '3bit'; it must be one of 8bit, 4bit, int8"):
        build(replace(options_for(tmp_path), target_quantization="3bit"), args)

"""`dflash-hub train` from end to end: data from a file, a draft on the Hub, and a stranger who uses it."""

import io
import json
import re
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from rich.color import ColorSystem
from rich.console import Console
from typer.testing import CliRunner

import training_run
from dflash_hub import DFlashDraftModel, cli
from dflash_hub.commands import train_display
from dflash_hub.commands.built_in import name_of
from dflash_hub.commands.loading import load_tokenizer
from dflash_hub.commands.screen import console
from dflash_hub.commands.training_run import tell_next
from dflash_hub.publishing.probe import digests
from dflash_hub.training import DFlashTrainingArguments
from dflash_hub.training.progress import draw
from dflash_hub.training.setup import TrainOptions, make_draft, taps_of_few_layers, unused_token
from paths import ROOT, TINY

SHAPE = ["--mask-token-id", "1", "--block-size", "8", "--num-layers", "1", "--target-layer-ids", "1", "2", "4"]
SMALL = ["--max-length", "96", "--num-anchors", "8", "--max-steps", "6", "--logging-steps", "2", "--report-to", "none"]
SMALL += ["--disable-tqdm", "true", "--use-cpu", "true", "--per-device-train-batch-size", "2"]

pytestmark = pytest.mark.usefixtures("forked_probe")
USE = """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    target = AutoModelForCausalLM.from_pretrained({target!r})
    ids = torch.arange(40, 80)[None]
    ask = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None)
    own = target.generate(ids, **ask)
    draft = AutoModel.from_pretrained({repo!r}, trust_remote_code=True)
    print(type(draft).__module__)
    print(torch.equal(own, target.generate(ids, custom_generate=draft.speculate, **ask)))
    print(torch.equal(own, target.generate(ids, custom_generate={repo!r}, trust_remote_code=True, **ask)))
"""


def pair_in(folder):
    return f"--target {name_of(str(TINY / 'target'))} --draft {folder / 'draft'}"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(console, "width", 200, raising=False)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    sources = sorted(ROOT.glob("*_dflash.py"))
    path.write_text("".join(json.dumps({"text": source.read_text()[:600]}) + "\n" for source in sources))
    return str(path)


def train(data, folder, *words: str, target=TINY / "target"):
    given = ["train", "--target", str(target), "--data", data, "--output-dir", str(folder), *SMALL, *words]
    return CliRunner().invoke(cli.app, given, env={"COLUMNS": "200"}, catch_exceptions=False)


def test_a_draft_is_trained_pushed_and_used_by_a_stranger(hub, repo_id, data, tmp_path, fresh_process):
    """Checkpoints are pushed while it trains; at the end both layouts, checked, with how the run went on the card."""
    evaluate = ["--eval-rows", "3", "--eval-strategy", "steps", "--eval-steps", "3", "--eval-acceptance-prompts", "1"]
    evaluate += ["--eval-acceptance-tokens", "8"]
    push = ["--push-to-hub", repo_id, "--save-strategy", "steps", "--save-steps", "3", "--hub-strategy", "every_save"]
    done = train(data, tmp_path / "draft", *SHAPE, *evaluate, *push)
    output = done.output
    assert f"{repo_id} is published: main at" in output
    assert f"Plot: {tmp_path / 'draft' / 'training.png'}\n" in done.stdout
    assert "{'" not in output
    assert "\x1b" not in output
    lines = done.stderr.splitlines()
    assert [line[:6] for line in lines if re.match(r"step \d of 6: loss", line)] == ["step 2", "step 4", "step 6"]
    held_out = [line for line in lines if re.match(r"step [36], held out: loss [\d.]+, accuracy ", line)]
    assert [line.count(" decoded; right at position 1, 2, ...: ") for line in held_out] == [1, 1]
    assert f'  dflash-hub generate {pair_in(tmp_path)} "Write a quicksort in Python."' in lines
    here = DFlashDraftModel.from_pretrained(tmp_path / "draft")
    assert digests(DFlashDraftModel.from_pretrained(repo_id)) == digests(here)
    assert digests(DFlashDraftModel.from_pretrained(repo_id, revision="engines")) == digests(here)
    said = fresh_process(USE.format(target=str(TINY / "target"), repo=repo_id)).splitlines()[-3:]
    assert said[0].startswith("transformers_modules.")
    assert said[1:] == ["True", "True"]
    card = ModelCard.load(repo_id)
    assert card.data.base_model is None  # a folder is none
    assert "## Training" in card.text
    assert card.text.count("training.png") == 1
    assert "accuracy at positions 1 to 7" in card.text
    assert "Nothing yet" not in card.text
    assert "learning rate 0.0006, cosine schedule" in card.text
    assert "held-out prompts decoded greedily" in card.text
    files = HfApi().list_repo_files(repo_id)
    assert {"training.png", "README.md", "modeling_dflash.py", "custom_generate/generate.py"} <= set(files)
    assert not [name for name in files if "optimizer" in name or "checkpoint" in name]
    assert any("Training in progress, step 3" in commit.title for commit in HfApi().list_repo_commits(repo_id))


LONGER = "dflash-hub train --target a --draft my-draft"


@pytest.mark.parametrize(
    ("line", "pushed", "features", "found"),
    [
        ({"acceptance_length": 2.0}, False, None, ["dflash-hub push my-draft me/my-draft --base-model a"]),
        ({"acceptance_length": 2.0}, True, None, ["dflash-hub eval --target a --draft my-draft --output-dir results"]),
        ({}, False, None, ["dflash-hub eval --target a --draft my-draft --output-dir results"]),
        (
            {"acceptance_length": 2.0, "eval_acceptance_length": 1.04},
            True,
            None,
            ["dflash-hub train --target a --data b --inspect", f"{LONGER} --data b --output-dir my-draft-longer"],
        ),
        ({"acceptance_length": 1.0}, False, "f", [f"{LONGER} --features f --output-dir my-draft-longer"]),
    ],
)
def test_what_comes_next_is_a_push_only_where_drafted_tokens_are_accepted(line, pushed, features, found, capsys):
    args = DFlashTrainingArguments(push_to_hub=pushed, max_steps=6, use_cpu=True, report_to="none")
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(log_history=[line]))
    tell_next(trainer, TrainOptions("a", "b", features=features), "my-draft")
    told = capsys.readouterr().err.splitlines()
    assert ("train longer" in " ".join(told)) == (found[0].startswith("dflash-hub train"))
    more = " --max-steps 60" if "longer" in found[-1] else ""
    assert [line.strip() for line in told[-len(found) :]] == [*found[:-1], found[-1] + more]


@pytest.mark.usefixtures("undrawn")
def test_a_run_in_a_pipe_says_how_far_the_answers_of_a_round_are(data, tmp_path, monkeypatch):
    monkeypatch.setattr("dflash_hub.commands.screen.SECONDS_OF_A_LINE", 0)
    rows = 4
    Path(data).write_text("\n".join(Path(data).read_text().splitlines()[:rows]))
    rounds = ["--regenerate-every", "1", "--regenerate-temperature", "1", "--regenerate-max-new-tokens", "2"]
    done = train(data, tmp_path / "draft", *SHAPE, *rounds, "--max-steps", "2", "--save-strategy", "no")
    told = re.findall(r"Answers of round 1: (\d+) of (\d+) rows", done.stderr)
    assert told == [(str(row), str(rows)) for row in range(1, rows + 1)]


def test_a_hub_that_is_down_at_the_end_leaves_the_draft_on_disk_and_says_how_to_push_it(hub, repo_id, data, tmp_path):
    hub.state.fail["/commit/"] = 501
    with pytest.raises(RuntimeError, match=r"(?s)the draft is safe in .*Push it later: dflash-hub push .* tester/"):
        train(data, tmp_path / "draft", *SHAPE, "--push-to-hub", repo_id)
    hub.state.fail.clear()
    words = ["push", str(tmp_path / "draft"), repo_id]
    assert "is published" in CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"}, catch_exceptions=False).output
    card = ModelCard.load(repo_id).text
    assert card.startswith(f"\n# {repo_id.split('/')[1]}\n")
    assert "## Training" in card
    assert "your-draft" not in card
    for revision in ("main", "engines"):
        assert "training.png" in HfApi().list_repo_files(repo_id, revision=revision)


def test_without_options_it_says_which_are_missing():
    with pytest.raises(ValueError, match="missing: --target, --data"):
        CliRunner().invoke(cli.app, ["train"], catch_exceptions=False)


@pytest.mark.usefixtures("undrawn")
def test_a_dry_run_checks_everything_leaves_nothing_and_tells_the_cost(data, tmp_path):
    output = train(data, tmp_path / "draft", *SHAPE, "--dry-run").output
    for text in (
        "expected peak",
        "data: ",
        "parameters",
        "GiB",
        "s a step",
        "for 6 steps",
        "reloads bit-equal",
        "the target's own",
    ):
        assert text in output
    assert not (tmp_path / "draft").exists()


@pytest.mark.usefixtures("undrawn")
def test_training_goes_on_from_a_published_draft_and_from_an_interrupted_run(data, tmp_path):
    saved = ["--save-strategy", "steps", "--save-steps", "3"]
    train(data, tmp_path / "one", "--draft", str(TINY / "draft"), *saved, "--learning-rate", "0")
    assert digests(DFlashDraftModel.from_pretrained(tmp_path / "one")) == digests(
        DFlashDraftModel.from_pretrained(TINY / "draft")
    )
    with pytest.raises(ValueError, match="checkpoint-6 is of an earlier run"):
        train(data, tmp_path / "one", "--draft", str(TINY / "draft"), *saved)
    resume = [*saved, "--resume-from-checkpoint", "true", "--max-steps", "8"]
    with pytest.raises(ValueError, match=r"learning_rate is 0.0006, but was 0.0"):
        train(data, tmp_path / "one", "--draft", str(TINY / "draft"), *resume)
    resume += ["--learning-rate", "0"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        said = train(data, tmp_path / "one", "--draft", str(TINY / "draft"), *resume).output
    assert "is not the uninterrupted one: max_steps was 6 and is 8" in said
    assert (tmp_path / "one" / "checkpoint-8").exists() or (tmp_path / "one" / "model.safetensors").exists()


@pytest.mark.usefixtures("undrawn")
def test_options_for_the_shape_of_a_fresh_draft(data, tmp_path):
    fresh = ["--mask-token-id", "1", "--block-size", "6", "--num-layers", "3", "--target_layer_ids", "0", "3"]
    train(data, tmp_path / "draft", *fresh, "--sliding-window", "32", "--causal", "--loss", "ce=0.5,kl=0.5")
    config = DFlashDraftModel.from_pretrained(tmp_path / "draft").config
    assert config.layer_types == ["sliding_attention"] * 2 + ["full_attention"]
    assert (config.sliding_window, config.is_causal, config.block_size) == (32, True, 6)


@pytest.mark.parametrize(("system", "marked"), [(None, "{}"), ("standard", "\x1b[1;32m{}\x1b[0m")])
def test_rows_are_printed_as_they_would_be_trained_on(tmp_path, monkeypatch, system, marked):
    """Without a draft, a target or a folder: brackets, or bold green where there is colour."""
    monkeypatch.setattr(console, "_color_system", system and ColorSystem.STANDARD)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"def f{n}(x):", "completion": " return x"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], {"text": "short"}, *rows]))
    output = train(str(path), tmp_path / "draft", *SHAPE, "--inspect").output
    marked = marked.format("[ return x<|endoftext|>]" if system is None else " return x<|endoftext|>")
    assert output.count(marked) == 2
    assert "rows.jsonl, line 1: " in output
    assert "rows.jsonl, line 3: 3 tokens, 3 supervised; left out, too short" in output
    assert "line 4" not in output
    assert "line 4" in train(str(path), tmp_path / "draft", *SHAPE, "--inspect", "4").output
    assert not (tmp_path / "draft").exists()


@pytest.mark.quick
@pytest.mark.usefixtures("undrawn")
def test_a_stream_is_trained_on(data, tmp_path):
    words = ["--eval-rows", "2", "--eval-strategy", "steps", "--eval-steps", "3", "--eval-acceptance-prompts", "1"]
    output = train(data, tmp_path / "draft", *SHAPE, "--streaming", *words, "--eval-acceptance-tokens", "8").output
    assert "The best evaluation: step " in output
    assert DFlashDraftModel.from_pretrained(tmp_path / "draft").config.block_size == 8


def test_mask_and_taps_of_a_small_target_are_chosen_for_it(tiny_target):
    tokenizer = load_tokenizer(str(TINY / "target"))
    options = TrainOptions(target=str(TINY / "target"), data="", num_layers=1)
    config = make_draft(options, tiny_target, tokenizer).config
    assert tokenizer.convert_ids_to_tokens(config.mask_token_id) == "<|mask|>"
    assert config.target_layer_ids == list(range(1, tiny_target.config.num_hidden_layers - 1))
    found = {layers: taps_of_few_layers(layers) for layers in (1, 2, 3, 4, 7, 8)}
    assert found == {1: [0], 2: [0], 3: [1], 4: [1, 2], 7: [1, 2, 3, 4, 5], 8: None}


class Vocabulary:
    """A tokenizer of these tokens, of which each stands for itself, save the byte FF."""

    def __init__(self, *tokens: str, added: tuple[str, ...] = (), pad: str | None = None, end: str = "e"):
        self.tokens, self.added = [*tokens, *added], added
        self.pad_token_id = self.tokens.index(pad) if pad else None
        self.bos_token_id = self.eos_token_id = self.tokens.index(end)

    def get_vocab(self):
        return {token: number for number, token in enumerate(self.tokens)}

    def get_added_vocab(self):
        return {token: self.tokens.index(token) for token in self.added}

    def convert_tokens_to_ids(self, token):
        return self.tokens.index(token)

    def decode(self, ids):
        return "\ufffd" if self.tokens[ids[0]] in ("<0xFF>", "\u00ff") and "a" not in self.tokens else "\u00ff"


@pytest.mark.parametrize(
    ("tokenizer", "rows", "found"),
    [
        (Vocabulary("e", "b"), 3, 2),
        (Vocabulary("e", "b", added=("<|mask|>",)), 3, 2),
        (Vocabulary("e", "b", "\u00ff"), 3, 2),
        (Vocabulary("e", "<0xFF>", "b"), 3, 1),
        (Vocabulary("e", "p", "\u00ff", "a", pad="p"), 4, 1),
        (Vocabulary("e", "p", pad="e"), 2, None),
    ],
)
def test_a_fresh_draft_has_a_mask_token_that_no_text_has(tokenizer, rows, found):
    """An unused row, a token named so, a byte that no UTF-8 has, the padding; or the option must be given."""
    target = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(rows, 1))
    if found is None:
        with pytest.raises(ValueError, match="--mask-token-id must be given"):
            unused_token(target, tokenizer)
    else:
        assert unused_token(target, tokenizer) == found


def test_on_a_terminal_one_display_shows_step_loss_positions_and_time_left(tmp_path, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)
    monkeypatch.setattr(train_display, "notes", screen)
    trainer = training_run.trainer(tmp_path, max_steps=3, eval_rows=4, eval_strategy="steps", eval_steps=3)
    with train_display.shown(trainer) as display:
        trainer.train()
        assert display.live is None
        display.on_train_begin(trainer.args, trainer.state, None)
    text = screen.file.getvalue()
    for found in (
        "step 3 of 3",
        "100%",
        "tokens a cycle expected",
        "right at position 1, 2, ...: ",
        "step 3, held out:",
    ):
        assert found in text, found
    assert not [one for one in trainer.callback_handler.callbacks if "Progress" in type(one).__name__]
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l") > 0  # the cursor is back


def test_the_plot_has_a_panel_for_what_was_logged_and_no_other(tmp_path):
    history = [{"step": 1, "loss": 2.0, "acceptance_length": 1.5}]
    assert not draw(tmp_path / "x.png", [{"step": 1, "train_runtime": 1.0}])
    widths = []
    for more in ({}, {"step": 1, "eval_loss": 1.0, "eval_accuracy_1": 0.01, "eval_accuracy_2": 0.0}):
        assert draw(tmp_path / "x.png", [*history, more], "run")
        widths.append(struct.unpack(">I", (tmp_path / "x.png").read_bytes()[16:20])[0])
    assert widths[1] / widths[0] == pytest.approx(3 / 2, rel=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*SHAPE, "--nonsense", "1"], "--nonsense"),
        ([*SHAPE, "--eval-rows", "999"], "eval_rows is 999, but the data has only"),
        ([*SHAPE[:-3], "1", "9"], "asks for layer 9"),
        (["--mask-token-id", "512", *SHAPE[2:]], "mask_token_id is 512"),
        ([*SHAPE, "--variant", "dspark", "--markov-head-type", "deep"], "markov_head_type is 'deep'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(data, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "draft", *words)
    assert not (tmp_path / "draft" / "model.safetensors").exists()


@pytest.mark.usefixtures("undrawn")
def test_regenerated_text_trains(data, tmp_path):
    words = ["regenerate", "--target", str(TINY / "target"), "--data", data, "--output", str(tmp_path / "own.jsonl")]
    words += ["--max-new-tokens", "32", "--temperature", "0", "--prompt-tokens", "20", "--limit", "4"]
    output = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"}, catch_exceptions=False).output
    assert "own.jsonl holds 4 rows" in output.replace("\n", "")
    again = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert again.stdout == (
        f"{tmp_path / 'own.jsonl'}: 4 of 4 already there; nothing to do. To have them "
        "answered anew, or with other options, choose another --output.\n"
    )
    with pytest.raises(ValueError, match=r"made with --temperature 0.0, and this call has --temperature 1.0. Give"):
        CliRunner().invoke(cli.app, [*words, "--temperature", "1"], catch_exceptions=False)
    train(str(tmp_path / "own.jsonl"), tmp_path / "draft", *SHAPE)
    assert (tmp_path / "draft" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("missing", "statement", "complaint"),
    [
        ("accelerate", "from dflash_hub.training import DFlashTrainer", "Training needs accelerate"),
        ("matplotlib", "from dflash_hub.training import DFlashTrainer", "Training needs matplotlib"),
        ("httpx_is_not_asked_for", "from dflash_hub.training import DFlashTrainer", None),
        ("accelerate", "import dflash_hub.training.regenerate", None),
        (
            "datasets",
            "import dflash_hub.cli as c; sys.argv = ['x', 'regenerate', *COMMON]; c.main()",
            "Regenerating answers needs datasets",
        ),
    ],
)
def test_each_command_asks_for_its_own_extras_only(fresh_process, missing, statement, complaint):
    code = f"""
    import importlib.util, sys
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *args: None if name == {missing!r} else found(name, *args)
    COMMON = ["--target", "x", "--data", "y", "--output", "z"]
    {statement}
    """
    output = fresh_process(code, block=False, fails=complaint is not None)
    assert complaint is None or complaint in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune", "learning_rate"], "--tune has 'learning_rate'; write options and their values"),
        (["--tune", "lerning_rate=1,2", "--eval-rows", "2"], "did you mean --learning-rate"),
        (["--tune", "learning_rate=1e-3,2e-3", "--eval-rows", "2"], "--tune compares by what held-out prompts decode"),
    ],
)
def test_a_comparison_that_says_nothing_is_refused(data, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "draft", *SHAPE, *words)


@pytest.mark.usefixtures("undrawn")
def test_options_are_compared_by_what_their_drafts_decode(data, tmp_path):
    words = ["--tune", "learning_rate=1e-3,1e-2", "block-size=4", "--tune-steps", "2", "--eval-rows", "3"]
    words += ["--eval-acceptance-prompts", "1", "--eval-acceptance-tokens", "16"]
    output = train(data, tmp_path / "draft", *SHAPE, *words).output
    rows = [line.split() for line in output.splitlines()]
    table = rows[next(number for number, row in enumerate(rows) if "learning_rate" in row[:1]) :]
    assert [row[:2] for row in table[1:3]] == [["1e-3", "4"], ["1e-2", "4"]]
    assert "After 2 steps most is accepted with --learning_rate=" in output
    assert not (tmp_path / "draft").exists()

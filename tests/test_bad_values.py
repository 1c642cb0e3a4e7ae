"""Bad values for every argument of every public call: an error of ours, or the value serves."""

import re
import shutil
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import dflash_hub
import tiny
from dflash_hub import (
    DecodeStatistics,
    DFlash2Config,
    DFlash2DraftModel,
    DFlashConfig,
    DFlashDraftModel,
    DFlashDraftSpec,
    DominoConfig,
    DSparkConfig,
    build_target_layer_ids,
    cli,
    dflash_generate,
    load_draft,
    register_dflash_draft,
    registry,
    resolve_dflash_draft_spec,
)
from dflash_hub.commands.words import in_flags
from dflash_hub.evaluation import compare, greedy, positions_left, stop_token_ids, warm_up
from dflash_hub.findings_dflash import explained
from dflash_hub.publishing import plan, publish
from dflash_hub.publishing.refresh import refresh
from dflash_hub.training import DFlashTrainingArguments
from paths import TINY

HOME = Path(dflash_hub.__file__).resolve().parent
ERRORS = (ValueError, OSError, TypeError, RuntimeError)
EVERY_TOKEN = list(range(tiny.VOCAB))
FIELDS = {
    **{"block_size": 5, "mask_token_id": 3, "target_layer_ids": [0, 2], "num_target_layers": 4, "vocab_size": 12},
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024},
}
MORE_FIELDS = {
    **{"target_hidden_size": None, "is_causal": None, "layer_types": None, "sliding_window": None},
    **{"rope_parameters": None, "rope_theta": 1e4, "dtype": None, "final_logit_softcapping": None},
    **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0},
}


def bad_values(folder: Path) -> dict:
    """Values that few arguments may have, by a name for messages."""
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    return {
        **{"None": None, "True": True, "5": 5, "-1": -1, "2.5": 2.5, "nan": float("nan"), "huge": 10**30},
        **{"empty text": "", "missing": "no/such", "missing path": str(folder / "file" / "no")},
        **{"like a URL": "hf://a//b c?", "file": str(folder / "file"), "empty folder": folder / "empty"},
        **{"[]": [], "[None]": [None], "{}": {}, "{'a': 1}": {"a": 1}, "object": object(), "class": dict},
        **{"nan tensor": torch.full((2, 3, 1), torch.nan), "no ids": torch.zeros(3, 0, dtype=torch.long)},
    }


def calls(folder: Path, target, draft) -> dict:
    """Every public call with arguments that it takes, by a name for messages."""
    saved = folder / "draft"
    draft.save_pretrained(saved)
    ids, spec = tiny.prompt(6), DFlashDraftSpec("a/b", architectures=("X",))
    second = tiny.draft(target, **tiny.SECOND)
    block = {"noise_embeds": torch.zeros(1, 5, 32), "context_hidden_states": torch.zeros(1, 3, 64)}
    optional = dict.fromkeys(("attention_mask", "position_ids", "past_key_values", "use_cache", "cache"))
    ours = {"statistics": None, "draft_sampling": "coupled", "capture": "eager", "strict": False, "proposer": None}
    names = {"targets": (), "architectures": (), "note": "", "subfolder": "", "details": {}}
    unknown = ("second", "revision", "hidden_size", "num_target_layers", "vocab_size", "license", "gated", "draft_cls")
    trained = {"num_anchors": 5, "loss_gamma": None, "loss": "tv", "selector_loss_weight": 1.0, "max_length": 5}
    trained |= {
        "loss_weights": "dpace",
        "dpace_alpha": 0.5,
        "confidence_loss_weight": 1.0,
        "base_loss_until": 0.5,
        "given_prefix": 0.9,
    }
    trained |= {"packing": True, "draft_attention": "auto", "eval_acceptance_prompts": 0, "eval_acceptance_tokens": 5}
    pair = {"draft": draft, "target": target, "input_ids": ids}
    loading = {"dtype": None, "subfolder": "", "revision": "main"}
    fresh = {"mask_token_id": 3, "target_layer_ids": [0, 2], "block_size": 5, "num_hidden_layers": 2, "rope_theta": 1e4}

    def generate(custom_generate=draft.speculate, **keywords):
        return target.generate(ids, max_new_tokens=2, do_sample=False, custom_generate=custom_generate, **keywords)

    def arguments(**keywords):
        return DFlashTrainingArguments(report_to="none", use_cpu=True, output_dir=str(folder / "out"), **keywords)

    return {
        "spec_generate": (
            draft.spec_generate,
            {
                "target": target,
                "input_ids": ids,
                "max_new_tokens": 2,
                "stop_token_ids": EVERY_TOKEN,
                "temperature": 0.0,
            },
        ),
        "generate": (generate, ours),
        "generate(draft=)": (lambda **keywords: generate(dflash_generate, **keywords), {"draft": draft}),
        "dflash_generate": (
            lambda **keywords: dflash_generate(max_new_tokens=2, **keywords),
            {"model": target, "draft": draft, "input_ids": ids},
        ),
        "speculate": (lambda **all: draft.speculate(max_new_tokens=2, **all), {"model": target, "input_ids": ids}),
        "forward": (draft.forward, block | optional),
        "DFlashConfig": (DFlashConfig, FIELDS | MORE_FIELDS),
        "DFlash2Config": (DFlash2Config, FIELDS | tiny.SECOND),
        "DSparkConfig": (DSparkConfig, FIELDS | tiny.DSPARK | {"markov_head_type": "gated"}),
        "DominoConfig": (DominoConfig, FIELDS | tiny.DOMINO),
        "from_dict": (DFlashConfig.from_dict, {"config_dict": draft.config.to_dict()}),
        "config.from_pretrained": (DFlashConfig.from_pretrained, {"pretrained_model_name_or_path": saved}),
        "config.save_pretrained": (draft.config.save_pretrained, {"save_directory": folder / "c", "layout": "hub"}),
        "DFlashDraftModel": (DFlashDraftModel, {"config": draft.config}),
        "DFlash2DraftModel": (DFlash2DraftModel, {"config": second.config}),
        "from_pretrained": (
            DFlashDraftModel.from_pretrained,
            {"pretrained_model_name_or_path": saved, "config": None, "token": None, "block_size": 5} | loading,
        ),
        "load_draft": (load_draft, {"name": saved, "hidden_size": 32} | loading),
        "save_pretrained": (
            draft.save_pretrained,
            {"save_directory": folder / "s", "layout": "hub", "max_shard_size": "5GB"},
        ),
        "resolve": (
            resolve_dflash_draft_spec,
            {"architectures": ["Qwen3ForCausalLM"], "target": "Qwen/Qwen3-4B"},
        ),
        "register": (register_dflash_draft, {"architecture": "X", "spec": "a/b", "overwrite": False}),
        "DFlashDraftSpec": (DFlashDraftSpec, {"first": "a/b"} | names | dict.fromkeys(unknown)),
        "spec.load": (DFlashDraftSpec(str(saved)).load, {"repo_id": None, "dtype": None, "block_size": 5}),
        "spec.build": (spec.build, {"target_config": target.config, "variant": None} | fresh),
        "spec.serves": (spec.serves, {"architecture": "Qwen3ForCausalLM"}),
        "spec.matches_shape": (spec.matches_shape, {"text_config": target.config}),
        "build_target_layer_ids": (build_target_layer_ids, {"num_target_layers": 36, "num_draft_layers": 5}),
        "drafts_for": (registry.drafts_for, {"target": "Qwen/Qwen3-4B"}),
        "compare": (compare, pair | {"max_new_tokens": 2, "streamer": None, "capture": "eager"}),
        "warm_up": (warm_up, pair | {"capture": "eager"}),
        "greedy": (greedy, {"target": target, "input_ids": ids, "max_new_tokens": 2}),
        "positions_left": (positions_left, {"target": target, "input_ids": ids}),
        "stop_token_ids": (stop_token_ids, {"target": target}),
        "DFlashTrainingArguments": (arguments, trained),
    }


ENDLESS = {("compare", "max_new_tokens", "huge"), ("greedy", "max_new_tokens", "huge")}
"""Valid, and takes for ever."""


def is_ours(error: Exception, argument: str) -> bool:
    """Whether a check of ours raised it, or its message names the argument."""
    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    ours = last.is_relative_to(HOME) and not last.is_relative_to(HOME / "tests")
    return isinstance(error, ERRORS) and (ours or argument in str(error))


@pytest.fixture(scope="module")
def pair():
    target = tiny.target("qwen3")
    return target, tiny.draft(target, num_hidden_layers=1)


def foreign_errors(calls: dict, values: dict, skip: set = frozenset()) -> list[str]:
    found = []
    for name, (function, good) in calls.items():
        for argument, (label, value) in ((one, bad) for one in good for bad in values.items()):
            if (name, argument, label) in skip:
                continue
            try:
                function(**(good | {argument: value}))
            except Exception as error:
                if not is_ours(error, argument):
                    found.append(f"{name}({argument}={label}): {type(error).__name__}: {error}"[:200])
    return found


def test_no_error_of_another_library_comes_out_of_a_public_call(hub, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "no/such" is a folder that can be written
    warnings.simplefilter("ignore")
    assert foreign_errors(calls(tmp_path, *pair), bad_values(tmp_path), ENDLESS) == []


def test_neither_does_one_come_out_of_a_push_or_a_refresh(hub, pair, tmp_path):
    values = bad_values(tmp_path)
    options = {name: values[name] for name in ("5", "nan", "empty text", "[None]", "class", "no ids")}
    empty = str(tmp_path / "empty")
    pushes = {
        "push_to_hub": (pair[1].push_to_hub, {"repo_id": "", "layouts": ("hub",), "layout": None}),
        "publish": (publish, {"directory": empty, "repo_id": "a b", "options": None}),
        "plan": (plan, {"directory": empty, "repo_id": "a b", "options": None}),
        "refresh": (refresh, {"repo_id": "tester/none", "options": None}),
    }
    assert foreign_errors(pushes, options) == []


@pytest.mark.quick
def test_the_original_error_is_the_cause_and_the_sentence_says_what_to_do():
    with (
        pytest.raises(ValueError, match=r"(?s)x could not be read: 'a'\n.*Do that") as caught,
        explained("x could not be read", "Do that."),
    ):
        {}["a"]
    assert isinstance(caught.value.__cause__, KeyError)


# Arguments that `generate` drops beside a decoding function -----------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("assistant_model", "target"),
        ("assistant_tokenizer", object()),
        ("synced_gpus", True),
        ("prompt_lookup_num_tokens", 3),
        ("assistant_early_exit", 1),
        ("use_mtp", True),
        ("force_words_ids", [[[1]]]),
        ("constraints", [object()]),
        ("num_beam_groups", 2),
        ("diversity_penalty", 0.5),
        ("num_assistant_tokens", 3),
        ("assistant_confidence_threshold", 0.1),
        ("max_matching_ngram_size", 2),
        ("is_assistant", True),
        ("speculation_type", "other"),
    ],
)
def test_what_generate_would_ignore_beside_a_draft_is_refused_by_name(pair, argument, value):
    target, draft = pair
    value = target if value == "target" else value
    for function in (draft, draft.speculate, dflash_generate(draft=draft)):
        with pytest.raises(ValueError, match=f"cannot be used with {argument}"):
            target.generate(tiny.prompt(6), max_new_tokens=4, custom_generate=function, **{argument: value})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"statistics": True}, "statistics is True; it must be a DecodeStatistics"),
        ({"statistics": DecodeStatistics}, "statistics is the class DecodeStatistics; pass an object"),
        ({"statistics": "x"}, "statistics is 'x'"),
        ({"strict": "yes"}, "strict is 'yes'; it must be one of True, False"),
        ({"capture": None}, "capture is None; it must be one of auto"),
        ({"proposer": 5}, "proposer is 5"),
        ({"proposer": lambda chain: 5}, "proposer= returned is 5"),
        ({"custom_generate": DFlashDraftModel}, "custom_generate is the class DFlashDraftModel"),
        ({"custom_generate": DFlashDraftModel.speculate}, "custom_generate is `speculate` of a class"),
        ({"custom_generate": dflash_generate, "draft": 5}, "draft is 5; pass a loaded draft"),
    ],
)
def test_keywords_of_ours_are_refused_in_one_sentence(pair, keywords, message):
    target, draft = pair
    with pytest.raises(ValueError, match=message) as caught:
        target.generate(tiny.prompt(6), max_new_tokens=4, **({"custom_generate": draft.speculate} | keywords))
    assert "\n" not in str(caught.value)


def test_a_draft_is_taken_in_every_spelling(pair, tmp_path):
    target, draft = pair
    draft.save_pretrained(tmp_path)
    ids, folder, plain = tiny.prompt(6), str(tmp_path), tiny.greedy(pair[0], tiny.prompt(6), 12)
    asked = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    texts = [
        target.generate(ids, custom_generate=draft, **asked),
        target.generate(ids, custom_generate=draft, assistant_model=draft, **asked),
        target.generate(ids, custom_generate=dflash_generate(draft=draft), **asked),
        target.generate(ids, custom_generate=dflash_generate(draft=folder), **asked),
        target.generate(ids, custom_generate=dflash_generate, draft=DFlashDraftSpec(folder), **asked),
        dflash_generate(target, ids, draft=tmp_path, **asked),
        dflash_generate(target, input_ids=ids, draft=draft, **asked),
        draft.speculate(target, ids, **asked),
        draft(target, ids, **asked),
    ]
    assert all(torch.equal(text, plain) for text in texts)


@pytest.mark.parametrize("spelling", ["draft", "speculate", "dflash_generate"])
def test_streamer_and_tokenizer_reach_every_spelling(pair, tiny_target, tiny_draft, spelling):
    class Streamer:
        parts = []

        def put(self, value):
            self.parts.append(value)

        def end(self):
            self.parts.append(None)

    function = {"draft": tiny_draft, "speculate": tiny_draft.speculate, "dflash_generate": dflash_generate}[spelling]
    more = {"draft": tiny_draft} if spelling == "dflash_generate" else {}
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    ids = tokenizer("def main(", return_tensors="pt").input_ids
    asked = {"max_new_tokens": 30, "do_sample": False, "stop_strings": ["\n"], "tokenizer": tokenizer}
    Streamer.parts.clear()
    text = tiny_target.generate(ids, custom_generate=function, streamer=Streamer(), **asked, **more)
    assert torch.equal(text, tiny_target.generate(ids, **asked))
    assert len(Streamer.parts) == 2 + text.shape[1] - ids.shape[1]


def test_a_draft_as_an_assistant_alone_says_what_to_pass_instead(pair):
    target, draft = pair
    with pytest.raises(ValueError, match=r"custom_generate=draft\.speculate"):
        target.generate(tiny.prompt(6), max_new_tokens=4, assistant_model=draft)
    assert not hasattr(draft, "generation_config")


# The end of the target's positions ------------------------------------------------------------------------------------


def test_a_text_beyond_the_targets_positions_is_warned_of_before_its_first_token(pair, monkeypatch):
    from dflash_hub import support_dflash

    target, draft = pair
    warned, told = [], []
    monkeypatch.setattr(support_dflash.logger, "warning_once", warned.append)
    stop = {"stopping_criteria": [lambda ids, scores: told.append(len(warned)) or torch.ones(1, dtype=torch.bool)]}
    for new, count in ((1018, 0), (1019, 1)):
        target.generate(tiny.prompt(6), max_new_tokens=new, custom_generate=draft.speculate, **stop)
        assert len(warned) == count
    assert told == [0, 1]
    assert "1,025 tokens" in warned[0]
    assert "1,024" in warned[0]
    draft.spec_generate(target, tiny.prompt(6), max_new_tokens=1019, stop_token_ids=EVERY_TOKEN)
    assert len(warned) == 2


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("max_length is 1; it must be at least 2.", "--max-length is 1; it must be at least 2."),
        ("choose them yourself: target_layer_ids=[...].", "choose them yourself: --target-layer-ids [...]."),
        ("pass sliding_window=", "pass --sliding-window"),
        ("config.json says block_size is 'x'", "config.json says block_size is 'x'"),
        ("dflash_config.block_size=3", "dflash_config.block_size=3"),
        ("Train one with spec.build()", "Train one with `dflash-hub train`"),
        ("2 things:\n- loss is 'x'.\n- The loss falls.", "2 things:\n- --loss is 'x'.\n- The loss falls."),
        ("cut_target is True, but max_length decodes", "--cut-target is given, but --max-length decodes"),
        ("or leave features out.", "or leave --features out."),
        ("leave out streaming.", "leave out --streaming."),
        ("--max_length needs more; see a/max_length.", "--max-length needs more; see a/max_length."),
    ],
)
@pytest.mark.quick
def test_advice_at_the_shell_is_in_flags(message, said):
    names = ["max_length", "target_layer_ids", "sliding_window", "block_size", "loss", "cut_target", "features"]
    assert in_flags(message, [*names, "streaming"]) == said


DRAFT = ["--draft", str(TINY / "draft")]
TARGET = ["--target", str(TINY / "target")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "--target", ""], "--target is ''"),
        (["generate", "x", "--target", "/no/such"], "There is no folder /no/such"),
        (["generate", "x", "--target", str(TINY / "draft")], "which is a draft"),
        (["generate", "x", *TARGET, "--draft", ""], "''"),
        (["generate", "x", *TARGET, *DRAFT, "--dtype", "foo"], "--dtype is 'foo'"),
        (["generate", "x", *TARGET, *DRAFT, "--dtype", "nn"], "--dtype is 'nn'"),
        (["generate", "x", *TARGET, *DRAFT, "--device", "foo"], "--device is 'foo'"),
        (["generate", "x", *TARGET, *DRAFT, "--capture", "foo"], "--capture is 'foo'"),
        (["generate", "", *TARGET, *DRAFT], "Error: The prompt is empty"),
        (["demo", "--variant", "foo"], "--variant is 'foo'"),
        (["drafts", "--target", "foo"], "No draft is known for foo"),
        (["resolve", ""], "target is ''; pass a Hub id or a folder"),
        (["resolve", "./unknown"], "`dflash-hub train`"),
        (["push", str(TINY / "draft"), "a b"], "no repository can be named so"),
        (["refresh", "/no/such"], "which is a path; pass the name of a repository"),
        (
            ["regenerate", *TARGET, "--data", "/no/such", "--output", "x"],
            "--data is /no/such: there is no such file or folder",
        ),
        (["regenerate", *TARGET, "--data", "x", "--output", "/"], "--output is the folder /"),
        (["train", "--target", "/no/such", "--data", "x"], "There is no folder /no/such"),
        (["train", *TARGET, "--data", "x", "--loss", "5"], "--loss is '5'"),
        (["train", *TARGET, "--data", "x", "--dpace-alpha", "0"], "--dpace-alpha is 0"),
        (["train", *TARGET, "--data", "x", "--mask-token-id", "1"], "x could not be read"),
    ],
)
def test_a_bad_value_at_the_shell_is_one_line_in_flags(hub, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # a training locks its output folder
    shutil.copytree(TINY / "target", "unknown")
    monkeypatch.setattr("sys.argv", ["dflash-hub", *words])
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error.replace("\n", " ")), error


def test_generate_at_the_shell_stops_at_the_end_of_the_targets_positions(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY / "target")
    model.config.max_position_embeddings = 40
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY / "target").save_pretrained(tmp_path)
    words = ["generate", "def main(", "--target", str(tmp_path), *DRAFT, "--max-new-tokens", "100000"]
    done = CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert "--max-new-tokens is 100,000, but the target was made for texts of 40 tokens" in done.output
    assert done.exit_code == 0
    words[1] = "x " * 100
    with pytest.raises(ValueError, match="Shorten it"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)

"""The command line, as a user types it."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import typer
from huggingface_hub import HfApi
from rich.console import Console
from transformers import AutoConfig
from typer.testing import CliRunner

import tiny
import tiny_checkpoints
from dflash_hub import cli, evaluation
from dflash_hub.adaptive_dflash import MEASURED_FROM
from dflash_hub.catalogue import rows
from dflash_hub.commands import answers
from dflash_hub.commands.built_in import TARGET
from dflash_hub.commands.drafts import _Line, show
from dflash_hub.commands.features_run import write_features
from dflash_hub.commands.loading import Loaded, find_draft, load_target, load_tokenizer
from dflash_hub.commands.mistakes import listed
from dflash_hub.commands.screen import console, hanging, notes
from dflash_hub.generation_dflash import DecodeStatistics
from dflash_hub.kinds import KINDS
from dflash_hub.registry import CATALOGUE, drafts_for
from paths import TINY

RUNNER = CliRunner()
AS_MAIN = "import runpy; runpy.run_module('dflash_hub', run_name='__main__')"
"""What `python -m dflash_hub` does; a process that was forked, and has imported torch and transformers, runs it."""


def run(*words: str):
    return RUNNER.invoke(cli.app, list(words), env={"COLUMNS": "200"}, catch_exceptions=False)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(console, "width", 200, raising=False)


def test_python_dash_m_runs_it_and_errors_have_no_traceback(servers):
    words = ("-m", "push", "no/such/folder", "me/draft")
    done = servers.models.run(*words, code=AS_MAIN)
    assert done.returncode == 1
    assert "Error: no/such/folder is not a folder" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_charts_are_drawn_where_a_notebook_of_another_environment_runs_the_command(servers):
    code = "import contextlib, runpy\nwith contextlib.suppress(SystemExit):\n"
    code += "    runpy.run_module('dflash_hub', run_name='__main__')\nimport matplotlib"
    done = servers.models.run("-m", "version", code=code, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr


def test_an_error_that_nobody_expects_shows_its_traceback(monkeypatch):
    def broken(**options):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(KeyError, match="a fault of ours"):
        cli.main()


def test_the_demo_shows_both_texts_and_the_figures():
    output = run("demo", "--prompts", "1", "--capture", "off").output
    for text in ("the target alone", "with DFlash", "tokens/s", "acceptance length", "tokens per cycle"):
        assert text in output
    assert "The two texts are identical." in output


@pytest.fixture
def differing(monkeypatch):
    """Both texts were generated, and differ in their last token."""
    found = evaluation.Comparison(((5, 6),), ((5, 7),), 1.0, 1.0, (2,))
    monkeypatch.setattr(evaluation, "compare", lambda *args, **kwargs: found)


def assert_reported(stderr: str) -> None:
    import torch
    import transformers

    from dflash_hub import __version__

    versions = (f"dflash-hub {__version__}", f"torch {torch.__version__}", f"transformers {transformers.__version__}")
    for text in ("Error: The two texts differ", "Please report it", *versions):
        assert text in stderr


def test_a_demo_whose_texts_differ_fails_and_asks_for_a_report(differing, monkeypatch, capsys):
    done = run("demo", "--prompts", "1", "--capture", "off")
    assert "The two texts are NOT identical." in done.stdout
    assert done.exit_code == 1
    assert_reported(done.stderr)
    monkeypatch.setattr(sys, "argv", ["dflash-hub", "demo", "--prompts", "1", "--capture", "off"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert_reported(capsys.readouterr().err)


PAIR = ["--target", str(TINY / "target"), "--draft", str(TINY / "draft")]


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0)])
def test_generate_fails_on_differing_texts_in_float32_alone(dtype, status, monkeypatch):
    monkeypatch.setattr(answers.Answerer, "alone", lambda *args: ((5, 6), 1.0))
    done = run("generate", "def main(", *PAIR, "--dtype", dtype, "--max-new-tokens", "8", "--compare")
    assert "The two texts are NOT identical." in done.stderr
    assert done.exit_code == status
    if status:
        assert_reported(done.stderr)
    else:
        assert "In bfloat16 a near-tie" in done.stderr


def own_text(row, tokens: int, **options) -> str:
    """What the target itself writes after these tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    row = tokenizer(row, return_tensors="pt").input_ids if isinstance(row, str) else row
    text = tiny.greedy(AutoModelForCausalLM.from_pretrained(TINY / "target"), row, tokens, **options)
    return tokenizer.decode(text[0, row.shape[1] :], skip_special_tokens=True)


@pytest.mark.quick
def test_the_answer_alone_is_on_stdout_and_only_our_notes_are_on_stderr(tmp_path, servers):
    (tmp_path / "prompt.txt").write_text("def main(")
    words = ["generate", "--file", str(tmp_path / "prompt.txt"), *PAIR, "--max-new-tokens", "40"]
    done = servers.models.run("-m", *words, code=AS_MAIN, NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == own_text("def main(", 40).rstrip("\n")
    loading, prompt, figures, *rest = done.stderr.splitlines()
    assert loading in (f"Loading {TINY / 'target'}", "Loading demo")
    assert prompt == "> def main("
    assert re.fullmatch(
        r"\[40 tokens, [\d.]+ tokens/s, [\d.]+ times the target alone \(estimated\), [\d.]+ tokens a cycle\]", figures
    )
    assert [line for line in rest if not line.startswith("Note: The draft does not help")] == []


@pytest.mark.parametrize(
    ("words", "least", "most"),
    [
        (["--proposal", "plain"], 1, 1),
        (["--proposal", "chain", "--width", "1"], 1.5, 2),
        (["--proposal", "tree", "--width", "30"], 3, 8),
    ],
)
def test_generate_compares_with_the_target_alone_and_verifies_what_is_asked_for(words, least, most):
    """The draft's whole chain would give 2.75 tokens a cycle."""
    prompt = "# Copyright 2001 by the authors\n#\n# Licensed"
    done = run("generate", prompt, *PAIR, "--max-new-tokens", "12", "--compare", *words)
    assert "times the target alone (measured)" in done.stderr
    assert "The two texts are identical." in done.stderr
    assert least <= float(re.search(r"([\d.]+) tokens a cycle", done.stderr)[1]) <= most


@pytest.mark.parametrize(
    ("proposal", "tokens", "measured"),
    [("auto", MEASURED_FROM, True), ("auto", MEASURED_FROM - 1, False), ("chain", MEASURED_FROM, False)],
)
def test_costs_of_a_long_answer_are_measured_before_it_is_timed(proposal, tokens, measured):
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    experiences = draft.speculate.experiences
    experiences.clear()
    answerer = answers.Answerer(Loaded(target, draft, ()), None, answers.Sampling())
    answerer.proposing = {"proposal": proposal}
    answerer.warm_up(tiny.prompt(9), tokens)
    assert list(experiences.get(target, {})) == ([(1, "eager")] if measured else [])


def test_sampled_answers_follow_the_seed_and_end_at_a_text(monkeypatch):
    words = ["--quiet", "generate", "-", *PAIR, "--temperature", "1.2", "--top-k", "40", "--top-p", "0.9"]
    words += ["--max-new-tokens", "24"]

    def drawn(*more: str) -> str:
        done = RUNNER.invoke(cli.app, [*words, *more], input="def main(", catch_exceptions=False)
        assert done.stderr == ""
        return done.stdout

    first = drawn("--seed", "3")
    assert first == drawn("--seed", "3") != drawn("--seed", "4")
    end = first.strip()[3:5]
    assert drawn("--seed", "3", "--stop", end).rstrip("\n") == first[: first.index(end) + len(end)]


def test_the_figures_after_a_sampled_answer_are_of_this_very_call():
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    tokenizer = load_tokenizer(str(TINY / "target"))
    answerer = answers.Answerer(Loaded(target, draft, ()), tokenizer, answers.Sampling(temperature=1.0), "eager")
    answerer.warm_up(tiny.prompt(9), 12)
    for size in (12, 7):
        answer = answerer.answer(tiny.prompt(9), size)
        assert 1 + sum(answer.statistics.committed) == len(answer.tokens) == size
        line = answers.figures(answer, 1.0, "estimated")
        assert line.startswith(f"{size} tokens, ")
        assert line.endswith(f"{(size - 1) / len(answer.statistics.committed):.2f} tokens a cycle")


TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture
def chatty(tmp_path):
    """The built-in target with a chat template."""
    folder = tmp_path / "target"
    shutil.copytree(TINY / "target", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def conversation(*messages: str) -> str:
    roles = ["system", *["user", "assistant"] * len(messages)]
    lines = [f"{role}: {message}\n" for role, message in zip(roles, messages, strict=False)]
    return "".join([*lines, "assistant:"])


def test_a_conversation_has_a_history_and_an_answer_can_be_ended(chatty, monkeypatch):
    words = [
        "generate",
        "one",
        "--chat",
        "--system",
        "be brief",
        "--target",
        str(chatty),
        "--draft",
        str(TINY / "draft"),
    ]
    words += ["--max-new-tokens", "12"]
    put, interrupted = answers._Writer.put, []

    def put_or_end(writer, value):
        put(writer, value)
        if len(interrupted) < 4 and len(writer.tokens) > 5 and "three" in asked[-1]:
            interrupted.append(writer.tokens)
            raise KeyboardInterrupt

    asked, encode = [], answers.encode

    def asking(tokenizer, turn, template):
        asked.append(str(turn[-1]))
        return encode(tokenizer, turn, template)

    monkeypatch.setattr(answers, "encode", asking)
    monkeypatch.setattr(answers._Writer, "put", put_or_end)
    typed = "two\n/clear\nthree\nfour\n/exit\nnever\n"
    done = RUNNER.invoke(cli.app, words, input=typed, catch_exceptions=False)
    assert done.exit_code == 0
    first = own_text(conversation("be brief", "one"), 12)
    second = own_text(conversation("be brief", "one", first, "two"), 12)
    third = own_text(conversation("be brief", "three"), 12)
    assert done.stdout.startswith(f"{first}\n{second}\n")
    ended = done.stdout.removeprefix(f"{first}\n{second}\n")
    part = next(third[:length] for length in range(len(third), 0, -1) if ended.startswith(third[:length]))
    assert 0 < len(part) < len(third)
    fourth = own_text(conversation("be brief", "three", part, "four"), 12)
    assert ended.removeprefix(part).strip() == fourth.strip()
    assert "Stopped after 6 tokens." in done.stderr
    assert "The conversation is forgotten." in done.stderr
    assert "never" not in str(asked)


EMPTY = "The prompt is empty"
NO_FLOAT = "dtype is 'float17'; it must be auto, or a dtype of torch"
NO_FOLDER = "There is no folder ./no."
NO_TOKENIZER = "has no tokenizer; save that of its model with it"
A_DRAFT = "which is a draft; pass the model that it was trained for"
A_TARGET = "which is no DFlash draft but a model of its own (Qwen3ForCausalLM)"
OUTPUT = ["--output-dir", "out"]
PUSHED = ["--output-dir", "out", "--push-to-hub", "me/x"]
TRAINED = ["--target", PAIR[1], "--data", "a-file", *OUTPUT]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--quiet", "generate", "hi", *PAIR, "-v"], ["--verbose and --quiet are given together"]),
        (["generate", " ", *PAIR], [EMPTY]),
        (["generate", "hi", *PAIR, "--dtype", "float17"], [NO_FLOAT]),
        (["generate", "hi", *PAIR, "--dtype", "int8"], ["--dtype is 'int8'"]),
        (["generate", "hi", *PAIR, "--device", "cuda:7"], ["--device is 'cuda:7', which cannot be used here"]),
        (["generate", "hi", *PAIR, "--capture", "fast"], ["--capture is 'fast'; it must be one of auto, "]),
        (["generate", "hi", *PAIR, "--proposal", "trees"], ["--proposal is 'trees'; it must be one of auto, chain"]),
        (["generate", "hi", *PAIR, "--width", "3"], ["--width is 3, but --proposal auto has no width to set"]),
        (["generate", "hi", *PAIR, "--file", "x.txt"], ["The prompt is given twice"]),
        (["generate", "--file", "no.txt", *PAIR], ["cannot be read from no.txt: No such file"]),
        (["generate", "hi", "--target", "mute", "--system", "be kind"], ["has no chat template, which --system would"]),
        (
            ["generate", "hi", "--target", "mute", "--chat-template-file", "no.jinja", "--chat"],
            ["--chat-template-file is no.jinja, which cannot"],
        ),
        (["generate", "hi", *PAIR, "--temperature", "0", "--top-p", "0.5"], ["so --top-p would change nothing"]),
        (["generate", "hi", *PAIR, "--temperature", "0", "--seed", "1"], ["so --seed would change nothing; leave one"]),
        (["generate", "hi", *PAIR, "--seed", "0"], ["--seed would change nothing, since text is greedy without"]),
        (["generate", "hi", *PAIR, "--seed", "0", "--top-p", "2"], ["--top-p is 2"]),
        (["generate", "hi", *PAIR[:2], "--draft", PAIR[1]], ["is no DFlash draft but a model of its own (Qwen3ForC"]),
        (["generate", "hi", "--target", PAIR[3]], ["is a draft; pass the model that it was trained for"]),
        (["generate", "hi", "--target", "no/such/place"], ["There is no folder no/such/place"]),
        (["generate", "hi", "--target", "runs--of/me"], ["There is no folder runs--of/me"]),
        (["generate", "hi", "--target", "bare"], ["has no tokenizer; save that of its model with it"]),
        (["generate", "", "--target", "./no", "--dtype", "float17"], [EMPTY, NO_FLOAT, NO_FOLDER]),
        (["eval", "--target", "./no", *OUTPUT, "--dtype", "float17"], [NO_FLOAT, NO_FOLDER]),
        (["train", "--dta", "x", "--block", "4"], ["mean --data?", "mean --block-size?", "missing: --target, --data."]),
        (["train", "--target", "./no", "--data", "x", *OUTPUT, "--target-dtype", "float17"], [NO_FOLDER, NO_FLOAT]),
        (
            ["train", "--target", PAIR[3], "--data", "no.jsonl", "--draft", PAIR[1], "--output-dir", "a-file"],
            [A_DRAFT, A_TARGET, "--data is no.jsonl: there is no such file", "--output-dir is a-file, which is a file"],
        ),
        (
            ["train", *TRAINED, "--eval-strategy", "steps", "--eval-acceptance-prompts", "2", "--streaming"],
            ["--eval-strategy asks", "--eval-acceptance-prompts decodes", "so --max-steps must be given"],
        ),
        (["train", "--target", "bare", *TRAINED[2:]], [NO_TOKENIZER]),
        (["train", *TRAINED, "--draft-revision", "x"], ["--draft-revision is given without --draft"]),
        (["train", *TRAINED, "--resume-from-checkpoint", "true"], ["holds no complete checkpoint to resume from"]),
        (["train", *TRAINED, "--target-layer-ids", "1", "99"], ["asks for layer 99, but the target has 6 layers"]),
        (
            ["train", *TRAINED, "--mask-token-id", "9999", "--learning-rate", "-1", "--loss", "foo"],
            ["learning_rate is -1.0", "loss is 'foo'", "mask_token_id is 9999, but vocab_size is 512"],
        ),
        (["train", *TRAINED, "--mask-token-id", "512"], ["mask_token_id is 512, but vocab_size is 512"]),
        (
            ["train", *TRAINED, "--loss", "foo", "--block-size", "1", "--num-anchors", "0", "--emb-dim", "x"],
            ["'x'", "num_anchors is 0", "loss is 'foo'", "block_size is 1; it must be an int from 2"],
        ),
        (
            ["train", *TRAINED, "--learning-rate", "-1", "--load-best-model-at-end", "true"],
            ["learning_rate is -1.0", "eval_strategy is 'no' and save_strategy is 'steps'. Make them equal"],
        ),
        (
            ["train", *TRAINED, "--cut-target", "--regenerate-every", "5", "--loss", "kl"],
            ["regenerate_every decodes", "kl=1, needs the target's own", "needs max_steps", "own settings are greedy"],
        ),
        (
            ["train", *TRAINED, "--draft", PAIR[3], "--cut-target", "--loss", "tv", "--tensor-parallel", "--dry-run"],
            ["tv=1, needs the target's own", "tensor_parallel is True, which dry_run is not implemented with"],
        ),
        (
            ["train", *TRAINED, "--tune", "x", "--tune-steps", "0", "--eval-rows", "-1", "--regenerate-workers", "0"],
            ["regenerate_workers is 0", "tune_steps is 0", "eval_rows is -1"],
        ),
        (
            ["train", *TRAINED, "--draft", PAIR[3], "--num-layers", "5", "--mask_token_id=9", "--variant", "dspark"],
            ["--num-layers gives the shape", "--mask-token-id gives the shape", "--variant is dspark, and --draft"],
        ),
        (["train", *TRAINED, "--draft", PAIR[3], "--variant", "dflash", "--emb-dim", "8"], ["--emb-dim gives the sh"]),
        (["train", *TRAINED, "--draft", PAIR[1], "--variant", "dspark"], [A_TARGET]),
        (
            ["train", *TRAINED, "--draft", PAIR[3], "--tune", "causal=0,1", "variant=dflash,domino"],
            ["--causal gives the shape", "--variant is domino, and --draft", "--tune compares by what held-out"],
        ),
        (
            ["features", *TRAINED, "--draft", PAIR[3], "--block-size", "8", "--loss", "foo"],
            ["loss is 'foo'", "--block-size gives the shape of a fresh draft, and --draft names one that has its own"],
        ),
        (["train", *TRAINED, "--tune", "x", "--metric-for-best-model", "y"], ["--tune has 'x'; write options"]),
        (
            ["train", *TRAINED, "--eval-rows", "1", "--metric-for-best-model", "best"],
            ["metric_for_best_model is 'best', which is none"],
        ),
        (
            ["features", *TRAINED, "--shard-size", "-1", "--loss", "foo", "--dtype", "x", "--streaming", "--tune", "x"],
            ["--dtype is x", "shard_size is -1.0", "loss is 'foo'", "streaming is True", "tune compares runs"],
        ),
        (
            ["features", "--target", "./no", "--data", "no.jsonl", "--output-dir", "a-file", "--num-layers", "0"],
            ["a-file, which is a file", NO_FOLDER, "no.jsonl: there is no such", "num_layers is 0"],
        ),
        (
            ["generate", "", *PAIR, "--temperature", "-1", "--top-p", "2", "--max-new-tokens", "0", "--top-k", "x"],
            ["--max-new-tokens is 0; it must be at least 1", "temperature is -1", "top-p is 2", "top-k is x", EMPTY],
        ),
        (
            ["eval", "--target", "./no", "--limit", "0", "--batch-size", "0", "--block-size", "4", "--repeats", "0"],
            ["--limit is 0", "--batch-size is 0", "--repeats is 0", "--output-dir is missing", NO_FOLDER],
        ),
        (["eval", "--compare", "a", "b", "--limit", "0"], ["--limit is 0; it must be at least 1"]),
        (
            ["demo", "--prompts", "0", "--capture", "fast", "--variant", "domino"],
            ["--prompts is 0", "--capture is 'fast'", "has no draft of the kind domino"],
        ),
        (["train", *TRAINED, "--push-to-hub", "a b"], ["--push-to-hub is 'a b', and no repository can be named so"]),
        (
            ["eval", *PAIR, "--output-dir", "a-file", "--against", "x", "--thinking", "maybe", "--prompts", "no.txt"],
            ["--against has 'x'", "--thinking is 'maybe'", "a-file, which is a file", "'no.txt', which is no file"],
        ),
        (["eval", *PAIR[:3], PAIR[1], *OUTPUT, "--device", "cuda:7"], [A_TARGET, "--device is 'cuda:7'"]),
        (["eval", *PAIR, *OUTPUT, "--update-card", "--proposal", "tree"], ["--update-card goes with --proposal chain"]),
        (["eval", "--target", "bare", *OUTPUT], [NO_TOKENIZER]),
        (
            ["push", "./no", "a b", "--base-model", "demo", "--thinking", "maybe"],
            ["no is not a folder", "no repository can be named so", "--base-model is demo", "--thinking is 'maybe'"],
        ),
        (["push", PAIR[1], "me/draft"], [A_TARGET]),
        (
            ["convert", "./no", "a-file", "--layout", "gguf", "--base-model", "a b", "--target", PAIR[3]],
            [NO_FOLDER, "is a-file, which is a file", "layout is 'gguf'", "no repository can be named so", A_DRAFT],
        ),
        (["convert", PAIR[1], "out", "--layout", "hub"], [A_TARGET]),
        (["convert", PAIR[3], "out", "--layout", "hub", "--revision", "x"], ["is a folder, which has none"]),
        (
            ["regenerate", "--target", "./no", "--data", "no.jsonl", "--output", ".", "--model", "x"],
            [NO_FOLDER, "there is no such file", "--output is the folder .; pass a file", "and there is no --server"],
        ),
        (["regenerate", "--target", PAIR[3], "--data", "a-file", "--output", "x.jsonl"], [A_DRAFT]),
        (["generate", "--target", "demo-dflash", "x"], ["--target is demo-dflash, which is a built-in draft"]),
        (["regenerate", "--target", "bare", "--data", "a-file", "--output", "x.jsonl"], [NO_TOKENIZER]),
        (["refresh", PAIR[3]], ["which is a path; pass the name of a repository"]),
        (["resolve", PAIR[3]], [A_DRAFT]),
        (["serve-with", "ollama", PAIR[1], "--target", PAIR[3]], ["engine is 'ollama'", A_TARGET, A_DRAFT]),
        (["serve-with", "vllm", "./no", "--target", "./no"], [NO_FOLDER]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_all_that_is_wrong_with_a_call_is_told_at_once_before_weights_are_loaded(words, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "a-file").write_text("{}")
    shutil.copy(TINY / "target" / "config.json", tmp_path / "bare")
    (tmp_path / "mute").symlink_to(TINY / "target")
    for auto_class in ("AutoModelForCausalLM", "AutoModel"):
        monkeypatch.delattr(f"transformers.{auto_class}.from_pretrained")
    with pytest.raises(ValueError, match=re.escape(found[0])) as error:
        run(*words)
    message = str(error.value)
    assert [part for part in found if part not in message] == []
    assert message.count("\n- ") == (len(found) if len(found) > 1 else 0)


def test_further_lines_of_a_mistake_are_indented_and_the_help_of_features_has_what_it_takes(capsys):
    assert listed(["a\nb", "c"]) == "2 things are wrong:\n- a\n  b\n- c"
    assert listed(["a\nb"]) == "a\nb"
    with pytest.raises(typer.Exit):
        write_features(["--help"])
    text = capsys.readouterr().out
    assert "Tell the disk space and the time, and write nothing." in " ".join(text.split())
    assert [name for name in ("--tune", "--streaming", "--features", "Trainer:") if name in text] == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["push"], ["DIRECTORY is missing: Folder with the draft", "REPO is missing: Repository to push to"]),
        (
            ["regenerate", "--limit", "0"],
            ["--target is mi", "--data is mi", "--output is mi", "--limit is 0; it must be"],
        ),
        (["resolve", "a", "b"], ["b is more than resolve takes"]),
        (
            ["check", "a", "--max-new-token", "0", "--tokem=x", "--device", "x", "--max-new-tokens", "1"],
            ["did you mean --max-new-tokens?", "did you mean --token?", "--max-new-tokens is 1; it must be at least 2"],
        ),
    ],
)
def test_all_mistakes_of_a_line_that_cannot_be_read_are_told_at_once(words, found):
    done = run(*words)
    assert done.exit_code == 2
    assert [part for part in found if part not in done.stderr] == []
    assert done.stderr.count("\n- ") == (len(found) if len(found) > 1 else 0)


def test_a_conversation_without_its_template_is_refused(chatty):
    with pytest.raises(ValueError, match="--chat needs the chat template; leave out --no-chat-template"):
        run("generate", "hi", "--chat", "--no-chat-template", "--target", str(chatty), *PAIR[2:])


def test_check_lists_all_problems_too_and_its_status_is_that_of_a_broken_draft(tmp_path):
    words = ("./no", "--target", PAIR[3], "--dtype", "float17", "--device", "cuda:7", "--prompts", str(tmp_path / "x"))
    done = run("check", *words)
    found = (NO_FOLDER, A_DRAFT, NO_FLOAT, "--device is 'cuda:7'", "which cannot be read: No such file")
    assert [part for part in found if part not in done.stderr] == []
    assert done.stderr.count("\n- ") == len(found)
    assert (done.exit_code, done.stdout) == (2, "")
    assert A_TARGET in run("check", PAIR[1]).stderr


def test_writing_to_the_hub_takes_a_token_and_that_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for words in (["push", PAIR[3], "me/x"], ["refresh", "me/x"], ["train", *PAIR[:2], "--data", PAIR[3], *PUSHED]):
        flag = "--hub-token" if words[0] == "train" else "--token"
        with pytest.raises(ValueError, match=rf"There is no token of the Hub.* pass {flag}\."):
            RUNNER.invoke(cli.app, [*words], env={"HF_TOKEN": None}, catch_exceptions=False)


def test_a_name_that_may_be_a_folder_or_a_repository_is_said_to_be_no_folder_either(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(OSError, match="models/mine could not be read, and there is no such folder"):
        run("resolve", "models/mine")
    with pytest.raises(OSError, match=re.escape(NO_FOLDER)):
        run("resolve", "./no")


def test_an_answer_of_one_token_has_no_tokens_a_cycle():
    answer = answers.Answer((1,), "a", 1.0, DecodeStatistics())
    assert re.fullmatch(
        r"1 token, [\d.]+ tokens/s, 1.00 times the target alone \(estimated\)",
        answers.figures(answer, 1.0, "estimated"),
    )


@pytest.mark.parametrize(
    ("times", "committed", "made_for", "text", "found"),
    [
        (2.0, [3] * 9, (), "", None),
        (0.5, [1] * 3, (), "", None),
        (0.9, [3] * 9, (), "", "a block takes as long as the tokens that it saves"),
        (0.9, [1, 2] * 9, ("org/other",), "", "it was made for org/other"),
        (0.9, [1, 2] * 9, ("org/own",), "<think>so</think>", "the target thinks aloud"),
        (0.9, [1] * 9, ("org/own",), "", "a draft that is not trained"),
        (0.9, [1, 2] * 9, (), "", "unlike its training"),
    ],
)
def test_where_a_draft_does_not_help_the_likeliest_reason_is_told(times, committed, made_for, text, found):
    target = SimpleNamespace(config=SimpleNamespace(_name_or_path="org/own"))
    statistics = DecodeStatistics(cycles=len(committed), committed=committed)
    answer = answers.Answer((1,) * sum(committed), text, 1.0, statistics)
    answerer = answers.Answerer(Loaded(target, None, made_for), None, answers.Sampling())
    told = answers.why_no_help(answerer, answer, times)
    assert (told is None) == (found is None)
    assert found is None or found in told
    answerer.proposing = {"proposal": "lookup"}  # which asks no draft
    assert answers.why_no_help(answerer, answer, times) is None


def test_generate_without_a_draft_says_why_none_was_found(chatty):
    with pytest.raises(ValueError, match="fits its shape"):
        run("generate", "def", "--target", str(chatty))


@pytest.mark.parametrize("architecture", ["Qwen3_5ForConditionalGeneration", "KimiK25ForConditionalGeneration"])
def test_generate_finds_the_draft_of_a_target_that_sees_images(architecture, hub, tmp_path):
    """Its text model's config names no architecture, or transformers has no text model of it alone."""
    tiny_checkpoints.save(architecture, tmp_path)
    name = next(spec.target for spec in CATALOGUE if architecture in spec.architectures)
    HfApi().create_repo(name)
    HfApi().upload_folder(folder_path=tmp_path, repo_id=name)
    model = load_target(name, "auto")
    with pytest.raises(OSError, match=drafts_for(name)[0].repo_id), notes.capture() as shown:
        find_draft(model, None, None)
    assert f"It was made for {name}." in shown.get()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["resolve", "demo"], f"draft\t{TARGET.removesuffix('target')}draft2\n"),
        (["check", "demo-dflash", "--target", "demo", "--no-run", "--no-values"], "Verdict"),
        (["convert", "demo", "out", "--layout", "engines", "--dry-run"], "DFlash 2 draft"),
        (["serve-with", "vllm", "demo-dflash", "--target", "demo"], f"vllm serve {TARGET}"),
        (["train", "--target", "demo", "--draft=demo", "--data", "rows.jsonl", "--inspect", "1"], "def main("),
        (["features", "--target=demo", "--data", "rows.jsonl", "--max-length", "64", "--dry-run"], "2 of 100 tokens"),
        (
            ["regenerate", "--target", "demo", "--data", "rows.jsonl", "--output", "new", "--max-new-tokens", "2"],
            "new holds 1 row.",
        ),
        (
            [
                "eval",
                "--target",
                "demo",
                "--draft",
                "demo-dflash",
                "--limit",
                "1",
                "--output-dir",
                "out",
                "--max-new-tokens",
                "4",
            ],
            "\ndemo-dflash ",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_demo_names_the_built_in_pair_wherever_a_target_or_a_draft_is_named(words, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "def main(" * 20}) + "\n")
    assert found in run(*words).stdout


def test_a_conversation_with_the_built_in_target_is_one_text_and_a_file_may_say_otherwise(tmp_path):
    (tmp_path / "template").write_text(TEMPLATE)
    words = ["--quiet", "generate", "x = 1", "--chat", "--target", "demo", "--max-new-tokens", "4"]
    assert run(*words).stdout.strip("\n") == own_text("x = 1\n", 4).strip("\n")
    told = run(*words, "--chat-template-file", str(tmp_path / "template")).stdout
    assert told.strip("\n") == own_text("user: x = 1\nassistant:", 4).strip("\n")


LIGHT = [["--help"], ["--version"], ["version"], ["drafts"], ["drafts", "--json"], ["resolve", "Qwen/Qwen3-8B"]]


def test_what_needs_no_torch_does_not_import_it():
    code = f"""
        import io, os, sys
        from contextlib import redirect_stdout
        from dflash_hub import cli
        def ran(words):
            sys.argv = ["dflash-hub", *words]
            with redirect_stdout(io.StringIO()) as shown:
                try:
                    cli.main()
                except SystemExit as end:
                    assert not end.code, words
            assert shown.getvalue(), words
            assert not {{"torch", "transformers"}} & {{*sys.modules}}, words
        for words in {LIGHT}:
            ran(words)
        os.environ |= {{"_DFLASH_HUB_COMPLETE": "complete_bash", "COMP_WORDS": "dflash-hub dra", "COMP_CWORD": "1"}}
        ran([])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_drafts_in_a_pipe_are_lines_of_columns():
    done = run("drafts", "--licence")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(line[0], line[1]) for line in lines] == [(", ".join(row.targets), row.repo_id) for row in rows()]
    assert [(line[3], line[4]) for line in lines] == [
        ("yes" if row.decodes else "no", row.reason or "") for row in rows()
    ]
    assert {len(line) for line in lines} == {7}
    loaded, decoded = sum(row.loads for row in rows()), sum(row.decodes for row in rows())
    assert done.stderr == f"{len(rows())} DFlash drafts: {loaded} load, {decoded} decode here\n"
    assert run("--quiet", "drafts").stderr == ""


@pytest.mark.parametrize("width", [80, 120])
def test_drafts_on_a_terminal_are_one_line_each_and_names_stay_whole(width, monkeypatch):
    monkeypatch.setattr(console, "width", width, raising=False)
    with console.capture() as capture:
        show([_Line(row) for row in rows()], width)
    lines = capture.get().splitlines()
    for row in rows():
        of_row = [line for line in lines if f"  {row.repo_id} " in line]
        assert len(of_row) == [row.repo_id for row in rows()].count(row.repo_id)
        assert all(KINDS[row.variant].title in line for line in of_row)
        assert any(("yes" if row.decodes else "(") in line for line in of_row)
    assert sum(len(line) > width for line in lines) <= 4  # names that no line of this width holds
    reasons = {row.reason for row in rows() if row.reason}
    text = " ".join(capture.get().split())
    assert [reason for reason in reasons if f") {reason}" not in text] == []


@pytest.mark.parametrize(
    ("words", "found", "missing"),
    [
        (["--target", "Qwen/Qwen3-4B"], "z-lab/Qwen3-4B-DFlash-b16", "Qwen3.5-4B"),
        (["--target", "gpt-oss"], "z-lab/gpt-oss-120b-DFlash", "Qwen3"),
        (["--architecture", "GptOssForCausalLM"], "z-lab/gpt-oss-20b-DFlash", "Qwen3-4B"),
        (["--architecture", "Qwen3_5ForCausalLM"], "z-lab/Qwen3.5-4B-DFlash", "gpt-oss"),
        (["--target", "zai-org/GLM-5.3"], "not decoded here", "yes"),
        (["--target", "moonshotai/Kimi-K2.5"], "yes", "not decoded here"),
    ],
)
def test_drafts_lists_by_a_part_of_a_target_and_by_architecture(words, found, missing):
    output = run("drafts", *words).stdout
    assert found in output
    assert missing not in output


@pytest.mark.parametrize(
    ("name", "nearest"), [("me/nothing", "Run"), ("qwen3-9b", "Qwen/Qwen3-8B"), ("Qwen/Qwen3.4-9B", "Qwen/Qwen3.5-9B")]
)
def test_a_target_without_drafts_is_answered_with_the_names_spelt_alike(name, nearest):
    with pytest.raises(ValueError, match=f"No draft is known for {name}.*{nearest}"):
        run("drafts", "--target", name)


def test_drafts_ask_the_hub_for_downloads(hub):
    HfApi().create_repo("z-lab/gpt-oss-20b-DFlash")
    done = run("drafts", "--target", "openai/gpt-oss-20b", "--downloads")
    counts = dict(line.split("\t")[1::5] for line in done.stdout.splitlines())
    known = {"z-lab/gpt-oss-20b-DFlash": "0 downloads"}
    assert counts == dict.fromkeys(counts, "downloads not known") | known
    assert len(counts) == 2
    assert "does not tell the downloads of 1 drafts" in done.stderr


def test_drafts_for_programs_say_of_each_whether_it_loads_and_decodes():
    entries = json.loads(run("drafts", "--json").output)
    assert [entry["repo_id"] for entry in entries] == [spec.repo_id for spec in CATALOGUE]
    for entry, spec in zip(entries, CATALOGUE, strict=True):
        assert (entry["loads"], entry["decodes"], entry["reason"]) == (spec.loads, spec.decodes, spec.reason)
        assert {"variant", "layout", "quantization", "targets", "config_seen"} <= {*entry}
    of_target = json.loads(run("drafts", "--json", "--target", "zai-org/GLM-5.3").output)
    assert not any(entry["decodes"] for entry in of_target)


def test_resolve_shows_what_would_be_loaded_and_why():
    output = run("resolve", "Qwen/Qwen3-4B").output
    for text in (
        "z-lab/Qwen3-4B-DFlash-b16",
        "b74e3a329c4d963783143b1e970d95b002be72bd",
        "It was made for Qwen/Qwen3-4B",
    ):
        assert text in output
    assert json.loads(run("resolve", "Qwen/Qwen3.8-27B", "--json").stdout)["class"] == "DFlash2DraftModel"


def test_resolve_follows_copies_folders_and_adapters(hub, tmp_path):
    config = AutoConfig.for_model("qwen3", hidden_size=4096, num_hidden_layers=36, vocab_size=151936)
    config.push_to_hub("unsloth/Qwen3-8B-bnb-4bit")
    config.save_pretrained(tmp_path / "Qwen3-8B-AWQ")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    copy, folder = (
        run("resolve", "unsloth/Qwen3-8B-bnb-4bit").output,
        run("resolve", str(tmp_path / "Qwen3-8B-AWQ")).output,
    )
    adapter = run("resolve", str(tmp_path / "adapter")).output
    assert all("z-lab/Qwen3-8B-DFlash-b16" in output for output in (copy, folder, adapter))
    assert "of which unsloth/Qwen3-8B-bnb-4bit is a quantised copy (by its name and shape)" in copy
    assert "a quantised copy (by its folder and shape)" in " ".join(folder.split())
    assert "is an adapter for Qwen/Qwen3-8B." in " ".join(adapter.split())


def test_push_publishes_and_prints_the_snippet_for_this_commit(hub, repo_id, forked_probe):
    card = ("--base-model", "me/tiny", "--license", "apache-2.0", "--dataset", "me/rows")
    done = run("push", str(TINY / "draft"), repo_id, *card)
    commit = hub.state.repos["models", repo_id].branches["main"]
    assert f'revision="{commit}"' in done.stdout
    for text in (
        "branch main: ",
        "branch engines: ",
        "MiB  model.safetensors",
        "Left out: log.json",
        "base_model: me/tiny",
    ):
        assert text in done.stderr, text
    assert "datasets: me/rows" in done.stderr
    assert "The card does not say the language" in done.stderr
    assert "A push does not decode. `dflash-hub check FOLDER" in " ".join(done.stderr.split())
    for engine, text in {
        "vLLM": "vllm serve me/tiny",
        "SGLang": "sglang.launch_server",
        "llama.cpp": "llama-server",
        "TensorRT-LLM": "trtllm-serve me/tiny",
        "dflash-mlx (bstnxbt)": "dflash serve --model me/tiny",
    }.items():
        assert f"\n{engine}:\n" in done.stdout
        assert text in done.stdout
    assert "Serving engines read the branch engines" in done.stdout
    assert set(hub.state.repos["models", repo_id].branches) == {"main", "engines"}


@pytest.mark.parametrize("token", ["hf_test", None])
def test_a_dry_run_of_a_push_takes_no_token_and_says_what_it_could_not_ask(hub, repo_id, token, forked_probe):
    words = ["push", str(TINY / "draft"), repo_id, "--base-model", "me/tiny", "--dry-run"]
    done = RUNNER.invoke(cli.app, words, env={"COLUMNS": "200", "HF_TOKEN": token}, catch_exceptions=False)
    for text in ("branch main: ", "base_model: me/tiny", "vllm serve me/tiny", "Nothing was pushed (--dry-run)."):
        assert text in done.stdout, text
    assert {method for method, _, _ in hub.calls()} == ({"GET"} if token else set())
    unasked = f"the Hub was not asked whether {repo_id} exists"
    assert (unasked in done.stderr, "hf auth login" in done.stderr) == ((token is None,) * 2)


def test_on_a_terminal_sentences_wrap_below_each_other_and_names_stay_whole():
    file = io.StringIO()
    for is_terminal in (True, False):
        out = Console(file=file, width=30, force_terminal=is_terminal, color_system=None)
        hanging(out, "It lacks some_name.that-is-long and another_name.of-this", "  - ")
    wrapped = ["  - It lacks", "    some_name.that-is-long and", "    another_name.of-this"]
    whole = "  - It lacks some_name.that-is-long and another_name.of-this"
    assert file.getvalue().splitlines() == [*wrapped, whole]


def test_env_says_what_a_bug_report_needs_and_hides_tokens():
    from dflash_hub import __version__

    assert f"dflash-hub {__version__}" in run("version").stdout
    found = json.loads(run("env", "--json").stdout)
    assert (found["dflash-hub"], found["torch"]) == (__version__, torch.__version__)
    assert found["HF_TOKEN"] == "set, not shown"
    assert found["HF_ENDPOINT"] == os.environ["HF_ENDPOINT"]
    assert "TORCH_LOGS" not in found
    assert f"python: {found['python']}\n" in run("env").stdout

"""The commands `check` and `serve-with`, as a user types them, for folders and for drafts on the Hub."""

import json
import shlex

import pytest
from huggingface_hub import HfApi
from typer.testing import CliRunner

import tiny
from dflash_hub import cli
from dflash_hub.checking import CheckOptions, check_draft
from dflash_hub.checking.serve import LAUNCHES, serve_with
from dflash_hub.commands.shared import console
from paths import DATA, TINY

RUNNER = CliRunner()


def run(*words: str):
    return RUNNER.invoke(cli.app, list(map(str, words)), env={"COLUMNS": "200"}, catch_exceptions=False)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(console, "width", 200, raising=False)


@pytest.fixture
def pushed(hub, repo_id):
    """A draft on the Hub, in both layouts."""
    draft = tiny.draft(tiny.target("qwen3"))
    draft.card_metadata = {"base_model": "Qwen/Qwen3-4B"}
    draft.push_to_hub(repo_id)
    return repo_id


# check ---------------------------------------------------------------------------------------------------------------


def test_a_report_for_people_names_the_draft_its_faults_the_engines_and_the_verdict():
    done = run("check", TINY / "draft", "--target", TINY / "target", "--no-run")
    for text in ("the hub layout of dflash-hub", "There is no model card", "vLLM 0.33.0", "refuses", "Verdict: good."):
        assert text in done.stdout, text
    assert done.exit_code == 0


ALONE = "these files are for dflash-hub alone"
BOTH = "These files are for transformers and dflash-hub"


@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        (
            lambda config: config.pop("auto_map"),
            (ALONE, "names code for it", "It does not count what engines do."),
            BOTH,
        ),
        (lambda config: None, (BOTH, "It does not count what engines do."), ALONE),
        (
            lambda config: config.update(block_size=-3),
            ("says block_size is -3; it must be", "broken.\n"),
            "files are for",
        ),
        (lambda config: "{", ("is not a valid JSON file.\n  Correct the file.",), "log in"),
    ],
    ids=["without code", "whole", "broken", "no JSON"],
)
def test_a_report_says_one_thing_of_what_loads_the_files(change, said, unsaid, tmp_path):
    tiny.draft(tiny.target("qwen3")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = change(config)
    (tmp_path / "config.json").write_text(text if text == "{" else json.dumps(config))
    shown = run("check", tmp_path).stdout
    for one in said:
        assert one in shown, one
    assert unsaid not in shown


def test_json_is_all_that_stands_on_stdout_and_holds_the_run_too(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join((TINY / "prompts.jsonl").read_text().splitlines()[:2]))
    words = ("--target", TINY / "target", "--prompts", prompts, "--max-new-tokens", "6", "--json")
    done = run("check", TINY / "draft", *words)
    report = json.loads(done.stdout)
    assert report["run"]["exact"] is True
    assert report["run"]["prompts"] == 2
    first = report["run"]["acceptance"][0]
    assert (first["name"], first["anchors"]) == ("as configured", 10)
    assert report["status"] == done.exit_code
    assert {one["engine"] for one in report["engines"]} >= {"vllm", "sglang", "llama.cpp", "tensorrt-llm"}
    reason = next(one for one in report["engines"] if one["engine"] == "vllm")["reasons"][0]
    assert reason["source"].startswith("vllm/")
    assert {"what", "found", "expected", "advice"} <= set(reason)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("name", ["nobody/nothing", "./no-such-folder"])
def test_what_cannot_be_read_has_the_status_of_a_broken_draft_and_no_report(name, as_json, hub):
    done = run("check", name, *(["--json"] if as_json else []))
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: ")
    assert name in done.stderr
    if as_json:
        found = json.loads(done.stdout)
        assert (found["draft"], found["status"], found["verdict"]) == (name, 2, "broken")
        assert found["error"] in done.stderr
    else:
        assert done.stdout == ""


def test_a_target_that_cannot_be_loaded_is_still_compared_by_its_config(tmp_path):
    tiny.target("qwen3").config.save_pretrained(tmp_path)
    done = run("check", TINY / "draft", "--target", tmp_path, "--json")
    report = json.loads(done.stdout)
    assert "Nothing is decoded" in done.stderr
    assert report["run"] is None
    assert "misfit" in [remark["name"] for remark in report["remarks"]]
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompts.jsonl", b'{"text": "x"}\n', 'must be a JSON object with a text under "prompt"'),
        ("prompts.txt", b"\n \n", "which holds no prompt"),
        ("prompts.txt", b"\xff\xfe", "which cannot be read: it is no text in UTF-8"),
        ("prompts.txt", None, "which cannot be read: No such file or directory"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    done = run("check", TINY / "draft", "--target", "not/loaded", "--prompts", path, "--json")
    assert done.exit_code == 2
    assert f"--prompts is {path}, w" in done.stderr
    assert message in json.loads(done.stdout)["error"]


def test_a_target_without_a_tokenizer_is_not_decoded_with_and_all_else_is_reported():
    golden = DATA / "golden" / "dspark-a"
    done = run("check", golden / "draft", "--target", golden / "target", "--json")
    report = json.loads(done.stdout)
    (remark,) = [one for one in report["remarks"] if one["section"] == "run"]
    assert (remark["name"], remark["level"]) == ("not-run", "note")
    assert "the target has no tokenizer" in remark["what"]
    assert "tokenizer-missing" in [one["name"] for one in report["remarks"]]
    assert report["engines"]


def test_a_draft_on_the_hub_is_checked_at_one_commit_and_points_to_its_other_branch(pushed):
    report = check_draft(pushed)
    assert report.commit == HfApi().model_info(pushed).sha
    assert {remark.name: remark.level for remark in report.remarks} == {"branch-engines": "note"}
    engines = check_draft(pushed, options=None)
    assert engines.status == 0
    done = run("check", pushed, "--revision", "engines", "--json")
    other = json.loads(done.stdout)
    assert other["commit"] == HfApi().model_info(pushed, revision="engines").sha
    assert [one["engine"] for one in other["engines"] if one["outcome"] != "loads"] == []


def test_without_values_no_weights_of_a_repository_are_downloaded(pushed, hub):
    hub.state.log.clear()
    done = run("check", pushed, "--revision", "engines", "--no-values", "--json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert {one["outcome"] for one in report["engines"]} == {"loads"}  # which goes by the names of tensors too
    from huggingface_hub import try_to_load_from_cache

    assert not isinstance(try_to_load_from_cache(pushed, "model.safetensors", revision=report["commit"]), str)


def test_a_private_repository_without_a_card_is_said(hub, repo_id, tmp_path):
    draft = tiny.draft(tiny.target("qwen3"))
    draft.save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink()
    HfApi().create_repo(repo_id, private=True)
    HfApi().upload_folder(folder_path=tmp_path, repo_id=repo_id)
    report = check_draft(repo_id)
    found = {remark.name: remark.level for remark in report.remarks}
    assert found == {"card-missing": "warning", "private": "note"}
    assert report.status == 1


# serve-with ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engines_folder(tmp_path):
    folder = tmp_path / "my draft"  # a name that must be quoted
    tiny.draft(tiny.target("qwen3")).save_pretrained(folder, layout="engines")
    return folder


@pytest.mark.parametrize("engine", LAUNCHES)
def test_the_lines_can_be_copied_and_name_the_pair_and_the_block(engine, engines_folder):
    done = run("serve-with", engine, engines_folder, "--target", "org/target")
    assert done.exit_code == 0, done.stderr
    words = shlex.split(done.stdout)
    if engine == "vllm":
        assert json.loads(words[words.index("--speculative-config") + 1]) == {
            "method": "dflash",
            "model": str(engines_folder),
            "num_speculative_tokens": 4,
        }
    elif engine == "tensorrt-llm":
        settings = json.loads(words[words.index("echo") + 1])["speculative_config"]
        assert settings == {"decoding_type": "DFlash", "max_draft_len": 4, "speculative_model": str(engines_folder)}
    elif engine == "llama.cpp":
        assert words[words.index("--spec-draft-n-max") + 1] == "4"
    elif engine == "dflash-mlx":
        assert words[:2] == ["dflash", "serve"]
        assert words[words.index("--draft") + 1] == str(engines_folder)
    elif engine == "mlx-vlm":
        assert words[words.index("--draft-kind") + 1] == "dflash"
    else:
        assert words[words.index("--speculative-algorithm") + 1] == "DFLASH"
    assert any("org/target" in word for word in words)
    assert any(str(engines_folder) in word for word in words)


def test_a_branch_that_the_engine_does_not_read_exits_with_1_and_names_the_one_that_it_does(pushed):
    done = run("serve-with", "vllm", pushed)
    assert done.exit_code == 1
    assert "vLLM 0.33.0 refuses" in done.stderr
    assert "vllm/transformers_utils/config.py" in done.stderr
    command = f"dflash-hub serve-with vllm {pushed} --revision engines"
    assert command in done.stderr
    done = run(*shlex.split(command)[1:])
    assert (done.exit_code, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[:3] == ["vllm", "serve", "Qwen/Qwen3-4B"]  # as the card says
    assert json.loads(words[-1])["revision"] == "engines"


def test_an_engine_that_would_be_wrong_exits_with_1_too(engines_folder):
    path = engines_folder / "config.json"
    content = json.loads(path.read_text()) | {"draft_vocab_size": 6}
    path.write_text(json.dumps(content))
    done = run("serve-with", "sglang", engines_folder, "--target", "org/target")
    assert done.exit_code == 1
    assert "SGLang 0.5.23 loads" in done.stderr
    assert "and is wrong" in done.stderr
    assert "--speculative-algorithm DFLASH" in done.stdout


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_domino_draft_of_another_prefix_is_wrong_in_sglang_as_its_remarks_say(length, tmp_path):
    draft = tiny.draft(tiny.target("qwen3"), **tiny.DOMINO | {"pure_draft_prefix_len": length})
    draft.save_pretrained(tmp_path, layout="engines")
    done = run("serve-with", "sglang", tmp_path, "--target", "org/target")
    remarked = any("pure_draft_prefix_len" in remark for remark in draft.config.engines_remarks)
    assert (done.exit_code == 1) == remarked == (length != 1)
    assert ("pure_draft_prefix_len" in done.stderr) == remarked


@pytest.mark.parametrize(
    ("golden", "method", "drafted"), [("dspark-a", "dspark", 7), ("speculators-reduced", "dflash", 7)]
)
def test_the_kind_decides_method_and_number_of_tokens(golden, method, drafted):
    draft = DATA / "golden" / golden / "draft"
    (line,) = serve_with("vllm", draft, "org/target").lines
    settings = json.loads(shlex.split(line)[-1])
    assert (settings["method"], settings["num_speculative_tokens"]) == (method, drafted)
    server = serve_with("llama.cpp", draft, "org/target").lines[-1]
    assert f"--spec-type draft-{method} --spec-draft-n-max {drafted}" in server


def test_arguments_that_mean_nothing_are_refused(engines_folder):
    with pytest.raises(ValueError, match="engine is 'ollama'; it must be one of vllm, sglang"):
        serve_with("ollama", engines_folder)
    with pytest.raises(ValueError, match="says which target it was made for"):
        serve_with("vllm", engines_folder)
    with pytest.raises(ValueError, match="options is 3"):
        check_draft(engines_folder, options=3)
    with pytest.raises(ValueError, match=r"prompts is \[\]"):
        check_draft(engines_folder, options=CheckOptions(prompts=[]))
    with pytest.raises(ValueError, match="target is 3"):
        check_draft(engines_folder, 3)

"""Refreshing a published draft over real HTTP: only code changes, whole and checked, or nothing does."""

import copy
import json
import os
import re
import sys
from dataclasses import replace

import pytest
from huggingface_hub import HfApi, constants
from transformers import AutoModel
from typer.testing import CliRunner

import tiny
from dflash_hub import DFlash2DraftModel, DFlashDraftModel, DominoDraftModel, __version__, cli
from dflash_hub.publishing import refresh as refreshing
from dflash_hub.publishing.probe import digests
from dflash_hub.publishing.refresh import RefreshOptions, refresh, travelling_code
from hubserver import Entry, git_blob
from paths import DATA, ROOT, TINY

HEADER = b"# Copyright 2026 the dflash-hub authors.\n"
CARD = b"---\nlicense: mit\n---\n# Words of my own  \r\nand no newline at the end"
OLD = {
    "modeling_dflash.py": HEADER
    + b"from .gone_dflash import gone\nfrom .mine import mine\nraise RuntimeError('old code ran')\n",
    "gone_dflash.py": HEADER + b"from .gone_too import gone\n",
    "gone_too.py": HEADER + b"gone = 1\n",
    "mine.py": b"raise RuntimeError('code of the owner ran')\n",
    "notes_dflash.py": HEADER + b"# Ours by its first line, but nothing of ours imports it.\n",
    "custom_generate/generate.py": HEADER + b"raise RuntimeError('old code ran')\n",
    "README.md": CARD,
    "sequences_dflash.py": None,
}
# The drafts of these tests have full and sliding layers.
pytestmark = [
    pytest.mark.usefixtures("forked_probe"),
    pytest.mark.filterwarnings("ignore:Some layers slide:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sliding layers are causal:UserWarning"),
]
LOAD = """
    import json, sys
    from transformers import AutoModel
    sys.path.insert(0, {root!r})
    from probe import digests
    for revision in ("main", "engines"):
        model = AutoModel.from_pretrained({repo!r}, revision=revision, trust_remote_code=True)
        print(json.dumps([type(model).__module__, digests(model)]))
"""


def repository(hub, repo_id: str):
    return hub.state.repos["models", repo_id]


def tree(hub, repo_id: str, branch: str = "main") -> dict[str, Entry]:
    return dict(repository(hub, repo_id).resolve(branch).tree)


def put(hub, repo_id: str, branch: str, contents: dict[str, bytes | None]) -> None:
    """One commit on the Hub; None removes a file."""
    repo = repository(hub, repo_id)
    parent = repo.resolve(branch)
    entries = {path: data and Entry(git_blob(data), len(data), None, data) for path, data in contents.items()}
    after = {path: entry for path, entry in (parent.tree | entries).items() if entry is not None}
    repo.branches[branch] = repo.add(parent, "by somebody else", "", after).oid


def aged_config(data: bytes, version: str) -> bytes:
    """The same values in a format of the owner's own, from an older dflash-hub."""
    config = json.loads(data)
    config |= {"dflash_hub_version": version} if "dflash_hub_version" in config else {}
    note = {"note": {"dflash_hub_version": "0.0.9"}}  # no version of the draft's
    text = json.dumps(note | dict(sorted(config.items(), reverse=True)), indent=3)
    return text.replace("\n", "\r\n").encode()


def age(hub, repo_id: str, branch: str, version: str = "0.0.9") -> None:
    """Make the code on a branch old, and such that it fails if it is run."""
    before = tree(hub, repo_id, branch)
    new_line = f'__version__ = "{version}"'.encode()
    configuration = re.sub(rb'__version__ = ".*"', new_line, before["configuration_dflash.py"].data)
    config = aged_config(before["config.json"].data, version)
    put(hub, repo_id, branch, OLD | {"configuration_dflash.py": configuration, "config.json": config})


@pytest.fixture
def draft():
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    return tiny.draft(tiny.target("qwen3"), **layers)


@pytest.fixture(scope="module")
def made():
    """A repository and the large files of its Hub, once a test has made them."""
    return {}


@pytest.fixture
def old(hub, repo_id, draft, made):
    """The id of a repository with both branches, of an older version; it is pushed once, and copied then."""
    if not made:
        draft.push_to_hub(repo_id)
        draft.push_to_hub(repo_id, layout="engines", revision="engines")
        for branch in ("main", "engines"):
            age(hub, repo_id, branch)
        made |= {"repo": repository(hub, repo_id), "lfs": dict(hub.state.lfs)}
    hub.state.repos["models", repo_id] = replace(copy.deepcopy(made["repo"]), rid=repo_id)
    hub.state.lfs.update(made["lfs"])
    hub.state.log.clear()
    return repo_id


@pytest.fixture
def unchecked(monkeypatch):
    """Without the fresh processes, which are tested above, and slow."""
    monkeypatch.setattr(refreshing, "check_branch", lambda branch: None)


def assert_new(hub, repo_id: str, branch: str) -> None:
    present = tree(hub, repo_id, branch)
    for path, content in travelling_code(DFlashDraftModel).items():
        assert present[path].data == content, path


def heads(hub, repo_id: str) -> dict[str, str]:
    return dict(repository(hub, repo_id).branches)


def modules_of_repositories() -> set[str]:
    """Modules that transformers made of repositories' code in this process."""
    return {name for name in sys.modules if name.startswith("transformers_modules")}


def test_both_branches_get_this_versions_code_and_nothing_else_changes(hub, old, draft, fresh_process):
    imported = modules_of_repositories()
    before = {branch: tree(hub, old, branch) for branch in ("main", "engines")}
    first = heads(hub, old)
    done = refresh(old)
    assert done.commits == heads(hub, old)
    assert [found.version for found in done.branches] == ["0.0.9", "0.0.9"]
    for branch, commit in done.commits.items():
        assert repository(hub, old).commits[commit].parent == first[branch]
        assert_new(hub, old, branch)
        after = tree(hub, old, branch)
        config, new_config = before[branch].pop("config.json").data, after.pop("config.json").data
        if branch == "main":  # the engines layout does not say it
            before_it, _, after_it = config.rpartition(b'"0.0.9"')
            config = before_it + json.dumps(__version__).encode() + after_it
            assert json.loads(config)["dflash_hub_version"] == __version__
        assert new_config == config
        code = {*travelling_code(DFlashDraftModel), "gone_dflash.py", "gone_too.py"}
        assert before[branch].keys() - after.keys() == {"gone_dflash.py", "gone_too.py"}
        for path in before[branch].keys() - code:
            assert after[path] == before[branch][path], path
        assert after["README.md"].data == CARD
        assert after["model.safetensors"].sha256 == before[branch]["model.safetensors"].sha256
    assert [call[:2] for call in hub.calls() if "lfs" in call[1]] == [
        ("GET", f"/_lfs/{after['model.safetensors'].sha256}")
    ]
    assert modules_of_repositories() == imported, "code of the repository ran here"
    lines = fresh_process(LOAD.format(root=str(ROOT / "publishing"), repo=old)).splitlines()[-2:]
    for module, found in map(json.loads, lines):
        assert module.startswith("transformers_modules.")
        assert found == digests(draft)
    assert refresh(old).commits == {}
    assert heads(hub, old) == done.commits


def test_without_a_branch_engines_main_alone_is_refreshed_shards_and_all(hub, repo_id, draft):
    draft.push_to_hub(repo_id, max_shard_size="20KB", layouts=["hub"])
    age(hub, repo_id, "main")
    put(hub, repo_id, "main", {".gitattributes": None})
    assert set(refresh(repo_id).commits) == {"main"} == set(heads(hub, repo_id))
    assert_new(hub, repo_id, "main")
    assert tree(hub, repo_id)[".gitattributes"].data == (ROOT / "hub_repo" / ".gitattributes").read_bytes()


@pytest.mark.parametrize(
    ("file", "old_text", "new_text", "complaint"),
    [
        ("cache_dflash.py", "import torch", "raise RuntimeError('spoilt')", r"(?s)does not load.*spoilt"),
        (
            "repository_dflash.py",
            "model.card_source =",
            "model.fc.weight.data += 1; model.card_source =",
            "other weights.*fc",
        ),
        (
            "configuration_dflash.py",
            "self._normalize_rope(kwargs)",
            "self.rms_norm_eps = 0.5",
            "rms_norm_eps .* as 0.5",
        ),
    ],
    ids=["fails", "other-tensors", "other-values"],
)
def test_code_that_loads_a_branch_otherwise_is_never_pushed(hub, old, file, old_text, new_text, complaint, monkeypatch):
    code = travelling_code(DFlashDraftModel)
    spoilt = code[file].replace(old_text.encode(), new_text.encode(), 1)
    assert spoilt != code[file]
    monkeypatch.setattr(refreshing, "travelling_code", lambda draft_class: code | {file: spoilt})
    first = heads(hub, old)
    with pytest.raises(ValueError, match=complaint):
        refresh(old)
    assert heads(hub, old) == first


def test_a_value_of_either_layout_that_is_read_otherwise_is_refused(hub, old, draft):
    right = draft.config.to_dict() | {"dtype": "float32"}
    others = {
        "mask_token_id": {"mask_token_id": 5},
        r"rope_parameters\.rope_theta": {"rope_parameters": {"rope_theta": 2.0, "rope_type": "default"}},
        "rms_norm_eps": {"rms_norm_eps": 0.5},
    }
    for branch in refreshing._read(HfApi(), old):
        branch.check_config_values(right)
        for named, changes in others.items():
            with pytest.raises(ValueError, match=rf"{named} in config.json on .* is .* reads it as "):
                branch.check_config_values(right | changes)


@pytest.mark.filterwarnings("ignore:.*SGLang")
@pytest.mark.parametrize(
    ("draft_class", "folder"),
    [
        (DFlashDraftModel, TINY / "draft"),
        (DFlash2DraftModel, TINY / "draft2"),
        (DominoDraftModel, DATA / "golden" / "domino-a" / "draft"),
    ],
)
@pytest.mark.parametrize("layout", ["hub", "engines"])
def test_the_code_of_a_refresh_is_the_code_of_a_push(draft_class, folder, layout, tmp_path):
    draft_class.from_pretrained(folder).save_pretrained(tmp_path, layout=layout)
    written = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.py")}
    assert travelling_code(draft_class) == written
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == refreshing._auto_maps(draft_class)[layout]


def test_a_loaded_repository_of_older_code_runs_the_packages(old, draft):
    loaded = AutoModel.from_pretrained(old, trust_remote_code=True)
    assert type(loaded) is DFlashDraftModel
    assert digests(loaded) == digests(draft)


# Showing and asking ----------------------------------------------------------------------------------------------


def run(*words: str):
    return CliRunner().invoke(cli.app, ["refresh", *words], env={"COLUMNS": "200"})


@pytest.mark.quick
def test_a_dry_run_shows_the_difference_and_commits_nothing(hub, old):
    first = heads(hub, old)
    done = run(old, "--dry-run", "--yes")
    assert done.exit_code == 0
    output = done.output
    for branch in ("main", "engines"):
        assert f"{branch} at {first[branch][:8]}: dflash-hub 0.0.9 becomes {__version__}" in output
    added = len((ROOT / "sequences_dflash.py").read_text().splitlines())
    for line in (
        f"new      sequences_dflash.py +{added}/-0",
        "changed  config.json +1/-1",
        "removed  gone_too.py +0/-2",
    ):
        assert line in output
    assert "mine.py" not in output
    assert "-from .gone_dflash import gone" not in output
    lines = run(old, "--dry-run", "--diff").output.splitlines()
    for line in ("--- /dev/null", "+++ b/sequences_dflash.py", "+++ /dev/null", "-from .gone_dflash import gone"):
        assert line in lines
    assert heads(hub, old) == first
    assert not [call for call in hub.calls() if call[0] not in ("GET", "HEAD") or "lfs" in call[1]]


def test_without_a_terminal_it_is_not_pushed_unless_told_to(hub, old, unchecked):
    first = heads(hub, old)
    refused = run(old)
    assert "removed  gone_too.py" in refused.output
    assert isinstance(refused.exception, ValueError)
    assert "Pass --yes" in str(refused.exception)
    assert heads(hub, old) == first
    done = run(old, "--yes", "--message", "Newer code")
    assert done.exit_code == 0, done.output
    for branch, commit in heads(hub, old).items():
        assert f"{branch} is at {commit[:8]}" in done.output
        assert repository(hub, old).commits[commit].title == "Newer code"
    again = run(old)
    assert again.exit_code == 0
    assert "Nothing to push" in again.output


@pytest.mark.parametrize("answer", ["y", "n"])
def test_at_a_terminal_it_asks(hub, old, unchecked, answer, monkeypatch):
    first = heads(hub, old)
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(sys, "argv", ["dflash-hub", "refresh", old])
        os.write(ours, f"{answer}\n".encode())
        with pytest.raises(SystemExit) as ended:
            cli.main()
    os.close(ours)
    assert ended.value.code == (0 if answer == "y" else 1)
    assert (heads(hub, old) != first) == (answer == "y")


# What is refused, and what can go wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["main", "engines"])
def test_newer_code_is_refused(hub, old, branch):
    age(hub, old, branch, version="99.1")
    first = heads(hub, old)
    with pytest.raises(
        ValueError, match=rf"branch {branch}\) is of dflash-hub 99\.1.*pip install --upgrade dflash-hub"
    ):
        refresh(old)
    assert heads(hub, old) == first


def test_a_config_that_a_newer_version_wrote_is_refused(hub, old):
    put(hub, old, "main", {"config.json": aged_config(tree(hub, old)["config.json"].data, "99.1")})
    with pytest.raises(ValueError, match=r"is of dflash-hub 99\.1"):
        refresh(old)
    put(hub, old, "main", {"config.json": aged_config(tree(hub, old)["config.json"].data, "newest")})
    with pytest.raises(ValueError, match=r"'newest' wrote it, which is no version"):
        refresh(old)


FOREIGN = {
    "nothing": {"config.json": None},
    "no-auto-map": {"config.json": b'{"model_type": "qwen3"}'},
    "others-map": {"config.json": b'{"auto_map": {"AutoModel": "model.Model"}, "dflash_hub_version": "0.0.9"}'},
    "elsewhere": {"config.json": b'{"auto_map": {"AutoModel": "me/x--dflash.DFlashDraftModel"}}'},
}


@pytest.mark.parametrize("contents", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_dflash_hub_did_not_push_is_refused(hub, old, contents):
    put(hub, old, "main", contents)
    first = heads(hub, old)
    with pytest.raises(ValueError, match=r"no draft that dflash-hub pushed.*dflash-hub push FOLDER"):
        refresh(old)
    assert heads(hub, old) == first


def test_others_code_under_the_name_that_engines_know_is_refused(hub, repo_id):
    HfApi().create_repo(repo_id)
    config = b'{"model_type": "qwen3", "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}'
    put(hub, repo_id, "main", {"config.json": config, "dflash.py": b"raise RuntimeError('ran')\n"})
    with pytest.raises(ValueError, match="no draft that dflash-hub pushed"):
        refresh(repo_id)


def test_an_auto_map_that_names_what_is_not_shipped_any_more_is_refused(hub, old):
    config = json.loads(tree(hub, old)["config.json"].data)
    config["auto_map"]["AutoModelForCausalLM"] = "gone_dflash.Gone"
    put(hub, old, "main", {"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match=r"names gone_dflash\.Gone for AutoModelForCausalLM"):
        refresh(old)


@pytest.mark.parametrize("moved", ["main", "engines"])
def test_a_branch_that_moved_meanwhile_is_refused(hub, old, unchecked, moved):
    def somebody_pushes(branches):
        put(hub, old, moved, {"words.txt": b"x"})
        return True

    there = "Nothing was pushed" if moved == "main" else r"On the Hub now: main is new \(commit \w+\), engines is not"
    with pytest.raises(RuntimeError, match=rf"\(branch {moved}\) moved.*{there}.*Run the same again"):
        refresh(old, agree=somebody_pushes)
    assert repository(hub, old).resolve(moved).title == "by somebody else"
    refresh(old)
    for branch in ("main", "engines"):
        assert_new(hub, old, branch)
    assert "words.txt" in tree(hub, old, moved)


def test_a_failure_between_the_commits_says_which_is_new_and_a_second_run_completes(hub, old, unchecked):
    hub.state.fail["POST .*/commit/engines"] = 501  # the client would try 500 again and again
    with pytest.raises(
        RuntimeError, match=r"(?s)branch engines.*main is new \(commit \w+\), engines is not.*completes"
    ):
        refresh(old)
    main = heads(hub, old)["main"]
    assert_new(hub, old, "main")
    hub.state.fail.clear()
    assert set(refresh(old).commits) == {"engines"}
    assert_new(hub, old, "engines")
    assert heads(hub, old)["main"] == main


@pytest.mark.parametrize("fault", ["GET .*/tree/", "/resolve/.*/config.json"])
def test_a_failing_server_leaves_everything_as_it_was_and_says_so(hub, old, fault):
    """`test_hub_faults.py` has more faults, at other requests."""
    hub.state.fail[fault] = 501
    first = heads(hub, old)
    with pytest.raises(RuntimeError, match=r"(?s)Nothing was pushed: all is as it was\. Run the same again"):
        refresh(old)
    assert heads(hub, old) == first


def test_without_the_right_to_write_without_a_repository_and_offline_it_says_so(hub, old, unchecked, monkeypatch):
    with pytest.raises(RuntimeError, match=r"(?s)401.*Nothing was pushed.*hf auth login"):
        refresh(old, RefreshOptions(token="hf_wrong"))
    with pytest.raises(RuntimeError, match=r"(?s)could not be read.*404.*Nothing was pushed.*the right name"):
        refresh("tester/not-there")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"(?s)could not be read.*ffline.*with a connection"):
        refresh(old)


def test_without_a_connection_it_says_so(old, monkeypatch):
    monkeypatch.setattr(refreshing, "HfApi", lambda token: HfApi("http://127.0.0.1:9", token=token))
    with pytest.raises(RuntimeError, match=r"(?s)could not be read.*with a connection"):
        refresh(old)

"""A failing Hub: after each fault disk and Hub are in the old or the new state, whole, and a second run completes."""

import copy
import json
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

import tiny
from dflash_hub import DFlashDraftModel, cli, load_draft
from dflash_hub.publishing import push as pushing
from dflash_hub.publishing import refresh as refreshing
from dflash_hub.publishing.probe import digests
from dflash_hub.publishing.refresh import refresh, travelling_code
from dflash_hub.registry import drafts_for, explain_resolution
from hubserver import Entry, Fault, git_blob
from paths import TINY

BRANCHES = ("main", "engines")
OLD, NEW = "old", "new"


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that the client wanted to wait before it tried again; it does not wait."""
    asked, sleep = [], time.sleep

    def nap(seconds):
        asked.append(seconds)
        sleep(min(seconds, 0.002))

    monkeypatch.setattr(time, "sleep", nap)
    return asked


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr("dflash_hub.evaluation.run.measured_bandwidth", lambda device: 1e10)


@pytest.fixture(scope="module")
def drafts():
    """Two drafts that differ in their weights."""
    old = tiny.draft(tiny.target("qwen3"))
    new = copy.deepcopy(old)
    with torch.no_grad():
        new.fc.weight.add_(1)
    return {OLD: old, NEW: new}


class Way:
    """One thing that a user does with a repository on the Hub, which is in its old state before."""

    prepared: dict = {}  # what `put_up` left on the Hub, by class

    def __init__(self, hub, repo_id, drafts):
        self.hub, self.repo_id, self.drafts = hub, repo_id, drafts
        if type(self) not in self.prepared:
            self.put_up()
            self.prepared[type(self)] = (hub.state.repos.get(("models", repo_id)), dict(hub.state.lfs))
        repository, lfs = self.prepared[type(self)]
        if repository is not None:
            hub.state.repos["models", repo_id] = copy.deepcopy(repository)
            hub.state.repos["models", repo_id].rid = repo_id
        hub.state.lfs |= lfs
        self.begin()

    def put_up(self):
        """Bring the old state to the Hub."""

    def begin(self):
        """Note it."""
        branches = self.hub.state.repos["models", self.repo_id].branches
        self.before = {branch: self.tree(branch) for branch in branches}

    def repository(self):
        return self.hub.state.repos["models", self.repo_id]

    def tree(self, branch="main"):
        return dict(self.repository().resolve(branch).tree)

    def states(self) -> list[str]:
        """The state of each branch; it fails where one is neither."""
        return [self.state(branch) for branch in self.repository().branches]


class Load(Way):
    """The old draft is in the cache, the new one on the Hub."""

    def put_up(self):
        for draft in self.drafts.values():
            draft.push_to_hub(self.repo_id, layouts=["hub"])

    def begin(self):
        branches, newest = self.repository().branches, self.repository().resolve("main")
        branches["main"] = self.first = newest.parent
        assert self.act() == OLD
        branches["main"] = newest.oid

    def act(self, **options):
        loaded = digests(load_draft(self.repo_id, **options))
        return next(state for state, draft in self.drafts.items() if loaded == digests(draft))

    def states(self):
        assert self.act(revision=self.first, local_files_only=True) == OLD
        return []


class Evaluate(Load):
    """An evaluation of the draft on the Hub, with the built-in target."""

    def __init__(self, hub, repo_id, drafts):
        if not self.built_in:
            for state in (OLD, NEW):
                self.built_in[state] = load_draft(TINY / "draft")
            with torch.no_grad():
                self.built_in[NEW].fc.weight.add_(1)
        super().__init__(hub, repo_id, self.built_in)

    built_in: dict = {}

    def act(self, **options):
        if options:
            return super().act(**options)
        with tempfile.TemporaryDirectory() as folder:
            words = ["eval", "--target", str(TINY / "target"), "--draft", self.repo_id, "--output-dir", folder]
            done = CliRunner().invoke(cli.app, [*words, "--limit", "1", "--max-new-tokens", "4"])
            report = Path(folder) / "report.json"
            if done.exception is not None:
                assert not report.exists()
                raise done.exception
            commit = json.loads(report.read_text())["ways"][1]["revision"]
        return OLD if commit == self.first else NEW if commit == self.repository().branches["main"] else commit


class Resolve(Way):
    """A target whose card names what it is a copy of."""

    target, card = "Qwen/Qwen3.6-27B", b"---\nbase_model: Qwen/Qwen3.6-27B\n---\n"
    shape = {"hidden_size": 5120, "num_hidden_layers": 64, "vocab_size": 248320}

    def put_up(self):
        config = AutoConfig.for_model("qwen3", architectures=["Qwen3ForCausalLM"], **self.shape)
        config.push_to_hub(self.repo_id)
        if self.card:
            HfApi().upload_file(path_or_fileobj=self.card, path_in_repo="README.md", repo_id=self.repo_id)

    def act(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            spec, _ = explain_resolution(None, self.repo_id)
        if told := [str(one.message) for one in caught if "did not send" in str(one.message)]:
            raise OSError(told[0])
        return NEW if spec is drafts_for(self.target)[0] else "another"

    def states(self):
        return []


class ResolveByShape(Resolve):
    """A target without a card."""

    target, card = "Qwen/Qwen3-8B", None
    shape = {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936}


class Push(Way):
    branches = ("main",)

    def put_up(self):
        self.push(OLD)

    def push(self, state):
        layouts = {"main": "hub", "engines": "engines"}
        self.drafts[state].push_to_hub(self.repo_id, layouts=[layouts[branch] for branch in self.branches])

    def act(self):
        self.push(NEW)
        return self.outcome()

    def outcome(self):
        return NEW if self.states() == [NEW] * len(self.branches) else "not all new"

    def state(self, branch):
        now, then = self.tree(branch), self.before[branch]
        weights, first = now.pop("model.safetensors").sha256, then["model.safetensors"].sha256
        assert now == {path: entry for path, entry in then.items() if path != "model.safetensors"}
        return OLD if weights == first else NEW


class PushBoth(Push):
    branches = BRANCHES


class FirstPush(PushBoth):
    """To a repository that does not exist."""

    def put_up(self):
        """Leave the Hub empty."""

    begin = put_up

    def states(self):
        exists = ("models", self.repo_id) in self.hub.state.repos
        return super().states() if exists else []

    def state(self, branch):
        now = self.tree(branch)
        if branch == "main" and set(now) == {".gitattributes"}:
            return OLD
        types = {"main": b'"model_type": "dflash"', "engines": b'"model_type": "qwen3"'}
        assert types[branch] in now["config.json"].data
        assert {"model.safetensors", "README.md", *travelling_code(DFlashDraftModel)} <= set(now)
        return NEW


class Refresh(Push):
    def put_up(self):
        self.push(OLD)
        for branch in self.branches:
            data = b"# Copyright 2026 the dflash-hub authors.\nold = 1\n"
            put(self.repository(), branch, {"cache_dflash.py": data})

    def act(self):
        refresh(self.repo_id)
        return self.outcome()

    def state(self, branch):
        now = self.tree(branch)
        if now == self.before[branch]:
            return OLD
        for path, content in travelling_code(DFlashDraftModel).items():
            assert now[path].data == content, path
        return NEW


class RefreshBoth(Refresh):
    branches = BRANCHES


WAYS = {
    "load": Load,
    "eval": Evaluate,
    "resolve": Resolve,
    "resolve by shape": ResolveByShape,
    "push": Push,
    "push both": PushBoth,
    "first push": FirstPush,
    "refresh": Refresh,
    "refresh both": RefreshBoth,
}


def put(repository, branch, contents):
    """One commit of somebody else's."""
    parent = repository.resolve(branch)
    entries = {path: Entry(git_blob(data), len(data), None, data) for path, data in contents.items()}
    repository.branches[branch] = repository.add(parent, "by somebody else", "", parent.tree | entries).oid


@pytest.fixture
def way(request, hub, repo_id, drafts, monkeypatch):
    def stage(branch):  # the fresh process is tested elsewhere, and slow
        with tempfile.TemporaryDirectory() as folder:
            branch.stage(Path(folder))

    monkeypatch.setattr(refreshing, "check_branch", stage)
    return WAYS[request.param](hub, repo_id, drafts)


FAULTS = {
    "429": Fault(status=429, retry_after=7),
    "429 once": Fault(status=429, retry_after=7, times=1),
    "503": Fault(status=503, retry_after=7),
    "503 once": Fault(status=503, retry_after=7, times=1),
    "500": Fault(status=500),
    "reset": Fault("reset"),
    "lost": Fault("lost", times=1),
    "cut": Fault("cut"),
    "short": Fault("short"),
    "long": Fault("long"),
    "flip": Fault("flip"),
    "trickle": Fault("trickle"),
    "redirect": Fault("redirect"),
    "refuse": Fault("refuse"),
}
CONFIG, CARD, WEIGHTS, CODE = "/resolve/.*/config.json", "/resolve/.*/README.md", "GET /_lfs/", "/resolve/.*_dflash.py"
LOADED = r"(?s)could not be loaded: .*run the same again"
CHOSEN = r"(?s)did not send README.md of .* chosen without it: .*Run the same again"
CONFIGURED = r"(?s)config of the target .* could not be read: .*run the same again"
ASKED = r"(?s)was asked about .* and refused: .*Nothing was pushed. Run the same again"
CARDLESS = r"(?s)card of .* could not be read from the Hub: .*not replaced. Run the same again"
MAIN = r"(?s)did not take the upload to .*branch main is as it was.* Run the same again"
ENGINES = r"(?s)did not take .*branch engines is as it was.* Run the same again.*Already new on the Hub: main \(commit"
UNKNOWN = r"(?s)branch main could not be asked about .*It is the old one or the new one.*Run the same again"
MOVED = r"(?s)branch main moved meanwhile and is at commit \w+\. .*answer to this push was lost. Run the same again"
READ = r"(?s)could not be read from the Hub: .*all is as it was. Run the same again"
CODE_MAIN = r"(?s)new code could not be pushed to .*branch main.*all is as it was. Run the same again"
CODE_ENGINES = r"(?s)branch engines.*On the Hub now: main is new \(commit \w+\), engines is not. Run the same again"
CODE_LOST = r"(?s)branch main.*main is the old one or the new one, whole. Run the same again"

# fault, what is done, the requests that the fault strikes, and what comes of it: the state or a message
TABLE = [
    ("429", "load", WEIGHTS, LOADED),
    ("429", "resolve", CARD, CHOSEN),
    ("429", "push", "preupload", MAIN),
    ("429", "refresh", CODE, READ),
    ("429 once", "load", WEIGHTS, NEW),
    ("429 once", "push", "PUT", NEW),
    ("429 once", "refresh", WEIGHTS, NEW),
    ("503", "load", CONFIG, OLD),  # as huggingface_hub does: the cache, as of one commit
    ("503", "load", "mask_embedding.pt", r"(?s)did not send mask_embedding.pt of .*: .*Run the same again"),
    ("503", "push", CARD, CARDLESS),
    ("503", "refresh", "commit/main", CODE_MAIN),
    ("503 once", "push", "preupload", NEW),
    ("500", "load", WEIGHTS, LOADED),
    ("500", "resolve", CARD, CHOSEN),
    ("500", "push", "whoami", ASKED),
    ("500", "push both", "commit/engines", ENGINES),
    ("500", "refresh both", "commit/engines", CODE_ENGINES),
    ("reset", "load", WEIGHTS, LOADED),
    ("reset", "resolve", CARD, CHOSEN),
    ("reset", "push", "commit/main", MAIN),
    ("lost", "push", "commit/main", MOVED),
    ("lost", "first push", "branch/engines", ENGINES),
    ("lost", "refresh", "commit/main", CODE_LOST),
    ("cut", "load", WEIGHTS, LOADED),
    ("cut", "resolve", "GET .*/README.md", CHOSEN),
    ("cut", "push", "GET .*/refs", UNKNOWN),
    ("cut", "refresh", CODE, READ),
    ("short", "load", WEIGHTS, LOADED),
    ("short", "resolve by shape", CONFIG, CONFIGURED),
    ("short", "push", "whoami", ASKED),
    ("short", "refresh", "/refs", READ),
    ("long", "load", WEIGHTS, LOADED),
    ("long", "resolve by shape", CONFIG, CONFIGURED),
    ("long", "push", CARD, CARDLESS),
    ("long", "refresh", WEIGHTS, READ),
    ("flip", "load", WEIGHTS, "arrived damaged.*load again"),
    ("flip", "eval", WEIGHTS, "arrived damaged.*load again"),
    ("flip", "refresh", WEIGHTS, "arrived damaged"),
    ("trickle", "load", WEIGHTS, NEW),
    ("trickle", "push", CARD, NEW),
    ("trickle", "refresh", WEIGHTS, NEW),
    ("redirect", "load", CONFIG, OLD),
    ("redirect", "load", WEIGHTS, NEW),
    ("redirect", "resolve by shape", CONFIG, CONFIGURED),
    ("redirect", "push", "whoami", ASKED),
    ("redirect", "push", "commit/main", MAIN),
    ("refuse", "push", "PUT", MAIN),
]


@pytest.mark.parametrize(("fault", "way", "at", "says"), TABLE, indirect=["way"], ids=map(str, range(len(TABLE))))
def test_after_a_fault_all_is_old_or_new_and_a_second_run_completes(hub, way, fault, at, says, waits):
    hub.state.log.clear()
    hub.state.fail[at] = fault = replace(FAULTS[fault])
    if says in (OLD, NEW):
        assert way.act() == says
    else:
        with pytest.raises((OSError, RuntimeError), match=says) as error:
            way.act()
        assert ("The Hub asks to wait 7 seconds." in str(error.value)) == (fault.retry_after == 7)
    assert fault.struck
    assert 8 in waits or not (fault.times == 1 and fault.retry_after)  # the client adds a second
    assert not [request for request in hub.state.log if request["origin"] == "cdn" and request["auth"]]
    way.states()
    hub.state.fail.clear()
    assert way.act() == NEW


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"push both", "first push", "refresh both"}), indirect=True)
def test_a_repository_that_was_renamed_is_followed_or_named(hub, way):
    new = f"{way.repo_id}-new"
    hub.state.repos["models", new] = hub.state.repos.pop(("models", way.repo_id))
    hub.state.repos["models", new].rid = new
    hub.state.renamed[way.repo_id] = new
    if isinstance(way, Refresh) or not isinstance(way, Push):
        way.repository = lambda: hub.state.repos["models", new]
        assert way.act() == NEW
        return
    with pytest.raises(ValueError, match=f"{way.repo_id} was renamed to {new}; push to that name"):
        way.act()
    way.repo_id = new
    assert way.act() == NEW


class Move(Load):
    """The old draft is on the Hub. The new one, whose config differs too, comes while it is read."""

    def begin(self):
        self.newest = self.repository().resolve("main")
        self.repository().branches["main"] = self.newest.parent

    def move(self):
        self.repository().branches["main"] = self.newest.oid


@pytest.fixture(scope="module")
def configured():
    """Two drafts that differ in their configs and their weights, so that a mixture is neither."""
    drafts = {OLD: tiny.draft(tiny.target("qwen3"), block_size=3), NEW: tiny.draft(tiny.target("qwen3"), block_size=5)}
    with torch.no_grad():
        drafts[NEW].fc.weight.add_(1)
    return drafts


LOADERS = {"any kind": load_draft, "class": DFlashDraftModel.from_pretrained, "Auto class": AutoModel.from_pretrained}


@pytest.mark.parametrize(
    ("loader", "at"),
    [
        ("any kind", "/config.json"),
        ("any kind", "/mask_embedding.pt"),
        ("any kind", "HEAD .*/model.safetensors"),
        ("class", "/mask_embedding.pt"),
        ("class", "HEAD .*/model.safetensors"),
        ("class", "GET /_lfs/"),
        ("Auto class", "/mask_embedding.pt"),
        ("Auto class", "HEAD .*/model.safetensors"),
    ],
    ids="12345678",
)
def test_a_revision_that_moves_while_it_is_read_gives_one_commit(hub, repo_id, configured, loader, at):
    way = Move(hub, repo_id, configured)
    hub.state.fail[at] = move = Fault("meanwhile", meanwhile=way.move, times=1)
    for state in (None, NEW):
        loaded = LOADERS[loader](repo_id)
        found = OLD if loaded.config.block_size == 3 else NEW
        assert digests(loaded) == digests(configured[found])
        assert state in (None, found)
    assert move.struck


@pytest.mark.parametrize(
    ("at", "loses"), [("/whoami", False), ("/refs", True), ("PUT", True), ("/commit/main", True)], ids="1234"
)
def test_of_two_pushes_at_once_one_wins_and_the_other_hears_of_it(hub, repo_id, drafts, configured, at, loses):
    """The second comes in while the first is at work, and brings shards, which the first would leave behind."""
    way = Push(hub, repo_id, drafts)
    other = configured[NEW]
    shards = {"layouts": ["hub"], "max_shard_size": "20KB"}
    meanwhile = Fault("meanwhile", meanwhile=lambda: other.push_to_hub(repo_id, **shards), times=1)
    hub.state.fail[at] = meanwhile
    if loses:
        with pytest.raises(RuntimeError, match=r"(?s)branch main moved meanwhile.* Run the same again"):
            way.push(NEW)
        assert "model.safetensors" not in way.tree()
        assert digests(load_draft(repo_id)) == digests(other)
    way.push(NEW)
    assert meanwhile.struck
    assert [path for path in way.tree() if "safetensors" in path] == ["model.safetensors"]
    assert digests(load_draft(repo_id)) == digests(drafts[NEW])


@pytest.mark.parametrize("publishes", [False, True], ids=["push_to_hub", "publish"])
def test_a_card_that_is_edited_during_a_push_is_not_overwritten(hub, repo_id, drafts, publishes, tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "check_staged", lambda draft, folder: None)  # slow, and tested elsewhere
    way = Push(hub, repo_id, drafts)
    words = b"---\nlicense: mit\n---\n# Words of its owner\n"
    edited = Fault("meanwhile", meanwhile=lambda: put(way.repository(), "main", {"README.md": words}), times=1)
    hub.state.fail["/refs"] = edited
    drafts[NEW].save_pretrained(tmp_path)
    push = (lambda: pushing.publish(tmp_path, repo_id)) if publishes else lambda: way.push(NEW)
    with pytest.raises(RuntimeError, match=r"(?s)main moved meanwhile.* edited its card.* Run the same again"):
        push()
    assert way.tree()["README.md"].data == words
    push()
    assert edited.struck
    assert b"# Words of its owner" in way.tree()["README.md"].data
    assert digests(load_draft(repo_id)) == digests(drafts[NEW])


def test_a_push_is_one_commit_however_the_client_uploads_folders(hub, repo_id, drafts, monkeypatch):
    """With hf_xet, huggingface_hub 2.4 makes several commits of a large folder."""
    monkeypatch.setattr(HfApi, "upload_folder", lambda *args, **kwargs: pytest.fail("several commits"))
    way = Push(hub, repo_id, drafts)
    first = way.repository().branches["main"]
    assert way.act() == NEW
    assert way.repository().resolve("main").parent == first

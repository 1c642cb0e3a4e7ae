"""Runs that end before their time: by a signal, a full disk, a folder that cannot be written, or another run's lock."""

import json
import os
import re
import signal
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

import tiny
import training_run
from dflash_hub import DFlashDraftModel, load_draft
from dflash_hub.publishing.probe import digests
from dflash_hub.repository_dflash import staging_folder
from dflash_hub.training.regenerate import regenerate
from hubserver import Fault
from paths import ROOT, TINY

ONLINE = "import huggingface_hub.constants; huggingface_hub.constants.HF_HUB_OFFLINE = False\n"
KILLS = f"import sys; sys.path[:0] = [{str(ROOT / 'benchmarks')!r}, {str(ROOT / 'tests')!r}]; import kills; "
ROWS = [{"text": f"row {number}"} for number in range(6)]
FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
import tiny

def disk(room=resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

try:
{step}
except OSError as error:
    disk()
    print(error)
"""
"""A limit on the size of files stands for the disk; Python ignores the signal of such a limit."""


def full_disk(server, step: str) -> str:
    """What a step says that meets a full disk."""
    step = textwrap.indent(textwrap.dedent(step), "    ")
    done = server.run(code=FULL.format(tests=str(ROOT / "tests"), step=step))
    assert done.returncode == 0, done.stderr
    assert done.stdout, "nothing was raised"
    return done.stdout


def quiet(done: int, failed: int) -> None:
    pass


def wait_for(path: Path) -> str:
    for _ in range(3000):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written within a minute")


# One run at a time ---------------------------------------------------------------------------------------------------


SLOW_ROWS = """
import os, time
from pathlib import Path
from dflash_hub.training.regenerate import regenerate
regenerate({rows!r}, Path({out!r}), lambda row: time.sleep(row["text"] != "row 0" and 60) or row, 1, print)
"""
SLOW_RUN = """
import sys
sys.path.insert(0, {tests!r})
import training_run
training_run.trainer({out!r}, max_steps=100_000).train()
"""


def regenerate_here(out: Path) -> None:
    assert regenerate(ROWS, out, dict, 2, quiet) == (len(ROWS), [])


def train_here(out: Path) -> None:
    training_run.trainer(out, max_steps=1).train()


@pytest.mark.parametrize(
    ("name", "lock", "code", "run_here"),
    [
        ("out.jsonl", "../out.jsonl.lock", SLOW_ROWS, regenerate_here),
        ("draft", "_run.lock", SLOW_RUN, train_here),
    ],
)
def test_a_second_run_into_one_output_is_refused_until_the_first_is_gone(tmp_path, servers, name, lock, code, run_here):
    out = tmp_path / name
    running = servers.training.start(code=code.format(rows=ROWS, out=str(out), tests=str(ROOT / "tests")))
    holder = wait_for(Path(os.path.normpath(out / f"{lock}-holder")))
    assert f" on {os.uname().nodename}, since 20" in holder
    with pytest.raises(ValueError, match=r"is being written by another run: process \d+ on .* choose another") as error:
        run_here(out)
    assert holder in str(error.value)
    os.kill(int(holder.split()[1]), signal.SIGKILL)
    assert running.wait().returncode == -signal.SIGKILL
    run_here(out)
    assert not list(tmp_path.rglob("*.lock*"))
    if name == "out.jsonl":
        rows = [json.loads(line)["row"] for line in out.read_text().splitlines()]
        assert sorted(rows) == list(range(len(ROWS)))


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [4_000, 30_000])
def test_a_save_that_meets_a_full_disk_leaves_the_older_draft(tmp_path, servers, room):
    """With room for no code, and with room for no weights; and then with room enough."""
    target = tiny.target("qwen3")
    tiny.draft(target).save_pretrained(tmp_path, max_shard_size="40KB")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    step = f"""
        newer = tiny.draft(tiny.target("qwen3"), 2, block_size=6)
        disk({room})
        newer.save_pretrained({str(tmp_path)!r})
    """
    said = full_disk(servers.training, step)
    assert f"{tmp_path} could not be written: " in said
    assert "File too large" in said
    assert "What it held is as it was. Make room" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    newer = tiny.draft(target, 2, block_size=6)
    newer.save_pretrained(tmp_path)
    again = DFlashDraftModel.from_pretrained(tmp_path)
    assert (digests(again), again.config.block_size) == (digests(newer), 6)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (tmp_path / "_partial").exists()


def test_a_single_file_is_not_loaded_in_place_of_the_shards_that_replaced_it(tmp_path):
    target = tiny.target("qwen3")
    tiny.draft(target).save_pretrained(tmp_path)
    newer = tiny.draft(target, 2)
    newer.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert digests(DFlashDraftModel.from_pretrained(tmp_path)) == digests(newer)


def test_a_row_that_meets_a_full_disk_leaves_nothing_and_is_written_by_the_next_run(tmp_path, servers):
    out = tmp_path / "out.jsonl"
    step = f"""
        from pathlib import Path
        from dflash_hub.training.regenerate import regenerate
        disk(100)
        regenerate({ROWS!r}, Path({str(out)!r}), dict, 1, lambda done, failed: None)
    """
    said = full_disk(servers.training, step)
    assert re.match(
        r"Row \d could not be written to .*\.jsonl: \[Errno 27\] File too large. It holds 3 whole rows", said
    )
    assert out.read_text().endswith("}\n")
    regenerate_here(out)


def test_a_trained_draft_that_meets_a_full_disk_names_the_checkpoint_to_resume_from(tmp_path, servers):
    step = f"""
        from dflash_hub.commands.training_run import finish
        from dflash_hub.training.setup import TrainOptions
        import training_run

        trainer = training_run.trainer({str(tmp_path)!r}, save_strategy="steps", save_steps=2, max_steps=2)
        trainer.train()
        disk(2000)
        finish(trainer, TrainOptions("target", "data"))
    """
    said = full_disk(servers.training, step)
    assert f"The trained draft could not be saved in {tmp_path}: {tmp_path} could not be written" in said
    assert f"The last complete one is {tmp_path / 'checkpoint-2'}: make room" in said
    assert not (tmp_path / "config.json").exists()


def test_a_layout_that_meets_a_full_disk_is_named_and_nothing_is_pushed(hub, repo_id, servers):
    step = f"""
        from dflash_hub.publishing import publish
        publish({str(TINY / "draft")!r}, {repo_id!r}, report=lambda step: "Staging" in step and disk(100_000))
    """
    said = full_disk(servers.models, step)
    assert said.startswith("The hub layout could not be staged: ")
    assert "Nothing was pushed. Staging needs room for two copies of the draft in" in said
    assert not hub.state.repos


def test_a_refresh_that_meets_a_full_disk_is_named_and_nothing_is_pushed(hub, repo_id, servers, tiny_draft):
    tiny_draft.push_to_hub(repo_id, layouts=("hub",))
    HfApi().upload_file(path_or_fileobj=b"# old", path_in_repo="sampling_dflash.py", repo_id=repo_id)
    load_draft(repo_id)  # so that the weights are in the cache
    before = hub.state.repos["models", repo_id].branches["main"]
    step = f"""
        from dflash_hub.publishing.refresh import refresh
        refresh({repo_id!r}, report=lambda step: "Checking" in step and disk(5_000))
    """
    said = full_disk(servers.models, step)
    assert said.startswith(f"The new {repo_id} (branch main) could not be staged: ")
    assert "Nothing was pushed. Staging needs room for two copies of the draft in" in said
    assert hub.state.repos["models", repo_id].branches["main"] == before


# Folders that cannot be written --------------------------------------------------------------------------------------


def test_without_a_home_that_can_be_written_folders_load_and_the_hub_is_refused_with_its_name(
    hub, repo_id, tmp_path, tiny_draft, fresh_process
):
    """A file lies where HF_HOME should be, which stops even an administrator."""
    tiny_draft.push_to_hub(repo_id, layouts=("hub",))
    home = tmp_path / "home"
    home.touch()
    code = f"""
        from dflash_hub import DFlashDraftModel, load_draft
        for load in (DFlashDraftModel.from_pretrained, load_draft):
            print(load({str(TINY / "draft")!r}).config.block_size)
            try:
                load({repo_id!r})
            except OSError as error:
                print(error)
    """
    said = fresh_process(code, block=False, HF_HOME=str(home)).splitlines()
    assert [line for line in said if line.isdigit()] == ["8", "8"]
    assert len([line for line in said if line.startswith(repo_id) and str(home) in line]) == 2
    assert len([line for line in said if "Downloads go to HF_HOME, or to cache_dir=." in line]) == 2


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "signals"),
    [("regenerate", "SIGINT SIGTERM SIGKILL"), ("train", "SIGTERM"), ("push", "SIGINT SIGTERM SIGKILL")],
)
def test_runs_ended_by_each_signal_and_resumed_are_those_that_were_not(hub, servers, job, signals):
    """One moment for each signal; `benchmarks/kills.py` takes more. `test_trainer.py` kills a run at a known step."""
    words = ["--jobs", job, "--moments", "1", "--steps", "4", "--signals", *signals.split()]
    done = servers.training.run(code=ONLINE + KILLS + f"kills.main({words})", HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["job"] == job


PUSH = """
import os, sys, tempfile
from pathlib import Path
from dflash_hub import cli
from dflash_hub.publishing import push
push.check_staged = lambda draft, folder: None
tempfile.tempdir = {folder!r}
Path({pid!r}).write_text(str(os.getpid()))
sys.argv = ["dflash-hub", "push", {draft!r}, {repo!r}]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_push_that_is_ended_removes_its_folder_or_a_later_push_does(
    hub, repo_id, servers, tmp_path, tiny_draft, monkeypatch, number
):
    folder, pid = tmp_path / "temporary", tmp_path / "pid"
    folder.mkdir()
    kill = Fault("meanwhile", meanwhile=lambda: os.kill(int(pid.read_text()), number), times=1)
    hub.state.fail["/preupload/main"] = kill
    code = PUSH.format(folder=str(folder), pid=str(pid), draft=str(TINY / "draft"), repo=repo_id)
    done = servers.training.run(code=ONLINE + code, HF_HUB_OFFLINE="0")
    assert kill.struck
    assert done.returncode == (143 if number == signal.SIGTERM else -9), done.stderr
    left = list(folder.iterdir())
    assert len(left) == (number == signal.SIGKILL)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with staging_folder() as running:
        os.utime(running, (0, 0))
        tiny_draft.push_to_hub(repo_id, layouts=("hub",))
        assert {*folder.iterdir()} == {*left, running}  # it may be of a push that begins
        for one in left:
            os.utime(one, (0, 0))
        tiny_draft.push_to_hub(repo_id, layouts=("hub",))
        assert list(folder.iterdir()) == [running]


# Many decodes --------------------------------------------------------------------------------------------------------


def test_many_decodes_leave_no_memory_hook_thread_or_file(servers):
    done = servers.training.run(code=KILLS + "kills.main(['--jobs', 'decodes', '--decodes', '16', '--longest', '30'])")
    assert done.returncode == 0, done.stderr


def test_eight_threads_with_one_draft_write_the_targets_own_texts():
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    prompts = [tiny.prompt(length, seed=length) for length in range(5, 65, 6)]

    def decode(ids: torch.Tensor) -> list[int]:
        call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        return target.generate(ids, custom_generate=draft.speculate, **call)[0].tolist()

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(decode, prompts))
    assert texts == [tiny.greedy(target, ids, 8)[0].tolist() for ids in prompts]
    assert tiny.as_found(target)


def test_four_processes_with_one_cache_folder_write_the_targets_own_text(
    hub, repo_id, tmp_path, tiny_target, tiny_draft, servers
):
    """All of them download the draft at once."""
    tiny_draft.push_to_hub(repo_id, layouts=("hub",))
    code = f"""
        import torch
        from transformers import AutoModelForCausalLM
        from dflash_hub import DFlashDraftModel
        target = AutoModelForCausalLM.from_pretrained({str(TINY / "target")!r}).eval()
        draft = DFlashDraftModel.from_pretrained({repo_id!r}, cache_dir={str(tmp_path)!r}).eval()
        ids = torch.arange(40, 70)[None]
        call = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        print(target.generate(ids, custom_generate=draft.speculate, **call).tolist())
    """
    running = [servers.models.start(code=textwrap.dedent(code)) for _ in range(4)]
    ids = torch.arange(40, 70)[None]
    own = str(tiny.greedy(tiny_target, ids, 8).tolist())
    assert [one.wait().stdout.splitlines()[-1] for one in running] == [own] * 4
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1
    assert not list(tmp_path.rglob("*.incomplete"))

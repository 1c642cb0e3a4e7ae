"""Features of the target written once: runs from them are the runs without them, however the writing went."""

import gc
import json
import os
import re
import shutil
import signal
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback
from typer.testing import CliRunner

import tiny
from dflash_hub import DFlashDraftModel, cli
from dflash_hub.commands.screen import console
from dflash_hub.publishing.probe import digests
from dflash_hub.training import DFlashTrainer, DFlashTrainingArguments, feature_data
from dflash_hub.training.feature_data import open_features
from dflash_hub.training.feature_setup import FeatureArguments, FeatureJob, build_from_features
from dflash_hub.training.feature_target import load_ends, save_ends
from dflash_hub.training.feature_writer import write
from dflash_hub.training.setup import TrainOptions, build
from paths import ROOT, TINY

pytestmark = pytest.mark.usefixtures("undrawn")

SHAPE = {"block_size": 8, "num_layers": 1, "target_layer_ids": [1, 2, 4], "mask_token_id": 1, "eval_rows": 3}
HEADS = {
    "dflash": {},
    "dflash2": {"selector_rank": 8, "selector_top_k": 4},
    "dspark": {"markov_rank": 8},
    "domino": {"emb_dim": 8, "gru_hidden_dim": 8},
}
RUN = {
    "num_anchors": 4,
    "max_length": 40,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
ALL = "ce=0.4,kl=0.3,tv=0.3"
"""A loss that needs everything that can be stored."""


def options(**more) -> TrainOptions:
    return TrainOptions(**{"target": str(TINY / "target")} | SHAPE | more)


def job(data, folder, more: dict | None = None, **given) -> FeatureJob:
    small = {"max_length": 40, "shard_size": 2e-4, "use_cpu": True}
    return FeatureJob(options(data=str(data), **(more or {})), FeatureArguments(str(folder), **small | given))


def written(data, folder, more: dict | None = None, **given) -> Path:
    made = job(data, folder, more, **given)
    write(folder, made.plan, made.load, lambda shards, rows: None)
    return folder


def from_features(folder, output, more: dict | None = None, **args) -> DFlashTrainer:
    chosen = options(**{"features": str(folder), "target": "", "data": ""} | (more or {}))
    return build_from_features(chosen, DFlashTrainingArguments(str(output), **RUN | args))


def result(trainer: DFlashTrainer) -> tuple:
    """Losses, what evaluation found, and the weights in the end."""
    trainer.train()
    timeless = [
        {name: value for name, value in line.items() if "second" not in name and "runtime" not in name}
        for line in trainer.state.log_history
    ]
    return timeless, digests(trainer.model)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """What is imported is not searched for garbage, which every run of Trainer collects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of a question and an answer, of several lengths."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for length in torch.randint(10, 40, (24,), generator=generator).tolist():
        ids = torch.randint(2, 500, (length,), generator=generator).tolist()
        lines.append(json.dumps({"input_ids": ids, "supervised": [0] * 4 + [1] * (length - 4)}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    return written(data, tmp_path_factory.mktemp("features") / "all", loss=ALL)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "args"),
    [
        ("dflash", {}),
        ("dflash", {"loss": ALL, "gradient_accumulation_steps": 2}),
        ("dflash2", {"loss": "kl", "dataloader_num_workers": 1}),
        ("dspark", {}),
        ("domino", {"loss": "ce=0.5,tv=0.5", "loss_weights": "dpace"}),
    ],
)
def test_a_run_from_features_is_the_run_without_them(data, folder, tmp_path, variant, args):
    """Losses, evaluation and weights, bit by bit; only embedding and head of the target are there."""
    kind = {"variant": variant} | HEADS[variant]
    online = build(options(data=str(data), **kind), DFlashTrainingArguments(str(tmp_path), **RUN | args))
    stored = from_features(folder, tmp_path, kind, **args)
    assert stored.target.num_parameters() == online.target.get_input_embeddings().weight.numel()
    assert ("last_hidden_state" in stored.train_dataset.column_names) == online.objective.needs_target
    assert result(stored) == result(online)
    batches = (batch["input_ids"] for batch in stored.get_train_dataloader())
    order = stored.train_dataset.part.order.tolist()
    for ids, number in zip(batches, order, strict=True):
        assert ids[0].tolist() == online.train_dataset[number]["input_ids"], "rows are not written in their order"


def test_smaller_dtypes_of_features_change_the_loss_by_little(data, folder, tmp_path):
    losses = {}
    for dtype, size in (("auto", 4 * 512 + 5), ("bfloat16", 2 * 512 + 5), ("fp8", 512 + 5 + 4 * 4)):
        stored = folder if dtype == "auto" else written(data, tmp_path / dtype, dtype=dtype, loss=ALL)
        assert open_features(str(stored)).origin.bytes_per_token == size
        log, _ = result(from_features(stored, tmp_path, loss=ALL, eval_strategy="no"))
        losses[dtype] = [line["loss"] for line in log if "loss" in line]
    assert losses["auto"] != losses["bfloat16"] != losses["fp8"]
    assert losses["bfloat16"] == pytest.approx(losses["auto"], rel=0.005)
    assert losses["fp8"] == pytest.approx(losses["auto"], rel=0.05)


@pytest.mark.parametrize("family", ["gemma4_text", "nemotron_h"])
def test_embedding_and_head_are_put_back_as_they_were(tmp_path, family):
    """One scales its embeddings by a number that no checkpoint holds."""
    target = tiny.target(family)
    save_ends(tmp_path, target)
    ends = load_ends(tmp_path)
    ids, states = torch.arange(tiny.VOCAB), torch.randn(3, 32)
    assert torch.equal(ends.get_input_embeddings()(ids), target.get_input_embeddings()(ids))
    assert torch.equal(ends.get_output_embeddings()(states), target.get_output_embeddings()(states))
    with pytest.raises(ValueError, match="Of the target only embedding and head are here"):
        ends.generate(ids[None])


def test_the_whole_target_is_loaded_where_held_out_prompts_are_decoded(folder, tmp_path):
    trainer = from_features(folder, tmp_path, eval_acceptance_prompts=1, eval_acceptance_tokens=4)
    log, _ = result(trainer)
    assert log[-2]["eval_decoded_acceptance_length"] >= 1


# Writing -------------------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_features

def report(shards, rows):
    if shards == {shards}:
        os.kill(os.getpid(), signal.SIGKILL)

job = test_features.job({data!r}, {folder!r}, loss=test_features.ALL)
test_features.write(Path({folder!r}), job.plan, job.load, report)
"""


def killed_after(shards: int):
    def spoil(data, folder: Path, servers) -> None:
        names = {"tests": str(ROOT / "tests"), "data": str(data), "folder": str(folder), "shards": shards}
        assert servers.training.run(code=KILLED.format(**names)).returncode == -signal.SIGKILL
        assert len(list(folder.glob("*-of-*"))) == shards

    return spoil


def broken(data, folder: Path, servers) -> None:
    """A shard that was cut by somebody else, one that was removed, and what a killed run left."""
    written(data, folder, loss=ALL)
    (folder / "_partial.safetensors").write_bytes(b"half")
    (folder / "eval-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"eval-00001.* is missing, and no `dflash-hub features` is writing it"):
        open_features(str(folder))
    os.truncate(folder / "train-00002-of-00007.safetensors", 1000)
    with pytest.raises(ValueError, match=r"00002.*is not whole.*Remove it. Run the `dflash-hub features`"):
        open_features(str(folder))


@pytest.mark.parametrize("spoil", [killed_after(0), killed_after(3), broken])
def test_what_an_interrupted_run_left_becomes_the_features_of_a_whole_run(data, folder, tmp_path, servers, spoil):
    spoil(data, tmp_path / "again", servers)
    assert content(written(data, tmp_path / "again", loss=ALL)) == content(folder)


def test_a_shard_that_meets_a_full_disk_is_written_by_the_next_run(data, folder, tmp_path, servers):
    """A limit on the size of files stands for the disk."""
    again = tmp_path / "again"
    code = f"""
        import resource, sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "tests")!r})
        import test_features

        def report(shards, rows):
            if shards == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

        job = test_features.job({str(data)!r}, {str(again)!r}, loss=test_features.ALL)
        try:
            test_features.write(Path({str(again)!r}), job.plan, job.load, report)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print(error)
    """
    said = servers.training.run(code=textwrap.dedent(code)).stdout
    assert re.search(
        rf"00002-of-00007.safetensors could not be written: .*{again} holds 2 of 8 shards; make room", said
    )
    assert not (again / "_partial.safetensors").exists()
    assert content(written(data, again, loss=ALL)) == content(folder)


# While they are being written ----------------------------------------------------------------------------------------


SLOW = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_features

def report(shards, rows):
    while shards == 3 and not Path({go!r}).exists():
        time.sleep(0.01)

job = test_features.job({data!r}, {folder!r}, loss=test_features.ALL)
test_features.write(Path({folder!r}), job.plan, job.load, report)
"""


@pytest.fixture
def writer(data, tmp_path, servers):
    """A process that writes features into `tmp_path / "again"`; after three shards it waits until there is a `go`."""
    names = {"tests": str(ROOT / "tests"), "data": str(data), "folder": str(tmp_path / "again")}
    running = servers.training.start(code=SLOW.format(**names, go=str(tmp_path / "go")))
    until = time.monotonic() + 120
    while len(list((tmp_path / "again").glob("*-of-*"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    yield running
    (tmp_path / "go").touch()


def test_a_run_reads_features_that_another_process_is_writing(folder, tmp_path, writer, monkeypatch):
    """It trains on what is there, and waits for the rest."""
    monkeypatch.setattr(feature_data, "POLL", 0.02)
    trainer = from_features(tmp_path / "again", tmp_path / "draft", eval_strategy="no", max_steps=10)
    trainer.add_callback(Going(tmp_path))
    found = result(trainer)
    assert writer.wait().returncode == 0
    assert found == result(from_features(folder, tmp_path / "draft", eval_strategy="no", max_steps=10))
    assert content(tmp_path / "again") == content(folder)


class Going(TrainerCallback):
    """Lets the writer go on after two steps."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            assert len(list((self.folder / "again").glob("*-of-*"))) == 3
            (self.folder / "go").touch()


def test_a_run_ends_where_the_process_that_writes_its_features_has_died(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(feature_data, "POLL", 0.02)
    trainer = from_features(tmp_path / "again", tmp_path / "draft", eval_strategy="no", max_steps=12)
    os.kill(int((tmp_path / "again" / "_run.lock-holder").read_text().split()[1]), signal.SIGKILL)
    writer.wait()
    with pytest.raises(ValueError, match=r"00003-of-00007.safetensors is missing, and no `dflash-hub features` is wri"):
        trainer.train()
    assert trainer.state.global_step >= 2


# On the Hub ----------------------------------------------------------------------------------------------------------


def test_features_on_the_hub_are_downloaded_shard_by_shard(hub, repo_id, folder, tmp_path):
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    api.upload_folder(repo_id=repo_id, folder_path=folder, path_in_repo="deep/er", repo_type="dataset")
    trainer = from_features(f"{repo_id}/deep/er", tmp_path, eval_strategy="no")

    def downloaded() -> set[str]:
        paths = [entry["path"].rpartition("/")[2] for entry in hub.state.log if "/resolve/" in entry["path"]]
        return {path for path in paths if "-of-" in path}

    assert not downloaded()
    found = result(trainer)
    assert 0 < len(downloaded()) < 4
    assert found == result(from_features(folder, tmp_path, eval_strategy="no"))
    api.delete_file("deep/er/train-00004-of-00007.safetensors", repo_id, repo_type="dataset")
    with pytest.raises(ValueError, match=rf"dataset {repo_id} lacks deep/er/train-00004.*Upload the whole folder"):
        open_features(f"{repo_id}/deep/er")


def test_a_target_on_the_hub_is_compared_by_its_weights_where_these_are_here(hub, repo_id, folder, tmp_path):
    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=TINY / "target")
    with pytest.raises(ValueError, match=rf"is at commit \w+, .* not here to be compared: `hf download {repo_id}`"):
        from_features(folder, tmp_path, {"target": repo_id})
    snapshot_download(repo_id)
    trainer = from_features(folder, tmp_path, {"target": repo_id})
    assert trainer.model.card_metadata == {"base_model": repo_id}


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "args", "message"),
    [
        ({"block_size": 6}, {}, "block_size is 6 here and 8 in the features"),
        ({"target_layer_ids": [0, 2]}, {}, r"target_layer_ids is \[0, 2\] here and \[1, 2, 4\] in the features"),
        ({}, {"max_length": 64}, "max_length is 64 here and 40 in the features. Leave these options out"),
        ({"eval_rows": 1}, {"packing": False}, r"packing is False here and True .*; eval_rows is 1 here and 3"),
        ({"data": "rows.jsonl"}, {}, "data is 'rows.jsonl', but features hold prepared rows"),
        ({"tune": ["block_size=4,8"]}, {}, "regenerate_every and tune need the whole target"),
        ({"target_dtype": "bfloat16"}, {}, "target_dtype is 'bfloat16' here and 'float32' in the features"),
        ({"variant": "dspark"}, {}, "features hold no last_hidden_state. Write them with the --variant and the --loss"),
        (
            {"target": "other"},
            {},
            "config.json differ .* the target's weights differ .* is of the target .*examples/tiny_pair/target",
        ),
        (
            {"target": "finer"},
            {},
            "^the target's weights differ from those .* is of the target .* or write features of",
        ),
        ({"target": "spoken"}, {}, "^the tokens of the target's tokenizer differ from those of the features"),
        ({"draft": str(TINY / "draft")}, {}, None),
    ],
)
def test_features_of_something_else_are_refused_by_name(plain, tmp_path, targets, more, args, message):
    if "target" in more:
        more = more | {"target": str(targets / more["target"])}
    if message is None:
        from_features(plain, tmp_path, more, **args)
        return
    with pytest.raises(ValueError, match=message):
        from_features(plain, tmp_path, more, **args)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> Path:
    return written(data, tmp_path_factory.mktemp("features") / "plain")


@pytest.fixture(scope="module")
def targets(tmp_path_factory, tiny_target) -> Path:
    """Targets that are like the built-in one: of another shape, trained further, and with another chat template."""
    root = tmp_path_factory.mktemp("targets")
    for name in ("other", "finer", "spoken"):
        shutil.copytree(TINY / "target", root / name)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(root / "spoken")
    weights = load_file(TINY / "target" / "model.safetensors")
    weights["model.layers.5.self_attn.q_proj.weight"][0, 0] += 1
    for name in ("other", "finer"):
        save_file(weights, root / name / "model.safetensors")
    config = json.loads((root / "other" / "config.json").read_text())
    (root / "other" / "config.json").write_text(json.dumps(config | {"rope_theta": 5}))
    return root


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("index.json", None, "holds no features: it has no index.json"),
        ("index.json", "{}", "index.json is no index of features"),
        ("index.json", '{"format": 9, "written_by": "dflash-hub 7"}', r"of format 9, written by dflash-hub 7; this is"),
        ("index.json", '{"format": 1, "written_by": "", "of": {}, "parts": {}}', "index.json lacks entries"),
        ("rows.safetensors", "half", "rows.safetensors cannot be read"),
        ("target/model.safetensors", "half", "the target's embedding and head, cannot be read"),
    ],
)
def test_a_bad_folder_is_refused_before_the_first_step(plain, tmp_path, name, text, message):
    shutil.copytree(plain, tmp_path / "bad")
    path = tmp_path / "bad" / name
    path.write_text(text) if text else path.unlink()
    with pytest.raises(ValueError, match=message):
        from_features(tmp_path / "bad", tmp_path)


@pytest.mark.parametrize(
    ("more", "given", "message"),
    [
        (
            {},
            {"max_length": 32},
            "max_length is 32 here and 40 in the features; the prepared rows of the data differ .* Choose another",
        ),
        ({}, {"shard_size": 1.0}, "shards of another size. Repeat its --shard-size"),
        ({"streaming": True}, {}, "streaming is True, but features are written of rows whose number is known"),
        ({}, {"shard_size": 0}, "shard_size is 0; it must be above 0"),
    ],
)
def test_features_are_not_mixed_with_others(data, plain, more, given, message):
    with pytest.raises(ValueError, match=message):
        written(data, plain, more, **given)


def test_a_folder_of_something_else_and_a_disk_without_room_are_refused(data, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, but no features. Choose another --output-dir"):
        written(data, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"The features need 0.0 GB more, but .* has 0.0 GB of room"):
        written(data, tmp_path / "new")


# The commands --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked_probe")
def test_features_are_written_and_trained_from_at_the_terminal(data, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "width", 200, raising=False)

    def run(*words: str) -> str:
        return CliRunner().invoke(cli.app, words, env={"COLUMNS": "200"}, catch_exceptions=False).output

    out, draft = tmp_path / "features", tmp_path / "draft"
    words = ["features", "--target", str(TINY / "target"), "--data", str(data), "--output-dir", str(out)]
    words += ["--block-size", "8", "--target-layer-ids", "1", "2", "4", "--mask-token-id", "1", "--eval-rows", "3"]
    words += ["--max-length", "40", "--shard-size", "0.0002", "--loss", ALL, "--use-cpu"]
    shown = run(*words, "--dry-run")
    assert re.search(r"disk +2,053 bytes a token; \d.\d\d MB in 8 shards", shown)
    assert re.search(r"tokens/s on cpu; about \d+ s", shown)
    assert not out.exists()
    assert "MB. Train from them: dflash-hub train --features" in run(*words)
    assert content(out) == content(folder)
    assert "8 of 8 shards were already there." in run(*words)
    words = ["train", "--features", str(out), "--output-dir", str(draft), "--num-layers", "1", "--num-anchors", "4"]
    words += ["--max-steps", "2", "--use-cpu", "true", "--report-to", "none", "--disable-tqdm", "true"]
    shown = run(*words, "--dry-run")
    assert "s a step" in shown
    assert "reloads bit-equal" in shown
    run(*words)
    config = DFlashDraftModel.from_pretrained(draft).config
    assert (config.block_size, config.mask_token_id, config.target_layer_ids) == (8, 1, [1, 2, 4])
    with pytest.raises(ValueError, match="inspect is 3, but features hold prepared rows"):
        run(*words, "--inspect")
    with pytest.raises(ValueError, match="missing: --target, --data"):
        run("features")
    with pytest.raises(ValueError, match="--dtipe is no option of features; did you mean --dtype"):
        run("features", "--dtipe", "fp8")

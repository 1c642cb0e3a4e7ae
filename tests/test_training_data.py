"""Rows of chat and text to packed rows of tokens."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from dflash_hub.training.data import Collator, PreprocessConfig, pack, packed_batch, prepare
from dflash_hub.training.reading import load_rows, row_of
from paths import ROOT, TINY

TEMPLATE = """{%- for m in messages %}<{{ m.role }}>
{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def config(tokenizer):
    return PreprocessConfig(tokenizer, block_size=4, mask_token_id=1, max_length=64, stop_ids=frozenset([0]))


def chat(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}


def spoken(tokenizer, row) -> list[str]:
    """The supervised stretches of a row, as text."""
    found, last = [], 0
    for token, supervised in zip(row["input_ids"], row["supervised"], strict=True):
        if supervised:
            found = [*found[:-1], [*found[-1], token]] if last and found else [*found, [token]]
        last = supervised
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.quick
def test_only_what_the_assistant_says_is_supervised_up_to_its_end_token(tokenizer, config):
    rows, report = prepare([chat("how", "so", "why", "thus")], config)
    assert len(rows) == 1
    assert spoken(tokenizer, rows[0]) == ["so<|endoftext|>", "thus<|endoftext|>"]
    assert tokenizer.decode(rows[0]["input_ids"]).startswith("<user>\nhow<|endoftext|>\n<assistant>\nso<|endoftext|>")
    assert str(report) == "1 documents"


def test_an_answer_stands_behind_what_the_target_will_be_asked_with(tokenizer, config):
    """The template drops the thoughts of earlier turns, so the second answer needs a document of its own."""
    rows, report = prepare([chat("a", "hm</think>b", "c", "oh</think>d")], replace(config, max_length=200))
    assert (report.used, len(rows), len(rows[0]["lengths"])) == (2, 1, 2)
    assert set(spoken(tokenizer, rows[0])) == {"hm</think>b<|endoftext|>", "oh</think>d<|endoftext|>"}
    asked = chat("a", "hm</think>b", "c")["messages"]
    asked = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert asked + "oh</think>d" in tokenizer.decode(rows[0]["input_ids"])
    assert "hm" not in asked


def test_text_is_supervised_whole_and_cut_into_pieces_that_know_nothing_of_each_other(tokenizer, config):
    text = (ROOT / "cli.py").read_text()
    ids = tokenizer(text).input_ids
    rows, report = prepare([{"text": text}], config)
    assert report.used + report.dropped["too short"] == -(-len(ids) // 64)
    assert [token for row in rows for token in row["input_ids"]] == ids[: sum(len(row["input_ids"]) for row in rows)]
    assert all(set(row["supervised"]) == {1} for row in rows)


def test_rows_that_teach_nothing_are_counted_by_reason_and_left_out(config):
    rows = [chat("hello there"), chat("long enough", "a good answer"), {"messages": []}, chat("one", "")]
    _, report = prepare(rows, config)
    assert report.used == 1
    assert dict(report.dropped) == {"nothing supervised": 3}
    _, report = prepare([{"text": "ab"}, {"text": ""}, {"text": "a"}, {"text": "def f(x): return x"}], config)
    assert dict(report.dropped) == {"too short": 3}
    assert str(report) == "1 documents; left out: 3 too short"


def test_a_conversation_that_the_template_refuses_is_counted(tokenizer, config):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="1 refused by the chat template"):
        prepare([chat("long enough", "a good answer")], config)


def test_an_answer_that_is_cut_off_before_it_begins_is_left_out(tokenizer, config):
    with pytest.raises(ValueError, match=r"No row can be trained on: 0 documents; left out: 1 nothing supervised"):
        prepare([chat("x " * 200, "never reached")], config)


def test_a_stream_gives_the_same_documents_and_counts_as_it_goes(tokenizer, config):
    rows = [chat("long enough", f"a good answer {n}") for n in range(5)] + [chat("no answer")]
    whole, _ = prepare(rows, config)
    streamed, report = prepare(Dataset.from_list(rows).to_iterable_dataset(), config)
    assert [row["input_ids"] for row in streamed] == [row["input_ids"] for row in whole]
    assert (report.used, dict(report.dropped)) == (5, {"nothing supervised": 1})


def test_packing_fills_rows_and_loses_nothing():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (200,), generator=generator).tolist()
    documents = {
        "input_ids": [[n] * size for n, size in enumerate(lengths)],
        "supervised": [[1] * size for size in lengths],
    }
    packed = pack(documents, 64)
    assert max(map(sum, packed["lengths"])) <= 64
    assert sum(map(sum, packed["lengths"])) / (64 * len(packed["lengths"])) > 0.9
    assert sorted(token for row in packed["input_ids"] for token in row) == sorted(
        n for n, size in enumerate(lengths) for _ in range(size)
    )
    assert len(pack(documents, 0)["lengths"]) == 200


def test_a_batch_says_which_token_is_of_which_document():
    batch = Collator()([{"input_ids": [5, 6, 7, 8, 9], "lengths": [2, 3]}, {"input_ids": [4, 4], "supervised": [0, 1]}])
    rows = packed_batch(batch)
    assert rows.documents.tolist() == [[1, 1, 2, 2, 2], [1, 1, 0, 0, 0]]
    assert rows.positions.tolist()[0] == [0, 1, 0, 1, 2]
    assert rows.loss_mask.tolist()[1] == [False, True, False, False, False]
    assert sorted(rows.spans()) == [(0, 0, 2), (0, 2, 3), (1, 0, 2)]


def test_columns_that_are_not_known_and_files_of_other_kinds_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="row 0: The columns topic are of no format that is read; 'messages', 'text'"):
        prepare([{"topic": "?"}], config)
    (tmp_path / "rows.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"give one of .jsonl"):
        load_rows(str(tmp_path / "rows.xml"))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_rows(str(tmp_path / "rows.jsonl"))


def test_text_that_holds_the_mask_token_is_refused(config):
    with pytest.raises(ValueError, match=r"row 0: The data contains the mask token 1\."):
        prepare([{"text": "x <|mask|> y and more"}], config)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_on_the_hub_is_read(hub, repo_id, config, tmp_path, streaming):
    from huggingface_hub import HfApi

    (tmp_path / "data.jsonl").write_text("".join(json.dumps(chat("q", f"an answer {n}")) + "\n" for n in range(3)))
    HfApi().create_repo(repo_id, repo_type="dataset")
    HfApi().upload_file(
        path_or_fileobj=tmp_path / "data.jsonl", path_in_repo="data.jsonl", repo_id=repo_id, repo_type="dataset"
    )
    rows, _ = prepare(load_rows(repo_id, streaming=streaming), config)
    assert sum(len(row["lengths"]) for row in rows) == 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.parquet"])
def test_files_of_every_kind_are_read(tmp_path, name):
    path = tmp_path / name
    table = Dataset.from_list([{"text": "one\ntwo"}])
    {
        "jsonl": lambda: table.to_json(path),
        "json": lambda: path.write_text(json.dumps([{"text": "one\ntwo"}])),
        "csv": lambda: table.to_csv(path),
        "txt": lambda: path.write_text("one\ntwo"),
        "parquet": lambda: table.to_parquet(path),
    }[path.suffix[1:]]()
    rows = load_rows(str(path))
    assert [row_of(row, 0)[0] for row in rows] == [{"text": "one\ntwo"}]


def test_an_empty_file_and_a_stream_of_nothing_usable_are_told_so(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        load_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "short.jsonl").write_text('{"input_ids": [5, 6]}\n' * 5)
    for streaming in (False, True):
        rows = load_rows(str(tmp_path / "short.jsonl"), streaming=streaming)
        with pytest.raises(ValueError, match="No row can be trained on: 0 documents; left out: 5 too short"):
            prepare(rows, PreprocessConfig(None, block_size=8, mask_token_id=1))


def test_a_stream_is_counted_from_its_beginning(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7, 8, 9]}\n{"input_ids": [5]}\n' * 3)
    packed, report = prepare(load_rows(str(tmp_path / "rows.jsonl"), streaming=True), PreprocessConfig(None, 4, 1))
    assert len(list(packed)) == 1
    assert (report.used, report.dropped["too short"]) == (3, 3)

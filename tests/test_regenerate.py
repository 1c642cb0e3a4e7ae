"""Answers rewritten with the target's own, by a real server over HTTP and in this process."""

import json
import threading
import time
from copy import copy
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dflash_hub import cli
from dflash_hub.training import regenerate as module
from dflash_hub.training.reading import load_rows
from dflash_hub.training.regenerate import (
    SEED,
    GenerationSettings,
    InProcess,
    Server,
    check_continued,
    check_options,
    check_template,
    finished_rows,
    prompt_of,
    question_of,
    regenerate,
)
from paths import TINY

CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "old"}]} for n in range(8)
]


class Backend(ThreadingHTTPServer):
    """Speaks OpenAI's protocol: an answer is 're: ' and the last message, or what the prompt was."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.questions: list[dict] = []
        self.broken = 0  # requests to be answered by an error
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self._say({"data": [{"id": "tiny"}]})

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.questions.append(question)
        if self.server.broken > 0:
            self.server.broken -= 1
            self._say({"error": "overloaded"}, 503)
        elif self.path.endswith("/chat/completions"):
            said = {
                "role": "assistant",
                "content": "re: " + question["messages"][-1]["content"],
                "reasoning_content": None,
            }
            self._say({"choices": [{"message": said}]})
        else:
            self._say({"choices": [{"text": " and on"}]})

    def _say(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def backend():
    server = Backend()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "target")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet(done: int, failed: int) -> None:
    pass


@pytest.mark.quick
def test_answers_of_a_server_replace_those_of_the_data_turn_by_turn(backend, tokenizer, tmp_path):
    talk = [("system", "be brief"), ("user", "a"), ("assistant", "x"), ("user", "b"), ("assistant", "y")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]}]
    answer = Server(backend.url, tokenizer, GenerationSettings(max_new_tokens=9, temperature=0.5))
    answer({"prompt": "x", SEED: 5})
    assert backend.questions.pop()["seed"] == 5
    assert regenerate(rows, tmp_path / "out.jsonl", answer, 2, quiet) == (1, [])
    said = [message["content"] for message in lines(tmp_path / "out.jsonl")[0]["messages"]]
    assert said == ["be brief", "a", "re: a", "b", "re: b"]
    assert backend.questions[1]["messages"][2] == {"role": "assistant", "content": "re: a"}
    assert {key: backend.questions[0][key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "tiny",
        "max_tokens": 9,
        "temperature": 0.5,
    }


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "a", "output": "x", "system": "be brief", "history": [["b", "y"]]},
            {
                "messages": [
                    ("system", "be brief"),
                    ("user", "b"),
                    ("assistant", "re: b"),
                    ("user", "a"),
                    ("assistant", "re: a"),
                ]
            },
        ),
        ({"prompt": "a"}, {"messages": [("user", "a"), ("assistant", "re: a")]}),
        ({"prompt": "the sky", "completion": " is red"}, {"prompt": "the sky", "completion": " and on"}),
        (
            {
                "messages": json.dumps([{"role": "user", "content": "a"}]),
                "chat_template_kwargs": {"enable_thinking": False},
            },
            {"messages": [("user", "a"), ("assistant", "re: a")], "chat_template_kwargs": {"enable_thinking": False}},
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x", "weight": 0}]},
            {"messages": [("user", "a"), ("assistant", "re: a", False)]},
        ),
    ],
)
def test_rows_of_every_format_are_answered_with_what_stands_beside_them(backend, tokenizer, tmp_path, row, expected):
    regenerate([row], tmp_path / "out.jsonl", Server(backend.url, tokenizer, GenerationSettings()), 1, quiet)
    found = lines(tmp_path / "out.jsonl")[0]
    if "messages" in found:
        found["messages"] = [tuple(message.values()) for message in found["messages"]]
        assert not any("train" in message for message in backend.questions[-1]["messages"])
        assert backend.questions[-1].get("chat_template_kwargs") == row.get("chat_template_kwargs")
    assert found == {"row": 0, **expected}


def test_text_keeps_its_first_tokens_and_goes_on_as_the_target_would(backend, tokenizer, tmp_path):
    text = "import os\nimport sys\n\n\ndef main():\n    pass\n"
    start = tokenizer.decode(tokenizer(text).input_ids[:5])
    answer = Server(backend.url, tokenizer, GenerationSettings(prompt_tokens=5))
    regenerate([{"text": text}], tmp_path / "out.jsonl", answer, 1, quiet)
    assert lines(tmp_path / "out.jsonl") == [{"row": 0, "text": start + " and on"}]
    assert text.startswith(start)


def test_an_interrupted_run_goes_on_where_it_was_and_nothing_is_written_twice(backend, tokenizer, tmp_path):
    """Half the rows are there, the last line cut off in the middle."""
    path = tmp_path / "out.jsonl"
    answer = Server(backend.url, tokenizer, GenerationSettings())
    regenerate(CHATS[:4], path, answer, 3, quiet)
    path.write_bytes(path.read_bytes()[:-7])
    assert len(finished_rows(path)) == 3
    before = len(backend.questions)
    assert regenerate(CHATS, path, answer, 3, quiet) == (8, [])
    assert len(backend.questions) - before == 5
    assert sorted(line["row"] for line in lines(path)) == list(range(8))
    assert {line["row"]: line["messages"][1]["content"] for line in lines(path)} == {n: f"re: q{n}" for n in range(8)}


@pytest.mark.parametrize(
    ("source", "other", "same"),
    [
        ({"text": "import os\nimport sys\n"}, {"text": "def main():\n    pass\n"}, {"text": "import os\nimport sys\n"}),
        (CHATS[0], CHATS[1], CHATS[0]),
        (CHATS[0], {"text": "import os"}, {"messages": CHATS[0]["messages"][:1]}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "b"}, {"prompt": "a", "completion": "z"}),
    ],
)
def test_an_output_of_other_rows_is_refused(backend, tokenizer, tmp_path, source, other, same):
    path = tmp_path / "out.jsonl"
    start = partial(prompt_of, tokenizer, tokens=3)
    check_continued([other], path, start)  # there is none yet
    regenerate([source], path, Server(backend.url, tokenizer, GenerationSettings(prompt_tokens=3)), 1, quiet)
    check_continued([same, other], path, start)
    with pytest.raises(ValueError, match=r"its row 0 is not row 0 of the data.*Choose another --output"):
        check_continued([other, source], path, start)


MADE = {"target": "org/own", "max_new_tokens": 9, "temperature": None, "model": "tiny"}


@pytest.mark.parametrize(
    ("recorded", "asked", "found"),
    [
        (MADE, {"temperature": 1.0}, "made with no --temperature, and this call has --temperature 1.0. Give"),
        (
            MADE,
            {"max_new_tokens": 8, "model": "big"},
            "--max-new-tokens 9 and --model tiny, and this call has --max-new-tokens 8 and --model big. Give",
        ),
        (MADE, {}, None),
        ({"max_new_tokens": 9}, {"target": "org/other"}, None),
        (None, {"max_new_tokens": 8}, None),
    ],
)
def test_an_output_of_other_options_is_refused_where_they_are_recorded(
    backend, tokenizer, tmp_path, recorded, asked, found
):
    path, asked = tmp_path / "out.jsonl", MADE | asked
    answer = Server(backend.url, tokenizer, GenerationSettings())
    regenerate(CHATS[:2], path, answer, 1, quiet, recorded)
    before = path.read_bytes()
    if found is None:
        check_options(path, asked)
        assert regenerate(CHATS, path, answer, 1, quiet, asked) == (8, [])
        return
    with pytest.raises(ValueError, match=found):
        check_options(path, asked)
    with pytest.raises(ValueError, match=found):
        regenerate(CHATS, path, answer, 1, quiet, asked)
    assert path.read_bytes() == before


def test_options_are_recorded_before_the_first_row_and_anew_for_an_output_without_rows(tmp_path):
    path, record = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.options"
    recorded = []

    def fails(row):
        recorded.append(json.loads(record.read_text()))
        raise RuntimeError

    for options in (MADE, MADE | {"max_new_tokens": 3}):
        assert regenerate(CHATS[:1], path, fails, 1, quiet, options)[0] == 0
        assert recorded.pop() == options
    check_options(path, MADE)
    assert regenerate(CHATS[:2], path, dict, 1, quiet, MADE) == (2, [])
    assert len(load_rows(str(tmp_path))) == 2  # the record is no data
    record.write_text("[1]")
    with pytest.raises(ValueError, match=r"should say what the answers in .* cannot be read. Remove it if all"):
        check_options(path, MADE)


def test_another_model_of_a_server_is_refused_by_the_command(backend, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "def main():"}\n{"text": "import os"}\n')
    words = ["regenerate", "--target", "demo", "--data", "rows.jsonl", "--output", "out.jsonl", "--server", backend.url]
    CliRunner().invoke(cli.app, [*words, "--limit", "1"], catch_exceptions=False)
    with pytest.raises(ValueError, match=r"made with --model tiny, and this call has --model big. Give"):
        CliRunner().invoke(cli.app, [*words, "--model", "big"], catch_exceptions=False)
    assert len(lines(tmp_path / "out.jsonl")) == 1
    assert CliRunner().invoke(cli.app, words, catch_exceptions=False).stdout == "out.jsonl holds 2 rows.\n"


def test_conversations_without_a_chat_template_are_refused_before_any_is_answered(tokenizer):
    check_template([{"text": "import os"}, CHATS[0]], tokenizer)
    check_template([], tokenizer)
    bare = copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template, which conversations need"):
        check_template(CHATS, bare)


def test_rows_that_fail_are_reported_and_tried_again_by_the_next_run(backend, tokenizer, tmp_path):
    backend.broken = 3
    answer = Server(backend.url, tokenizer, GenerationSettings())
    done, failed = regenerate(CHATS, tmp_path / "out.jsonl", answer, 1, quiet)
    assert (done, len(failed)) == (5, 3)
    assert "503" in failed[0]
    assert regenerate(CHATS, tmp_path / "out.jsonl", answer, 1, quiet) == (8, [])


def test_a_server_that_is_gone_ends_the_run_with_what_there_is_kept(backend, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONSECUTIVE_FAILURES", 3)
    answer = Server(backend.url, tokenizer, GenerationSettings())
    regenerate(CHATS[:2], tmp_path / "out.jsonl", answer, 1, quiet)
    backend.broken = 99
    with pytest.raises(RuntimeError, match=r"3 rows in succession .* holds 2, and the same command resumes"):
        regenerate(CHATS, tmp_path / "out.jsonl", answer, 1, quiet)
    assert len(lines(tmp_path / "out.jsonl")) == 2


def test_a_server_that_is_not_there_and_a_foreign_file_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries to connect
    with pytest.raises(ValueError, match="No server that lists its models answers at http"):
        Server("http://127.0.0.1:9/v1", tokenizer, GenerationSettings())
    (tmp_path / "mine.jsonl").write_text('{"text": "precious"}\n')
    with pytest.raises(ValueError, match="was not written by regenerate"):
        finished_rows(tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match="row 0: input_ids cannot be answered anew"):
        question_of({"input_ids": [1, 2]}, 0)


def test_in_process_the_text_is_the_targets_own(tiny_target, tokenizer, tmp_path):
    text = (TINY / "train.py").read_text()[:400]
    answer = InProcess(tiny_target, tokenizer, GenerationSettings(max_new_tokens=12, temperature=0, prompt_tokens=30))
    regenerate([{"text": text}], tmp_path / "out.jsonl", answer, 1, quiet)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :30]
    again = tokenizer(tokenizer.decode(ids[0]), return_tensors="pt").input_ids
    own = tiny_target.generate(again, attention_mask=again * 0 + 1, max_new_tokens=12, do_sample=False)
    assert lines(tmp_path / "out.jsonl")[0]["text"] == tokenizer.decode(own[0], skip_special_tokens=True)

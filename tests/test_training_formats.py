"""Every format that other trainers describe: what of a row is learnt from, and what is refused by name."""

import json
from dataclasses import replace

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from dflash_hub.training import DFlashTrainingArguments, data
from dflash_hub.training.conversations import LEFT_OUT, PROMPT_CHANGED, THOUGHT_LACKING
from dflash_hub.training.data import PreprocessConfig, documents_of_rows, prepare
from dflash_hub.training.reading import BadRow, load_rows, rows_of_list
from dflash_hub.training.setup import TrainOptions, build
from paths import TINY

TEMPLATE = """{%- if tools %}<tools>
{{ tools | tojson }}<|endoftext|>
{% endif %}{%- for m in messages %}<{{ m.role }}>
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' -}}
{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ suffix or '' }}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""
# As DeepSeek-R1's: the prompt opens a thought, and an answer is rendered without its own.
OPENING = """{%- for m in messages %}<{{ m.role }}>
{{ m.content.split('</think>')[-1].strip() }}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<assistant>
<think>
{% endif %}"""
END = "<|endoftext|>"
CALL = {"name": "look", "arguments": {"at": "sky"}}
CALLED = '[{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]' + END
LOOK = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TOOL = {"type": "function", "function": LOOK}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def said(who, text, **more):
    return {"from": who, "value": text, **more}


def called(arguments, **more):
    function = {"name": "look", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}], **more}


TALK = [user("how"), answer("so and so"), user("why"), answer("thus")]
BOTH = ["so and so" + END, "thus" + END]
IDS = list(range(20, 30))
HOW = [{"type": "text", "text": "how"}]
PARTS = [{"type": "text", "text": "wrong", "train": False}, {"type": "text", "text": " right", "train": True}]

READ = {
    # TRL
    "messages": ({"messages": TALK}, BOTH),
    "messages as JSON text": ({"messages": json.dumps(TALK), "tools": json.dumps([TOOL])}, BOTH),
    "text": ({"text": "all of it is learnt"}, ["all of it is learnt"]),
    "prompt and completion": ({"prompt": "the sky is", "completion": " blue"}, [" blue" + END]),
    "a completion with its end": ({"prompt": "the sky is", "completion": " blue" + END}, [" blue" + END]),
    "prompt and completion of messages": ({"prompt": TALK[:3], "completion": TALK[3:]}, BOTH[1:]),
    "arguments of the template": (
        {"messages": TALK[:2], "chat_template_kwargs": {"suffix": "!"}},
        ["so and so!" + END],
    ),
    "labels": ({"input_ids": IDS, "labels": [-100] * 4 + IDS[4:]}, IDS[4:]),
    "completion_mask": ({"input_ids": IDS, "completion_mask": [0] * 3 + [1] * 7}, IDS[3:]),
    "assistant_masks": ({"input_ids": IDS, "assistant_masks": [0, 1] * 1 + [1] * 8}, IDS[1:]),
    "both masks": ({"input_ids": IDS, "completion_mask": [0] + [1] * 9, "assistant_masks": [1] * 9 + [0]}, IDS[1:9]),
    "padding": ({"input_ids": IDS, "attention_mask": [0, 0] + [1] * 6 + [0, 0]}, IDS[2:8]),
    "position_ids of one document": ({"input_ids": IDS, "position_ids": list(range(10))}, IDS),
    # OpenAI
    "weight": ({"messages": [TALK[0], answer("so", weight=0), TALK[2], answer("thus", weight=1)]}, BOTH[1:]),
    "tool_calls": ({"messages": [user("how"), called('{"at": "sky"}')], "tools": [TOOL]}, [CALLED]),
    "arguments as an object": ({"messages": [user("how"), called({"at": "sky"})], "tools": [TOOL]}, [CALLED]),
    "function_call": (
        {"messages": [user("how"), answer(None, function_call={"name": "look", "arguments": '{"at": "sky"}'})]},
        [CALLED],
    ),
    "functions": ({"messages": TALK, "functions": [LOOK], "parallel_tool_calls": False}, BOTH),
    "content in parts": (
        {"messages": [user(HOW), answer([{"type": "text", "text": "so and so"}])]},
        BOTH[:1],
    ),
    # Axolotl
    "train": (
        {"conversations": [said("human", "how", train=False), said("gpt", "so", train=False), *TALK[2:]]},
        BOTH[1:],
    ),
    "training": ({"messages": [TALK[0], answer("so", training=False), *TALK[2:]]}, BOTH[1:]),
    "train_detail": (
        {
            "conversations": [
                said("human", "how"),
                said("gpt", "wrong right", train_detail=[{"begin_offset": 5, "end_offset": 10, "train": True}]),
            ]
        },
        [" right" + END],
    ),
    "parts with train": ({"messages": [user(HOW), answer(PARTS)]}, [" right" + END]),
    "parts of a thought": (
        {"messages": [user("how"), answer("so", reasoning_content=PARTS)]},
        ["<think>", " right</think>so" + END],
    ),
    "parts with weight": (
        {"messages": [user(HOW), answer([{"type": "text", "text": "wrong", "weight": 0}, PARTS[1]])]},
        [" right" + END],
    ),
    "segments": (
        {"segments": [{"label": False, "text": "asked "}, {"label": True, "text": "so" + END}]},
        ["so" + END],
    ),
    "pygmalion": (
        {"conversations": [{"role": "human", "value": "how"}, {"role": "gpt", "value": "so and so"}]},
        BOTH[:1],
    ),
    "question and answer": ({"question": "how", "answer": "so and so", "category": "x"}, BOTH[:1]),
    "INSTRUCTION and RESPONSE": ({"INSTRUCTION": "how", "RESPONSE": "so and so"}, BOTH[:1]),
    "message_1 and message_2": ({"message_1": "how", "message_2": "so and so"}, BOTH[:1]),
    "system_prompt, question and response": (
        {"system_prompt": "brief", "question": "how", "response": "so and so"},
        BOTH[:1],
    ),
    # LLaMA-Factory
    "alpaca": ({"instruction": "how", "input": "then", "output": "so and so", "system": "brief"}, BOTH[:1]),
    "alpaca with history": (
        {"instruction": "why", "input": "", "output": "thus", "history": [["how", "so and so"]]},
        BOTH,
    ),
    "sharegpt": (
        {
            "conversations": [
                said("human", "how"),
                said("function_call", json.dumps(CALL)),
                said("observation", "blue"),
                said("gpt", "so and so"),
            ],
            "system": "brief",
            "tools": json.dumps([LOOK]),
        },
        [CALLED, "so and so" + END],
    ),
    # ms-swift
    "loss": ({"messages": [TALK[0], answer("so", loss=False), TALK[2], answer("thus", loss=True)]}, BOTH[1:]),
    "loss_scale": ({"messages": [TALK[0], answer("so", loss_scale=0.0), *TALK[2:]], "channel": "x"}, BOTH[1:]),
    "loss of another role": ({"messages": [user("how", loss=True), answer("so and so")]}, BOTH[:1]),
    "pairs of a conversation": (
        {"system": "brief", "conversation": [{"human": "how", "assistant": "so and so"}]},
        BOTH[:1],
    ),
    "query, response and history": ({"query": "why", "response": "thus", "history": [["how", "so and so"]]}, BOTH),
    "tool_call and tool_response": (
        {
            "messages": [
                user("how"),
                {"role": "tool_call", "content": json.dumps(CALL)},
                {"role": "tool_response", "content": "blue"},
                answer("so and so"),
            ]
        },
        [CALLED, "so and so" + END],
    ),
    "a thought before a tool_call": (
        {"messages": [user("how"), answer("let me "), {"role": "tool_call", "content": json.dumps(CALL)}]},
        ["let me " + CALLED],
    ),
    "answers in succession": (
        {
            "messages": [
                user("how"),
                answer("so", loss=False),
                answer(" and so", loss=True),
                user("why"),
                answer("thus"),
            ]
        },
        [" and so" + END, BOTH[1]],
    ),
    "pretraining": ({"messages": [answer("so and so")]}, ["so and so"]),
    "Anthropic's blocks": (
        {
            "messages": [
                user(HOW),
                answer([{"type": "tool_use", "id": "t", "name": "look", "input": {"at": "sky"}}]),
                user([{"type": "tool_result", "tool_use_id": "t", "content": "blue"}]),
                answer([{"type": "text", "text": "so and so"}]),
            ]
        },
        [CALLED, "so and so" + END],
    ),
    # SpecForge and speculators
    "conversations with an id": ({"id": "1", "conversations": TALK, "status": "success"}, BOTH),
    "loss_mask": (
        {"id": "1_gen0", "input_ids": IDS, "loss_mask": [0] * 5 + [1] * 5, "text": "x", "conversations": TALK},
        IDS[5:],
    ),
    "input for turns and output": ({"input": TALK[:3], "output": "thus"}, BOTH[1:]),
    # ours
    "a column of other rows": (
        {"text": "all of it is learnt", "messages": None, "input_ids": None},
        ["all of it is learnt"],
    ),
    "supervised": ({"input_ids": IDS, "supervised": [0] * 6 + [1] * 4}, IDS[6:]),
    "input_ids": ({"input_ids": IDS}, IDS),
}

REFUSED = {
    "no column": ({"topic": "?"}, "The columns topic are of no format that is read"),
    "null": ({"text": None}, "text is null, but must be a text"),
    "a number": ({"text": 7}, "text is 7, but must be a text"),
    "null messages": ({"messages": None}, "messages is null, but must be a list"),
    "messages as text": ({"messages": "hi there"}, "messages is a text that is not JSON"),
    "tools as text": ({"messages": TALK, "tools": "look"}, "tools is a text that is not JSON"),
    "a message as text": ({"messages": ["hi"]}, r"messages\[0\] is 'hi', but must be an object with role and content"),
    "a message without role": ({"messages": [{"text": "hi"}]}, r"messages\[0\] has the keys text; role and content"),
    "an unknown sender": ({"conversations": [said("alice", "hi")]}, "is from 'alice', which is none of system"),
    "null content": ({"messages": [user(None)]}, r"messages\[0\] has content null"),
    "a number as content": ({"messages": [user("how"), answer(5)]}, r"messages\[1\] has the content 5, but it must be"),
    "a refusal": ({"messages": [user("how"), answer(None, refusal="no")]}, "has refusal 'no'"),
    "an image": ({"messages": [user([{"type": "image_url", "image_url": "x"}])]}, "part of the type 'image_url'"),
    "images": ({"messages": TALK, "images": ["a.png"]}, "The column images is of other media"),
    "a weight between": ({"messages": [TALK[0], answer("so", weight=0.5)]}, "has weight 0.5; it must be 0 or 1"),
    "a scale above 1": ({"messages": [TALK[0], answer("so", loss_scale=2.0)]}, "has loss_scale 2.0; it must be 0 or 1"),
    "training on a question": ({"messages": [user("how", train=True)]}, "is from 'user' and has train true"),
    "a detail of a question": (
        {"messages": [user("how", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": True}])]},
        "is from 'user' and has train true",
    ),
    "a part of a question": ({"messages": [user(PARTS)]}, "is from 'user' and has train true"),
    "a call unlike its answer": (
        {"messages": [user("how"), answer("so"), {"role": "tool_call", "content": json.dumps(CALL), "loss": False}]},
        r"messages\[2\] is learnt from, or not, unlike the answer",
    ),
    "a detail without its end": (
        {"messages": [TALK[0], answer("so", train_detail=[{"begin_offset": 0}])]},
        "train_detail has {'begin_offset': 0}; begin_offset, end_offset and train are needed",
    ),
    "a segment without label": ({"segments": [{"text": "x"}]}, "a segment must have text, and label true or false"),
    "a call as text": (
        {"messages": [user("how"), answer("so", tool_calls=["look"])]},
        r"messages\[1\].tool_calls has 'look'; a call must be an object",
    ),
    "a broken call": (
        {"conversations": [said("function_call", "look")]},
        r"conversations\[0\] is a text that is not JSON",
    ),
    "a call without name": (
        {"conversations": [said("function_call", "{}")]},
        "is the call {}; it must be JSON with name",
    ),
    "chosen": ({"prompt": "how", "chosen": "so", "rejected": "no"}, "The column chosen is of preference data"),
    "rejected_response": (
        {"messages": TALK, "rejected_response": "no"},
        "The column rejected_response is of preference",
    ),
    "label": ({"prompt": "how", "completion": "so", "label": False}, "The column label is of preference data"),
    "kto_tag": ({"conversations": TALK, "kto_tag": False}, "The column kto_tag is of preference data"),
    "preferred_output": ({"input": TALK[:1], "preferred_output": TALK[1:2]}, "The column preferred_output is of pref"),
    "completions": ({"prompt": "how", "completions": ["so"], "labels": [True]}, "The column completions is of pref"),
    "context": ({"context": "x", "question": "how", "answer": "so"}, "The column context is of a format with a prompt"),
    "two answers": ({"problem": "how", "solution": "so", "answer": "5"}, "answer and solution may each be the one"),
    "text beside a prompt": ({"prompt": "how", "text": "so"}, "text stands beside prompt. Rename text to completion"),
    "text beside an answer": ({"text": "how", "output": "so"}, "text stands beside output. Rename text to prompt"),
    "null completion": ({"prompt": "how", "completion": None}, "completion is null, but must be a text"),
    "an answer alone": ({"response": "so"}, "response is an answer without a prompt"),
    "history": ({"query": "how", "response": "so", "history": ["x"]}, "history has 'x'; it must hold pairs"),
    "mask_history": (
        {"messages": TALK, "mask_history": True},
        "The column mask_history is an option of another trainer",
    ),
    "completion_only_loss": ({"text": "x", "completion_only_loss": False}, "The column completion_only_loss is an opt"),
    "an argument of the template": ({"messages": TALK, "chat_template_kwargs": "x"}, "chat_template_kwargs is 'x'"),
    "supervised of another length": (
        {"input_ids": IDS, "supervised": [1]},
        "supervised has 1 values, but input_ids has 10",
    ),
    "a mask of halves": ({"input_ids": IDS, "loss_mask": [0.5] * 10}, "loss_mask has 0.5, but must hold whole numbers"),
    "a mask of twos": ({"input_ids": IDS, "loss_mask": [2] * 10}, "loss_mask has 2; it must be 0 or 1"),
    "shifted labels": ({"input_ids": IDS, "labels": [*IDS[1:], -100]}, r"labels\[0\] is 21, but input_ids\[0\] is 20"),
    "padding inside": ({"input_ids": IDS, "attention_mask": [1, 0] * 5}, "attention_mask has a 0 between ones"),
    "an unknown mask": (
        {"input_ids": IDS, "my_mask": [0] * 10},
        "my_mask has one value for each token, and may be a mask",
    ),
    "a packed row": ({"input_ids": IDS, "position_ids": [0, 1, 2, 3, 4] * 2}, "position_ids do not count from 0"),
    "packed lengths": ({"input_ids": IDS, "seq_lengths": [5, 5]}, "seq_lengths is of a packed row"),
    "an id beyond the vocabulary": ({"input_ids": [*IDS, 512]}, "the token 512, but the target's vocabulary has 512"),
    "a negative id": ({"input_ids": [*IDS, -1]}, "the token -1, but the target's vocabulary has 512"),
    "a null id": ({"input_ids": [20, None]}, "input_ids has null, but must hold whole numbers"),
    "null ids": ({"input_ids": None}, "input_ids is null, but must be a list"),
    "the mask token": ({"input_ids": [*IDS, 1]}, "The data contains the mask token 1"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "target")


@pytest.fixture
def config(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return PreprocessConfig(tokenizer, 2, 1, max_length=400, stop_ids=frozenset([0]), vocab_size=512)


def read(records, config):
    """The place and the documents of each row of a dataset."""
    records = list(records)
    return documents_of_rows(records, range(len(records)), config)


def learnt(rows, config):
    """The supervised stretches of the first row: texts, or ids of a row of ids."""
    _, documents = read([rows[0]], config)[0]
    found, last = [], 0
    for ids, supervised, _ in documents:
        for token, mark in zip(ids, supervised, strict=True):
            if mark:
                found = [*found[:-1], [*found[-1], token]] if last else [*found, [token]]
            last = mark
        last = 0
    return found


@pytest.mark.quick
@pytest.mark.parametrize("arrow", [False, True], ids=["JSON", "Arrow"])
@pytest.mark.parametrize("name", READ)
def test_every_format_is_learnt_from_as_its_trainer_documents(config, name, arrow):
    """Arrow holds the same row beside one with other keys, where the values of its shape allow that."""
    row, expected = READ[name]
    arguments = {"far": {"away": 1}} if '"arguments": {' in json.dumps(row) else "{}"
    function = {"name": "x", "arguments": arguments, "strict": True}
    other = {
        "messages": [{"role": "user", "name": "x", "weight": 1, "tool_calls": [{"id": "7", "function": function}]}]
    }
    other = {} if isinstance(row.get("messages"), str) else other
    rows = Dataset.from_list([row, other]) if arrow else rows_of_list([row])
    found = learnt(rows, config)
    if isinstance(expected[0], str):
        assert [config.tokenizer.decode(ids) for ids in found] == expected
    else:
        assert found == [expected]


@pytest.mark.quick
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learnt_from_is_refused_by_name_with_its_row(config, name):
    row, message = REFUSED[name]
    with pytest.raises(BadRow, match=f"^row 1: .*{message}"):
        prepare([{"input_ids": IDS}, row], config)


def texts(row, config):
    """The whole text of each document of a row."""
    return [config.tokenizer.decode(ids) for ids, _, _ in read(rows_of_list([row]), config)[0][1]]


@pytest.mark.parametrize(
    ("row", "start"),
    [
        (
            {"instruction": "how", "input": "then", "output": "so", "system": "brief"},
            "<system>\nbrief|<user>\nhow\nthen|",
        ),
        ({"messages": [{"role": "system", "content": "own"}, *TALK], "system": "brief"}, "<system>\nown|<user>\nhow|"),
        ({"messages": TALK, "tools": json.dumps([LOOK])}, f"<tools>\n{json.dumps([TOOL])}|<user>\nhow|"),
        ({"messages": TALK, "functions": [json.dumps(LOOK)]}, f"<tools>\n{json.dumps([TOOL])}|<user>\nhow|"),
        (
            {"messages": [user("how"), {"role": "tool_response", "content": "blue"}, answer("so")]},
            "<user>\nhow|<tool>\nblue|",
        ),
        ({"prompt": "the sky is", "completion": " blue"}, "the sky is blue|"),
        ({"query": "why", "response": "thus", "history": [["how", "so"]]}, "<user>\nhow|<assistant>\nso|<user>\nwhy|"),
    ],
)
def test_what_is_not_learnt_from_stands_before_the_answer(config, row, start):
    assert texts(row, config)[0].replace(END + "\n", "|").replace(END, "|").startswith(start)


def test_columns_of_unequal_shape_are_trained_on_as_they_were_written(config, tmp_path):
    """As JSON even with the nulls that were written; from Arrow without any, and without the keys that Arrow adds."""
    rows = [
        {"messages": [user("how"), called({"at": "sky", "when": None})], "tools": [TOOL]},
        {
            "messages": [user("how", name="x"), called({"far": {"away": 1}}, id="7")],
            "tools": [{**TOOL, "strict": True}],
        },
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        records = list(load_rows(str(tmp_path / "rows.jsonl"), streaming=streaming))
        found = [documents[0][0] for _, documents in read(records, config)]
        assert [config.tokenizer.decode(ids) for ids in found] == [texts(row, config)[0] for row in rows]
    assert '{"at": "sky", "when": null}' in texts(rows[0], config)[0]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    records = load_rows(str(tmp_path / "rows.parquet"))
    found = [config.tokenizer.decode(documents[0][0]) for _, documents in read(records, config)]
    assert found == [texts(row, config)[0].replace(', "when": null', "") for row in rows]


BROKEN = {
    "rows.jsonl": ('{"text": "a"}\n\n{"text": "b"\n', r"^rows\.jsonl, line 3 is not JSON: Expecting"),
    "rows.json": ('[\n{"text": "a"},\n{"text" "b"}]', r"^rows\.json, line 3 is not JSON"),
    "list.jsonl": ('{"text": "a"}\n5\n', r"^list\.jsonl, line 2 is 5, but must be a JSON object"),
    "items.json": ('[{"text": "a"}, 5]', r"^items\.json, row 1 is 5, but must be a JSON object"),
    "latin.jsonl": ('{"text": "\xe9"}'.encode("latin-1"), r"^latin\.jsonl is not UTF-8"),
    "null.jsonl": ('{"text": "a b c d"}\n{"text": null}\n', r"^null\.jsonl, line 2: text is null, but must be a text"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_told_with_its_file_and_line(config, tmp_path, name, streaming):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadRow, match=message):
        list(prepare(load_rows(str(tmp_path / name), streaming=streaming), config)[0])


def test_a_bad_row_of_a_table_is_told_with_its_number_and_the_file_by_the_command(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text\n" + "1,a b c d e f g h i j\n" * 9 + "2,\n")
    options = TrainOptions(str(TINY / "target"), str(tmp_path / "rows.csv"), draft=str(TINY / "draft"), eval_rows=3)
    with pytest.raises(BadRow, match=r"^/.*rows\.csv, row 9: text is null, but must be a text"):
        build(options, DFlashTrainingArguments(str(tmp_path / "draft"), report_to="none", use_cpu=True))


def test_a_folder_of_json_is_read_as_it_is_written(config, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": [user("how"), called({name: 1})]}) + "\n")
    records = load_rows(str(tmp_path))
    assert [place for place, _ in read(records, config)] == ["a.jsonl, line 1", "b.jsonl, line 1"]
    assert '"arguments": {"b": 1}}' in config.tokenizer.decode(read(records, config)[1][1][0][0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answer("hm\n</think>\n\nso"), ["hm\n</think>\n\nso" + END]),
        (answer("<think>\nhm\n</think>\n\nso"), ["hm\n</think>\n\nso" + END]),
        (answer("so", reasoning_content="hm"), ["hm\n</think>\n\nso" + END]),
        (answer("so"), THOUGHT_LACKING),
    ],
)
def test_an_answer_stands_behind_the_thought_that_the_prompt_opens(config, given, expected):
    """Both answers are learnt; the first stands in the second's prompt without its thought."""
    config.tokenizer.chat_template = OPENING
    row = {"messages": [user("how"), given, user("why"), given]}
    if expected == THOUGHT_LACKING:
        with pytest.raises(ValueError, match=f"0 documents; left out: 2 {expected}"):
            prepare([row], config)
        return
    found = texts(row, config)
    assert found[0] == f"<user>\nhow{END}\n<assistant>\n<think>\n{expected[0]}\n"
    assert (
        found[1] == f"<user>\nhow{END}\n<assistant>\nso{END}\n<user>\nwhy{END}\n<assistant>\n<think>\n{expected[0]}\n"
    )
    assert [config.tokenizer.decode(ids) for ids in learnt(rows_of_list([row]), config)] == expected * 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "The target's tokenizer has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", r"1 refused by the chat template \(roles must alternate\)"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}now{% endif %}",
            f"1 {PROMPT_CHANGED}",
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}!{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            f"1 {LEFT_OUT}",
        ),
    ],
)
def test_each_cause_for_which_a_template_gives_no_answer_is_told(config, template, message):
    config.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        prepare([{"messages": [user("how"), called({"at": "sky"})]}], config)


def test_the_last_answer_alone_is_learnt_from_if_asked(config):
    last = replace(config, last_answer_only=True)
    assert [config.tokenizer.decode(ids) for ids in learnt(rows_of_list([{"messages": TALK}]), last)] == BOTH[1:]


def test_several_processes_prepare_the_same_rows_and_tell_the_same_error(config, tmp_path, monkeypatch):
    rows = [{"messages": [user(f"how {n}"), answer("so " * (n % 7))]} for n in range(60)]
    whole, report = prepare(rows, config)
    monkeypatch.setattr(data, "ROWS_OF_A_PROCESS", 20)
    monkeypatch.setattr(data, "cores", lambda: 3)
    parts, same = prepare(rows, config)
    assert parts[:] == whole[:]
    assert str(same) == str(report)
    with pytest.raises(BadRow, match=r"^row 59: text is 5, but must be a text"):
        prepare([*rows[:-1], {"text": 5}], config)

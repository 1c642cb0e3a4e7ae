"""OpenAI's API: its own client gets the target's own text, whatever else the server is asked at the time."""

import copy
import gc
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial

import httpx
import openai
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tiny
from dflash_hub import DFlashDraftModel, cli
from dflash_hub.serving.addresses import bound, names_of, url_of
from dflash_hub.serving.choices import Choice, Options, options_of
from dflash_hub.serving.decoding import Decoder, Proposing, Worker
from dflash_hub.serving.mistakes import invalid
from dflash_hub.serving.requests import ChatRequest, CompletionRequest
from dflash_hub.serving.server import Server
from dflash_hub.serving.service import Service, Settings
from dflash_hub.serving.text import Detokenizer, StopFinder
from dflash_hub.serving.waiting import Waiting
from paths import TINY

NAME = "org/target"
JSON = {"content-type": "application/json"}
TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }};{% endif %}{% for message in messages %}{{ message.role }}:"
    "{{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function.arguments.x }}{% endfor %}|"
    "{% endfor %}{{ ending }}"
)
METHOD = "class Node(object):\n    def __init__(self"
PROMPTS = ["def quicksort(items):", "import os", "class Node(object):\n    def __init__(self", "# Copyright"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "target")


@pytest.fixture(scope="module")
def decoder(tiny_target, tokenizer):
    draft = DFlashDraftModel.from_pretrained(TINY / "draft").eval()
    return Decoder(tiny_target, draft, tokenizer, Proposing("eager", "chain"))


@contextmanager
def serving(decoder, **settings):
    """A server at a free port, with these settings."""
    service = Service(decoder, Settings(NAME, **settings))
    with bound("127.0.0.1", 0) as listener:
        server = Server(service)
        server.url = url_of(*listener.getsockname())
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield server
        finally:  # a server that is left running keeps the tests from ending
            server.end()
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(decoder):
    with serving(decoder, template=TEMPLATE, hosts=names_of("127.0.0.1")) as found:
        yield found


def client_of(server, key: str = "any"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as found:
        yield found


@pytest.fixture(scope="module")
def http(server):
    """A client without OpenAI's checks."""
    with httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


def own_text(target, tokenizer, prompt: str, new: int, **options) -> str:
    """The target's own text after a prompt, by plain `generate`."""
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": new} | options
    found = target.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True)


@pytest.fixture(scope="module")
def own(tiny_target, tokenizer):
    """The built-in target's own text."""
    return cache(partial(own_text, tiny_target, tokenizer))


def complete(client, prompt, new: int = 16, **options):
    return client.completions.create(model=NAME, prompt=prompt, max_tokens=new, **{"temperature": 0} | options)


def chat(client, text, new: int = 16, **options):
    messages = [{"role": "user", "content": text}]
    options = {"model": NAME, "messages": messages, "max_tokens": new, "temperature": 0} | options
    return client.chat.completions.create(**options)


def joined(stream) -> tuple[str, list]:
    """The text of a stream, of either kind, and its pieces."""
    pieces, text = list(stream), ""
    for piece in pieces:
        for choice in piece.choices:
            text += choice.text if hasattr(choice, "text") else choice.delta.content or ""
    return text, pieces


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_greedy_answers_are_the_targets_own_text(client, own):
    for prompt in PROMPTS[::3]:
        expected = own(prompt, 16)
        assert complete(client, prompt).choices[0].text == expected
        assert joined(complete(client, prompt, stream=True))[0] == expected
        as_chat = own(f"user:{prompt}|", 16)
        assert chat(client, prompt).choices[0].message.content == as_chat
        assert joined(chat(client, [{"type": "text", "text": prompt}], stream=True))[0] == as_chat


def test_several_prompts_and_choices_come_in_order(client, own, tokenizer):
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS[:2]]
    found = complete(client, prompts, 8, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [own(prompt, 8) for prompt in PROMPTS[:2] for _ in range(2)]
    assert found.usage.prompt_tokens == sum(map(len, prompts))
    assert found.usage.completion_tokens == 32


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stops", [1, 2])
def test_an_answer_ends_before_the_first_stop_string(stops, stream, client, own):
    text = own(PROMPTS[0], 16)
    places = [text[9:13], text[14:17]][:stops]
    first = min(text.index(stop) for stop in places)
    found = complete(client, PROMPTS[0], 16, stop=places if stops > 1 else places[0], stream=stream)
    if stream:
        answer, pieces = joined(found)
        assert answer == text[:first]
        assert [piece.choices[0].finish_reason for piece in pieces][-1] == "stop"
    else:
        assert found.choices[0].text == text[:first]
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 16


def test_a_seed_gives_the_same_text_whatever_else_is_decoded(client):
    def drawn(seed):
        found = complete(client, PROMPTS[1], 8, temperature=1, top_p=0.9, seed=seed, n=2)
        return [choice.text for choice in found.choices]

    alone = drawn(7)
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(6) as pool:
        busy = [pool.submit(complete, client, prompt, 8, temperature=1) for prompt in PROMPTS]
        again = [pool.submit(drawn, seed) for seed in (7, 8)]
        assert again[0].result() == alone != again[1].result()
        assert len({one.result().choices[0].text for one in busy}) == len(busy)


def test_penalties_lower_what_stands_in_the_answer(client, tiny_target, tokenizer):
    ids = tokenizer(PROMPTS[0]).input_ids
    text: list[int] = []
    for _ in range(12):
        scores = tiny_target(torch.tensor([ids + text])).logits[0, -1].detach()
        for token in set(text):
            scores[token] -= 0.9 + 0.7 * text.count(token)
        text.append(int(scores.argmax()))
    found = complete(client, PROMPTS[0], 12, presence_penalty=0.9, frequency_penalty=0.7)
    assert found.choices[0].text == tokenizer.decode(text) != complete(client, PROMPTS[0], 12).choices[0].text


def test_a_bias_and_a_repetition_penalty_are_those_of_generate(client, own, tokenizer, tiny_target):
    token = tokenizer("(").input_ids[0]
    options = {"sequence_bias": {(token,): 100.0}, "repetition_penalty": 1.5}
    expected = own_text(tiny_target, tokenizer, PROMPTS[1], 8, **options)
    found = complete(client, PROMPTS[1], 8, logit_bias={str(token): 100}, extra_body={"repetition_penalty": 1.5})
    assert found.choices[0].text == expected != own(PROMPTS[1], 8)


# Probabilities -------------------------------------------------------------------------------------------------------


@pytest.fixture
def likely(tiny_target, tokenizer):
    """For each token that the target writes after a prompt: its log probability, and the likeliest three."""

    def found(prompt: str, new: int) -> list:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = tiny.greedy(tiny_target, ids, new)
        logits = tiny_target(text).logits[0].log_softmax(-1).detach()
        of_new = logits[ids.shape[1] - 1 : -1]
        tokens = text[0, ids.shape[1] :].tolist()
        places = enumerate(tokens)
        return [(token, of_new[at, token].item(), of_new[at].topk(3).indices.tolist()) for at, token in places]

    return found


@pytest.mark.parametrize("stream", [False, True])
def test_chats_tell_how_likely_tokens_are(stream, client, likely, tokenizer):
    expected = likely("user:import os|", 12)
    found = chat(client, "import os", 12, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        pieces = [choice.logprobs for piece in found for choice in piece.choices if choice.logprobs]
        content = [one for piece in pieces for one in piece.content]
    else:
        content = found.choices[0].logprobs.content
    assert len(content) == len(expected)
    for one, (token, logprob, top) in zip(content, expected, strict=True):
        assert one.token == tokenizer.decode([token])
        assert bytes(one.bytes).decode() == one.token
        assert one.logprob == pytest.approx(logprob, abs=1e-3)
        assert [other.token for other in one.top_logprobs] == [tokenizer.decode([other]) for other in top]


def test_completions_tell_how_likely_tokens_are(client, likely, tokenizer):
    found = complete(client, PROMPTS[3], 12, logprobs=3).choices[0]
    expected = likely(PROMPTS[3], 12)
    assert "".join(found.logprobs.tokens) == found.text
    assert found.logprobs.token_logprobs == pytest.approx([logprob for _, logprob, _ in expected], abs=1e-3)
    for place, (token, _, top) in enumerate(expected):
        assert set(found.logprobs.top_logprobs[place]) == {tokenizer.decode([one]) for one in [*top, token]}
        offset = found.logprobs.text_offset[place]
        assert found.text[offset:].startswith(found.logprobs.tokens[place])


# Figures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_ends_with_its_usage_and_how_it_was_drafted(ask, client):
    whole = ask(client, PROMPTS[0], 20)
    _, pieces = joined(ask(client, PROMPTS[0], 20, stream=True, stream_options={"include_usage": True}))
    assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert not hasattr(pieces[-2], "metrics")
    assert pieces[-1].choices == []
    assert pieces[-1].usage == whole.usage
    for found in (whole.metrics, pieces[-1].metrics):
        words = found["speculative_decoding"]
        # The last cycle may have room for its drafted tokens alone.
        committed = words["num_spec_steps"] + words["num_accepted_draft_tokens"]
        assert committed - (whole.usage.completion_tokens - 1) in (0, 1)
        assert words["num_spec_steps"] == sum(words["acceptance_histogram"])
        assert words["mean_acceptance_length"] > 1
    assert joined(ask(client, PROMPTS[0], 4, stream=True))[1][-1].usage is None


def test_models_health_and_figures_for_prometheus(server, client, http):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == 2048
    assert http.get("/health").json() == {"status": "ok"}
    before = server.service.metrics.registry.get_sample_value("dflash_hub_generation_tokens_total")
    complete(client, "x", 5)
    ending = time.monotonic() + 5
    while server.service.waiting.running and time.monotonic() < ending:
        time.sleep(0.005)  # an answer is there before its batch has ended
    page = http.get("/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(figures["dflash_hub_generation_tokens_total"]) == before + 5
    assert float(figures["dflash_hub_spec_decode_num_accepted_tokens_total"]) > 0
    assert float(figures['dflash_hub_spec_decode_num_accepted_tokens_per_pos_total{position="0"}']) > 0
    assert figures["dflash_hub_num_requests_running"] == figures["dflash_hub_num_requests_waiting"] == "0.0"


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "options", "param"),
    [
        (complete, {"temperature": 2.5}, "temperature"),
        (complete, {"temperature": "0"}, "temperature"),
        (complete, {"n": 0}, "n"),
        (complete, {"suffix": "x"}, "suffix"),
        (complete, {"echo": True}, "echo"),
        (complete, {"best_of": 3}, None),
        (complete, {"stop": [""]}, "stop[0]"),
        (complete, {"logit_bias": {"x": 1}}, "logit_bias"),
        (complete, {"logit_bias": {"99999": 1}}, "logit_bias"),
        (complete, {"extra_body": {"min_tokens": 5}}, "min_tokens"),
        (complete, {"prompt": ""}, "prompt"),
        (complete, {"prompt": [600]}, "prompt"),
        (complete, {"prompt": [True]}, "prompt"),
        (complete, {"new": 2048}, "prompt"),
        (chat, {"response_format": {"type": "json_object"}}, "response_format"),
        (chat, {"reasoning_effort": "low"}, "reasoning_effort"),
        (chat, {"tool_choice": "required"}, "tool_choice"),
        (chat, {"top_logprobs": 2}, None),
        (chat, {"max_completion_tokens": 5}, None),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (chat, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        (chat, {"extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_answered_exactly_is_refused_by_name(ask, options, param, client):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, options.pop("prompt", "x"), **options)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert param is not None or next(iter(options)) in refused.value.message


def test_all_that_is_wrong_with_a_request_is_told_at_once(client):
    wrong = {"temperature": 9, "tool_choice": "required", "extra_body": {"nonsense": 1, "reasoning_effort": "low"}}
    with pytest.raises(openai.BadRequestError, match="4 things are wrong: ") as refused:
        chat(client, "x", **wrong)
    named = ("temperature", "tool_choice", "nonsense", "reasoning_effort")
    assert [name for name in named if name not in str(refused.value)] == []
    assert refused.value.param == "temperature"


def test_what_changes_no_text_is_taken(client):
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True}
    harmless |= {"response_format": {"type": "text"}, "tool_choice": "auto", "presence_penalty": 0, "seed": 1}
    empty = {"extra_body": {"logit_bias": None, "functions": None, "min_tokens": None}}
    assert chat(client, "x", 4, **harmless, **empty) is not None


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        ({"json": {"model": "other", "prompt": "x"}}, 404),
        ({"content": "{", "headers": JSON}, 400),
        ({"json": [1]}, 400),
        ({"content": b"\xff", "headers": JSON}, 400),
        ({"data": "{}"}, 415),
        ({"content": '{"prompt": "x"}', "headers": {"content-type": "text/json"}}, 415),
        ({"json": {"prompt": "x"}, "headers": {"host": "evil.example"}}, 403),
        ({"content": r'{"prompt": "\ud800"}', "headers": JSON}, 400),
        ({"content": r'{"prompt": "x", "\ud800": 1}', "headers": JSON}, 400),
        ({"content": "[" * 99_999, "headers": JSON}, 400),
        ({"content": '{"prompt": "x", "temperature": NaN}', "headers": JSON}, 400),
    ],
)
def test_every_refusal_has_openais_form(request_of, status, http):
    found = http.post("/v1/completions", **request_of)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        ("completions", '{"prompt": "x", "temperature": "hot"}', "temperature must be a number, not the text 'hot'."),
        ("completions", '{"prompt": "x", "temperature": NaN}', "temperature must be a finite number, not NaN."),
        ("completions", '{"prompt": "x", "top_p": 3}', "top_p must be at most 1, not 3."),
        ("completions", '{"prompt": "x", "n": 1.5}', "n must be an integer, not 1.5."),
        ("completions", '{"prompt": "x", "n": 1000}', "n must be at most 128, not 1000."),
        ("completions", '{"prompt": "x", "max_tokens": -1}', "max_tokens must be at least 1, not -1."),
        ("completions", '{"prompt": "x", "repetition_penalty": 0}', "repetition_penalty must be more than 0, not 0."),
        ("completions", '{"prompt": "x", "stream": "yes"}', "stream must be true or false, not the text 'yes'."),
        ("completions", '{"prompt": "x", "stop": 5}', "stop must be a text or a list of texts, not 5."),
        ("completions", '{"prompt": "x", "stop": ""}', "stop[0] must not be empty."),
        ("completions", '{"prompt": "x", "stop": [null]}', "stop[0] must be a text, not null."),
        ("completions", '{"prompt": "x", "stop": "\\ud800"}', "stop[0] has half of a surrogate pair"),
        ("completions", '{"prompt": "x", "stream_options": true}', "stream_options must be a JSON object, not true."),
        ("completions", '{"prompt": "x", "stream_options": {"a": 1}}', "server knows; leave it out."),
        ("completions", '{"prompt": "x", "logit_bias": {"x": 1}}', "must be token ids, not the text 'x'."),
        ("completions", '{"prompt": "x", "logit_bias": {"7": 200}}', "logit_bias[7] must be at most 100, not 200."),
        ("completions", '{"prompt": "x", "max_token": 5}', "that this server knows; did you mean max_tokens?"),
        ("completions", '{"prompt": "x", "foo": 5}', "foo is no field that this server knows; leave it out."),
        ("completions", '{"messages": []}', "messages is a field of /v1/chat/completions alone; leave it out."),
        ("completions", "{}", "prompt is missing; this route needs it."),
        ("completions", '{"prompt": []}', "none of them empty. It is an empty list."),
        (
            "completions",
            f'{{"prompt": "x", "n": "{"9" * 99}"}}',
            f"n must be an integer, not the text '{'9' * 40}...'.",
        ),
        ("completions", f'{{"prompt": {{"{"9" * 99}": 1}}}}', "none of them empty. It is an object."),
        ("completions", json.dumps({str(one): 1 for one in range(50)}), "51 things are wrong: prompt is missing;"),
        ("completions", "", "The body is missing; it must be a JSON object."),
        ("completions", '["x"]', "The body must be a JSON object, not a list."),
        ("completions", "{'prompt': 'x'}", "enclosed in double quotes, at character 2."),
        ("completions", b"\xff", "The body cannot be read as JSON: it is not text in UTF-8."),
        ("completions", "[" * 99_999, "The body cannot be read as JSON: its lists and objects are nested too deeply."),
        ("chat/completions", '{"messages": "hi"}', "messages must be a list, not the text 'hi'."),
        ("chat/completions", '{"messages": ["hi"]}', "messages[0] must be a JSON object, not the text 'hi'."),
        ("chat/completions", '{"messages": []}', "messages must not be empty."),
        (
            "chat/completions",
            '{"messages": [{"role": "bot"}]}',
            "messages[0].role is the text 'bot'; it must be one of",
        ),
        ("chat/completions", '{"messages": [{"role": "user", "content": 5}]}', "or a list of parts, not 5."),
        ("chat/completions", '{"messages": [{}], "verbosity": "high"}', 'not supported here, except for "medium":'),
        ("embeddings", "{}", "There is no route /v1/embeddings here; the routes are POST /v1/chat/completions, POST"),
        ("models", "{}", "/v1/models takes GET, not POST."),
    ],
)
def test_a_refusal_says_what_is_allowed_and_what_was_given(route, body, said, http):
    found = http.post(f"/v1/{route}", content=body, headers=JSON)
    assert said in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/v1/completions", 405, "/v1/completions takes POST, not GET."),
        ("DELETE", "/v1/models/x", 405, "/v1/models/x takes GET, not DELETE."),
        ("POST", "/chat/completions", 404, "GET /v1/models/{name}, GET /metrics, GET /health."),
        ("GET", "/v1/models/x", 404, f"this server has '{NAME}'."),
        ("POST", "/v1/completions", 415, "'Content-Type: application/json'; it is missing."),
    ],
)
def test_a_call_that_no_route_takes_is_told_which_do(method, path, status, said, http):
    found = http.request(method, path)
    assert found.status_code == status
    assert said in found.json()["error"]["message"]
    allowed = re.findall("takes (POST|GET)", said)
    assert found.headers.get_list("allow") == allowed


def test_a_mistake_that_this_version_does_not_know_is_told_in_pydantics_words():
    found = {"type": "of_later_versions", "loc": ("body", "n"), "msg": "Too odd", "input": 3}
    assert invalid([found]).message == "n: Too odd."


def test_a_key_is_asked_for(decoder):
    with serving(decoder, key="secret") as server:
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError, match="API key"):
            complete(client, "x")
        with client_of(server, "secret") as client:
            assert complete(client, "x", 4).choices[0].text
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                chat(client, "x")


# Conversations -------------------------------------------------------------------------------------------------------


def test_conversations_tools_and_variables_reach_the_template(client, own):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": 5}'}}
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "1",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
    ]
    prompts = ["look;system:be|assistant:5|tool:a\nb|>", "system:be|assistant:5|tool:a\nb|>"]
    for choice, prompt in zip(("auto", "none"), prompts, strict=True):
        variables = {"chat_template_kwargs": {"ending": ">"}}
        asked = {"messages": messages, "tools": tools, "tool_choice": choice, "extra_body": variables}
        found = chat(client, "", 8, **asked)
        assert found.choices[0].message.content == own(prompt, 8)
        assert found.choices[0].message.tool_calls is None


def answer_template(kind: str) -> dict:
    """Calls are what the built-in target writes between brackets."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"x": "{content}"}}}
    calls = {"open": "(", "close": ")", "repeats": True, "content": kind, "transform": call}
    return {"start_anchor": "|", "fields": {"content": {}, "tool_calls": calls}}


@pytest.mark.parametrize("kind", ["text", "json"])
def test_calls_are_found_where_the_tokenizer_says_how_they_are_written(kind, tiny_target, tokenizer, own):
    """What cannot be read as its template says stays text."""
    speaking = copy.deepcopy(tokenizer)
    speaking.response_template = answer_template(kind)
    draft = DFlashDraftModel.from_pretrained(TINY / "draft").eval()
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    asked = {"tools": tools, "max_tokens": 60}
    text = own(f"look;user:{METHOD}|", 60)
    inside = re.findall(r"\(([^)]*)\)", text)
    assert len(inside) > 1
    with (
        serving(Decoder(tiny_target, draft, speaking, Proposing("eager", "chain")), template=TEMPLATE) as server,
        client_of(server) as client,
    ):
        message = chat(client, METHOD, **asked).choices[0].message
        stream = list(chat(client, METHOD, stream=True, **asked))
        untouched = chat(client, METHOD, **asked, stop=["\0"]).choices[0].message
    deltas = [piece.choices[0].delta for piece in stream]
    streamed = "".join(delta.content or "" for delta in deltas)
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert (untouched.content, untouched.tool_calls) == (text, None)
    assert streamed == message.content
    if kind == "json":
        assert (message.content, message.tool_calls, calls) == (text, None, [])
        return
    assert message.content == re.sub(r"\([^)]*(\)|$)", "", text)
    for found in (message.tool_calls, calls):
        assert [json.loads(call.function.arguments) for call in found] == [{"x": one} for one in inside]
    assert deltas[-1].tool_calls == calls
    assert [call.index for call in calls] == list(range(len(inside)))


def test_a_chat_may_fill_the_context_and_a_completion_has_sixteen_tokens(decoder, tokenizer):
    with serving(decoder, context=40, template=TEMPLATE) as server, client_of(server) as client:
        found = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "import"}])
        assert found.usage.total_tokens == 40
        assert found.choices[0].finish_reason == "length"
        assert client.completions.create(model=NAME, prompt="a").usage.completion_tokens == 16


# Batches -------------------------------------------------------------------------------------------------------------


def choices_of(decoder, prompts, limits, stops=()):
    """Choices with these prompts, each with the list that its pieces come to."""
    found = []
    for prompt, limit in zip(prompts, limits, strict=True):
        pieces: list = []
        ids = decoder.tokenizer(prompt).input_ids
        found.append((Choice(ids, Options((("do_sample", False),)), limit, tuple(stops), pieces.append), pieces))
    return found


@pytest.mark.parametrize("left", [None, 0, 3])
def test_rows_end_one_by_one_and_a_client_that_leaves_ends_its_row(left, decoder, own):
    """A row ends at its own limit or stop string; one that is left after its first piece gets no more."""
    limits = [1, 7, 16, 24]
    found = choices_of(decoder, PROMPTS, limits)
    choices = [choice for choice, _ in found]
    if left is not None:
        gone = choices[left]
        deliver = gone.deliver
        gone.deliver = lambda piece: (deliver(piece), setattr(gone, "cancelled", True))
    decoder.decode(choices)
    for row, (_, pieces) in enumerate(found):
        text = "".join(piece.text for piece in pieces)
        expected = own(PROMPTS[row], limits[row])
        if row == left and limits[row] > 1:
            assert len(pieces) == 1
            assert expected.startswith(text)
            continue
        assert text == expected
        assert [piece.finish for piece in pieces][-1] == "length"
        assert sum(piece.tokens for piece in pieces) == limits[row]
        assert sum(cycle.committed for cycle in pieces[-1].cycles) == limits[row] - 1
    assert tiny.as_found(decoder.target)


def test_a_decode_ends_once_all_clients_have_left(decoder):
    (first, pieces), (second, _) = choices_of(decoder, PROMPTS[:2], [2000, 2000])
    first.deliver = lambda piece: (pieces.append(piece), setattr(first, "cancelled", True))
    second.cancelled = True
    started = time.perf_counter()
    decoder.decode([first, second])
    assert time.perf_counter() - started < 5  # 2,000 tokens take longer
    assert len(pieces) == 1
    assert tiny.as_found(decoder.target)


def test_nothing_of_a_batch_is_held_after_it(decoder):
    """Without a collection of garbage, which comes late."""

    def held() -> int:
        return sum(type(one).__name__ == "SlotCache" for one in gc.get_objects())

    (choice, pieces), *_ = choices_of(decoder, PROMPTS[:1], [4])
    waiting = Waiting(1, 1, None)
    waiting.add([choice])
    waiting.close()
    worker = Worker(waiting, decoder.decode)
    gc.collect()
    gc.disable()
    try:
        worker.run()
        assert held() == 0
    finally:
        gc.enable()
    assert pieces[-1].finish == "length"


def test_an_error_while_decoding_is_told_and_the_server_goes_on(decoder, server, client, own, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of something")

    with monkeypatch.context() as broken_target:
        broken_target.setattr(decoder.target, "generate", broken, raising=False)
        with pytest.raises(openai.InternalServerError, match="out of something"):
            complete(client, "x")
        with pytest.raises(openai.APIError, match="out of something"):
            joined(complete(client, "x", stream=True))
    assert complete(client, "x").choices[0].text == own("x", 16)


def rows(*asked, limit: int = 8, length: int = 8) -> list[Choice]:
    defaults = tiny.target("qwen3").generation_config
    return [Choice([1] * length, options_of(one, defaults), limit, (), print) for one in asked]


GREEDY = CompletionRequest(prompt="x", temperature=0)


@pytest.mark.parametrize(
    ("waits", "taken"),
    [
        (rows(*[GREEDY] * 3), 2),
        (rows(*[GREEDY] * 9), 4),
        ([*rows(GREEDY), *rows(CompletionRequest(prompt="x", temperature=1)), *rows(GREEDY)], 2),
        ([*rows(GREEDY), *rows(GREEDY, length=200)], 1),
        ([*rows(GREEDY, length=100), *rows(GREEDY, length=200)], 2),
        ([*rows(GREEDY, length=200, limit=50), *rows(GREEDY, length=100, limit=150)], 1),
        (rows(*[CompletionRequest(prompt="x", temperature=0, seed=1)] * 2), 2),
        (rows(*[CompletionRequest(prompt="x", temperature=1, seed=1)] * 2), 1),
        (rows(*[CompletionRequest(prompt="x", temperature=0, presence_penalty=1)] * 2), 1),
        (rows(*[CompletionRequest(prompt="x", temperature=0, logprobs=1)] * 2), 1),
        (rows(*[CompletionRequest(prompt="x", temperature=0, repetition_penalty=1.1)] * 2), 1),
    ],
)
def test_choices_that_fit_together_make_a_batch(waits, taken):
    waiting = Waiting(20, 4, 300)
    waiting.add(waits)
    assert len(waiting.take()) == taken


# The queue, and the end ----------------------------------------------------------------------------------------------


def test_more_than_may_wait_is_refused_with_a_time_to_come_back(decoder, monkeypatch):
    turn = threading.Event()
    decode = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda choices: (turn.wait(30), decode(choices)))
    with serving(decoder, most_waiting=2) as server, client_of(server) as client, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(complete, client, "x", 4)]
        while not server.service.waiting.running:
            time.sleep(0.01)
        answers += [pool.submit(complete, client, "x", 4) for _ in range(2)]
        while len(server.service.waiting.choices) < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as refused:
            complete(client, "x", 4)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        turn.set()
        assert len({one.result().choices[0].text for one in answers}) == 1


LIFE = """
import os, signal, sys, threading, time
import httpx

from dflash_hub import cli
from dflash_hub.serving.server import Server


def use(port, server):
    url = f"http://127.0.0.1:{port}/v1/completions"
    answers = []
    asked = {"prompt": "def f", "max_tokens": 40, "temperature": 0}
    refusing = threading.Event()
    worker = server.service.worker
    decode = worker.decode
    worker.decode = lambda choices: (refusing.wait(60), decode(choices))  # none is done before all five wait

    def ask():
        answers.append(client.post(url, json=asked).status_code)

    with httpx.Client(timeout=60) as client:
        asking = [threading.Thread(target=ask) for _ in range(5)]
        for one in asking:
            one.start()
        waiting = server.service.waiting
        while len(waiting.running) + len(waiting.choices) < 5:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
        while not waiting.closed:
            time.sleep(0.001)
        refused = client.post(url, json=asked)
        refusing.set()
        for one in asking:
            one.join()
    print(refused.status_code, refused.headers["retry-after"], sorted(answers), flush=True)


class Used(Server):
    async def serve(self, sockets=None):
        threading.Thread(target=use, args=(sockets[0].getsockname()[1], self)).start()
        await super().serve(sockets)


import dflash_hub.serving.server

dflash_hub.serving.server.Server = Used
sys.argv = ["dflash-hub", "-q", "serve", "demo", "--port", "0", "--proposal", "chain", "--max-batch", "1"]
cli.main()
"""


def test_a_signal_lets_those_who_wait_have_their_answers_and_refuses_others(servers):
    done = servers.models.run(code=LIFE)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("Serving demo at http://127.0.0.1:")
    assert last == "503 10 [200, 200, 200, 200, 200]"
    assert done.stderr == ""


def run(*words: str):
    return CliRunner().invoke(cli.app, list(words), catch_exceptions=False)


def test_all_that_is_wrong_with_a_call_is_told_before_anything_is_loaded(monkeypatch):
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["serve", "no/such", "--port", port, "--dtype", "int3", "--chat-template", "nowhere"]
        with pytest.raises(ValueError, match="5 things are wrong") as wrong:
            run(*words, "--api-key", "ä")
        for part in (
            f"port {port}: Address already in use",
            "--dtype is 'int3'",
            "--chat-template is nowhere, which cannot be read",
            "TARGET",
        ):
            assert part in str(wrong.value)
    with pytest.raises(ValueError, match=r"--host is 0\.0\.0\.0, where others than you can call; pass --api-key"):
        run("serve", "demo", "--host", "0.0.0.0", "--port", "0")
    monkeypatch.setattr("dflash_hub.commands.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(ValueError, match=r"serve needs uvicorn, not installed here: pip install 'dflash-hub\[serve\]'"):
        run("serve", "demo", "--port", "0")


# Load ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smaller(tokenizer):
    """A random pair whose cycles take little time, without end tokens."""
    shape = tiny.SMALL | {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "max_position_embeddings": 4096}
    target = tiny.scaled(AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape)).eval(), "qwen3")
    draft = tiny.draft(target, target_layer_ids=[0], num_hidden_layers=1)
    return Decoder(target, draft, tokenizer, Proposing("eager", "chain"))


def count_choices() -> int:
    gc.collect()
    return sum(type(one) is Choice for one in gc.get_objects())


def test_half_of_two_hundred_requests_are_left_and_the_others_have_the_targets_text(smaller):
    """Sixteen clients; those who leave do so in the middle of a stream, or while they wait. Nothing of them stays."""
    expected = [own_text(smaller.target, smaller.tokenizer, prompt, 12) for prompt in PROMPTS]

    before = count_choices()

    def ask(number: int) -> bool:
        place = number // 2 % len(PROMPTS)
        body = {"prompt": PROMPTS[place], "max_tokens": 12 if number % 2 else 4000, "temperature": 0}
        if number % 2:
            found = http.post("/v1/completions", json=body)
            return found.json()["choices"][0]["text"] == expected[place]
        if number % 4:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.1)
            return True
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            return next(stream.iter_lines()).startswith("data: {")

    with serving(smaller) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(200)))
        waiting = server.service.waiting
        started = time.monotonic()
        while waiting.running or waiting.choices:
            assert time.monotonic() - started < 5
            time.sleep(0.01)
        while count_choices() != before:  # a thread may still hold what it has just answered
            assert time.monotonic() - started < 10
            time.sleep(0.1)


# Parts ---------------------------------------------------------------------------------------------------------------


def test_characters_of_several_tokens_come_whole(tokenizer):
    text = "naïve “ünïcode” 🙂\n  x"
    ids = tokenizer(text).input_ids
    detokenizer = Detokenizer(tokenizer, tokenizer("# a").input_ids)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    cut = Detokenizer(tokenizer, [])
    assert "".join(cut.add(token) for token in tokenizer("🙂").input_ids[:-1]) == ""
    assert cut.rest() == "\ufffd"


@pytest.mark.parametrize(
    ("stops", "pieces", "given"),
    [
        (["abc"], ["xab", "ab", "c", "d"], ["x", "ab", "", None]),
        (["abc", "b"], ["a", "b"], ["", "a"]),
        (["aab"], ["aaa", "ab"], ["a", "aa"[:1]]),
        (["\n\n"], ["x\n", "y\n", "\nz"], ["x", "\ny", ""]),
        ([], ["x", "y"], ["x", "y"]),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(stops, pieces, given):
    finder = StopFinder(tuple(stops))
    for piece, expected in zip(pieces, given, strict=True):
        if expected is not None:
            assert finder.add(piece) == expected
    assert finder.found == bool(stops)


@pytest.mark.parametrize(
    ("asked", "config", "expected"),
    [
        ({}, {}, {"do_sample": False}),
        ({}, {"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_p": 1.0, "top_k": 20}),
        ({"temperature": 0.7}, {}, {"temperature": 0.7, "top_p": 1.0, "top_k": 0}),
        ({"temperature": 0}, {"do_sample": True}, {"do_sample": False}),
        ({"temperature": 1e-7}, {}, {"do_sample": False}),
        ({"top_p": 0.5, "top_k": -1}, {"top_k": 20}, {"temperature": 1.0, "top_p": 0.5, "top_k": 0}),
    ],
)
def test_what_a_request_leaves_open_is_as_the_targets_config_says(asked, config, expected):
    from transformers import GenerationConfig

    asked = ChatRequest(messages=[{"role": "user"}], **asked)
    assert dict(options_of(asked, GenerationConfig(**config)).keywords) == {"do_sample": True} | expected

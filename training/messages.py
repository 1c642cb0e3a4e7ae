# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Read the messages of a conversation in the dialects of other trainers, and what of them is learnt from.

A message becomes one that chat templates take: `role`, `content` as text, `tool_calls` as objects, and every other key
as it was. The keys that say what is learnt from are taken out.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .reading import BadRow, short

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "observations": "tool",
    "tool_response": "tool",
}
"""Roles of ShareGPT, LLaMA-Factory, ms-swift and OpenAI's former API, and what templates call them."""
CALLS = ("function_call", "tool_call")
"""Roles of LLaMA-Factory and ms-swift whose content is a call, or a list of calls."""
STANDARD = ("system", "developer", "user", "assistant", "tool")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an answer's thought; each template reads one of them."""
FLAGS = ("weight", "train", "training", "loss", "loss_scale")
"""Keys of OpenAI, Axolotl and ms-swift that say whether an answer is learnt from."""
FLAGS_OF_EVERY_ROLE = ("train", "training")
DETAILS = ("train_detail", "training_detail")


@dataclass(frozen=True)
class Message:
    """Hold one message.

    Args:
        fields: as the chat template takes it.
        learnt: whether it is an answer that is learnt from.
        masked: characters of it that are not learnt from all the same: key, start and end.
    """

    fields: dict[str, Any]
    learnt: bool = False
    masked: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def role(self) -> str:
        return self.fields["role"]


def read_messages(value: Any, column: str, system: Any = None) -> list[Message]:
    """Return the messages of a row.

    Args:
        value: a list of messages, or its JSON text.
        column: where they stand, for errors.
        system: the row's system prompt; messages that begin with one of their own keep that.

    Raises:
        BadRow: something in them cannot be read; names it.
    """
    found: list[Message] = []
    messages = listed(value, column)
    is_swift = any(
        isinstance(one, dict) and (one.keys() & {"loss", "loss_scale"}) for one in messages
    )
    for number, message in enumerate(messages):
        name = f"{column}[{number}]"
        for part in _turns(message, name):
            _append(found, part, name, is_swift)
    if system and not (found and found[0].role in ("system", "developer")):
        found.insert(0, Message({"role": "system", "content": text_of(system, "system")}))
    return found


def _append(found: list[Message], message: Message, name: str, is_swift: bool) -> None:
    """Append a message; a call that follows an answer directly belongs to it, in ms-swift a further answer too."""
    before = found[-1] if found and found[-1].role == "assistant" else None
    is_call = message.fields.pop("joins", False)
    if before is not None and is_call:
        if before.fields.get("content") and before.learnt != message.learnt:
            raise BadRow(f"{name} is learnt from, or not, unlike the answer that it belongs to.")
        before.fields.setdefault("tool_calls", []).extend(message.fields["tool_calls"])
    elif before is not None and is_swift and message.role == "assistant":
        found[-1] = _together(before, message)
    else:
        found.append(message)


def _together(first: Message, second: Message) -> Message:
    """Return two answers as one; what is not learnt from one is not from both."""
    texts = [one.fields.get("content", "") for one in (first, second)]
    masked = [*first.masked]
    masked += [
        (key, start + len(texts[0]), end + len(texts[0])) for key, start, end in second.masked
    ]
    if not first.learnt:
        masked.append(("content", 0, len(texts[0])))
    if not second.learnt:
        masked.append(("content", len(texts[0]), len("".join(texts))))
    fields = {**first.fields, **second.fields, "content": "".join(texts)}
    return Message(fields, first.learnt or second.learnt, masked)


def listed(value: Any, name: str) -> list[Any]:
    """Return a list, or the one whose JSON text the value is.

    Raises:
        BadRow: it is neither.
    """
    value = parsed(value, name) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise BadRow(f"{name} is {short(value)}, but must be a list or the JSON text of one.")
    return value


def parsed(text: str, name: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        BadRow: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{name} is a text that is not JSON: {error}.") from error


def text_of(value: Any, name: str) -> str:
    """Return a value that must be text.

    Raises:
        BadRow: it is not.
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} is {short(value)}, but must be a text.")
    return value


def _turns(message: Any, name: str) -> Iterable[Message]:
    """Return the messages that one entry of a conversation stands for."""
    if not isinstance(message, dict):
        raise BadRow(f"{name} is {short(message)}, but must be an object with role and content.")
    if _is_plain(message):  # as most are: the rest need not be looked for
        return [Message(message, message["role"] == "assistant")]
    if "role" in message or "from" in message:
        return _of_blocks(message, name) if _has_blocks(message) else [_message(message, name)]
    turns = [key for key in message if key in ROLES or key in STANDARD]
    if not turns:
        raise BadRow(f"{name} has the keys {', '.join(message)}; role and content are needed.")
    return [_message({"role": key, "content": message[key]}, f"{name}.{key}") for key in turns]


def _is_plain(message: dict[str, Any]) -> bool:
    is_known = message.keys() == {"role", "content"} and message["role"] in STANDARD
    return is_known and isinstance(message["content"], str)


def _message(message: dict[str, Any], name: str) -> Message:
    """Return one message with a role."""
    role = _role(message, name)
    fields: dict[str, Any] = {"role": role}
    learnt = _learnt(message, role, name)
    masked: list[tuple[str, int, int]] = []
    if message.get("role", message.get("from")) in CALLS:
        calls = _content(message)
        fields |= {"tool_calls": _calls_of(calls, name), "content": "", "joins": True}
    else:
        fields |= _texts(message, masked, name)
    known = {"role", "from", "content", "value", *FLAGS, *DETAILS, *THOUGHTS, *fields}
    for key, value in message.items():
        if key not in known and value is not None:
            fields[key] = value
    _take_calls(fields, name)
    return Message(fields, learnt, masked)


def _role(message: dict[str, Any], name: str) -> str:
    """Return the role as templates name it; one that they may know passes."""
    role = message.get("role", message.get("from"))
    if role in CALLS:
        return "assistant"
    if not isinstance(role, str) or ("role" not in message and role not in {*ROLES, *STANDARD}):
        known = ", ".join([*STANDARD, *ROLES, *CALLS])
        raise BadRow(f"{name} is from {short(role)}, which is none of {known}.")
    return ROLES.get(role, role)


def _content(message: dict[str, Any]) -> Any:
    return message.get("content", message.get("value"))


def _texts(
    message: dict[str, Any], masked: list[tuple[str, int, int]], name: str
) -> dict[str, str]:
    """Return content and thought of a message as texts; add what of them is not learnt from to `masked`."""
    texts = {}
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    if thought is not None:
        joined = _joined(thought, THOUGHTS[0], masked, name)
        texts.update(dict.fromkeys(THOUGHTS, joined))
    content = _content(message)
    if content is not None:
        texts["content"] = _joined(content, "content", masked, name)
    elif message.get("refusal") or not (thought or _calls(message)):
        key = "refusal" if message.get("refusal") else "content"
        raise BadRow(f"{name} has {key} {short(message.get(key))}; the content must be a text.")
    else:
        texts["content"] = ""  # as engines do: templates print None, or ask for the key
    details = _details(message)
    if details is not None:
        masked += _untrained(texts["content"], details, name)
    return texts


def _details(message: dict[str, Any]) -> Any:
    return next((message[key] for key in DETAILS if message.get(key) is not None), None)


def _calls(message: dict[str, Any]) -> Any:
    return message.get("tool_calls") or message.get("function_call")


def _joined(value: Any, key: str, masked: list[tuple[str, int, int]], name: str) -> str:
    """Return a text, or the parts of one put together; add the parts that are not learnt from to `masked`."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow(f"{name} has the {key} {short(value)}, but it must be a text.")
    whole = ""
    for part in value:
        text = _part(part, f"{name}.{key}")
        if isinstance(part, dict) and not _flag(part, ("train", "weight"), name, True):
            masked.append((key, len(whole), len(whole) + len(text)))
        whole += text
    return whole


def _part(part: Any, name: str) -> str:
    """Return the text of a part of a content."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRow(f"{name} has the part {short(part)}; a part must be a text.")
    kind = part.get("type", "text")
    if kind != "text":
        raise BadRow(f"{name} has a part of the type {kind!r}; only 'text' is read.")
    value = next((part[key] for key in ("text", "content", "value") if key in part), None)
    return text_of(value, f"{name}: the text of a part")


def _untrained(content: str, details: Any, name: str) -> list[tuple[str, int, int]]:
    """Return what of a content no detail of Axolotl's lets learn; the end of a detail is its last character."""
    learnt = [False] * len(content)
    for detail in listed(details, f"{name}.train_detail"):
        try:
            part = slice(detail["begin_offset"], detail["end_offset"] + 1)
            learnt[part] = [bool(detail["train"])] * len(learnt[part])
        except (KeyError, TypeError) as error:
            raise BadRow(
                f"{name}.train_detail has {short(detail)}; begin_offset, end_offset and train are needed."
            ) from error
    edges = [at for at, pair in enumerate(pairwise([True, *learnt, True])) if pair[0] != pair[1]]
    return [("content", start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _learnt(message: dict[str, Any], role: str, name: str) -> bool:
    """Return whether a message is an answer that is learnt from."""
    if role == "assistant":
        return _flag(message, FLAGS, name, True)
    parts = [*listed(_details(message) or [], f"{name}.train_detail"), *_parts(message)]
    trained = any(part.get("train") for part in parts if isinstance(part, dict))
    if trained or _flag(message, FLAGS_OF_EVERY_ROLE, name, False):
        raise BadRow(
            f"{name} is from {role!r} and has train true, but a draft learns answers alone. Set it to false."
        )
    return False


def _parts(message: dict[str, Any]) -> list[Any]:
    """Return the parts of a content, or none where it is a text."""
    content = _content(message)
    return content if isinstance(content, list) else []


def _flag(message: dict[str, Any], keys: Iterable[str], name: str, default: bool) -> bool:
    """Return whether all flags that are given are on."""
    given = {key: message[key] for key in keys if message.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):
            raise BadRow(f"{name} has {key} {short(value)}; it must be 0 or 1, true or false.")
    return all(given.values()) if given else default


# Calls of tools --------------------------------------------------------------------------------------------------


def _take_calls(fields: dict[str, Any], name: str) -> None:
    """Turn the calls of an answer into those of today, with arguments that are objects."""
    former = fields.pop("function_call", None)
    if former is not None:
        fields["tool_calls"] = _calls_of(former, name)
    elif fields.get("tool_calls") and "joins" not in fields:
        calls = listed(fields["tool_calls"], f"{name}.tool_calls")
        fields["tool_calls"] = [_with_arguments(call, f"{name}.tool_calls") for call in calls]


def _with_arguments(call: Any, name: str) -> Any:
    """Return a call whose arguments are an object, where they are the JSON text of one."""
    if not isinstance(call, dict):
        raise BadRow(f"{name} has {short(call)}; a call must be an object with name and arguments.")
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except ValueError:
        return call
    if not isinstance(value, dict):
        return call
    changed = {**function, "arguments": value}
    return {**call, "function": changed} if "function" in call else changed


def _calls_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls that a call or a list of them, or the JSON text of either, stands for."""
    calls = parsed(value, name) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or "name" not in call:
            raise BadRow(
                f"{name} is the call {short(call)}; it must be JSON with name and arguments."
            )
    return [_with_arguments({"type": "function", "function": call}, name) for call in calls]


def read_tools(value: Any, name: str) -> list[Any] | None:
    """Return descriptions of tools in OpenAI's form: from a list or its JSON text, wrapped or bare.

    Raises:
        BadRow: they cannot be read.
    """
    if value in (None, "", []):
        return None
    return [_tool(tool, f"{name}[{number}]") for number, tool in enumerate(listed(value, name))]


def _tool(tool: Any, name: str) -> Any:
    """Return the description of one tool."""
    tool = parsed(tool, name) if isinstance(tool, str) else tool
    if not isinstance(tool, dict):
        raise BadRow(f"{name} is {short(tool)}, but must be an object that describes a function.")
    function = tool.get("function", tool)
    if isinstance(function, dict) and isinstance(function.get("parameters"), str):
        function = {**function, "parameters": parsed(function["parameters"], f"{name}.parameters")}
    if "function" in tool:
        return {**tool, "function": function}
    return {"type": "function", "function": function} if "name" in tool else tool


# Blocks of Anthropic's API ---------------------------------------------------------------------------------------


def _has_blocks(message: dict[str, Any]) -> bool:
    kinds = [part.get("type") for part in _parts(message) if isinstance(part, dict)]
    return "tool_use" in kinds or "tool_result" in kinds


def _of_blocks(message: dict[str, Any], name: str) -> list[Message]:
    """Return the messages that texts, calls and results in one message of Anthropic's stand for."""
    rest = {key: value for key, value in message.items() if key not in ("content", "value")}
    found = []
    for block in _content(message):
        kind = block.get("type") if isinstance(block, dict) else "text"
        if kind == "tool_use":
            call = {"name": block.get("name"), "arguments": block.get("input", {})}
            found.append(_message({**rest, "role": "tool_call", "content": call}, name))
        elif kind == "tool_result":
            result = {"role": "tool", "content": block.get("content", "")}
            result["tool_call_id"] = block.get("tool_use_id")
            found.append(_message(result, name))
        else:
            found.append(_message({**rest, "content": [block]}, name))
    return found

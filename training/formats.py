# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Tell the format of a row by its columns, and read it: what is text or tokens in it, and what is learnt from.

The formats are those that TRL, Axolotl, LLaMA-Factory, ms-swift, SpecForge, speculators and OpenAI's fine-tuning
describe. What of them cannot be trained on is refused by the name of its column.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .messages import Message, listed, read_messages, read_tools, text_of
from .reading import BadRow, short

PROMPTS = (
    "prompt",
    "query",
    "instruction",
    "INSTRUCTION",
    "question",
    "problem",
    "input",
    "message_1",
)
ANSWERS = (
    *("completion", "response", "output", "answer", "RESPONSE", "generation", "target", "targets"),
    *("solution", "answers", "answer_key", "message_2"),
)
CONVERSATIONS = ("messages", "conversations", "conversation")
DECIDING = ("input_ids", *CONVERSATIONS, "segments")
"""Columns that come before all others."""
MASKS = (
    *("supervised", "loss_mask", "completion_mask", "assistant_masks", "assistant_mask"),
    *("response_mask", "labels", "attention_mask"),
)
"""Columns beside `input_ids` that say what is learnt from; a token is learnt from if all of them say so."""
UNREAD_BESIDE_IDS = ("special_tokens_mask", "token_type_ids")
PREFERENCE = (
    *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag"),
    *("preferred_output", "non_preferred_output", "completions", "label"),
)
MEDIA = ("pixel_values", "image", "images", "video", "videos", "audio", "audios", "objects")
OPTIONS = (
    *(
        "mask_history",
        "train_on_prompt",
        "train_on_inputs",
        "completion_only_loss",
        "assistant_only_loss",
    ),
    *(
        "train_only_last_turn",
        "roles_to_train",
        "train_on_eos",
        "train_on_eot",
        "loss_scale",
        "teacher_prompt",
    ),
)
CONTEXTS = (
    *("context", "article", "choices", "explanation", "unanswerable_question", "reflection"),
    *("corrected", "revision", "critiques"),
)
"""Columns that Axolotl builds a prompt from with words of its own."""


@dataclass(frozen=True)
class Conversation:
    """Hold a conversation: its messages, the tools, and further arguments of the chat template."""

    messages: list[Message]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Hold pieces of plain text, each with whether it is learnt from.

    Args:
        is_cut: whether it is one text, which may be cut anywhere.
        ends: whether the last piece ends as an answer does, with the end token.
    """

    pieces: list[tuple[str, bool]]
    is_cut: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Tokens:
    """Hold token ids, and 1 for each that is learnt from, else 0."""

    ids: list[int]
    supervised: list[int]


Form = Conversation | Text | Tokens


def read_row(row: dict[str, Any]) -> Form:
    """Return what a row holds.

    Raises:
        BadRow: it is of no known format, or something in it cannot be read or trained on; names the column.
    """
    given = {name for name, value in row.items() if value is not None}
    if given & {
        *DECIDING,
        *PROMPTS,
        *ANSWERS,
        "text",
    }:  # a table fills the columns of its other rows with null
        row = {name: row[name] for name in row if name in given or name not in DECIDING}
    _refuse(
        row,
        OPTIONS,
        "an option of another trainer; for the last answer alone pass --last-answer-only",
    )
    _refuse(row, MEDIA, "of other media than text, which drafts are not trained on")
    if "input_ids" in row:
        return _tokens(row)
    column = next((name for name in CONVERSATIONS if name in row), None)
    if column is not None:
        _refuse(row, PREFERENCE, "of preference data, and a draft learns one answer; keep that one")
        return _of_messages(row, read_messages(row[column], column, _system(row)))
    if "segments" in row:
        return Text([_segment(one) for one in listed(row["segments"], "segments")])
    if given & {*PROMPTS, *ANSWERS} and not _is_text(row):
        _refuse(row, PREFERENCE, "of preference data, and a draft learns one answer; keep that one")
        _refuse(row, CONTEXTS, "of a format with a prompt of its own; write it into the prompt")
        return _pair(row)
    _refuse(row, PREFERENCE[:6], "of preference data, and a draft learns one answer; rename it")
    if "text" in row:
        return Text([(text_of(row["text"], "text"), True)], is_cut=True)
    raise BadRow(
        f"The columns {', '.join(row) or '(none)'} are of no format that is read; 'messages', 'text', 'input_ids', or "
        "a prompt and an answer are needed (docs/training.md lists them)."
    )


def _is_text(row: dict[str, Any]) -> bool:
    """Return whether a row is plain text.

    Raises:
        BadRow: it may be a prompt and its answer as well.
    """
    if not isinstance(row.get("text"), str):
        return False
    prompts = [name for name in PROMPTS if row.get(name)]
    answers = [name for name in ANSWERS if row.get(name)]
    if bool(prompts) != bool(answers):
        other, role = (prompts[0], "completion") if prompts else (answers[0], "prompt")
        raise BadRow(
            f"text stands beside {other}. Rename text to {role} if it is that, or remove {other} to train on the whole "
            "text."
        )
    return not prompts


def _refuse(row: dict[str, Any], names: Iterable[str], what: str) -> None:
    """Refuse the columns of these names that hold something.

    Raises:
        BadRow: one does.
    """
    for name in names:
        if row.get(name) not in (None, "", [], {}):
            raise BadRow(f"The column {name} is {what}. Remove it to train without it.")


def _system(row: dict[str, Any]) -> Any:
    return row.get("system") or row.get("system_prompt")


def _of_messages(row: dict[str, Any], messages: list[Message]) -> Form:
    """Return the conversation of a row; an answer to nothing is the plain text of ms-swift's pretraining."""
    alone = messages[0] if len(messages) == 1 else None
    if alone is not None and alone.learnt and set(alone.fields) == {"role", "content"}:
        return Text([(alone.fields["content"], True)], is_cut=True)
    return _conversation(row, messages)


def _conversation(row: dict[str, Any], messages: list[Message]) -> Conversation:
    """Return the conversation of a row with its tools and its arguments of the template."""
    name = "tools" if row.get("tools") else "functions"
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRow(f"chat_template_kwargs is {short(options)}, but must be an object.")
    return Conversation(messages, read_tools(row.get(name), name), options)


def _segment(segment: Any) -> tuple[str, bool]:
    """Return one of Axolotl's segments."""
    if not isinstance(segment, dict) or segment.get("label") not in (True, False):
        raise BadRow(
            f"segments has {short(segment)}; a segment must have text, and label true or false."
        )
    return text_of(segment.get("text"), "segments: text"), bool(segment["label"])


# A prompt and an answer ------------------------------------------------------------------------------------------


def _pair(row: dict[str, Any]) -> Form:
    """Return a prompt with its answer; a prompt alone is a conversation without one."""
    prompts = [name for name in PROMPTS if name != "input" or "instruction" not in row]
    prompt, answer = _only(row, prompts), _only(row, ANSWERS)
    if prompt is None:
        raise BadRow(
            f"{answer} is an answer without a prompt; a column such as 'prompt' is needed."
        )
    if answer is None:
        return _conversation(row, _asked(row, prompt))
    is_chat = any(isinstance(row[name], list) for name in (prompt, answer))
    if (prompt, answer) == ("prompt", "completion") and not is_chat:
        question = text_of(row[prompt], prompt)
        return Text([(question, False), (text_of(row[answer], answer), True)], ends=True)
    return _conversation(row, [*_asked(row, prompt), *_answered(row[answer], answer)])


def _only(row: dict[str, Any], names: Iterable[str]) -> str | None:
    """Return the one column of these that holds something, or None if there is none of them.

    Raises:
        BadRow: several do.
    """
    present = [name for name in names if name in row]
    filled = [name for name in present if row[name] not in (None, "")]
    if len(filled) > 1:
        raise BadRow(f"{' and '.join(filled)} may each be the one; keep one of these columns.")
    return next(iter(filled or present), None)


def _asked(row: dict[str, Any], column: str) -> list[Message]:
    """Return the messages before the answer; those of LLaMA-Factory's history are learnt from as well."""
    if isinstance(row[column], list):
        messages = read_messages(row[column], column, _system(row))
        return [Message(message.fields) for message in messages]
    text = text_of(row[column], column)
    if column == "instruction" and row.get("input"):
        text = "\n".join(filter(None, [text, text_of(row["input"], "input")]))
    turns = [*_history(row), {"role": "user", "content": text}]
    return read_messages(turns, "history" if len(turns) > 1 else column, _system(row))


def _history(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a history, which is a list of prompts with their answers."""
    turns = []
    for pair in listed(row.get("history") or [], "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(
                f"history has {short(pair)}; it must hold pairs of a prompt and its answer."
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _answered(value: Any, column: str) -> list[Message]:
    if isinstance(value, list):
        return read_messages(value, column)
    return read_messages([{"role": "assistant", "content": text_of(value, column)}], column)


# Tokens ----------------------------------------------------------------------------------------------------------


def _tokens(row: dict[str, Any]) -> Tokens:
    """Return the tokens of a row without padding, and which of them every mask lets learn."""
    ids = _numbers(row["input_ids"], "input_ids")
    _refuse_unread(row, len(ids))
    masks = {name: _mask(row[name], name, ids) for name in MASKS if row.get(name) is not None}
    first, end = _unpadded(masks.pop("attention_mask", [1] * len(ids)))
    supervised = [min(bits) for bits in zip([1] * len(ids), *masks.values(), strict=True)]
    return Tokens(ids[first:end], supervised[first:end])


def _numbers(value: Any, name: str) -> list[int]:
    """Return a list of whole numbers."""
    values = listed(value, name)
    wrong = next((item for item in values if type(item) not in (int, bool)), 0)
    if type(wrong) not in (int, bool):
        raise BadRow(f"{name} has {short(wrong)}, but must hold whole numbers.")
    return values


def _mask(value: Any, name: str, ids: list[int]) -> list[int]:
    """Return a mask as 0 and 1; of labels, 0 for -100."""
    values = _numbers(value, name)
    if len(values) != len(ids):
        raise BadRow(f"{name} has {len(values)} values, but input_ids has {len(ids)}.")
    if name == "labels":
        return _labels(values, ids)
    if not {0, 1}.issuperset(values):
        wrong = next(item for item in values if item not in (0, 1))
        raise BadRow(f"{name} has {wrong}; it must be 0 or 1 for each token.")
    return [int(item) for item in values]


def _labels(labels: list[int], ids: list[int]) -> list[int]:
    """Return 1 for each label that is its token, 0 for each that is -100."""
    for at, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (-100, token):
            raise BadRow(
                f"labels[{at}] is {label}, but input_ids[{at}] is {token}. Labels must be -100 or the token itself; "
                "shifted ones are not read."
            )
    return [int(label != -100) for label in labels]


def _unpadded(attention: list[int]) -> tuple[int, int]:
    """Return the first and the last position, exclusive, that are no padding."""
    if 1 not in attention:
        return 0, 0
    first, end = attention.index(1), len(attention) - attention[::-1].index(1)
    if 0 in attention[first:end]:
        raise BadRow(
            "attention_mask has a 0 between ones; padding must stand at the start or the end."
        )
    return first, end


def _refuse_unread(row: dict[str, Any], length: int) -> None:
    """Refuse what else stands beside tokens, one value for each: it may be a mask.

    Raises:
        BadRow: there is such a column, or the row is packed.
    """
    positions = row.get("position_ids")
    if positions is not None and list(positions) != list(range(length)):
        raise BadRow(
            "position_ids do not count from 0, as in a packed row; pass rows before packing."
        )
    if row.get("seq_lengths") not in (None, [length]):
        raise BadRow("seq_lengths is of a packed row; pass rows before packing.")
    read = {"input_ids", "position_ids", "seq_lengths", *MASKS, *UNREAD_BESIDE_IDS}
    for name in row.keys() - read:
        if length and _has_one_for_each(row[name], length):
            raise BadRow(
                f"{name} has one value for each token, and may be a mask. Rename it to loss_mask, or remove it."
            )


def _has_one_for_each(value: Any, length: int) -> bool:
    is_list = isinstance(value, list) and len(value) == length
    return is_list and type(value[0]) in (int, bool, float)

# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Collect from a report what each prompt gave: a row of figures, the text token by token, and where texts diverge."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from .reading import Reading, Way, entry, items, number, visible, words

MOST_ROWS = 2000
"""Rows of a table that a browser still sorts at once."""
MOST_TOKENS = 200_000
"""Tokens that a page holds, a few megabytes; report.json holds all."""
VERDICTS = {"rounding": "differs (rounding)", "bug": "differs (bug)"}


@dataclass(frozen=True)
class Outcome:
    """Hold one row of the table of prompts: a prompt decoded in one way, over all repeats."""

    prompt: str
    category: str | None
    way: str
    place: tuple[int, int]
    """The numbers of the prompt and of the way."""
    prompt_tokens: float | None
    new_tokens: float | None
    seconds: float | None
    """The median over the repeats."""
    acceptance_length: float | None
    kind: str
    """identical, differing, error or unknown."""
    shown: str
    error: str | None

    @property
    def tokens_per_second(self) -> float | None:
        if self.new_tokens is None or not self.seconds:
            return None
        return self.new_tokens / self.seconds


def outcomes(reading: Reading) -> list[Outcome]:
    """Return a row for each prompt and way, in the order of the prompts; of plain decoding only what failed."""
    found = []
    for number_of_prompt, prompt in enumerate(reading.prompts):
        for way in reading.ways:
            records = way.of_prompt.get(prompt)
            row = records and _outcome(reading, way, (number_of_prompt, prompt), records)
            if row and not (way.is_plain and row.error is None and reading.drafted):
                found.append(row)
    return found


def _outcome(
    reading: Reading, way: Way, prompt: tuple[int, str], records: list[dict[str, Any]]
) -> Outcome:
    about, first = reading.prompts[prompt[1]], _most_telling(records)
    kind, shown = _kind(first, way)
    seconds = [value for record in records if (value := number(record.get("seconds"))) is not None]
    return Outcome(
        prompt=prompt[1],
        category=words(about.get("category")),
        way=way.label,
        place=(prompt[0], way.index),
        prompt_tokens=number(way.about.get("context")) or number(about.get("tokens")),
        new_tokens=number(first.get("new_tokens")),
        seconds=median(seconds) if seconds else None,
        acceptance_length=_acceptance_length(first),
        kind=kind,
        shown=shown,
        error=words(first.get("error")),
    )


def _most_telling(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first repeat that failed, else the first that differs, else the first."""
    failed = [record for record in records if record.get("error") is not None]
    differing = [record for record in records if record.get("identical") is False]
    return (failed or differing or records)[0]


def _kind(record: dict[str, Any], way: Way) -> tuple[str, str]:
    """Return how a record compares with plain decoding, as a kind and in words."""
    if record.get("error") is not None:
        return "error", "error"
    if way.is_plain:
        return "unknown", "plain"
    if record.get("identical") is True:
        return "identical", "identical"
    if record.get("identical") is False:
        verdict = entry(record.get("divergence")).get("verdict")
        return "differing", VERDICTS.get(str(verdict), "differs")
    return "unknown", "not compared"


def _acceptance_length(record: dict[str, Any]) -> float | None:
    """Return tokens per cycle, counted from the cycles; else the figure that the record gives."""
    committed = [number(value) or 0 for value in items(record.get("committed"))]
    if committed:
        return sum(committed) / len(committed)
    return number(entry(record.get("speculative_decoding")).get("mean_acceptance_length"))


def divergences(reading: Reading) -> list[dict[str, Any]]:
    """Return where texts first differ from plain decoding, the ones that are bugs first."""
    found = []
    for way in reading.drafted:
        for record in way.records:
            divergence = entry(record.get("divergence"))
            if divergence:
                found.append(_divergence(reading, way, record, divergence))
    return sorted(found, key=lambda row: row["verdict"] != "bug")


def _divergence(
    reading: Reading, way: Way, record: dict[str, Any], divergence: dict[str, Any]
) -> dict[str, Any]:
    position, prompt = divergence.get("position"), str(record.get("prompt"))
    plain = [
        found for other in _plain_of(reading, way) for found in other.of_prompt.get(prompt, [])
    ]
    margin = number(divergence.get("margin"))
    return {
        "prompt": prompt,
        "way": way.label,
        "position": number(position),
        "plain": _token(plain[:1], position, divergence.get("plain_token")),
        "other": _token([record], position, divergence.get("other_token")),
        "margin": None if margin is None else f"{margin:.4g}",
        "float32": words(divergence.get("float32")),
        "verdict": words(divergence.get("verdict")),
    }


def _plain_of(reading: Reading, way: Way) -> list[Way]:
    """Return the plain ways with the settings of `way`."""
    plain = [other for other in reading.ways if other.is_plain]
    return [other for other in plain if other.condition == way.condition]


def _token(records: list[dict[str, Any]], position: Any, identifier: Any) -> str:
    """Return the token at a position as text and id; a text that ended there has none."""
    if identifier is None:
        return "end of the text"
    shown = f"id {words(identifier) or 'not known'}"
    for record in records:
        tokens = items(record.get("tokens"))
        if type(position) is int and 0 <= position < len(tokens):
            return f"{str(tokens[position])!r}, {shown}"
    return shown


def texts(reading: Reading) -> dict[str, Any]:
    """Return the texts token by token, for the page's script: of the first repeat, until the page holds enough."""
    found: list[dict[str, Any]] = []
    room = MOST_TOKENS
    for number_of_prompt, prompt in enumerate(reading.prompts):
        for way in reading.ways:
            for record in way.of_prompt.get(prompt, [])[:1]:
                text = _text(record, (number_of_prompt, way.index))
                room -= len(text["tokens"])
                if room >= 0:
                    found.append(text)
    prompts = [
        {"id": visible(name), "text": visible(words(about.get("text")) or "")}
        for name, about in reading.prompts.items()
    ]
    ways = [visible(way.label) for way in reading.ways]
    return {
        "prompts": prompts,
        "ways": ways,
        "texts": found,
        "first": _first(reading, found),
        "is_cut": room < 0,
    }


def _first(reading: Reading, found: list[dict[str, Any]]) -> int:
    """Return the number of the text to show first: one of the way in the headline."""
    way = reading.headlined
    for place, text in enumerate(found):
        if way is not None and text["way"] == way.index and text["tokens"]:
            return place
    return 0


def _text(record: dict[str, Any], place: tuple[int, int]) -> dict[str, Any]:
    """Return the text of a record as tokens, with "1" for those that were drafted and "0" for the target's own.

    Without a flag for each token, there are none.
    """
    tokens = [visible(str(token)) for token in items(record.get("tokens"))]
    flags = "".join(str(int(flag is True)) for flag in items(record.get("drafted")))
    divergence = entry(record.get("divergence")).get("position")
    return {
        "prompt": place[0],
        "way": place[1],
        "tokens": tokens or [visible(words(record.get("text")) or "")],
        "drafted": flags if len(flags) == len(tokens) else "",
        "divergence": number(divergence),
        "state": visible(_state(record)),
    }


def _state(record: dict[str, Any]) -> str:
    """Return what went wrong with a text, in words; nothing if nothing did."""
    if (error := words(record.get("error"))) is not None:
        return error
    divergence = entry(record.get("divergence"))
    if not divergence:
        return ""
    found = {name: words(divergence.get(name)) for name in ("position", "margin", "verdict")}
    return "Differs from plain decoding. " + ", ".join(
        f"{name}: {value or 'not known'}" for name, value in found.items()
    )

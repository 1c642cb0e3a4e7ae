# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Put the figures of an evaluation into the model card of a draft in a folder."""

from pathlib import Path
from typing import Any

from ..files import write_whole
from .recommendation import shown_speedup
from .ways import DFLASH

FILE = "README.md"
BEGIN, END = "<!-- dflash-hub eval: begin -->", "<!-- dflash-hub eval: end -->"
"""Between these two lines stands what `update_card` writes."""


def check_folders(drafts: list[str]) -> None:
    """Refuse drafts whose card is not in a folder.

    Raises:
        ValueError: naming the first; or none is named, so that the known draft of the Hub would be taken.
    """
    if not drafts:
        raise ValueError(
            f"--update-card writes into {FILE} of a draft's folder. Pass the folder as --draft."
        )
    for draft in drafts:
        if not (Path(draft) / FILE).is_file():
            raise ValueError(
                f"--update-card writes into {FILE} of a draft's folder, and there is none in {draft}. Pass folders as "
                "--draft, with a card."
            )


def update_cards(report: dict[str, Any]) -> list[Path]:
    """Write the figures of every draft into its card, in place of those of an earlier evaluation.

    Returns:
        The cards.
    """
    found = []
    for draft in drafts_of(report):
        path = Path(draft) / FILE
        text = with_section(path.read_text(encoding="utf-8"), section(report, draft))
        write_whole(path, text.encode())
        found.append(path)
    return found


def drafts_of(report: dict[str, Any]) -> list[str]:
    """Return every draft of a report once, in its order."""
    drafts = [way["draft"] for way in report["ways"] if way["method"] == DFLASH]
    return list(dict.fromkeys(drafts))


def with_section(card: str, text: str) -> str:
    """Return a card with `text` between its marks, which are added at the end if there are none.

    Raises:
        ValueError: only one of the two marks is there.
    """
    if (BEGIN in card) != (END in card):
        raise ValueError(
            f"The card has one of the lines {BEGIN} and {END}, but not both; remove it, or add the other."
        )
    if BEGIN not in card:
        card = f"{card.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = card.split(BEGIN, maxsplit=1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, maxsplit=1)[1]}"


def section(report: dict[str, Any], draft: str) -> str:
    """Return the figures of one draft, with everything that they depend on."""
    settings, prompts = report["settings"], report["prompt_set"]
    ways = [way for way in report["ways"] if way["method"] == DFLASH and way["draft"] == draft]
    taps = ", ".join(map(str, ways[0]["taps"]))
    lines = [
        "## Measured",
        "",
        f"{measured_on(report)}: {prompts['count']} prompts of {prompts['name']} (license: {prompts['license']}; "
        f"language: {prompts['language']}), up to {settings['max_new_tokens']} new tokens{template_words(settings)}. "
        f"The draft taps the layers {taps}. Other texts, modes, languages and machines give other figures.",
        "",
        "| block | temperature | batch | context | times as fast as plain [95 %] | tokens per cycle | identical |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        way = report["ways"][result["way"]]
        if way in ways and result["speedup"]:
            lines.append(row(way, result))
    return "\n".join(lines)


def measured_on(report: dict[str, Any]) -> str:
    """Return the target, the machine, the day and the versions, in words."""
    settings, environment = report["settings"], report["environment"]
    return (
        f"With `{Path(settings['target']).name}` in {settings['dtype']}, on {environment['hardware']}, "
        f"{environment['date'][:10]}, with dflash-hub {environment['dflash_hub']}, transformers "
        f"{environment['transformers']} and torch {environment['torch']}"
    )


def row(way: dict[str, Any], result: dict[str, Any]) -> str:
    """Return the row of a way."""
    compared, length = result["identical"] + result["differing"], result["acceptance_length"]
    cells = [
        str(way["block_size"]),
        f"{way['temperature']:g}",
        str(way["batch_size"]),
        str(way["context"] or "of the prompts"),
        shown_speedup(result["speedup"]).replace(" times as fast", ""),
        "-" if length is None else f"{length:.2f}",
    ]
    cells.append(f"{result['identical']} of {compared}" if compared else "sampled")
    return f"| {' | '.join(cells)} |"


def template_words(settings: dict[str, Any]) -> str:
    """Return what was done with the chat template, in words."""
    if not settings["chat_template"]:
        return ", without a chat template"
    if settings["thinking"] is None:
        return ", with the chat template and its own mode of thinking"
    return f", with the chat template, thinking {'on' if settings['thinking'] else 'off'}"

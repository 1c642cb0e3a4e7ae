# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Write a report as one page, for people who look rather than read.

Everything of a report is hostile input. The template escapes every text, and the script of the page only ever sets
text. The page's policy forbids the browser to load anything, or to run another script.
"""

import base64
import hashlib
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..files import write_whole
from .charts import (
    SETTINGS,
    Chart,
    charts_of_condition,
    charts_of_settings,
    charts_of_way,
    conditions,
    counted,
    milliseconds,
    times,
)
from .reading import Reading, Way, entries, entry, number, read, visible, words
from .report import FORMAT, VERSION
from .svg import WIDTH, Drawing, draw
from .texts import MOST_ROWS, divergences, outcomes, texts

_NAMES = {"dflash_hub": "dflash-hub", "bandwidth_gb_s": "memory bandwidth, GB/s"}
_PAGE = Path(__file__).parent / "page"


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write `report` as one page that needs no other file and no network. A partial report gives a page that says so.

    Args:
        report: what report.json holds.
        path: the file to write; an older one is replaced at the end.
    """
    if not isinstance(report, dict):
        raise ValueError(
            f"report is a {type(report).__name__}; pass the dict that report.json holds."
        )
    write_whole(path, render(report).encode())


def render(report: dict[str, Any]) -> str:
    """Return the page as text."""
    return _template().render(**view(read(report)))


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    paths = (_PAGE / "report.css", _PAGE / "report.js")
    style, script = (path.read_text(encoding="utf-8") for path in paths)
    environment.globals |= {"style": style, "script": script, "policy": _policy(style, script)}
    return environment.get_template("report.html.jinja")


def _shown(value: Any) -> Any:
    """Return how the page shows a value: nothing known as a dash, and text without characters that break a page."""
    if value is None:
        return "\u2013"
    return visible(value) if type(value) is str else value


def _policy(style: str, script: str) -> str:
    """Return a policy that allows this style sheet and this script, and nothing else."""
    hashes = [hashlib.sha256(text.encode()).digest() for text in (style, script)]
    style_hash, script_hash = (base64.b64encode(digest).decode() for digest in hashes)
    allowed = f"style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'"
    return f"default-src 'none'; {allowed}; img-src data:; base-uri 'none'; form-action 'none'"


def view(reading: Reading) -> dict[str, Any]:
    """Return what the template shows."""
    rows = outcomes(reading)
    compared = [condition(reading, ways) for ways in conditions(reading)]
    return {
        "title": f"DFlash evaluation of {words(reading.part('settings').get('target')) or 'a target'}",
        "width": WIDTH,
        "headline": headline(reading),
        "advice": compared[0]["advice"] if compared else [],
        "byline": byline(reading),
        "notices": notices(reading),
        "tiles": tiles(reading),
        "conditions": compared,
        "by_setting": drawn(charts_of_settings(reading)),
        "ways": list(map(section, _headlined_first(reading))),
        "table": ways_table(reading),
        "outcomes": rows[:MOST_ROWS],
        "rows_left_out": max(len(rows) - MOST_ROWS, 0),
        "divergences": divergences(reading)[:MOST_ROWS],
        "float32_check": words(reading.report.get("float32_check")),
        "texts": texts(reading),
        "definitions": _rows(reading.part("definitions")),
        "facts": facts(reading),
    }


def headline(reading: Reading) -> str:
    """Return in words whether to use a draft, and how much faster it is."""
    way = reading.headlined
    if way is None:
        return "This report holds no speed-up yet"
    return _verdict(reading, way) if reading.is_complete else f"So far: {_verdict(reading, way)}"


def _verdict(reading: Reading, way: Way) -> str:
    if way.speedup is None:
        return f"{way.label} is recommended; its speed-up was not measured"
    if way.interval is not None and way.interval[0] <= 1 <= way.interval[1]:
        return f"No clear difference: {_reaches(way)}"
    if way.speedup < 1:
        return f"Plain decoding is faster: {_reaches(way)}"
    words_of_speed = f"{way.label} is {way.speedup:.2f} times as fast as plain decoding"
    if reading.recommended is not way:
        return f"Plain decoding is recommended, though {words_of_speed}{_interval(way)}"
    return f"{words_of_speed}{_interval(way)}"


def _reaches(way: Way) -> str:
    return f"{way.label} reaches {way.speedup:.2f} times its speed{_interval(way)}"


def _interval(way: Way) -> str:
    """Return the interval of a speed-up in words, after a space."""
    if way.interval is None:
        return ", without an interval"
    confidence = number(way.speedup_entry.get("confidence"))
    name = "interval" if confidence is None else f"{confidence:.0%} interval"
    return f" ({name} {way.interval[0]:.2f} to {way.interval[1]:.2f})"


def advice(reading: Reading, ways: list[Way]) -> list[str]:
    """Return the recommendations of the report for some ways, in its words."""
    given = entries(reading.report.get("recommendations")) or [reading.part("recommendation")]
    indices = [way.index for way in ways]
    found = [words(item.get("words")) for item in given if item.get("way") in indices]
    return [text for text in found if text is not None]


def byline(reading: Reading) -> str:
    """Return when, on what and with which versions the report was made."""
    environment, settings = reading.part("environment"), reading.part("settings")
    parts = [words(environment.get("date")), words(environment.get("hardware"))]
    parts.append(words(settings.get("dtype")))
    for name in ("dflash_hub", "transformers", "torch"):
        version = words(environment.get(name))
        parts.append(version and f"{_name(name)} {version}")
    if reading.prompts:
        parts.append(counted(len(reading.prompts), "prompt"))
    return " · ".join(part for part in parts if part)


def notices(reading: Reading) -> list[tuple[str, str]]:
    """Return what a reader must know before anything else, each with its kind: warning or note."""
    report, found = reading.report, []
    if not reading.is_complete:
        done = counted(sum(len(way.records) for way in reading.ways), "record")
        found.append(("warning", f"This report is partial: the run did not end. It holds {done}."))
    if (report.get("format"), report.get("format_version")) != (FORMAT, VERSION):
        known = f"{FORMAT!r}, version {VERSION}"
        given = f"{words(report.get('format'))!r}, version {words(report.get('format_version'))}"
        found.append(("warning", f"This page shows reports of {known}; the report says {given}."))
    counts = _faults(reading)
    if counts["bug"]:
        differ = "text differs" if counts["bug"] == 1 else "texts differ"
        text = f"{counts['bug']} {differ} from plain decoding beyond rounding: a bug. Please report it."
        found.append(("warning", text))
    if counts["error"]:
        found.append(("warning", f"{counted(counts['error'], 'run')} ended with an error, below."))
    missing = [way.label for way in reading.ways if not way.result]
    if missing:
        found.append(("note", f"Without results: {'; '.join(missing)}."))
    return found


def _faults(reading: Reading) -> dict[str, int]:
    """Count the records with errors, and those that differ because of a bug."""
    records = [record for way in reading.ways for record in way.records]
    bugs = [record for record in records if entry(record.get("divergence")).get("verdict") == "bug"]
    return {"bug": len(bugs), "error": sum(record.get("error") is not None for record in records)}


def tiles(reading: Reading) -> list[tuple[str, str, str]]:
    """Return the main figures of the way in the headline: what is measured, the figure, and what to know of it."""
    way = reading.headlined
    if way is None:
        return []
    found = []
    if way.speedup is not None:
        found.append(("speed-up", times(way.speedup), _interval(way).strip(" (),")))
    if (speed := number(way.result.get("tokens_per_second"))) is not None:
        found.append(("speed", f"{speed:.1f}", "tokens per second"))
    if way.acceptance_length is not None:
        found.append(("acceptance length", f"{way.acceptance_length:.2f}", "tokens per cycle"))
    if compared := _compared(way):
        same = f"{compared[0]:g} of {compared[1]:g}"
        found.append(("identical texts", same, "as plain decoding"))
    return found


def _compared(way: Way) -> tuple[float, float] | None:
    """Return how many texts are the same as those of plain decoding, and how many were compared."""
    same, other = number(way.result.get("identical")), number(way.result.get("differing"))
    if same is None or other is None or not same + other:
        return None
    return same, same + other


def _headlined_first(reading: Reading) -> list[Way]:
    """Return the ways, the one of the headline first and plain decoding last."""
    first = reading.headlined
    return sorted(reading.ways, key=lambda way: (way is not first, way.is_plain))


def drawn(charts: dict[str, Chart]) -> list[tuple[Chart, Drawing]]:
    """Return charts with their images."""
    return [(chart, draw(chart)) for chart in charts.values()]


def condition(reading: Reading, ways: list[Way]) -> dict[str, Any]:
    """Return what the page shows of ways that are compared with each other."""
    plain = next((way.label for way in ways if way.is_plain), "plain decoding")
    charts = drawn(charts_of_condition(ways))
    return {"baseline": plain, "advice": advice(reading, ways), "charts": charts}


def section(way: Way) -> dict[str, Any]:
    """Return what the page shows of one way."""
    return {"label": way.label, "facts": _way_facts(way), "charts": drawn(charts_of_way(way))}


def _way_facts(way: Way) -> list[tuple[str, str | None]]:
    result = way.result
    found = [
        ("speed", _with_unit(result.get("tokens_per_second"), 1, " tokens per second")),
        ("acceptance length", _with_unit(way.acceptance_length, 2, " tokens per cycle")),
        ("identical, differing, errors", _counts(result)),
        ("physical floor of a step", _floor(way)),
        ("peak memory", _gibibytes(result.get("peak_memory_bytes"))),
    ]
    if not way.is_plain:
        shown = None if way.speedup is None else times(way.speedup, way.interval)
        found.insert(0, ("speed-up", shown))
        found.append(("slower than plain on", _slower(way)))
        found.append(("method of the interval", words(way.speedup_entry.get("method"))))
    return found


def _slower(way: Way) -> str | None:
    """Return the number of prompts that took longer than plainly, and their names; None if that is not known."""
    names = way.result.get("slower_than_plain")
    if way.speedup is None or not isinstance(names, list):
        return None
    if not names:
        return "no prompt"
    return f"{counted(len(names), 'prompt')}: {', '.join(map(str, names))}"


def _with_unit(value: Any, digits: int, unit: str) -> str | None:
    found = number(value)
    return None if found is None else f"{found:.{digits}f}{unit}"


def _counts(result: dict[str, Any]) -> str | None:
    counts = [number(result.get(key)) for key in ("identical", "differing", "errors")]
    if counts.count(None) == len(counts):
        return None
    return ", ".join(words(count) or "not known" for count in counts)


def _floor(way: Way) -> str | None:
    seconds, share = (
        number(way.result.get(f"floor_{key}")) for key in ("seconds_per_step", "share")
    )
    if seconds is None:
        return None
    reached = "" if share is None else f", which is {share:.0%} of the time taken"
    return f"{milliseconds(1000 * seconds)}{reached}"


def _gibibytes(value: Any) -> str | None:
    size = number(value)
    return None if size is None else f"{size / 2**30:.2f} GiB"


def ways_table(reading: Reading) -> dict[str, Any]:
    """Return the table of ways: its columns, without those that are empty, and its rows."""
    keys = ["method", "draft", "revision", "kind", *SETTINGS]
    columns = ["way", *map(_name, keys), "tokens/s", "tokens per cycle", "speed-up"]
    rows = []
    for way in reading.ways:
        settings = [words(way.about.get(key)) for key in keys]
        rows.append([way.label, *settings, *_figures(way)])
    filled = [i for i, cells in enumerate(zip(*rows, strict=True)) if set(cells) != {None}]
    chosen = itemgetter(*filled) if filled else tuple
    return {"columns": chosen(columns), "rows": list(map(chosen, rows))}


def _figures(way: Way) -> list[str | None]:
    speed = _with_unit(way.result.get("tokens_per_second"), 1, "")
    ratio = None if way.speedup is None else times(way.speedup, way.interval)
    return [speed, _with_unit(way.acceptance_length, 2, ""), ratio]


def facts(reading: Reading) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Return the settings, the prompts and the environment: a heading each, with names and values."""
    parts = {"Settings": "settings", "Prompts": "prompt_set", "Environment": "environment"}
    found = []
    for heading, name in parts.items():
        if rows := _rows(reading.part(name)):
            found.append((heading, rows))
    return found


def _rows(part: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(_name(key), _value(value)) for key, value in part.items()]


def _name(key: Any) -> str:
    return _NAMES.get(str(key), str(key).replace("_", " "))


def _value(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return words(value) if isinstance(value, str | int | float | None) else str(value)

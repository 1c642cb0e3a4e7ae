"""The page of an evaluation: whole, readable in light and dark, with the report's figures, and safe to open."""

import base64
import copy
import hashlib
import json
import re
import sys
from html.parser import HTMLParser

import pytest

import eval_report
from dflash_hub.evaluation import pngs, svg
from dflash_hub.evaluation.charts import Bar, Bars, Line, Lines
from dflash_hub.evaluation.html import headline, render, write_html
from dflash_hub.evaluation.reading import read
from paths import ROOT

VOID = {"meta", "link", "br", "img", "input", "hr"}
SECTIONS = ["speed", "ways", "prompts", "divergences", "texts", "settings", "words"]
FEW, MANY = eval_report.report(), eval_report.report(eval_report.MANY, prompts=4)


class Page(HTMLParser):
    """A page taken apart: what is open must be closed in turn."""

    def __init__(self, report):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.source = render(report)
        self.feed(self.source)
        self.close()
        assert self.open == []
        ids = [found["id"] for _, found in self.elements if "id" in found]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag):
        return [found for name, found in self.elements if name == tag]

    def inside(self, *tags):
        """The text that lies directly in elements of these names."""
        return "\n".join(text for tag, text in self.texts if tag in tags)

    @property
    def shown(self):
        """All text but that of scripts and styles."""
        return "\n".join(text for tag, text in self.texts if tag not in ("script", "style"))

    @property
    def data(self):
        """What the script of the page reads."""
        found = re.search(r'<script type="application/json" id="text-data">(.*?)</script>', self.source, re.DOTALL)
        assert found is not None
        return json.loads(found[1])


@pytest.fixture(scope="module")
def page():
    return Page(FEW)


def without_results():
    report = copy.deepcopy(FEW)
    report |= {"complete": False, "recommendation": None, "results": report["results"][:1]}
    report["records"] = report["records"][:14]
    report["records"][13]["error"] = "ValueError: <b>out of memory</b>"
    return report


PARTIAL = without_results()


@pytest.mark.parametrize("report", [FEW, MANY, PARTIAL, {}], ids=["few ways", "many ways", "partial", "empty"])
def test_a_page_is_whole_and_has_every_section(report):
    page = Page(report)
    assert page.source.startswith("<!DOCTYPE html>")
    assert [found["id"] for found in page.of("section")] == SECTIONS
    assert len(page.of("h1")) == 1


def test_nothing_of_a_report_becomes_markup_or_script(page):
    hostile = Page(poisoned(FEW))
    for other in (page, hostile):
        assert {tag for tag, _ in other.elements}.isdisjoint({"img", "iframe", "object", "form", "base", "a"})
        assert not [name for _, found in other.elements for name in found if name.startswith("on") or name == "style"]
        assert [found.get("type") for found in other.of("script")] == ["application/json", None]
        assert "{{ 7 * 7 }}" in other.shown
    assert len(hostile.of("b")) == len(page.of("b")) == 4  # of the main figures
    assert "49" not in re.findall(r"\b49\b", page.inside("span"))


def poisoned(value):
    """A report with hostile text in place of every text but those that the page works by."""
    if isinstance(value, dict):
        return {key: item if key == "method" else poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return "".join(eval_report.HOSTILE) if isinstance(value, str) else value


def test_the_page_loads_nothing_and_runs_only_its_own_script(page):
    addresses = [found.get(name) for _, found in page.elements for name in ("src", "href", "data", "srcset")]
    assert [address for address in addresses if address is not None] == ["data:,"]
    style, script = (ROOT / "evaluation/page" / name for name in ("report.css", "report.js"))
    assert not re.search(r"url\(|@import|https?:", style.read_text() + script.read_text())
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script.read_text())
    policy = next(found["content"] for found in page.of("meta") if "http-equiv" in found)
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)[-1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_characters_that_would_break_or_reorder_the_page_are_made_visible(page, tmp_path):
    write_html(poisoned(FEW), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_bytes().decode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)
    assert "[U+202E]" in page.inside("span")
    assert not list(tmp_path.glob("_*"))


def test_every_text_is_there_token_by_token(page):
    first = next(record for record in FEW["records"] if record["way"] == 1)
    shown = next(text for text in page.data["texts"] if text["way"] == 1)
    assert shown["drafted"] == "".join("01"[flag] for flag in first["drafted"])
    assert len(page.data["texts"]) == len(FEW["records"])
    kinds = [found["class"].split() for found in page.of("span") if found.get("class")]
    spans = [kind for kind in kinds if kind in (["drafted"], ["own"])][2:]  # after the two of the legend
    assert spans == [["drafted"] if flag else ["own"] for flag in first["drafted"]]
    differing = next(text for text in page.data["texts"] if text["divergence"] is not None)
    assert differing["divergence"] == 23
    assert "rounding" in differing["state"]


def test_texts_without_flags_are_not_coloured_and_long_reports_are_cut(monkeypatch):
    report = copy.deepcopy(FEW)
    for record in report["records"]:
        record["drafted"] = None
    assert {text["drafted"] for text in Page(report).data["texts"]} == {""}
    monkeypatch.setattr("dflash_hub.evaluation.texts.MOST_TOKENS", 500)
    cut = Page(report)
    assert 0 < len(cut.data["texts"]) <= 5
    assert "Further texts are in report.json" in cut.shown


def test_figures_on_the_page_are_those_of_the_report(page):
    result = FEW["results"][1]
    speedup, shown = result["speedup"], page.shown
    interval = f"{speedup['low']:.2f}, {speedup['high']:.2f}"
    assert f"is {speedup['pooled']:.2f} times as fast as plain decoding" in page.inside("h1")
    for figure in (
        f"{speedup['pooled']:.2f}\u00d7 [{interval}]",
        f"{result['tokens_per_second']:.1f} tokens per second",
        f"{result['acceptance_length']:.2f} tokens per cycle",
        f"{result['identical']}, {result['differing']}, 0",
        "5.90 ms, which is 18% of the time taken",
        "9.00 GiB",
        "1 prompt: prompt-11",
        "NVIDIA H100 80GB HBM3",
    ):
        assert figure in shown
    words = page.inside("desc")
    whole = sum(result["histogram"].values())
    for size, count in result["histogram"].items():
        assert f"{size}: {count} ({count / whole:.1%})" in words
    for values in result["acceptance_by_position"].values():
        assert ", ".join(f"{i}: {value:.3g}" for i, value in enumerate(values, start=1)) in words
    for name, figures in result["by_category"].items():
        assert f"{name}: {figures['speedup']:.2f}\u00d7, 3 prompts" in words
        assert f"{name}: {figures['acceptance_length']:.2f} tokens, 3 prompts" in words
    split = result["time_split"]
    shares = ", ".join(
        f"{part} {split[part] / sum(split.values()):.0%}" for part in ("prefill", "draft", "verify", "rest")
    )
    assert shares in words
    floor = 1000 * result["floor_seconds_per_step"] / result["acceptance_length"]
    assert f"{1000 * result['seconds_per_token']:.1f} ms, floor {floor:.2f} ms" in words


def test_the_table_holds_a_row_for_each_prompt_and_way_with_values_to_sort_by(page):
    table = page.source.partition('<table id="outcomes">')[2].partition("</table>")[0]
    rows = table.partition("<tbody>")[2].split("</tr>")[:-1]
    assert len(rows) == 2 * len(FEW["prompts"])
    assert table.count("differs (rounding)") == 2
    record = next(record for record in FEW["records"] if record["way"] == 1)
    assert f'data-value="{record["new_tokens"] / record["seconds"]}"' in rows[0]


def test_ways_are_compared_under_the_same_condition_and_a_floor_is_shared_by_the_rows_of_a_batch():
    page = Page(MANY)
    summaries = page.inside("summary")
    for name in ("plain", "plain, batches of 4", "plain, temperature 0.7", "plain, context 8,192"):
        assert f"Compared with {name}\n" in summaries
    assert "plain, batches of 4: 26.3 ms, floor 1.20 ms" in page.inside("desc")
    drafted = len([way for way in MANY["ways"] if way["context"] == 8192 and way["method"] != "plain"])
    assert page.source.count('data-value="8192"') == drafted * len(MANY["prompts"])


def test_charts_over_a_setting_have_a_line_for_ways_that_differ_in_nothing_else():
    page = Page(MANY)
    words = page.inside("desc")
    ways = [way["name"] for way in MANY["ways"]]
    chosen = [
        ways.index(f"z-lab/Qwen3-4B-DFlash-b16, block 4{end}") for end in ("", ", batches of 4", ", batches of 8")
    ]
    values = [MANY["results"][way]["speedup"]["pooled"] for way in chosen]
    shown = ", ".join(f"{size}: {value:.3g}" for size, value in zip((1, 4, 8), values, strict=True))
    assert f"z-lab/Qwen3-4B-DFlash-b16, block 4: {shown}" in words
    assert all(f"by {name}" in page.shown for name in ("block size", "batch size", "context", "temperature"))


@pytest.mark.parametrize(
    ("pooled", "interval", "recommended", "words"),
    [
        (2.5, (2.3, 2.8), 1, "drafted is 2.50 times as fast as plain decoding (95% interval 2.30 to 2.80)"),
        (2.5, (None, None), 1, "drafted is 2.50 times as fast as plain decoding, without an interval"),
        (1.1, (0.9, 1.3), 0, "No clear difference: drafted reaches 1.10 times its speed (95% interval 0.90 to 1.30)"),
        (0.9, (0.8, 1.1), 0, "No clear difference: drafted reaches 0.90 times its speed (95% interval 0.80 to 1.10)"),
        (0.8, (0.7, 0.9), 0, "Plain decoding is faster: drafted reaches 0.80 times its speed (95% interval 0.70 to"),
        (0.8, (0.7, 0.9), None, "Plain decoding is faster: drafted reaches 0.80 times its speed"),
        (2.0, (1.5, 3.0), 0, "Plain decoding is recommended, though drafted is 2.00 times as fast as plain decoding"),
        (None, (None, None), 1, "drafted is recommended; its speed-up was not measured"),
        (None, (None, None), None, "This report holds no speed-up yet"),
    ],
)
def test_the_headline_says_plainly_which_is_faster(pooled, interval, recommended, words):
    ways = [{"name": "plain", "method": "plain", "baseline": 0}, {"name": "drafted", "method": "dflash", "baseline": 0}]
    speedup = {"pooled": pooled, "low": interval[0], "high": interval[1], "confidence": 0.95}
    results = [{"way": 1, "speedup": speedup}]
    report = {"ways": ways, "results": results, "recommendation": {"way": recommended}, "complete": True}
    assert headline(read(report)).startswith(words)


def test_a_partial_report_says_so_and_shows_what_there_is():
    page = Page(PARTIAL)
    assert "This report is partial: the run did not end. It holds 14 records." in page.shown
    assert page.inside("h1") == "This report holds no speed-up yet"
    assert Page(FEW | {"complete": False}).inside("h1").startswith("So far: z-lab/Qwen3-4B-DFlash-b16")
    assert "1 run ended with an error, below." in page.shown
    assert "Without results: z-lab/Qwen3-4B-DFlash-b16, block 16; prompt-lookup." in page.shown
    assert "error: ValueError: <b>out of memory</b>" in page.shown
    assert "This report is partial" not in Page(FEW).shown
    bug = copy.deepcopy(FEW)
    next(record for record in bug["records"] if record["divergence"])["divergence"]["verdict"] = "bug"
    assert "1 text differs from plain decoding beyond rounding: a bug." in Page(bug).shown
    assert "This page shows reports of" in Page(FEW | {"format_version": 2}).shown


@pytest.mark.parametrize(
    "value", [None, "text", 1.0, -1, float("nan"), 10**400, [], {}, [None], True], ids=lambda value: repr(value)[:9]
)
def test_whatever_is_missing_or_of_another_type_the_page_is_whole(value):
    small = eval_report.report(prompts=2)
    for key in small:
        assert "Words of this page" in render(small | {key: value})
    for part in ("ways", "results", "records", "prompts"):
        mutated = copy.deepcopy(small)
        for index, key in enumerate(list(mutated[part][0])):
            mutated[part][index % len(mutated[part])][key] = value  # several things missing at once
        Page(mutated)
    mutated = copy.deepcopy(small)
    for result in mutated["results"]:
        for inner in filter(lambda item: isinstance(item, dict), list(result.values())):
            inner.update(dict.fromkeys(inner, value))
    Page(mutated)


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report is a list; pass the dict"):
        write_html([], tmp_path / "report.html")


def test_light_and_dark_have_all_colours_and_enough_contrast():
    css = (ROOT / "evaluation/page/report.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("prefers-color-scheme: dark"))
    dark = dict(list(dark.items())[: len(light)])
    assert light.keys() == dark.keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", css)) <= light.keys()
    for colours in (light, dark):
        for text in ("text", "quiet", "good", "bad", "line-0", "line-1", "line-2", "line-3"):
            assert contrast(colours[text], colours["card"]) >= 4.5, text
        for ground in ("page", "drafted", "own", "warn"):
            assert contrast(colours["text"], colours[ground]) >= 4.5, ground
        for part in range(4):
            assert contrast(colours["on-part"], colours[f"part-{part}"]) >= 4.5, part
        for mark in ("accent", "plain", "axis"):
            assert contrast(colours[mark], colours["card"]) >= 3, mark


def contrast(first, second):
    lights = sorted(luminance(colour) for colour in (first, second))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour):
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_bars_begin_at_zero_are_in_proportion_and_leave_room_for_their_words():
    bars = [Bar("one", 1.0, "1.00", (0.5, 4.0)), Bar("two" * 40, 2.0, "2.00 [a, b]", None, floor=0.5)]
    marks = svg.draw(Bars("title", bars, reference=1.0)).marks
    first, second = (mark.attributes for mark in marks if mark.tag == "rect")
    assert first["x"] == second["x"] == 0
    assert second["width"] == pytest.approx(2 * first["width"], abs=0.2)
    for mark in marks:
        if mark.tag == "text":
            assert mark.attributes["x"] + 5.5 * len(mark.text) <= svg.WIDTH


def test_lines_lie_within_their_chart_and_names_at_their_ends_do_not_overlap():
    lines = [Line("first line", [("1", 0.5), ("2", 0.5)], [None, None]), Line("other", [("2", 0.5)], [(0.4, 0.7)])]
    drawing = svg.draw(Lines("title", ["1", "2"], lines, "x", "y", is_share=True))
    names = [mark.attributes for mark in drawing.marks if "name" in str(mark.attributes["class"])]
    assert abs(names[0]["y"] - names[1]["y"]) >= 12
    for mark in drawing.marks:
        assert all(0 <= value <= svg.WIDTH for key, value in mark.attributes.items() if key in ("x", "x1", "x2"))
        assert all(0 <= value <= drawing.height for key, value in mark.attributes.items() if key in ("y", "y1", "y2"))


@pytest.mark.parametrize("most", [1e-7, 0.3, 1, 1.9, 2.5, 7, 99, 12345])
def test_an_axis_has_a_few_round_steps_up_to_its_greatest_value(most):
    steps = svg.scale_of(most)
    assert steps[0] == 0
    assert steps[-1] >= 0.998 * most
    assert 2 <= len(steps) <= 7


def test_the_charts_are_drawn_as_png_files(tmp_path):
    pytest.importorskip("matplotlib")
    small = eval_report.report(eval_report.ways_of([{}, {"batch_size": 4}], eval_report.DRAFTS[:1]), prompts=2)
    small["ways"][1]["name"] = "$x^{$ \x00"
    files = pngs.write_pngs(small, tmp_path / "new")
    assert {path.name for path in files} >= {
        "speed_up.png",
        "time_split.png",
        "by_batch_size.png",
        "tokens_per_cycle.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert pngs.write_pngs({}, tmp_path) == []


def test_without_matplotlib_no_png_is_drawn_and_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(pngs.logger.parent, "propagate", True)
    assert pngs.write_pngs(FEW, tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert "matplotlib is not installed" in caplog.text

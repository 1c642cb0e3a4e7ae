"""`dflash-hub eval`: every way decodes the same prompts, and the figures are those that one would count by hand."""

import json
import math
import os
import shutil
import signal
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dflash_hub import DecodeStatistics, DFlashDraftModel, cli, load_draft
from dflash_hub.commands import eval as command
from dflash_hub.commands.eval_models import Choice, Loader, against_of
from dflash_hub.commands.eval_table import condition_of, short_name
from dflash_hub.commands.shared import console
from dflash_hub.evaluation import divergence, profile, results
from dflash_hub.evaluation.card import with_section
from dflash_hub.evaluation.decoding import Cycle, Job, Models, decode, engine_words, followed
from dflash_hub.evaluation.encoding import Encoding, of_length
from dflash_hub.evaluation.floor import measured_bandwidth
from dflash_hub.evaluation.prompts import BENCHMARKS, BUILT_IN, Prompt, PromptSet, load_prompts
from dflash_hub.evaluation.recommendation import recommendations
from dflash_hub.evaluation.report import read_report
from dflash_hub.evaluation.run import Evaluation, Settings
from dflash_hub.evaluation.ways import Condition, Drafting, Way, conditions, grid, in_turn
from dflash_hub.target_dflash import Target
from paths import DATA, TINY

RUNNER = CliRunner()
TIMES = ("seconds", "prefill_seconds", "draft_seconds", "verify_seconds", "rest_seconds")
TEXTS = [json.loads(line)["prompt"] for line in (TINY / "prompts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "target")


@pytest.fixture
def models(tiny_target, tiny_draft, tokenizer):
    return Models(tiny_target, tokenizer, {("draft", 8): tiny_draft})


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr("dflash_hub.evaluation.run.measured_bandwidth", lambda device: 1e10)


def test_the_bandwidth_is_that_of_a_copy():
    assert 1e8 < measured_bandwidth(torch.device("cpu"), 2**22) < 1e13


def prompt_set(*numbers: int) -> PromptSet:
    prompts = [Prompt(f"p{number}", "odd" if number % 2 else "even", TEXTS[number]) for number in numbers]
    return PromptSet("own", "Apache-2.0", "here", tuple(prompts))


def evaluation(models, folder, prompts=None, draftings=None, found=None, **settings) -> Evaluation:
    draftings = [Drafting("dflash", name, block_size=size) for name, size in models.drafts] + (draftings or [])
    settings = {"max_new_tokens": 6, "warm_up": 0} | settings
    return Evaluation(
        models,
        grid(draftings, found or [Condition()]),
        prompts or prompt_set(0, 1),
        Encoding(models.tokenizer, chat_template=False),
        Settings("target", "own", **settings),
        folder,
    )


def untimed(records) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.mark.quick
def test_figures_are_those_counted_by_hand(models, tmp_path):
    report = evaluation(models, tmp_path, prompt_set(0, 3), max_new_tokens=12).run()
    assert report == read_report(tmp_path)
    draft, target = models.drafts["draft", 8], models.target
    committed, accepted_at = [], [0] * 7
    for number, record in zip((0, 3), report["records"][1::2], strict=True):
        ids = models.tokenizer(TEXTS[number], return_tensors="pt").input_ids
        statistics = DecodeStatistics()
        kwargs = {"max_new_tokens": 12, "do_sample": False, "statistics": statistics}
        text = target.generate(ids, custom_generate=draft.speculate, **kwargs)[0, ids.shape[1] :].tolist()
        assert (record["prompt"], record["way"], record["identical"]) == (f"p{number}", 1, True)
        assert (record["token_ids"], record["committed"]) == (text, statistics.committed)
        assert "".join(record["tokens"]) == record["text"] == models.tokenizer.decode(text)
        own, words = [False], record["speculative_decoding"]
        for count in statistics.committed:
            own += [True] * (count - 1) + [False]
        assert record["drafted"][: len(own) - 1] == own[:-1]  # the last cycle may be cut before the target's own
        assert words["num_accepted_draft_tokens"] == sum(record["drafted"]) == sum(statistics.accepted_at)
        assert words["num_spec_steps"] == statistics.cycles
        assert words["num_draft_tokens"] == 7 * statistics.cycles
        assert math.isclose(record["seconds"], sum(record[part] for part in TIMES[1:]))
        committed += statistics.committed
        accepted_at = [one + two for one, two in zip(accepted_at, statistics.accepted_at, strict=True)]
    plain, drafted = report["results"]
    assert drafted["acceptance_length"] == sum(committed) / len(committed)
    assert drafted["histogram"] == {str(size): committed.count(size) for size in sorted(set(committed))}
    marginal = [count / len(committed) for count in accepted_at]
    assert drafted["acceptance_by_position"]["marginal"] == marginal
    assert drafted["acceptance_by_position"]["conditional"][1] == accepted_at[1] / accepted_at[0]
    assert plain["acceptance_length"] is plain["speedup"] is None
    seconds = [sum(record["seconds"] for record in report["records"][way::2]) for way in (0, 1)]
    assert math.isclose(drafted["speedup"]["pooled"], seconds[0] / seconds[1])
    assert drafted["by_category"].keys() == {"even", "odd"}
    profiled = json.loads((tmp_path / profile.FILE).read_text())
    assert math.isclose(profiled["mean_accept_length"], 1 + sum(marginal))
    assert profiled["marginal_accept_rates"] == marginal
    assert sum(profiled["acceptance_length_histogram"].values()) == len(committed)


def numbers_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the ids of tokens."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(token): token for token in range(size)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


VLLM_FIELDS = [
    *("mean_acceptance_length", "draft_acceptance_rate", "acceptance_histogram"),
    *("acceptance_histogram_by_draft_length", "num_spec_steps", "num_accepted_draft_tokens", "num_draft_tokens"),
    *("num_spec_tokens", "per_step_accepted", "per_step_drafted"),
]
"""What `metrics.speculative_decoding` holds of a request in vLLM, with per-request metrics that are `detailed`."""
PROFILE_FIELDS = [
    *("schema_version", "measured", "method", "draft_checkpoint", "target_model", "num_speculative_tokens"),
    *("block_size", "max_supported_k", "verification_method", "conditional_accept_rates", "marginal_accept_rates"),
    *("mean_accept_length", "mean_accept_length_per_request", "accept_length_model", "accept_length_by_k"),
    *("acceptance_length_histogram", "per_category", "measurement_conditions", "validation"),
]
"""What a `speculation_profile.json` of Model Optimizer's schema 1.0 holds."""


def test_counts_are_in_the_words_and_forms_that_other_tools_read(models, tmp_path):
    report = evaluation(models, tmp_path, prompt_set(0, 3), max_new_tokens=12).run()
    for record in report["records"][1::2]:
        words = record["speculative_decoding"]
        assert list(words) == VLLM_FIELDS
        steps, histogram = words["num_spec_steps"], words["acceptance_histogram"]
        assert words["num_spec_tokens"] == 7
        assert len(histogram) == 8
        assert sum(histogram) == steps == len(words["per_step_accepted"]) == len(words["per_step_drafted"])
        assert sum(place * count for place, count in enumerate(histogram)) == words["num_accepted_draft_tokens"]
        assert words["acceptance_histogram_by_draft_length"] == {"7": histogram}
        assert words["mean_acceptance_length"] == 1 + words["num_accepted_draft_tokens"] / steps
        assert words["draft_acceptance_rate"] == words["num_accepted_draft_tokens"] / words["num_draft_tokens"]
        assert words["num_draft_tokens"] == sum(words["per_step_drafted"])
    several = engine_words([Cycle(3, 1, 2), Cycle(1, 1, 2), Cycle(3, 3, 4)], 7)
    assert several["acceptance_histogram_by_draft_length"] == {"1": [0, 1], "3": [0, 1, 0, 1]}
    assert engine_words([], 7)["acceptance_histogram"] == [0] * 8
    profiled = json.loads((tmp_path / profile.FILE).read_text())
    assert list(profiled) == PROFILE_FIELDS
    assert profiled["num_speculative_tokens"] == len(profiled["conditional_accept_rates"]) == 7
    assert profiled["accept_length_by_k"] == {"7": profiled["mean_accept_length"]}
    assert all(check["passed"] for check in profiled["validation"].values())
    survival = 1.0
    for conditional, marginal in zip(
        profiled["conditional_accept_rates"], profiled["marginal_accept_rates"], strict=True
    ):
        survival *= conditional
        assert math.isclose(survival, marginal, abs_tol=1e-9)
    assert set(profiled["per_category"]) == {"even", "odd"}
    assert profile.checkpoint("/home/me/org/draft", None) == {"id": "org/draft", "revision": None}


COUNTED = ["qwen3-full", "dspark-a", "domino-a", "domino-b", "speculators-dspark-bonus", "speculators-reduced"]


@pytest.mark.parametrize("name", COUNTED)
def test_acceptance_is_number_for_number_what_the_original_loops_count(name, tmp_path):
    """Of texts that end with one of their cycles, since they count the last one whole, also past the end."""
    home = DATA / "golden" / name
    data = load_file(home / "golden.safetensors")
    counted = data["committed_per_cycle"].tolist()
    draft = load_draft(home / "draft")
    target = AutoModelForCausalLM.from_pretrained(home / "target")
    target.generation_config.eos_token_id = None
    models = Models(target, numbers_tokenizer(target.config.vocab_size), {("draft", draft.config.block_size): draft})
    ids = data["prompt_ids"][0].tolist()
    prompts = PromptSet("own", "", "", (Prompt("p", "all", " ".join(map(str, ids))),))
    report = evaluation(models, tmp_path, prompts, max_new_tokens=1 + sum(counted)).run()
    plain, drafted = report["records"]
    text = data["generated_ids"][0, len(ids) :].tolist()
    assert plain["token_ids"] == drafted["token_ids"]
    assert drafted["token_ids"][: len(text)] == text
    assert drafted["committed"] == counted
    figures = report["results"][1]
    length = sum(counted) / len(counted)
    assert figures["acceptance_length"] == figures["acceptance_length_mean_of_prompts"] == length
    assert drafted["speculative_decoding"]["mean_acceptance_length"] == pytest.approx(length)
    assert figures["histogram"] == {str(size): counted.count(size) for size in sorted(set(counted))}


def test_a_bootstrap_interval_is_the_known_one():
    assert results.interval([(1.0, 10, 0.5, 10)] * 5)["low"] == 2
    two = results.interval([(1.0, 10, 1.0, 10), (3.0, 10, 1.0, 10)])
    assert (two["low"], two["high"]) == (1, 3)  # both from one prompt, in a quarter of the draws each
    assert results.interval([(1.0, 10, 1.0, 10)])["low"] is None
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [(float(2 + 0.4 * value), 10, 1.0, 10) for value in noise]
    found, error = results.interval(pairs), 0.4 * float(noise.std()) / 20
    assert math.isclose(found["high"] - found["low"], 2 * 1.96 * error, rel_tol=0.1)
    assert found["low"] < results.ratio_of(pairs) < found["high"]


@pytest.mark.parametrize(
    ("forwards", "text", "counts"),
    [
        ([[1, 1, 1], [5], [6]], [5, 6, 7], [(0, 0, 1), (0, 0, 1)]),  # nothing proposed
        ([[1, 1, 1], [5, 6, 7, 9], [8, 3]], [5, 6, 7, 8, 4], [(3, 2, 3), (1, 0, 1)]),
        ([[1, 1, 1, 5, 6], [7, 8]], [5, 6, 7, 8], [(2, 2, 3), (1, 1, 1)]),  # with the prompt; cut by the end
        ([[1, 1, 1], [5, 6]], [5, 6, 7, 8], None),  # a forward is missing
    ],
)
def test_cycles_of_other_methods_follow_from_the_forwards(forwards, text, counts):
    cycles = followed([[ids] for ids in forwards], 3, text)
    assert (cycles and [(one.drafted, one.accepted, one.committed) for one in cycles]) == counts


DRAFT = ("draft", None, None, 8)
HAS_STATIC_LOOP = Version(transformers.__version__) >= Version("5.24")


def test_all_methods_are_compared_in_one_call_with_the_floor_of_each(models, tmp_path):
    models.assistants["assistant"] = AutoModelForCausalLM.from_pretrained(TINY / "target")
    others = [Drafting("transformers-dflash", *DRAFT), Drafting("prompt-lookup"), Drafting("assistant", "assistant")]
    others += [Drafting("plain-static"), Drafting("transformers-dflash-static", *DRAFT)]
    report = evaluation(models, tmp_path, draftings=others, max_new_tokens=12).run()
    names = ["plain", "draft", "transformers, draft", "prompt-lookup", "assistant"]
    assert [way["name"] for way in report["ways"]] == [*names, "plain-static", "transformers-static, draft"]
    identical = [result["identical"] for result in report["results"]]
    assert identical == [0, 2, 2, 2, 2, 2, 2 if HAS_STATIC_LOOP else 0]
    drafted = report["results"][1]
    for theirs in report["results"][2:7:4] if HAS_STATIC_LOOP else report["results"][2:3]:
        assert drafted["acceptance_length"] == theirs["acceptance_length"]
        assert drafted["acceptance_by_position"] == theirs["acceptance_by_position"]
    assert report["results"][4]["acceptance_length"] > 2  # the target itself guesses right
    assert all(len(record["drafted"]) == record["new_tokens"] for record in report["records"] if not record["error"])
    assert {record["prompt"]: record["way"] for record in report["records"]} == {"p0": 6, "p1": 6}
    plain, ours, theirs, lookup, assistant, static, _ = [way["bytes_per_step"] for way in report["ways"]]
    assert plain == lookup == static
    assert ours == theirs
    assert assistant == plain | {"per_drafted": plain["fixed"]}  # the assistant is the target once more
    assert 0 < report["results"][4]["floor_share"] < 1
    assert not command.has_failed(report)


@pytest.mark.skipif(not HAS_STATIC_LOOP, reason="transformers before 5.24 has no static cache in its loop")
def test_the_cycles_of_a_compiled_loop_are_watched_without_hooks_in_its_graph(models, monkeypatch):
    """The compiler stands aside here, for its time; transformers takes its compiled path all the same."""
    hooks = []

    def compiled(target, config):
        return lambda **kwargs: hooks.append(len(target._forward_pre_hooks)) or target(**kwargs)

    monkeypatch.setattr(type(models.target), "get_compiled_call", compiled)
    models.capture, job = "compile", Job((tuple(models.tokenizer(TEXTS[0]).input_ids),), 12)
    records = []
    for method in ("transformers-dflash", "transformers-dflash-static"):
        records += decode(models, Way(Drafting(method, *DRAFT), Condition()), job)
    assert hooks
    assert set(hooks) == {0}
    assert records[0]["speculative_decoding"] == records[1]["speculative_decoding"]
    assert 0 < records[1]["prefill_seconds"] < records[1]["seconds"]
    assert "get_compiled_call" not in vars(models.target)


def test_a_method_that_fails_here_is_a_row_that_says_why(models, tmp_path):
    others = [Drafting("transformers-dflash", *DRAFT)]
    report = evaluation(models, tmp_path, draftings=others, found=[Condition(batch_size=2)]).run()
    assert report["results"][2]["errors"] == 2
    assert "batch_size = 1" in report["records"][4]["error"]
    assert "transformers, draft failed: see the errors" in report["recommendation"]["words"]
    assert not command.has_failed(report)
    report["ways"][2]["method"] = "dflash"
    assert command.has_failed(report)


def test_the_word_transformers_is_both_of_its_loops_where_it_compiles_one():
    chosen = Choice("target", [], [], against_of("plain-static,transformers,transformers"), "auto", None, "auto")
    loader = Loader(chosen)
    ours = [Drafting("dflash", "draft", None, "dflash", 8)]
    found = {}
    for device in ("cpu", "cuda"):
        target = SimpleNamespace(device=torch.device(device))
        others = [loader._others(word, ours, Models(target, None)) for word in chosen.against]
        found[device] = [str(one) for several in others for one in several]
    assert found["cpu"] == ["plain-static", "transformers, draft"]
    assert found["cuda"] == ["plain-static", "transformers, draft", "transformers-static, draft"]


def test_rows_of_a_batch_have_the_texts_that_they_have_alone(models, tmp_path):
    prompts = prompt_set(0, 1, 2)
    alone = evaluation(models, tmp_path / "alone", prompts).run()["records"]
    found = conditions([0.0, 0.7], [2], [])
    report = evaluation(models, tmp_path, prompts, found=found).run()
    assert [way["baseline"] for way in report["ways"]] == [0, 0, 2, 2]
    together = [record for record in report["records"] if record["way"] < 2]
    key = lambda record: (record["prompt"], record["way"])  # noqa: E731
    for one, other in zip(sorted(alone, key=key), sorted(together, key=key), strict=True):
        assert (one["token_ids"], one["committed"]) == (other["token_ids"], other["committed"])
    sampled = [record for record in report["records"] if record["way"] == 3]
    assert [record["identical"] for record in sampled] == [None] * 3
    assert len(report["recommendations"]) == 2
    again = evaluation(models, tmp_path / "again", prompts, found=found).run()
    assert untimed(again["records"]) == untimed(report["records"])


def test_a_report_that_is_slow_to_write_is_written_less_often(models, tmp_path):
    report = evaluation(models, tmp_path).report
    assert report.write_in_time()
    report.cost = 0.2
    assert not report.write_in_time()
    report.written -= 11
    assert report.write_in_time()["complete"] is False


def test_compiled_ways_are_warmed_up_with_prompts_of_several_lengths(models, tmp_path, monkeypatch):
    """Whole texts, since code is compiled anew for the second length; a short one suffices otherwise."""
    jobs = []
    monkeypatch.setattr("dflash_hub.evaluation.run.decode", lambda models, way, job: jobs.append(job) or [])
    prompts = prompt_set(0, 1, 2, 3, 4)
    lengths = sorted(len(models.tokenizer(prompt.text).input_ids) for prompt in prompts.prompts)
    for capture, count in (("compile", 3), ("auto", 1)):
        run = evaluation(models, tmp_path, prompts, max_new_tokens=64, capture=capture, warm_up=count)
        run._warm_up(Condition(), [1])
    assert [len(job.rows[0]) for job in jobs[:3]] == [lengths[0], lengths[2], lengths[4]]
    assert [job.max_new_tokens for job in jobs] == [64, 64, 64, 32]


def test_a_report_is_replaced_whole_or_not_at_all(models, tmp_path, monkeypatch):
    report = evaluation(models, tmp_path).report
    report.write(complete=False)
    before = report.path.read_bytes()

    def full(*paths):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        report.write(complete=True)
    assert report.path.read_bytes() == before


def test_the_floor_is_what_a_step_reads(models, tmp_path):
    """In batches of two prompts of 30 tokens: the step of a batch reads the weights once, and keys of both rows."""
    report = evaluation(models, tmp_path, prompt_set(0, 1, 2, 3), found=conditions([0.0], [2], [30])).run()
    target, draft = models.target, models.drafts["draft", 8]
    layer = 2 * target.config.num_key_value_heads * target.config.head_dim * 4
    head = target.get_output_embeddings().weight.nbytes
    body = sum(weight.nbytes for weight in target.parameters())
    if target.get_input_embeddings().weight is not target.get_output_embeddings().weight:
        body -= target.get_input_embeddings().weight.nbytes
    read = [body + target.config.num_hidden_layers * layer * 2 * 33]  # after half of six new tokens
    layers = target.config.num_hidden_layers + draft.config.num_hidden_layers
    own = sum(weight.nbytes for weight in draft.parameters())
    read.append(body + own + head + layers * layer * 2 * 33)
    for way, result in enumerate(report["results"]):
        assert math.isclose(result["floor_seconds_per_step"], read[way] / 1e10)
        records = [record for record in report["records"] if record["way"] == way]
        counts = [5 if way == 0 else len(record["committed"]) for record in records]
        steps = max(counts[:2]) + max(counts[2:])
        spent = sum(record["seconds"] - record["prefill_seconds"] for record in records)
        assert math.isclose(result["floor_share"], result["floor_seconds_per_step"] * steps / spent)


PLAIN_FIRST = [{"name": "plain", "method": "plain", "draft": None, "baseline": 0}]


@pytest.mark.parametrize(
    ("speedups", "bugs", "way", "words"),
    [
        ([(2.0, 1.5, 2.5)], [0], 1, "Use a: 2.00 times as fast [1.50, 2.50]."),
        ([(2.0, 1.5, 2.5), (3.0, 2.9, 3.1)], [0, 0], 2, "Use b: 3.00 times as fast [2.90, 3.10]."),
        ([(2.0, 1.5, 2.5), (3.0, 2.9, 3.1)], [0, 1], 1, "Use a: 2.00 times as fast [1.50, 2.50]. Do not use b: 1 of"),
        ([(1.2, 0.9, 1.5)], [0], 0, "Use plain decoding, or evaluate more prompts"),
        ([(0.99, 0.7, 1.5)], [0], 0, "Use plain decoding, or evaluate more prompts"),
        ([(0.8, 0.7, 0.9)], [0], 0, "Use plain decoding, which is faster: the fastest other way, a, is 0.80 times"),
        ([(2.0, None, None)], [0], 1, "Use a: 2.00 times as fast. One prompt is too few"),
        ([None], [0], 0, "Use plain decoding. a failed"),
    ],
)
def test_the_fastest_way_that_is_exact_is_recommended_if_it_is_faster_for_sure(speedups, bugs, way, words):
    ways, found = list(PLAIN_FIRST), [{"way": 0}]
    for index, (speedup, bug) in enumerate(zip(speedups, bugs, strict=True), start=1):
        name = "ab"[index - 1]
        ways.append({"name": name, "method": "dflash", "draft": name, "baseline": 0, "temperature": 0.0})
        figures = speedup and dict(zip(("pooled", "low", "high"), speedup, strict=True))
        result = {"way": index, "speedup": figures, "verdicts": {"bug": bug} if bug else {}, "errors": not figures}
        found.append(result | {"acceptance_length": 3.0, "slower_than_plain": []})
    (advice,) = recommendations(ways, found)
    assert advice["way"] == way
    assert advice["words"].startswith(words)


def test_every_way_begins_as_often_as_the_others(models, tmp_path):
    seen = []
    evaluation(models, tmp_path, repeats=2).run(lambda progress: seen.append(progress.doing))
    assert [word for word in seen if word in ("plain", "draft")] == [
        *("plain", "draft", "draft", "plain"),
        *("draft", "plain", "plain", "draft"),
    ]
    assert [in_turn([4, 5, 6], number) for number in range(4)] == [[4, 5, 6], [5, 6, 4], [6, 4, 5], [4, 5, 6]]


def test_prompts_of_a_fixed_length_keep_their_end_and_their_first_token():
    rows = [[0, 5, 6], [0, 7, 8, 9], [0, 1]]
    assert of_length(rows, 3, first=0) == [[0, 5, 6], [0, 8, 9], [0, 6, 1]]
    assert of_length(rows, 6, first=None)[0] == [7, 8, 9, 0, 5, 6]
    assert all(len(row) == 50 for row in of_length(rows, 50, first=0))
    assert of_length(rows, 50, first=0)[0][-2:] == [5, 6]


def changed_verify(monkeypatch, change):
    """Let `change` see target, tokens and slots, or the logits, of every block that is verified."""
    verify = Target.verify

    def changed(self, state, tokens, slots, ancestors=None):
        return change(self, lambda slots: verify(self, state, tokens, slots, ancestors), slots)

    monkeypatch.setattr(Target, "verify", changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_whose_slots_are_wrong_is_called_a_bug(models, tokenizer, tmp_path, monkeypatch, dtype):
    """In bfloat16, where rounding changes texts too, since they differ in float32 as well."""
    tested = models
    if dtype == torch.bfloat16:
        target = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=dtype)
        draft = DFlashDraftModel.from_pretrained(TINY / "draft", dtype=dtype)
        tested = Models(target, tokenizer, {("draft", 8): draft})
    for number, checked in enumerate((models, tested)):
        evaluation(checked, tmp_path / f"checked{number}").run()  # the self-check passes, once
    changed_verify(monkeypatch, lambda target, verify, slots: verify(slots - 3))
    broken = evaluation(tested, tmp_path, max_new_tokens=10)
    broken.in_float32 = lambda: models
    report = broken.run()
    drafted = report["results"][1]
    assert drafted["verdicts"] == {"bug": 2}
    assert report["records"][1]["divergence"]["float32"] == "differs"
    assert report["recommendation"]["way"] == 0
    assert "Do not use draft: 2 of its texts differ" in report["recommendation"]["words"]
    assert command.has_failed(report)


def test_a_near_tie_in_bfloat16_is_called_rounding(models, tokenizer, tmp_path, monkeypatch):
    """The likeliest token loses 0.1 in every block, in bfloat16 alone: as much as rounding may take."""

    def rounded(target, verify, slots):
        verified = verify(slots)
        if target.model.dtype == torch.bfloat16:
            best = verified.logits.argmax(-1, keepdim=True)
            lower = torch.full_like(best, -0.1, dtype=torch.bfloat16)
            verified.logits = verified.logits.scatter_add(-1, best, lower)
        return verified

    changed_verify(monkeypatch, rounded)
    target = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.bfloat16)
    draft = DFlashDraftModel.from_pretrained(TINY / "draft", dtype=torch.bfloat16)
    low = Models(target, tokenizer, {("draft", 8): draft})
    run = evaluation(low, tmp_path, prompt_set(3, 8, 12), max_new_tokens=10)
    run.in_float32 = lambda: models
    report = run.run()
    verdicts = report["results"][1]["verdicts"]
    assert verdicts.keys() == {"rounding"}
    assert report["float32_check"] == "done"
    found = [record["divergence"] for record in report["records"] if record["divergence"]]
    assert all(one["float32"] == "same" and abs(one["margin"]) <= 0.5 for one in found)
    assert report == read_report(tmp_path)
    assert not command.has_failed(report)


@pytest.mark.parametrize(
    ("margin", "other", "expected"),
    [(0.1, "same", "rounding"), (2.0, "same", "unknown"), (None, "same", "unknown"), (0.1, "differs", "bug")],
)
def test_verdicts_follow_from_the_margin_and_float32(models, margin, other, expected, monkeypatch):
    texts = iter([[1, 2], [1, 2]] if other == "same" else [[1, 2], [1, 7]])
    monkeypatch.setattr(divergence, "decode", lambda *args: [{"token_ids": next(texts)}])
    monkeypatch.setattr(divergence, "_plain_logits", lambda *args: torch.arange(8.0))
    found = {"position": 1, "margin": margin, "float32": "not checked", "verdict": "unknown"}
    way = Way(Drafting("dflash", "draft", block_size=8), Condition())
    divergence.check_in_float32(models, way, Job(((1,),), 2), 0, found, torch.bfloat16)
    assert (found["float32"], found["verdict"]) == (other, expected)


def test_a_text_that_ends_early_differs_where_it_ends(models):
    assert divergence.first_difference([1, 2, 3], [1, 2]) == 2
    assert divergence.first_difference([1, 2], [1, 2]) is None
    assert divergence.divergence(models, Job(((1,),), 3), 0, [1, 2, 3], [1, 2])["margin"] is None


def test_a_draft_of_a_sibling_of_its_target_is_found_out(models, tmp_path):
    """The sibling has the target's shape, tokens and embeddings, so the draft loads and decodes; it guesses nothing."""
    torch.manual_seed(0)
    sibling = AutoModelForCausalLM.from_config(models.target.config).eval()
    sibling.set_input_embeddings(models.target.get_input_embeddings())
    models.target = sibling
    report = evaluation(models, tmp_path, prompt_set(0, 1, 2), max_new_tokens=12).run()
    drafted = report["results"][1]
    assert drafted["acceptance_length"] < 1.3
    assert drafted["identical"] == 3
    assert report["recommendation"]["way"] == 0
    words = report["recommendation"]["words"]
    assert words.startswith("Use plain decoding")
    assert "draft guesses hardly anything: 1." in words


def test_a_prompt_that_fails_is_one_row_that_says_so(models, tmp_path, monkeypatch):
    positions = len(models.tokenizer(TEXTS[0]).input_ids) + 9
    monkeypatch.setattr(models.target.config, "max_position_embeddings", positions)
    long = Prompt("long", "all", TEXTS[0] + TEXTS[1])
    prompts = PromptSet("own", "", "", (*prompt_set(0).prompts, long))
    report = evaluation(models, tmp_path, prompts).run()
    failed = report["records"][2:]
    assert all("tokens, but the target was made for texts of" in record["error"] for record in failed)
    assert [result["errors"] for result in report["results"]] == [1, 1]
    assert report["results"][1]["identical"] == 1
    assert report["complete"]


def test_an_evaluation_that_was_interrupted_leaves_a_valid_report(models, tmp_path):
    def interrupt(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    run = evaluation(models, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.run(interrupt)
    report = read_report(tmp_path)
    assert not report["complete"]
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert [record["prompt"] for record in report["records"]] == ["p0", "p0"]
    assert report["results"][1]["acceptance_length"] >= 1


KILLED = """
import os, signal, sys
sys.path.append({tests!r})
import test_eval
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from dflash_hub import DFlashDraftModel
from dflash_hub.evaluation.card import with_section
from dflash_hub.evaluation.decoding import Models

def kill(progress):
    if progress.done == 4:
        os.kill(os.getpid(), signal.SIGKILL)

target = AutoModelForCausalLM.from_pretrained(test_eval.TINY / "target")
drafts = {{("draft", 8): DFlashDraftModel.from_pretrained(test_eval.TINY / "draft")}}
models = Models(target, AutoTokenizer.from_pretrained(test_eval.TINY / "target"), drafts)
test_eval.evaluation(models, Path({folder!r}), test_eval.prompt_set(0, 1, 2)).run(kill)
"""


def test_an_evaluation_that_was_killed_goes_on_with_the_same_records(models, tmp_path, servers):
    prompts = prompt_set(0, 1, 2)
    code = KILLED.format(tests=str(DATA.parent), folder=str(tmp_path / "killed"))
    done = servers.models.run(code=code)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    partial = read_report(tmp_path / "killed")
    assert len(partial["records"]) == 4
    decoded = []
    resumed = evaluation(models, tmp_path / "killed", prompts).run(lambda progress: decoded.append(progress.done))
    assert min(decoded) == 4
    assert resumed["records"][:4] == partial["records"]
    whole = evaluation(models, tmp_path / "whole", prompts).run()
    assert untimed(resumed["records"]) == untimed(whole["records"])
    assert resumed["complete"]
    spent = resumed["overhead"]
    assert math.isclose(spent["decoding_seconds"], sum(record["seconds"] for record in resumed["records"]))
    assert spent["share"] == spent["other_seconds"] / spent["decoding_seconds"]
    assert spent["other_seconds"] > partial["overhead"]["other_seconds"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 9}, "max_new_tokens is 9 now and was 6"),
        ({"prompts": prompt_set(0, 2)}, "prompts are not the same"),
        ({"draftings": [Drafting("prompt-lookup")]}, "ways is"),
        ({"seed": 1}, "seed is 1 now and was 0"),
    ],
)
def test_a_folder_with_another_evaluation_is_refused(models, tmp_path, change, message):
    (tmp_path / "report.json").write_text(json.dumps(evaluation(models, tmp_path).report.head | {"records": []}))
    with pytest.raises(ValueError, match=message):
        evaluation(models, tmp_path, **change).run()


MESSAGES = [{"role": "user", "content": "Hello."}]


def test_prompts_of_a_file_are_text_or_messages(tmp_path, tokenizer):
    file = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "One"},
        {"messages": MESSAGES, "category": "chat", "id": 7},
        {"turns": ["Three", "Four"], "question_id": 81},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = load_prompts(str(file))
    assert [(one.id, one.category) for one in found.prompts] == [("mine-0", "all"), ("7", "chat"), ("81", "all")]
    assert found.prompts[1].conversation == MESSAGES
    assert [one.id for one in load_prompts(str(file), limit=2).prompts] == ["mine-0", "7"]
    assert found.prompts[2].text == "Three"
    assert Encoding(tokenizer, chat_template=False).ids(found.prompts[0]) == tokenizer("One").input_ids
    with pytest.raises(ValueError, match="The prompt 7 has messages"):
        Encoding(tokenizer, chat_template=False).ids(found.prompts[1])


def test_the_chat_template_gets_what_was_said_of_thinking():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    )
    texts = []
    for thinking in (None, True, False):
        texts.append(tokenizer.decode(Encoding(tokenizer, True, thinking).ids(Prompt("1", "", "def "))))
    assert texts == ["def ", "def True", "def False"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "an object with either a prompt, turns or messages"),
        ('{"text": "One"}', "an object with either a prompt, turns or messages"),
        ('{"prompt": "One", "messages": []}', "an object with either a prompt, turns or messages"),
        ('{"prompt": 3}', "prompt is 3; it must be a text"),
        ('{"turns": []}', "prompt is None; it must be a text"),
        ('{"messages": []}', "must be a list of objects with role and content"),
        ('{"messages": [{"role": "assistant", "content": "Yes"}]}', "the last message is the assistant's"),
        ('{"prompt": "One", "id": "a"}', "Two prompts of mine.jsonl have the id a"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused_by_its_number(tmp_path, line, message):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "One", "id": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(str(tmp_path / "mine.jsonl"))


def test_the_built_in_prompts_are_of_several_categories_with_code_first():
    found = load_prompts(BUILT_IN)
    assert found.license == "Apache-2.0"
    assert len({one.category for one in found.prompts}) >= 5
    assert found.prompts[0].category == "code"
    assert len({one.category for one in load_prompts(BUILT_IN, limit=5).prompts}) == 5


SPEED = {"question_id": "q1", "category": "coding", "sub_category": "x", "turns": ["First turn", "Second turn"]}
SPEED |= {"source": "s", "src_id": "1", "difficulty": "hard", "multiturn": True}
PUBLISHED = {
    "openai/gsm8k": ("mit", {"main/test-00000-of-00001.parquet": {"question": "First turn", "answer": "4"}}),
    "HuggingFaceH4/MATH-500": (None, {"test.jsonl": {"problem": "First turn", "level": 2, "unique_id": "test/1"}}),
    "openai/openai_humaneval": (
        "mit",
        {"openai_humaneval/test-00000-of-00001.parquet": {"task_id": "HumanEval/0", "prompt": "First turn"}},
    ),
    "google-research-datasets/mbpp": (
        "cc-by-4.0",
        {"sanitized/test-00000-of-00001.parquet": {"task_id": 2, "prompt": "First turn", "code": "pass"}},
    ),
    "HuggingFaceH4/mt_bench_prompts": (
        "apache-2.0",
        {"data/train-00000-of-00001.parquet": {"prompt": ["First turn", "Second turn"], "category": "writing"}},
    ),
    "RedHatAI/speculator_benchmarks": (
        "apache-2.0",
        {file: {"prompt": "First turn"} for file in BENCHMARKS["speculator-benchmarks"].files},
    ),
    "nvidia/SPEED-Bench": (
        "other",
        {f"{config}/test-00000-of-00001.parquet": SPEED for config in ("qualitative", "throughput_32k")},
    ),
}
"""License, files and columns of the datasets on the Hub."""


def upload_dataset(folder, repository: str, license: str | None, rows: dict[str, dict]) -> None:
    """Upload one row a file, as the file's ending says, and a card with a configuration for each folder."""
    datasets = pytest.importorskip("datasets")
    configs = []
    for file, row in rows.items():
        path = folder / repository / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list([row]).to_parquet(path)
            name, split = Path(file).parent.name, Path(file).name.partition("-")[0]
            data = {"split": split, "path": f"{name}/{split}-*"}
            configs.append({"config_name": "default" if name == "data" else name, "data_files": [data]})
        else:
            path.write_text(json.dumps(row) + "\n")
    metadata = {"license": license, "language": ["en"]} | ({"configs": configs} if configs else {})
    (folder / repository / "README.md").write_text(f"---\n{json.dumps(metadata)}\n---\n")
    HfApi().create_repo(repository, repo_type="dataset")
    HfApi().upload_folder(folder_path=folder / repository, repo_id=repository, repo_type="dataset")


def test_benchmarks_are_read_over_http_by_the_files_and_columns_of_their_datasets(tmp_path, hub, monkeypatch):
    # The server of exports has a name of its own, which takes seconds to look up where nobody has it.
    monkeypatch.setattr("datasets.config.USE_PARQUET_EXPORT", False)
    for repository, (license, rows) in PUBLISHED.items():
        upload_dataset(tmp_path, repository, license, rows)
    alike = [f"speed-bench-throughput-{size}" for size in ("1k", "2k", "8k", "16k")]
    assert all(BENCHMARKS[name].config == name.removeprefix("speed-bench-").replace("-", "_") for name in alike)
    found = {name: load_prompts(name) for name in BENCHMARKS if name not in alike}
    for name, benchmark in BENCHMARKS.items():
        if name in alike:
            continue
        assert len(found[name].prompts) == len(benchmark.files or [1])
        assert found[name].prompts[0].text.startswith("First turn")
        assert benchmark.repository in found[name].source
        stated = PUBLISHED[benchmark.repository][0] or "not stated"
        assert stated == "other" or found[name].license.lower().startswith(stated)
    assert found["speed-bench"].prompts[0].category == "coding"
    assert found["humaneval"].prompts[0].id == "HumanEval/0"
    assert [one.category for one in found["spec-bench"].prompts][:2] == ["mt-bench", "math"]
    assert len(found["speculator-benchmarks"].prompts) == 9
    qa = load_prompts("spec-bench:qa, rag")
    assert [one.category for one in qa.prompts] == ["qa", "rag"]
    assert qa.prompts[0].id == "spec-bench-2"  # as in the whole set
    with pytest.raises(ValueError, match="no category 'poems'; it has mt-bench, math, qa"):
        load_prompts("spec-bench:poems")
    any_dataset = load_prompts("openai/openai_humaneval")
    assert (any_dataset.license, any_dataset.language) == ("mit", "en")
    assert any_dataset.prompts[0].text == "First turn"
    assert load_prompts("openai/gsm8k:main").prompts[0].id == "gsm8k-0"
    with pytest.raises(OSError, match=r"(?s)dataset no/such could not be read.*hf auth login"):
        load_prompts("no/such")


def test_prompts_that_another_script_prepared_are_read_from_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [SPEED, SPEED | {"question_id": "q2", "category": "rag"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    found = load_prompts(str(tmp_path / "test.parquet")).prompts
    assert [(one.id, one.category, one.text) for one in found] == [
        ("q1", "coding", "First turn"),
        ("q2", "rag", "First turn"),
    ]


def test_prompts_that_are_only_placeholders_are_refused(monkeypatch):
    rows = [{"turns": ["First turn"]}, {"turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING IT"]}]
    rows = [row | {"category": "rag", "question_id": str(number)} for number, row in enumerate(rows)]
    monkeypatch.setattr("dflash_hub.evaluation.prompts._rows", lambda *args: rows)
    with pytest.raises(ValueError, match=r"1 of the 2 prompts of speed-bench are not in its .* test\.parquet"):
        load_prompts("speed-bench")


PAIR = ("eval", "--target", str(TINY / "target"), "--draft", str(TINY / "draft"), "--max-new-tokens", "8")


def run(*words: str):
    return RUNNER.invoke(cli.app, list(words), env={"COLUMNS": "200"}, catch_exceptions=False)


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(console, "width", 200, raising=False)


def test_the_command_shows_results_and_goes_on_and_compares(tmp_path, wide, monkeypatch):
    words = (*PAIR, "--limit", "2", "--output-dir", str(tmp_path / "a"))
    done = run(*words)
    assert done.exit_code == 0, done.output
    for text in ("2 prompts of built-in (license: Apache-2.0)", "times plain", "2 of 2", "Use ", "Report: "):
        assert text in done.stdout
    assert "floor: share of the time" in done.stderr
    assert "floor: share of the time" not in run("--quiet", *words).output
    report = read_report(tmp_path / "a")
    assert report["complete"]
    assert report["settings"]["chat_template"] is False
    assert report["settings"]["proposal"] == "chain"
    assert report["ways"][1] | {"bytes_per_step": 0} == {
        "name": str(TINY / "draft"),
        "method": "dflash",
        "draft": str(TINY / "draft"),
        "revision": None,
        "kind": "dflash",
        "block_size": 8,
        "taps": list(DFlashDraftModel.from_pretrained(TINY / "draft").config.target_layer_ids),
        "temperature": 0.0,
        "batch_size": 1,
        "context": None,
        "baseline": 0,
        "bytes_per_step": 0,
    }
    before = (tmp_path / "a" / "report.json").read_text()
    monkeypatch.setattr("dflash_hub.evaluation.run.decode", None)  # nothing is decoded again
    again = run(*words)
    assert again.exit_code == 0
    assert "4 of 4 decodes were in" in again.stderr
    assert "decodes were in" not in done.stderr
    assert read_report(tmp_path / "a")["records"] == json.loads(before)["records"]
    for record in report["records"]:
        record["seconds"] /= 2
        record["committed"] = record["committed"] and [2 * count for count in record["committed"]]
    (tmp_path / "b.json").write_text(json.dumps(report))
    compared = run("eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b.json"))
    assert f"first: {tmp_path / 'a'}; second: {tmp_path / 'b.json'}" in compared.stderr
    shown = compared.stdout
    length = report["results"][1]["acceptance_length"]
    row = next(line for line in shown.splitlines() if "tiny_pair/draft" in line).split()
    assert row[2:6] == ["2", "2.00", "[2.00,", "2.00]"]
    assert (row[6], row[-1]) == (f"{length:.2f}", "2")


@pytest.fixture
def update_card(tmp_path):
    """The words of a command that evaluates a draft in a folder with a card, and updates the card."""
    shutil.copytree(TINY / "draft", tmp_path / "draft")
    (tmp_path / "draft" / "README.md").write_text("# A draft\n\nMade by me.\n")
    words = ("eval", "--target", str(TINY / "target"), "--draft", str(tmp_path / "draft"), "--limit", "2")
    return (*words, "--max-new-tokens", "8", "--update-card", "--output-dir", str(tmp_path / "report"))


def test_the_table_names_a_condition_once_and_shortens_folders():
    ways = [("plain", None, 0), ("/a/b/c/d, block 4", "/a/b/c/d", 0), ("plain, batches of 2", None, 2)]
    ways = [{"name": name, "draft": draft, "baseline": baseline} for name, draft, baseline in ways]
    ways.append({"name": "org/draft, batches of 2", "draft": "org/draft", "baseline": 2})
    names = [short_name(way, condition_of({"ways": ways}, way)) for way in ways]
    assert names == ["plain", "c/d, block 4", "plain", "org/draft"]
    assert condition_of({"ways": ways}, ways[3]) == "batches of 2"


def test_the_figures_get_into_the_card_of_a_draft_in_a_folder(tmp_path, update_card):
    card = tmp_path / "draft" / "README.md"
    for _ in range(2):  # the second replaces the first
        done = run(*update_card)
        assert done.exit_code == 0
        text = card.read_text()
        assert text.startswith("# A draft\n\nMade by me.\n")
        assert text.count("## Measured") == text.count("| block |") == 1
    assert "Nothing is written into .eval_results: " in done.stdout
    assert not (tmp_path / "draft" / ".eval_results").exists()
    report = read_report(tmp_path / "report")
    length = report["results"][1]["acceptance_length"]
    assert f"| {length:.2f} | 2 of 2 |" in text
    for known in ("hardware", "torch", "transformers"):
        assert report["environment"][known] in text
    taps = ", ".join(map(str, DFlashDraftModel.from_pretrained(TINY / "draft").config.target_layer_ids))
    for word in (
        "language: en",
        "without a chat template",
        f"taps the layers {taps}.",
        report["environment"]["date"][:10],
    ):
        assert word in text
    with pytest.raises(ValueError, match="but not both"):
        with_section("<!-- dflash-hub eval: end -->", "")
    card.unlink()
    with pytest.raises(ValueError, match="there is none in"):
        run(*update_card)
    with pytest.raises(ValueError, match="Pass the folder as --draft"):
        run(*(update_card[:3] + update_card[5:]))


def test_a_new_card_of_a_draft_has_its_figures_in_place_of_the_words_that_there_are_none(tmp_path):
    DFlashDraftModel.from_pretrained(TINY / "draft").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Nothing yet: no acceptance length" in text
    measured = with_section(text, "## Measured\n\nSomething.")
    assert "Nothing yet" not in measured
    assert measured.count("## Measured") == 1


def test_a_score_is_written_as_the_hub_documents_it_if_the_benchmark_ranks_it(tmp_path, update_card):
    """Read by huggingface_hub, and by the fields of hub-docs' eval_results.yaml: which it has, of which type."""
    (tmp_path / "mine.jsonl").write_text('{"prompt": "def add(a, b):"}\n{"prompt": "import os"}\n')
    file = tmp_path / "draft" / ".eval_results" / "speed.yaml"
    file.parent.mkdir()
    other = {"dataset": {"id": "org/speed", "task_id": "answers"}, "value": 0.5}
    file.write_text(json.dumps([other]))
    prompts = ("--prompts", str(tmp_path / "mine.jsonl"))
    for _ in range(2):  # the second replaces the first
        done = run(*update_card, *prompts, "--eval-results", "org/speed", "lengths", "acceptance_length")
        assert done.exit_code == 0, done.output
    assert f"Score: {file}" in done.stdout
    before, entry = yaml.safe_load(file.read_text())
    assert before == other
    assert entry.keys() == {"dataset", "value", "date", "notes"}
    assert entry["dataset"] == {"id": "org/speed", "task_id": "lengths"}
    report = read_report(tmp_path / "report")
    assert entry["value"] == round(report["results"][1]["acceptance_length"], 4)
    assert datetime.fromisoformat(entry["date"])
    for word in ("tokens per cycle", "block 8, temperature 0", report["environment"]["hardware"]):
        assert word in entry["notes"]
    parse = getattr(huggingface_hub, "parse_eval_result_entries", None)
    if parse is not None:  # huggingface_hub 1.5
        assert [(one.dataset_id, one.task_id) for one in parse([before, entry])][1] == ("org/speed", "lengths")


@pytest.mark.parametrize(
    ("prompts", "words", "message"),
    [
        ("gsm8k", ("openai/gsm8k", "gsm8k", "acceptance_length"), "ranks the share of right answers"),
        ("built-in", ("org/speed", "lengths", "speedup"), "names org/speed, but the prompts are built-in"),
        ("speed-bench", ("org/speed", "lengths", "speedup"), "but the prompts are speed-bench"),
        ("speed-bench", ("nvidia/SPEED-Bench", "all", "accuracy"), "figure 'accuracy'; it must be one of acceptance_"),
    ],
)
def test_a_false_score_is_refused_before_anything_is_decoded(update_card, prompts, words, message):
    with pytest.raises(ValueError, match=message):
        run(*update_card, "--prompts", prompts, "--eval-results", *words)
    without = [word for word in update_card if word != "--update-card"]
    with pytest.raises(ValueError, match="--eval-results goes with --update-card"):
        run(*without, "--eval-results", *words)


def test_a_draft_of_the_hub_is_recorded_with_its_commit(hub, repo_id, tmp_path):
    """A text of one token has no cycle, so nothing can be said of acceptance."""
    HfApi().create_repo(repo_id)
    commit = HfApi().upload_folder(folder_path=TINY / "draft", repo_id=repo_id).oid
    words = ("eval", "--target", str(TINY / "target"), "--draft", f"{repo_id}@{commit}", "--limit", "2")
    done = run(*words, "--max-new-tokens", "1", "--output-dir", str(tmp_path))
    assert done.exit_code == 0, done.output
    report = read_report(tmp_path)
    assert report["ways"][1]["draft"] == f"{repo_id}@{commit}"
    assert report["ways"][1]["revision"] == commit
    assert [record["committed"] for record in report["records"]] == [None, []] * 2
    assert [record["drafted"] for record in report["records"]] == [[False]] * 4
    assert report["results"][1]["acceptance_length"] is None
    assert not list(tmp_path.glob("**/speculation_profile.json"))


def test_other_proposals_than_chains_are_recorded_and_have_no_profile(tmp_path):
    words = (*PAIR, "--limit", "1", "--output-dir", str(tmp_path), "--proposal", "plain")
    assert "up to 8 new tokens; proposal: plain" in run(*words).stdout.replace("\n", " ")
    report = read_report(tmp_path)
    assert report["settings"]["proposal"] == "plain"
    assert report["records"][1]["committed"] == [1] * 7
    assert not list(tmp_path.glob("**/speculation_profile.json"))
    with pytest.raises(ValueError, match="proposal is 'chain' now and was 'plain'"):
        run(*words[:-2])


def test_sigterm_leaves_a_partial_report(tmp_path, monkeypatch):
    @contextmanager
    def watching():
        def watch(progress):
            if progress.done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        yield watch

    monkeypatch.setattr(command, "watching", watching)
    done = run(*PAIR, "--limit", "2", "--output-dir", str(tmp_path))
    assert done.exit_code == 128 + signal.SIGTERM
    report = read_report(tmp_path)
    assert (report["complete"], len(report["records"])) == (False, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "nothing.jsonl"], "which is no file; pass a JSONL file, the org/name of a dataset, or one of"),
        (["--thinking", "maybe"], "--thinking is 'maybe'; it must be on or off"),
        (["--thinking", "on"], "no meaning with --no-chat-template"),
        (["--chat-template"], "has no chat template"),
        (["--against", "magic"], "--against has 'magic'"),
        (["--against", "transformers", "--batch-size", "2"], "one row at a time"),
        (["--draft", str(TINY / "draft")], "--draft is given twice"),
        (["--capture", "fast"], "--capture is 'fast'"),
        (["--proposal", "trees"], "--proposal is 'trees'; it must be one of auto, chain, tree, lookup, plain"),
        (["--proposal", "auto", "--update-card"], "--update-card goes with --proposal chain"),
        (["--dtype", "float99"], "--dtype is 'float99'"),
        (["--seed", "3", "--temperature", "0"], "--seed would change nothing"),
    ],
)
def test_settings_without_meaning_are_refused_by_name(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(*PAIR, "--output-dir", str(tmp_path), *words)


def test_the_command_asks_for_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="--output-dir is missing"):
        run("eval", "--target", str(TINY / "target"))
    (tmp_path / "target").symlink_to(TINY / "target")  # of the built-in target the draft is known
    with pytest.raises(ValueError, match="fits its shape"):
        run("eval", "--target", str(tmp_path / "target"), "--output-dir", str(tmp_path))
    (tmp_path / "report.json").write_text("{}")
    for other, message in ((tmp_path, "is no report of dflash-hub eval"), (tmp_path / "no", "There is no .*; pass")):
        with pytest.raises(ValueError, match=message):
            run("eval", "--compare", str(other), str(tmp_path))


def test_a_second_draft_and_block_size_is_a_way_of_its_own(tmp_path):
    words = (
        "--draft",
        str(TINY / "draft2"),
        "--block-size",
        "4",
        "--block-size",
        "8",
        "--limit",
        "1",
        "--context",
        "20",
    )
    assert run(*PAIR, *words, "--output-dir", str(tmp_path)).exit_code == 0
    report = read_report(tmp_path)
    assert [(way["kind"], way["block_size"]) for way in report["ways"][1:]] == [
        ("dflash", 4),
        ("dflash", 8),
        ("dflash2", 4),
        ("dflash2", 8),
    ]
    assert all(result["identical"] == 1 for result in report["results"][1:])
    assert {way["context"] for way in report["ways"]} == {20}
    assert len(list(tmp_path.glob("way-*/speculation_profile.json"))) == 4

"""Processors and criteria that are not transformers' own are called exactly as plain `generate` calls them."""

import functools
import json

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
)
from transformers.generation import ConfidenceCriteria

import paths
import tiny
from dflash_hub import DecodeStatistics
from dflash_hub.proposals_dflash import Proposal

pytestmark = pytest.mark.usefixtures("unchecked")

NEW = 12
KINDS = {"chain": {}, "second": tiny.SECOND}


class RecordingProcessor(LogitsProcessor):
    """Records its arguments, and biases the scores by how often it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, scores):
        self.calls.append((input_ids, scores.clone()))
        scores[:, len(self.calls) % tiny.VOCAB] += 3.0  # in place, as many do
        return scores


class RecordingCriterion(StoppingCriteria):
    """Records its arguments, and ends a row at its second token 5 after the prompt; it counts these by the call."""

    def __init__(self):
        self.calls, self.seen = [], None

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids, None if scores is None else [step.clone() for step in scores]))
        seen = (input_ids[:, -1] == 5).long()
        self.seen = seen if self.seen is None else self.seen + seen
        return self.seen >= 2


class ForcedText(LogitsProcessor):
    """Leaves one token in each step: that of a given text."""

    def __init__(self, text):
        self.text = text

    def __call__(self, input_ids, scores):
        wanted = self.text[:, input_ids.shape[1]][:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


def assert_same_calls(ours, theirs):
    assert len(ours) == len(theirs)
    for (our_ids, our_scores), (their_ids, their_scores) in zip(ours, theirs, strict=True):
        assert torch.equal(our_ids, their_ids)
        assert (our_scores is None) == (their_scores is None)
        if our_scores is not None:
            torch.testing.assert_close(our_scores, their_scores, atol=2e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def pair():
    return pair_of("qwen3", "chain")


@functools.cache
def pair_of(family, kind):
    """A target and its draft; decoding leaves both as they were."""
    if family == "qwen3":
        return tiny.shallow(**KINDS[kind])
    target = tiny.target(family)
    return target, tiny.draft(target, **KINDS[kind])


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3", "chain"), ("qwen3", "second"), ("gemma3_text", "chain"), ("qwen3_next", "chain")],
)
@pytest.mark.parametrize(("rows", "eos"), [(1, None), (3, None), (3, 7)])
def test_a_recording_processor_and_criterion_see_the_calls_of_plain_generate(family, rows, kind, eos):
    target, draft = pair_of(family, kind)
    inputs = tiny.batch(9, (0, 2, 4)[:rows])
    asked = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    asked |= {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}

    def run(**ours):
        processor, criterion = RecordingProcessor(), RecordingCriterion()
        found = target.generate(**inputs, **asked, **ours, logits_processor=[processor], stopping_criteria=[criterion])
        return found, processor.calls, criterion.calls

    plain, their_scores, their_ends = run()
    statistics = DecodeStatistics()
    right = tiny.partly_right(torch.nn.functional.pad(plain.sequences, (0, 8)))
    ours, our_scores, our_ends = run(custom_generate=draft.speculate, statistics=statistics, proposer=right)
    assert torch.equal(ours.sequences, plain.sequences)
    assert_same_calls(our_scores, their_scores)
    assert_same_calls(our_ends, their_ends)
    for name in ("scores", "logits"):
        for step, (mine, theirs) in enumerate(zip(ours[name], plain[name], strict=True)):
            torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3, msg=f"{name} of step {step}")
    assert statistics.stepwise[:2] == ["RecordingProcessor", "RecordingCriterion"]
    assert 1 < statistics.acceptance_length < 5
    assert plain.sequences.unique().numel() > 3


@pytest.mark.parametrize("rows", [1, 3])
def test_a_sampled_text_shows_the_calls_that_plain_generate_would_make_for_it(rows):
    target, draft = pair_of("qwen3", "second")
    inputs = tiny.batch(9, (0, 2, 4)[:rows])
    asked = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "eos_token_id": 7, "pad_token_id": 0}
    asked |= {"return_dict_in_generate": True, "output_scores": True}
    torch.manual_seed(3)
    processor, criterion = RecordingProcessor(), RecordingCriterion()
    recorders = {"logits_processor": [processor], "stopping_criteria": [criterion]}
    ours = target.generate(**inputs, **asked, **recorders, custom_generate=draft.speculate)
    again, ends = RecordingProcessor(), RecordingCriterion()
    # plain sampling draws other numbers, so it is led along the same text
    plain = {"logits_processor": [again, ForcedText(ours.sequences)], "stopping_criteria": [ends]}
    forced = target.generate(**inputs, **asked, **plain)
    assert torch.equal(ours.sequences, forced.sequences)
    assert_same_calls(processor.calls, again.calls)
    assert all(torch.equal(mine, theirs) for (mine, _), (theirs, _) in zip(criterion.calls, ends.calls, strict=True))
    assert ours.sequences.unique().numel() > 3


def test_a_tree_shows_the_calls_of_plain_generate_too():
    target, draft = pair_of("gemma3_text", "chain")
    inputs = tiny.batch(9, (0, 3))
    plain_calls, our_calls = RecordingProcessor(), RecordingProcessor()
    asked = {"max_new_tokens": NEW, "do_sample": False}
    plain = target.generate(**inputs, **asked, logits_processor=[plain_calls])
    expected = torch.nn.functional.pad(plain, (0, 9))

    def branch(proposal, state):
        """A wrong child of the root before the right one, which goes on with two right tokens and a wrong one."""
        for row, slot in enumerate(state.last_slots):
            right = expected[row, slot + 1 : slot + 4]
            proposal.tokens[row, 1:] = torch.stack([(right[0] + 1) % tiny.VOCAB, right[0], right[1], right[2] + 1])
        parents = torch.tensor([[-1, 0, 0, 2, 3]]).expand(2, -1)
        return Proposal(proposal.tokens % tiny.VOCAB, parents)

    statistics = DecodeStatistics()
    ours = {"custom_generate": draft.speculate, "proposer": tiny.steered(branch), "statistics": statistics}
    found = target.generate(**inputs, **asked, **ours, logits_processor=[our_calls])
    assert torch.equal(found, plain)
    assert_same_calls(our_calls.calls, plain_calls.calls)
    assert statistics.acceptance_length > 2.5


class BareBool(StoppingCriteria):
    """Ends everything with a bare bool, as many harnesses do."""

    def __call__(self, input_ids, scores, **kwargs):
        return bool((input_ids[:, 9:] == 5).any(dim=1).all())


class FlagPerRow(StoppingCriteria):
    """Keeps a flag for each row, and ends the batch when every row had its stop word, as lm_eval's criterion does."""

    def __init__(self, rows):
        self.done = [False] * rows

    def __call__(self, input_ids, scores, **kwargs):
        for row, done in enumerate(self.done):
            self.done[row] = done or input_ids[row, -2:].tolist() == [5, 5] or int(input_ids[row, -1]) == 2
        return torch.tensor([all(self.done)] * len(self.done))


class ReadsScores(StoppingCriteria):
    """Ends a row at the third step whose likeliest token was no surprise."""

    def __call__(self, input_ids, scores, **kwargs):
        sure = torch.stack([step.softmax(-1).amax(-1) > 0.9 for step in scores])
        return sure.sum(0) >= 3


class Returns(StoppingCriteria):
    """Returns what is no tensor of truth values."""

    def __init__(self, form):
        self.form = form

    def __call__(self, input_ids, scores, **kwargs):
        return self.form(input_ids[:, -1] == 5, input_ids.shape[1] > 25)


CRITERIA = {
    "an int": lambda rows: Returns(lambda ends, late: int(late)),
    "a tensor of ints": lambda rows: Returns(lambda ends, late: ends.long()),
    "a bare bool": lambda rows: BareBool(),
    "a flag for each row": FlagPerRow,
    "reads the scores": lambda rows: ReadsScores(),
    "of transformers, by the last score": lambda rows: ConfidenceCriteria(0.2),
}


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, 3) for name in CRITERIA), ("a bare bool", 1), ("of transformers, by the last score", 1)]
)
def test_criteria_as_evaluation_harnesses_write_them_end_the_text_where_plain_generate_ends_it(pair, name, rows):
    target, draft = pair
    asked = {"max_new_tokens": 28, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    inputs = tiny.batch(9, (0, 2, 4)[:rows])
    plain = target.generate(**inputs, **asked, stopping_criteria=[CRITERIA[name](rows)])
    ours = target.generate(**inputs, **asked, stopping_criteria=[CRITERIA[name](rows)], custom_generate=draft.speculate)
    assert torch.equal(ours.sequences, plain.sequences)


class Rewrites(LogitsProcessor):
    """Writes another last token into the text, as processor and as criterion."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] % 3 == 0:
            input_ids[:, -1] = (input_ids[:, -1] + 1) % tiny.VOCAB
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("keyword", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_written_into_the_text_stays_there(pair, keyword, rows):
    target, draft = pair
    asked = {"max_new_tokens": NEW, "do_sample": False, keyword: [Rewrites()]}
    plain = target.generate(**tiny.batch(9, (0, 2, 4)[:rows]), **asked)
    ours = target.generate(**tiny.batch(9, (0, 2, 4)[:rows]), **asked, custom_generate=draft.speculate)
    assert torch.equal(ours, plain)


class GivesNaN(LogitsProcessor):
    """Gives NaN for one token, which an argmax takes for the largest."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([input_ids.shape[1] % tiny.VOCAB]), torch.nan)


def test_a_processor_that_gives_nan_is_followed_as_by_plain_generate(pair):
    target, draft = pair
    asked = {**tiny.batch(9, (0, 2)), "max_new_tokens": 12, "do_sample": False, "logits_processor": [GivesNaN()]}
    assert torch.equal(target.generate(**asked, custom_generate=draft.speculate), target.generate(**asked))


def only_even(batch_id, input_ids):
    """Allow tokens of one kind after the other, by the length."""
    return [token for token in range(tiny.VOCAB) if (token + len(input_ids)) % 3]


STATEFUL = {
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": only_even},
    "guidance_scale with a negative prompt": {"guidance_scale": 1.7, "negative_prompt_ids": tiny.prompt(6, seed=8)},
}


@pytest.mark.parametrize("asked", STATEFUL.values(), ids=STATEFUL)
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_transformers_own_stateful_processors_give_the_text_of_plain_generate(family, asked):
    target, draft = pair_of(family, "chain")
    ids = tiny.prompt(9)
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, **asked}
    plain = target.generate(ids, **common)
    statistics = DecodeStatistics()
    ours = target.generate(ids, **common, custom_generate=draft.speculate, statistics=statistics)
    assert torch.equal(ours, plain)
    assert statistics.stepwise
    assert not torch.equal(plain, tiny.greedy(target, ids, NEW))
    assert tiny.as_found(target)


def test_a_synthid_watermark_is_the_one_of_plain_generate(pair):
    target, draft = pair
    inputs = tiny.batch(9, (0, 2))
    watermark = SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=3)
    asked = {"max_new_tokens": NEW, "do_sample": True, "watermarking_config": watermark}
    asked |= {"output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    ours = target.generate(**inputs, **asked, custom_generate=draft.speculate)
    processor = watermark.construct_processor(tiny.VOCAB, torch.device("cpu"))
    for step, (scores, logits) in enumerate(
        zip(ours.scores, plain_logits(target, inputs, ours.sequences), strict=True)
    ):
        text = ours.sequences[:, : 9 + step]
        torch.testing.assert_close(scores, processor(text, logits), atol=2e-3, rtol=1e-3)


def plain_logits(target, inputs, text):
    """The target's own logits for each step of a text of `inputs`."""
    asked = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    new = text.shape[1] - inputs["input_ids"].shape[1]
    return target.generate(**inputs, **asked, max_new_tokens=new, logits_processor=[ForcedText(text)]).logits


def test_a_criterion_is_asked_for_the_token_that_reaches_the_length_too(pair):
    target, draft = pair
    criterion = RecordingCriterion()
    asked = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": [criterion]}
    target.generate(**tiny.batch(9, (0,)), **asked, custom_generate=draft.speculate)
    assert len(criterion.calls) == 12


class InOrder:
    """A processor, a criterion and a streamer that write into one list when they are called."""

    def __init__(self, told):
        self.told = told

    def __call__(self, input_ids, scores):
        self.told.append((self.__class__.__name__, input_ids.shape[1]))
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value):
        self.told.append(("put", value.tolist()))

    def end(self):
        self.told.append(("end", None))


def test_processor_criterion_and_streamer_are_called_in_the_order_of_plain_generate(pair):
    target, draft = pair
    plain, ours = [], []
    for told, more in ((plain, {}), (ours, {"custom_generate": draft.speculate})):
        one = InOrder(told)
        asked = {"logits_processor": [one], "stopping_criteria": [one], "streamer": one, "do_sample": False}
        target.generate(**tiny.batch(9, (0,)), max_new_tokens=12, **asked, **more)
    if tiny.CACHE == "cache":  # from transformers 5.24 on; before, a token is streamed before the criteria are asked
        assert plain == ours
    for streams in (True, False):
        parts = [[one for one in told if (one[0] in ("put", "end")) == streams] for told in (plain, ours)]
        assert parts[0] == parts[1]


def test_transformers_own_processors_take_the_fast_path(pair):
    target, draft = pair
    asked = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[4]], "min_new_tokens": 5}
    asked |= {"suppress_tokens": [2], "do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.8}
    asked |= {"begin_suppress_tokens": [1], "sequence_bias": {(6,): 1.0}, "eos_token_id": 7, "pad_token_id": 0}
    statistics = DecodeStatistics()
    target.generate(
        **tiny.batch(9, (0, 2)), **asked, max_new_tokens=12, custom_generate=draft.speculate, statistics=statistics
    )
    assert statistics.stepwise == []


def test_a_processor_of_ones_own_class_is_not_taken_for_that_of_transformers(pair):
    class Counting(TemperatureLogitsWarper):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return super().__call__(input_ids, scores)

    target, draft = pair
    counting = Counting(0.8)
    asked = {"max_new_tokens": 12, "logits_processor": [counting], "do_sample": False}
    target.generate(**tiny.batch(9, (0,)), **asked, custom_generate=draft.speculate)
    assert counting.calls == 12


# Grammars: whole libraries, on the built-in pair and its tokenizer ----------------------------------------------------

PROPERTIES = {"n": {"type": "integer"}, "ok": {"type": "boolean"}}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["n", "ok"]}


def grammar_of(library, tokenizer, vocab_size):
    """The keywords of `generate` for a text that follows `SCHEMA`."""
    if library == "xgrammar":
        xgrammar = pytest.importorskip("xgrammar", reason="pip install dflash-hub[grammar], where xgrammar has a wheel")
        from xgrammar.contrib.hf import LogitsProcessor as Grammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
        return {"logits_processor": [Grammar(xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(SCHEMA)))]}
    enforcer = pytest.importorskip("lmformatenforcer", reason="pip install dflash-hub[grammar]")
    # its own integration imports a module that transformers 5 no longer has; this is what it does there
    words = []
    for token in range(vocab_size):
        if token not in tokenizer.all_special_ids:
            after = tokenizer.decode([tokenizer.encode("0")[-1], token])
            words.append((token, after[1:], len(after[1:]) > len(tokenizer.decode([token]))))
    data = enforcer.TokenEnforcerTokenizerData(words, tokenizer.decode, tokenizer.eos_token_id, False, vocab_size)
    state = enforcer.TokenEnforcer(data, enforcer.JsonSchemaParser(SCHEMA))
    return {"prefix_allowed_tokens_fn": lambda row, ids: state.get_allowed_tokens(ids.tolist()).allowed_tokens}


@pytest.mark.parametrize("library", ["xgrammar", "lm-format-enforcer"])
def test_a_grammar_gives_the_text_of_plain_generate(tiny_target, tiny_draft, library):
    tokenizer = AutoTokenizer.from_pretrained(paths.TINY / "target")
    inputs = tokenizer(["write this as json: "], return_tensors="pt")
    asked = {"max_new_tokens": 24, "do_sample": False}

    def run(**ours):
        grammar = grammar_of(library, tokenizer, tiny_target.config.vocab_size)
        return tiny_target.generate(**inputs, **asked, **grammar, **ours)

    plain = run()
    statistics = DecodeStatistics()
    ours = run(custom_generate=tiny_draft.speculate, statistics=statistics)
    assert torch.equal(ours, plain)
    assert "{" in tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :])
    assert statistics.stepwise

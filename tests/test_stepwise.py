"""Processors and criteria that are not transformers' own are called exactly as plain `generate` calls them."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
)

import tiny
from dflash_hub import DecodeStatistics

NEW = 24
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


def pair_of(family, kind):
    target = tiny.target(family)
    return target, tiny.draft(target, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("eos", [None, 7])
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
    assert statistics.stepwise == ["RecordingProcessor", "RecordingCriterion"]
    assert 1 < statistics.acceptance_length < 5
    assert plain.sequences.unique().numel() > 3

"""Caches that are handed to `generate` and come back: plain code may do anything with them, before and after."""

import copy
import functools
import gc
import io
import pickle

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache, StoppingCriteria, StoppingCriteriaList

import tiny
from dflash_hub import DecodeStatistics, past_key_values_dflash
from dflash_hub.cache_dflash import SlotCache
from dflash_hub.compat_dflash import cache_in
from dflash_hub.past_key_values_dflash import matching_rows

pytestmark = pytest.mark.usefixtures("unchecked")

PADS = (0, 3, 5)
NEW = 12
ENDS = {"qwen3": 8, "gemma3_text": 1, "mistral": 9, "qwen3_next": 10, "lfm2": 0, "nemotron_h": 0, "gpt_oss": 4}
"""For each family a token at which the rows of its first turn end at different slots."""


# What plain code does with a cache between two turns ------------------------------------------------------------------


def saved(cache, ids, mask):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False), ids, mask


def repeated(cache, ids, mask):
    cache.batch_repeat_interleave(2)
    return cache, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)


def selected(cache, ids, mask):
    rows = torch.tensor([len(ids) - 1, 0])
    cache.batch_select_indices(rows)
    return cache, ids[rows], mask[rows]


def reordered(cache, ids, mask):
    rows = torch.arange(len(ids)).flip(0)
    cache.reorder_cache(rows)
    return cache, ids[rows], mask[rows]


def cropped(cache, ids, mask):
    cache.crop(-3)
    return cache, ids, mask


def cut(cache, ids, mask):
    cache.crop(-4)
    return cache, ids[:, :-4], mask[:, :-4]


def gathered(cache, ids, mask):
    return DynamicCache(list(cache)), ids, mask


CHANGES = {
    "nothing": lambda *turn: turn,
    "deepcopy": lambda cache, *text: (copy.deepcopy(cache), *text),
    "pickle": lambda cache, *text: (pickle.loads(pickle.dumps(cache)), *text),
    "torch.save": saved,
    "repeat": repeated,
    "select": selected,
    "reorder": reordered,
    "crop": cropped,
    "cut": cut,
    "gather": gathered,
}
KINDS = {
    "dynamic": lambda target: DynamicCache(config=target.config),
    "lazy": lambda target: DynamicCache(),
    "static": lambda target: StaticCache(config=target.config, max_cache_len=60),
    "recording": lambda target: recording(target),
}


def recording(target):
    cache = DynamicCache(config=target.config)
    cache.activate_past_recording()
    return cache


def longer(ids, mask, more):
    """The text and its mask, with `more` after every row."""
    more = more.expand(len(ids), -1)
    return torch.cat([ids, more], dim=1), torch.cat([mask, mask.new_ones(more.shape)], dim=1)


def turn(target, ids, mask, cache, draft=None, **extra):
    """One turn, by plain `generate` without a draft; text and mask afterwards."""
    by = {} if draft is None else {"custom_generate": draft.speculate}
    asked = {"max_new_tokens": NEW, "do_sample": False, tiny.CACHE: cache} | extra
    text = target.generate(ids, attention_mask=mask, **asked, **by)
    return text, torch.cat([mask, mask.new_ones(len(mask), text.shape[1] - ids.shape[1])], dim=1)


def conversation(family, kind, rows, change, drafts=(None, None), expected=None):
    """Two turns with a cache that is changed in between: the text of both, and the cache.

    Args:
        drafts: of each turn; None for plain `generate`.
        expected: the text of both turns, of which the drafts propose a part.
    """
    target = tiny_pair(family)[0]
    given, cache = tiny.batch(20, PADS[:rows]), KINDS[kind](target)
    text, texts = (given["input_ids"], given["attention_mask"]), []
    for number, draft in enumerate(drafts):
        if number:
            cache, *text = CHANGES[change](cache, *text)
            text = longer(*text, tiny.prompt(5, seed=9))
        steered = {} if draft is None else {"proposer": tiny.partly_right(expected[number])}
        text = turn(target, *text, cache, draft, eos_token_id=ENDS[family], pad_token_id=0, **steered)
        texts.append(text[0])
    return texts, cache


@functools.cache
def tiny_pair(family):
    """A target, and a draft of each kind, which have passed their self-check after the first test."""
    target = tiny.target(family)
    return target, tiny.draft(target), tiny.draft(target, seed=4, **tiny.SECOND)


def assert_same_content(plain, ours, first=0):
    """The same slots in every layer, from `first` on, and the same states, within rounding."""
    assert plain.get_seq_length() == ours.get_seq_length()
    for one, other in zip(plain.layers, ours.layers, strict=True):
        for name in ("keys", "values"):
            if getattr(one, name, None) is not None:
                first = first if one.keys.shape[2] > first else 0
                close(getattr(one, name)[:, :, first:], getattr(other, name)[:, :, first:])
        for name in ("conv_states", "recurrent_states"):
            for key, state in getattr(one, name, {}).items():
                if state is not None:
                    close(state, getattr(other, name)[key])


def close(one, other):
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-4 * one.abs().max()


NEWER = pytest.mark.skipif(tiny.CACHE != "cache", reason="plain generate of this transformers fails, or differs")
CASES = [
    *(("qwen3", "dynamic", 3, change) for change in CHANGES if change not in ("pickle", "reorder")),  # of others below
    *(("qwen3", kind, 1, change) for kind, change in (("lazy", "crop"), ("dynamic", "repeat"))),
    pytest.param("qwen3", "static", 1, "crop", marks=NEWER),
    *(("gemma3_text", "dynamic", 3, change) for change in ("pickle", "repeat")),
    pytest.param("gemma3_text", "dynamic", 3, "gather", marks=NEWER),
    pytest.param("gemma3_text", "recording", 3, "crop", marks=NEWER),
    pytest.param("mistral", "recording", 1, "reorder", marks=NEWER),
    ("gemma3_text", "lazy", 3, "crop"),
    ("mistral", "static", 1, "reorder"),
    *(("gpt_oss", "static", 3, change) for change in ("nothing", "deepcopy")),
    *(("lfm2", kind, 3, "reorder") for kind in ("dynamic", "static")),
    ("qwen3_next", "dynamic", 3, "pickle"),
    ("nemotron_h", "dynamic", 3, "nothing"),
]


@pytest.mark.parametrize(("family", "kind", "rows", "change"), CASES)
def test_a_changed_cache_goes_on_as_in_plain_generate(family, kind, rows, change):
    _, first, second = tiny_pair(family)
    plain, cache = conversation(family, kind, rows, change)
    ways = [(first, first), (first, None), (None, second)]
    for drafts in ways if change in ("nothing", "repeat") else ways[:1]:
        ours, returned = conversation(family, kind, rows, change, drafts, expected=plain)
        assert all(torch.equal(*both) for both in zip(plain, ours, strict=True))
        assert_same_content(cache, returned, max(PADS))


# What follows what the cache holds ------------------------------------------------------------------------------------


def both(family, make, follow):
    """The text of plain `generate` and of a draft, after a cache that `make` fills; `follow` asks for text."""
    _, draft, _ = tiny_pair(family)
    texts = []
    for extra in ({}, {"custom_generate": draft.speculate}):
        cache = make()
        texts.append(follow({"do_sample": False, "max_new_tokens": NEW, tiny.CACHE: cache} | extra))
    return texts


def forward_cache(target, ids, **extra):
    return cache_in(target(ids, use_cache=True, **extra))


@pytest.mark.parametrize(
    ("family", "length", "cached", "covered"),
    [
        *(("gemma3_text", 6, 6, 12), ("gemma3_text", 6, 9, 15), ("gemma3_text", 6, 9, 17), ("gemma3_text", 1, 1, 2)),
        *(("gemma3_text", 14, 14, 28), ("qwen3", 6, 9, 15), ("qwen3", 14, 14, 28), ("lfm2", 6, 6, 12)),
        *(("lfm2", 6, 9, 17), ("lfm2", 1, 1, 2)),
    ],
)
def test_a_prompt_that_is_cached_as_a_whole_is_fed_again_as_plain_generate_feeds_it(family, length, cached, covered):
    target = tiny_pair(family)[0]
    mask = torch.ones(1, covered, dtype=torch.long)
    plain, ours = both(
        family,
        lambda: forward_cache(target, tiny.prompt(cached)),
        lambda asked: target.generate(tiny.prompt(length), attention_mask=mask, **asked),
    )
    assert torch.equal(plain, ours)


@NEWER
def test_of_a_prompt_shorter_than_the_cache_the_end_is_fed_where_plain_generate_drops_its_mask():
    target = tiny_pair("qwen3")[0]
    ids, mask = tiny.prompt(6), torch.ones(1, 6, dtype=torch.long)
    for cached in (6, 8, 11):
        plain, ours = both(
            "qwen3",
            lambda cached=cached: forward_cache(target, tiny.prompt(cached)),
            lambda asked: target.generate(ids, attention_mask=mask, **asked),
        )
        assert torch.equal(plain, ours)


@pytest.mark.parametrize(
    ("rows", "length", "cached", "covered", "reason"),
    [
        (1, 6, 12, 6, "The cache holds 12 slots, more than the prompt of 6 tokens, so nothing is left to feed"),
        (1, 1, 5, 1, "The cache holds 5 slots, more than the prompt of 1 tokens"),
        (3, 6, 6, 6, "attention_mask covers 6 slots, but the cache holds 6 and 6 follow"),
        (3, 6, 8, 8, "attention_mask covers 8 slots, but the cache holds 8 and 6 follow"),
        (2, 20, 20, 20, "The cache holds 3 rows, and input_ids has 2"),
    ],
)
def test_a_cache_that_nothing_can_follow_is_refused_before_any_forward(rows, length, cached, covered, reason):
    target = tiny_pair("qwen3")[0]
    ids, mask = tiny.prompt(length).expand(rows, -1), torch.ones(rows, covered, dtype=torch.long)
    cache = forward_cache(target, tiny.prompt(cached).expand(max(rows, 3 if rows == 2 else 1), -1))
    if rows == 3:
        mask[1, 0] = 0
    if rows == 2:
        ids, mask = longer(ids, mask, tiny.prompt(3))
    draft, calls = tiny_pair("qwen3")[1], []
    with target.register_forward_pre_hook(lambda *_: calls.append(1)), pytest.raises(ValueError, match=reason):
        target.generate(
            ids, attention_mask=mask, max_new_tokens=9, custom_generate=draft.speculate, **{tiny.CACHE: cache}
        )
    assert not calls


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "lfm2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_only_the_new_tokens_may_be_given_and_the_cache_may_come_from_a_forward(family, rows):
    target = tiny_pair(family)[0]
    given = tiny.batch(20, PADS[:rows])
    suffix = tiny.prompt(5, seed=9).expand(rows, -1)
    mask = torch.cat([given["attention_mask"], torch.ones_like(suffix)], dim=1)
    plain, ours = both(
        family,
        lambda: forward_cache(target, given["input_ids"], attention_mask=given["attention_mask"]),
        lambda asked: target.generate(suffix, attention_mask=mask, **asked),
    )
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("family", ["qwen3", "lfm2", "qwen3_next", "nemotron_h"])
def test_later_turns_of_different_lengths_are_padded_as_in_plain_generate(family):
    target, draft, _ = tiny_pair(family)
    more, kept = tiny.batch(6, pads=(0, 2, 4)), []
    for one in (None, draft):
        given, cache = tiny.batch(20, PADS), DynamicCache(config=target.config)
        text, mask = turn(target, given["input_ids"], given["attention_mask"], cache, one)
        text = torch.cat([text, more["input_ids"]], dim=1)
        mask = torch.cat([mask, more["attention_mask"]], dim=1)
        kept.append((turn(target, text, mask, cache, one)[0], cache))
    assert torch.equal(kept[0][0], kept[1][0])
    assert_same_content(kept[0][1], kept[1][1], max(PADS))


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_a_turn_in_inference_mode_may_be_followed_by_one_outside_and_the_other_way_round(modes):
    target, draft, _ = tiny_pair("gemma3_text")
    texts = []
    for one in (None, draft):
        cache, text = DynamicCache(config=target.config), (tiny.prompt(20), torch.ones(1, 20, dtype=torch.long))
        for mode in modes:
            with torch.inference_mode(mode):
                text = longer(*turn(target, *text, cache, one), tiny.prompt(4))
        texts.append(text[0])
    assert torch.equal(*texts)


def test_the_cache_of_another_model_of_the_same_shape_goes_on():
    target, other = tiny_pair("gemma3_text")[0], tiny.target("gemma3_text", seed=7)
    draft, given, texts = tiny_pair("gemma3_text")[1], tiny.batch(20, PADS), []
    for one in (None, draft):
        cache = DynamicCache(config=target.config)
        text = turn(other, given["input_ids"], given["attention_mask"], cache, one)
        texts.append(turn(target, *longer(*text, tiny.prompt(4)), cache, one)[0])
    assert torch.equal(*texts)


class EndsAt(StoppingCriteria):
    """Without an end token `generate` extends every row until all have ended."""

    def __call__(self, ids, scores, **kwargs):
        return ids[:, -1] == 10


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["qwen3", "lfm2"])
def test_the_state_of_a_row_that_went_past_the_end_is_that_of_the_text(family, rows):
    target, draft, _ = tiny_pair(family)
    given, kept = tiny.batch(20, PADS[:rows]), []
    whole = target.generate(**given, max_new_tokens=NEW, do_sample=False)
    for one in (None, draft):
        cache = DynamicCache(config=target.config)
        extra = {} if one is None else {"proposer": tiny.partly_right(whole)}
        extra["stopping_criteria"] = StoppingCriteriaList([EndsAt()])
        text = turn(target, given["input_ids"], given["attention_mask"], cache, one, **extra)
        kept.append((turn(target, *longer(*text, tiny.prompt(4)), cache, one)[0], cache))
    assert torch.equal(kept[0][0], kept[1][0])
    assert_same_content(kept[0][1], kept[1][1], max(PADS))


def test_rows_that_ended_early_are_completed_in_parts(monkeypatch):
    monkeypatch.setattr(past_key_values_dflash, "PREFILL_CHUNK", 2)
    _, draft, _ = tiny_pair("lfm2")
    plain, cache = conversation("lfm2", "dynamic", 3, "nothing")
    ours, returned = conversation("lfm2", "dynamic", 3, "nothing", (draft, draft), expected=plain)
    assert torch.equal(plain[1], ours[1])
    assert_same_content(cache, returned, max(PADS))


# The draft's context --------------------------------------------------------------------------------------------------

LONG = {"max_new_tokens": 40, "eos_token_id": None}
SHORTER = LONG | {"max_new_tokens": 16}


def committed(target, draft, text, cache):
    """The tokens committed in each cycle of a turn after `text`."""
    statistics = DecodeStatistics()
    turn(target, *longer(*text, torch.arange(40, 45)[None]), cache, draft, statistics=statistics, **SHORTER)
    return statistics.committed


@pytest.mark.parametrize("change", ["deepcopy", "repeat", "select", "reorder", "cut"])
def test_the_draft_accepts_as_much_after_a_change_that_its_context_follows(tiny_target, tiny_draft, change):
    ids = torch.stack([torch.arange(40, 60), torch.arange(50, 70), torch.arange(44, 64)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    cache = DynamicCache(config=tiny_target.config)
    text = turn(tiny_target, ids, mask, cache, tiny_draft, **SHORTER)
    cache, *text = CHANGES[change](cache, *text)
    assert committed(tiny_target, tiny_draft, text, cache) == committed(tiny_target, tiny_draft, text, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_models_and_cache_may_move_to_another_device_between_two_turns(tiny_target, tiny_draft):
    target, draft = copy.deepcopy(tiny_target), copy.deepcopy(tiny_draft)
    cache = DynamicCache(config=target.config)
    text = turn(target, torch.arange(40, 60)[None], torch.ones(1, 20, dtype=torch.long), cache, draft, **LONG)
    expected = committed(target, draft, text, copy.deepcopy(cache))
    target.cuda(), draft.cuda()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.cuda(), layer.values.cuda()
    more = longer(*(part.cuda() for part in text), torch.arange(40, 45, device="cuda")[None])
    statistics = DecodeStatistics()
    ours, _ = turn(target, *more, cache, draft, statistics=statistics, **SHORTER)
    assert torch.equal(ours, turn(target, *more, None, **SHORTER)[0])
    assert statistics.committed == expected


def test_the_draft_has_context_of_the_padding_after_rows_that_ended_early(tiny_target, tiny_draft):
    ids, mask = torch.stack([torch.arange(40, 60), torch.arange(50, 70)]), torch.ones(2, 20, dtype=torch.long)
    whole, _ = turn(tiny_target, ids, mask, None, **LONG)
    ends = {"eos_token_id": int(whole[0, 26]), "pad_token_id": 0, "max_new_tokens": 40}
    cache = DynamicCache(config=tiny_target.config)
    text = turn(tiny_target, ids, mask, cache, tiny_draft, **ends)
    assert (text[0][0, 27:] == 0).all()
    assert text[0].shape[1] > 40
    assert committed(tiny_target, tiny_draft, text, cache) == committed(tiny_target, tiny_draft, text, None)


def test_a_pickle_needs_nothing_of_ours():
    target, draft, _ = tiny_pair("gemma3_text")
    cache = DynamicCache(config=target.config)
    turn(target, tiny.prompt(20), torch.ones(1, 20, dtype=torch.long), cache, draft)
    pickled = pickle.dumps(cache)
    assert b"dflash_hub" not in pickled
    assert pickle.loads(pickled).dflash is None
    assert cache.dflash is not None


def test_context_of_another_draft_is_not_used():
    target, first, second = tiny_pair("qwen3")
    cache = DynamicCache(config=target.config)
    text = turn(target, tiny.prompt(20), torch.ones(1, 20, dtype=torch.long), cache, first)
    more = longer(*text, tiny.prompt(4))
    ours, _ = turn(target, *more, cache, second)
    assert torch.equal(ours, turn(target, *more, None)[0])
    assert cache.dflash.draft() is second
    assert cache.dflash.hidden[0, :31].all()


def test_context_of_other_keys_is_hidden_from_the_draft(tiny_target, tiny_draft):
    """Cropped, and extended by plain `generate` to the length it had: the draft sees what both have in common."""
    ids, mask = torch.arange(40, 60)[None], torch.ones(1, 20, dtype=torch.long)
    first, second = DynamicCache(config=tiny_target.config), DynamicCache(config=tiny_target.config)
    text = turn(tiny_target, ids, mask, first, tiny_draft, **LONG)
    second = copy.deepcopy(first)
    kept = {}
    for name, cache in (("followed", first), ("plain", second)):
        cache.crop(-30)
        start = text[0][:, :29], text[1][:, :29]
        again = turn(tiny_target, *longer(*start, torch.tensor([[33, 34]])), cache, max_new_tokens=30)
        if name == "plain":
            cache.dflash = None
        kept[name] = committed(tiny_target, tiny_draft, again, cache)
    stale = first.dflash.hidden[0]
    assert not stale[:29].any()
    assert stale[29:60].all()
    assert not stale[60:].any()
    assert sum(kept["followed"]) == sum(kept["plain"])


def test_each_row_finds_the_row_with_the_longest_common_beginning():
    ours = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 9], [5, 6, 7, 8]])[..., None]
    theirs = torch.tensor([[5, 6, 7, 0], [1, 2, 9, 9], [0, 2, 3, 4]])[..., None]
    assert matching_rows(theirs, ours) == ([2, 1, 0], [3, 4, 0])
    assert matching_rows(theirs.float(), ours) == ([0, 0, 0], [0, 0, 0])


def test_a_cache_that_a_draft_went_on_with_has_no_context_where_plain_code_wrote_it(tiny_target, tiny_draft):
    ids, mask = torch.arange(40, 60)[None], torch.ones(1, 20, dtype=torch.long)
    cache = DynamicCache(config=tiny_target.config)
    text = turn(tiny_target, ids, mask, cache, **LONG)
    text = turn(tiny_target, *longer(*text, ids[:, :4]), cache, tiny_draft, **LONG)
    turn(tiny_target, *longer(*text, ids[:, :4]), cache, tiny_draft, **LONG)
    assert cache.dflash.hidden[0, :59].all()
    assert not cache.dflash.hidden[0, 59:].any()


# Refused --------------------------------------------------------------------------------------------------------------


def recurrent_recording():
    return recording(tiny_pair("lfm2")[0])


REFUSED = [
    (
        "qwen3",
        lambda: StaticCache(config=tiny_pair("qwen3")[0].config, max_cache_len=30),
        "The text takes 31 slots, but",
    ),
    ("gemma3_text", lambda: StaticCache(config=tiny_pair("gemma3_text")[0].config, max_cache_len=8), "room for 8"),
    ("lfm2", DynamicCache, "The cache was made without a config, but Lfm2ForCausalLM keeps recurrent state"),
    ("lfm2", lambda: DynamicCache(config=tiny_pair("qwen3")[0].config), "Layer 0 of the cache is a DynamicLayer"),
    ("lfm2", recurrent_recording, "The cache records the past of its recurrent layers"),
    ("nemotron_h", lambda: DynamicCache(config=tiny_pair("lfm2")[0].config), "The cache has 4 layers, but NemotronH"),
]


@pytest.mark.parametrize(("family", "make", "reason"), REFUSED)
def test_a_cache_that_cannot_hold_the_text_is_refused_before_any_forward(family, make, reason):
    target, calls = tiny_pair(family)[0], []
    draft, cache = tiny_pair(family)[1], make()
    with target.register_forward_pre_hook(lambda *_: calls.append(1)), pytest.raises(ValueError, match=reason):
        turn(target, tiny.prompt(20), torch.ones(1, 20, dtype=torch.long), cache, draft)
    assert not calls


def test_a_text_that_outgrows_a_static_cache_leaves_it_as_it_was():
    target = tiny_pair("qwen3")[0]
    cache = StaticCache(config=target.config, max_cache_len=25)
    mask = torch.ones(1, 20, dtype=torch.long)
    with pytest.raises(
        ValueError, match="The text takes 31 slots, but the cache has room for 25, so it was not changed"
    ):
        turn(target, tiny.prompt(20), mask, cache, tiny_pair("qwen3")[1], eos_token_id=99)
    assert cache.get_seq_length() == 0


def test_a_static_cache_that_generate_made_is_returned():
    target = tiny_pair("gemma3_text")[0]
    asked = {"cache_implementation": "static", "return_dict_in_generate": True, "max_new_tokens": NEW}
    draft, kept = tiny_pair("gemma3_text")[1], []
    for extra in ({}, {"custom_generate": draft.speculate}):
        given = target.generate(**tiny.batch(20, PADS), do_sample=False, **asked, **extra)
        kept.append((given.sequences, copy.deepcopy(cache_in(given))))
    assert torch.equal(kept[0][0], kept[1][0])
    assert_same_content(kept[0][1], kept[1][1])


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_text_may_follow_an_image_in_the_cache_and_another_image_is_refused(family):
    target, inputs = tiny.seeing(family, True)
    draft, texts = tiny.draft(target), []
    for one in (None, draft):
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        ids, mask, *_ = inputs["input_ids"], inputs["attention_mask"]
        seen = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        text = turn(target, ids, mask, cache, one, **seen)
        texts.append(turn(target, *longer(*text, torch.tensor([[1, 2, 3]])), cache, one))
    assert torch.equal(texts[0][0], texts[1][0])
    with pytest.raises(ValueError, match=r"The cache holds \d+ slots, and .* would follow them"):
        turn(target, *longer(*texts[1], torch.tensor([[1, 2, 3]])), cache, draft, **seen)


def test_a_quantized_cache_is_refused():
    target = tiny_pair("qwen3")[0]
    cache = QuantizedCache.__new__(QuantizedCache)
    super(QuantizedCache, cache).__init__(layers=[])
    with pytest.raises(ValueError, match="The cache is a QuantizedCache; with a draft only a DynamicCache or a Static"):
        turn(target, tiny.prompt(20), torch.ones(1, 20, dtype=torch.long), cache, tiny_pair("qwen3")[1])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next"])
def test_keys_and_values_are_gone_when_a_decode_ends_before_any_collection(family):
    target = tiny.target(family)
    asked = tiny.batch(9, (0, 3)) | {"max_new_tokens": 12, "do_sample": False}
    asked["custom_generate"] = tiny.draft(target).speculate
    gc.collect()
    gc.disable()
    try:
        target.generate(**asked)
        assert not [one for one in gc.get_objects() if type(one) is SlotCache]
    finally:
        gc.enable()

"""A release that runs targets otherwise is an error before the first token, whatever it changed."""

import functools

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from dflash_hub import attention_dflash, cache_dflash, generation_dflash, selfcheck_dflash
from dflash_hub.sequences_dflash import Prompt
from dflash_hub.target_dflash import Target
from test_decode import speculative

FAMILIES = ("qwen3", "gemma3_text", "qwen3_next")  # dense, sliding, recurrent


class Told:
    """A streamer that remembers what was given out."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        pass


def wrap(patch, owner, name, change):
    """Put `change(honest, *args, **kwargs)` in the place of a method, under the method's own signature."""
    honest = getattr(owner, name)

    @functools.wraps(honest)
    def changed(*args, **kwargs):
        return change(honest, *args, **kwargs)

    patch.setattr(owner, name, changed)


def rename_cache(patch, target):
    def renamed(honest, *args, **kwargs):
        kwargs.pop(tiny.CACHE, None)
        return honest(*args, **kwargs)

    wrap(patch, target, "forward", renamed)


def ignore_masks(patch, target):
    def unmasked(honest, *args, attn_mask, **kwargs):
        return honest(*args, attn_mask=None, **kwargs)

    wrap(patch, attention_dflash, "scaled_dot_product_attention", unmasked)


def ignore_positions(patch, target):
    def counted(honest, *args, position_ids=None, **kwargs):
        seen = kwargs[tiny.CACHE].get_seq_length()
        length = kwargs["input_ids"].shape[1]
        return honest(*args, position_ids=torch.arange(seen, seen + length)[None], **kwargs)

    wrap(patch, target, "forward", counted)


def silence_hooks(patch, target):
    layer = target.get_decoder().layers[2]
    patch.setattr(type(layer), "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs))


def write_keys_elsewhere(patch, target):
    def shifted(honest, states, rows, new):
        return honest(states, rows + 1, new)

    wrap(patch, cache_dflash, "write_flat", shifted)


def widen_windows(patch, target):
    def visible(honest, query, key, window, *kind):
        return honest(query, key, None if window is None else window + 1, *kind)

    wrap(patch, attention_dflash, "visible", visible)


def pass_over_attention(patch, target):
    def interface(honest, name, default):
        return honest("sdpa" if str(name).startswith("dflash") else name, default)

    wrap(patch, ALL_ATTENTION_FUNCTIONS, "get_interface", interface)


def norm_before_the_tap(patch, target):
    layer, norm = target.get_decoder().layers[2], target.get_decoder().norm
    wrap(patch, layer, "forward", lambda honest, *args, **kwargs: norm(honest(*args, **kwargs)))


def give_tuples(patch, target):
    layer = target.get_decoder().layers[2]
    hook = layer.register_forward_hook(lambda module, inputs, output: (None, output))
    patch.setattr(torch.nn.Module, "_tidy", hook.remove, raising=False)
    following = target.get_decoder().layers[3]
    second = following.register_forward_pre_hook(lambda module, args: (args[0][1], *args[1:]))
    patch.setattr(torch.nn.Module, "_tidy_too", second.remove, raising=False)


def keep_rejected_state(patch, target):
    for user in (generation_dflash, selfcheck_dflash):
        patch.setattr(user, "roll_back", lambda recurrent, snapshot, committed, size: None)


def ignore_logits_to_keep(patch, target):
    def whole(honest, *args, logits_to_keep=0, **kwargs):
        return honest(*args, **kwargs)

    wrap(patch, target, "forward", whole)


def scale_logits_of_blocks(patch, target):
    def scaled(honest, *args, **kwargs):
        output = honest(*args, **kwargs)
        if kwargs.get(tiny.CACHE) is not None and kwargs[tiny.CACHE].get_seq_length():
            output.logits = output.logits * 1.5
        return output

    wrap(patch, target, "forward", scaled)


CHANGES = (
    rename_cache,
    ignore_masks,
    ignore_positions,
    silence_hooks,
    write_keys_elsewhere,
    widen_windows,
    pass_over_attention,
    norm_before_the_tap,
    give_tuples,
    keep_rejected_state,
    ignore_logits_to_keep,
    scale_logits_of_blocks,
)
# What a family without windows, or without recurrent state, cannot meet.
ELSEWHERE = {widen_windows: ("gemma3_text",), keep_rejected_state: ("qwen3_next",)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("length", [1, 40])
def test_what_a_release_changes_is_an_error_before_the_first_token(family, change, length, monkeypatch):
    if family not in ELSEWHERE.get(change, FAMILIES):
        pytest.skip(f"{family} has nothing that {change.__name__} could change")
    target, told = tiny.target(family), Told()
    draft, ids = tiny.draft(target, target_layer_ids=[0, 2]), tiny.prompt(length)
    with monkeypatch.context() as patch:
        change(patch, target)
        with pytest.raises(
            ValueError, match=r"transformers \d+\.\d+\.\d+, torch .* not written\. .* (upgrade it|without a draft)"
        ):
            speculative(target, draft, ids, 20, streamer=told)
    assert sum(tokens.numel() for tokens in told.tokens) <= length, "text was given out"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_check_is_made_once_for_all_drafts_and_again_when_something_changes(family, monkeypatch):
    from dflash_hub import generate_dflash

    checks = []
    wrap(monkeypatch, generate_dflash, "check_alone", lambda honest, *args: checks.append(1) or honest(*args))
    target = tiny.target(family)
    draft = tiny.draft(target)
    for length in (5, 9):
        speculative(target, draft, tiny.prompt(length), 5)
    speculative(target, tiny.draft(target, seed=2), tiny.prompt(5), 5)
    assert len(checks) == 1
    for fields in ({"block_size": 4}, {"target_layer_ids": [1]}):
        for seed in (1, 2):
            speculative(target, tiny.draft(target, seed, **fields), tiny.prompt(5), 5)
    assert len(checks) == 3
    inputs = tiny.batch(20, pads=(0, 3))
    target.generate(**inputs, max_new_tokens=5, do_sample=False, custom_generate=draft.speculate)
    assert len(checks) == 4
    target.to(torch.bfloat16)
    draft.to(torch.bfloat16)
    speculative(target, draft, tiny.prompt(5), 5)
    assert len(checks) == 5


@pytest.mark.quick
def test_a_check_that_failed_is_made_again():
    target = tiny.target("qwen3")
    draft, ids = tiny.draft(target), tiny.prompt(40)
    with pytest.MonkeyPatch.context() as patch:
        write_keys_elsewhere(patch, target)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"A block over dflash-hub's cache is not what|cached"):
                speculative(target, draft, ids, 8)
    assert torch.equal(speculative(target, draft, ids, 8)[0], tiny.greedy(target, ids, 8))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_change_behind_the_short_text_is_found_on_the_prompt_itself(family):
    """Blocks differ from slot 75 on, which no text of the check's own reaches."""
    target, told = tiny.target(family), Told()
    ids = tiny.prompt(90)

    def late(honest, *args, **kwargs):
        output = honest(*args, **kwargs)
        cache = kwargs.get(tiny.CACHE)
        block = cache is not None and 1 < kwargs["input_ids"].shape[1] < 20
        if block and int(kwargs["position_ids"].max()) > 75:
            output.logits = output.logits.roll(1, dims=-1)
        return output

    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, target, "forward", late)
        with pytest.raises(ValueError, match=r"at slot \d+ of row 0 the logits differ"):
            speculative(target, tiny.draft(target), ids, 20, streamer=told)
    assert sum(tokens.numel() for tokens in told.tokens) <= 90, "text was given out"


def test_a_prompt_on_another_device_than_the_target_is_refused_with_both():
    elsewhere = Prompt(tiny.prompt(9).to("meta"), {})
    with pytest.raises(ValueError, match=r"input_ids are on meta, but Qwen3ForCausalLM is on c.*Move them: input_ids"):
        selfcheck_dflash.check_alone(Target(tiny.target("qwen3"), (0, 2)), 5, elsewhere)

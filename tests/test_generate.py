"""Whatever `generate` prepares is honoured as without a draft."""

import copy
import functools
import shutil
import threading

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import tiny
from dflash_hub import support_dflash
from paths import TINY


def both(target, draft, **inputs):
    """What `generate` gives without and with the draft."""
    inputs = {"do_sample": False} | inputs
    plain = target.generate(**copy.deepcopy(inputs) if "streamer" not in inputs else inputs)
    return plain, target.generate(**inputs, custom_generate=draft.speculate)


@pytest.fixture(scope="module")
def pair():
    return tiny.shallow()


PADDED = tiny.batch(9, pads=(0, 3, 5, 1))


def test_the_draft_may_also_be_given_as_the_assistant(pair):
    target, draft = pair
    inputs = {name: value[:1] for name, value in PADDED.items()}
    plain, ours = both(target, draft, **inputs, max_new_tokens=20)
    both_ways = {"assistant_model": draft, "custom_generate": draft.speculate}
    assert torch.equal(target.generate(**inputs, max_new_tokens=20, do_sample=False, **both_ways), plain)
    assert torch.equal(plain, ours)


@pytest.mark.quick
def test_generation_settings_may_come_from_the_target_or_in_a_config(pair):
    target, draft = pair
    settings = GenerationConfig(max_new_tokens=12, repetition_penalty=1.4, eos_token_id=5, pad_token_id=0)
    plain, ours = both(target, draft, **PADDED, generation_config=settings)
    assert torch.equal(plain, ours)
    before, target.generation_config = target.generation_config, settings
    try:
        assert torch.equal(plain, both(target, draft, **PADDED)[1])
    finally:
        target.generation_config = before


def test_rows_end_at_different_times_and_are_padded(pair):
    ends = set()
    for stop in (0, 4, 8):
        plain, ours = both(*pair, **PADDED, max_new_tokens=24, eos_token_id=stop, pad_token_id=11)
        assert torch.equal(plain, ours)
        ends |= {row.index(stop) if stop in row else 24 for row in plain[:, 9:].tolist()}
    assert len(ends) > 4


class Seen:
    """A streamer that keeps what it is told."""

    def __init__(self):
        self.told, self.ended = [], 0

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_in_another_thread_gives_the_text(tiny_target, tiny_draft):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    inputs = tokenizer("def main():", return_tensors="pt")
    asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = tokenizer.decode(tiny_target.generate(**inputs, **asked)[0])
    streamer = TextIteratorStreamer(tokenizer)
    call = {**inputs, **asked, "streamer": streamer, "custom_generate": tiny_draft.speculate}
    thread = threading.Thread(target=tiny_target.generate, kwargs=call)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


class Asks(StoppingCriteria):
    """A criterion that runs the target itself, on the text so far; counts where it disagrees with the last token."""

    def __init__(self, target):
        self.target, self.wrong, self.asked = target, 0, 0

    def __call__(self, input_ids, scores, **kwargs):
        own = self.target(input_ids[:, :-1]).logits[:, -1].argmax(-1)
        self.wrong += int((own != input_ids[:, -1]).sum())
        self.asked += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_next"])
def test_a_stopping_criterion_may_call_the_target(family):
    target, ids = tiny.target(family), tiny.prompt(20)
    criterion, draft = Asks(target), tiny.draft(target)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    criteria = StoppingCriteriaList([criterion])
    ours = target.generate(ids, **asked, custom_generate=draft.speculate, stopping_criteria=criteria)
    assert torch.equal(ours, tiny.greedy(target, ids, 10))
    assert criterion.wrong == 0
    assert criterion.asked == 10


def test_max_time_ends_a_text_soon(pair):
    target, draft = pair
    inputs = {name: value[:1] for name, value in PADDED.items()}
    text = target.generate(
        **inputs, max_new_tokens=5000, max_time=0.2, do_sample=False, custom_generate=draft.speculate
    )
    assert 9 < text.shape[1] < 2000


def conversation(target, cache, **extra) -> torch.Tensor:
    """Three turns with one cache; the text, with what was said after the last."""
    ids = tiny.prompt(20)
    for turn in range(3):
        asked = {"max_new_tokens": 7, "do_sample": False, tiny.CACHE: cache}
        ids = target.generate(ids, attention_mask=torch.ones_like(ids), **asked, **extra)
        assert cache.get_seq_length() == ids.shape[1] - 1
        ids = torch.cat([ids, tiny.prompt(6, seed=turn)], dim=1)
    return ids


@pytest.mark.parametrize(
    ("family", "knows_layers"),
    [
        ("gemma3_text", True),
        ("gemma4_text-shared", True),
        ("qwen3_next", True),
        ("gemma3_text", False),
        ("deepseek_v3", False),
    ],
)
def test_a_cache_carries_a_conversation_on(family, knows_layers):
    """A cache that was made without a config knows no layers; `test_caches.py` has more, of two turns."""
    target = tiny.target(family)
    texts = []
    for more in ({}, {"custom_generate": tiny.draft(target).speculate}):
        cache = DynamicCache(config=target.config) if knows_layers else DynamicCache()
        texts.append(conversation(target, cache, **more))
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"num_beams": 2}, "num_beams above 1"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha|Contrastive"),
        ({"dola_layers": "low"}, "dola_layers|Dola|DoLa"),
        ({"draft_sampling": "hot"}, "draft_sampling is 'hot'; it must be one of greedy, coupled"),
        ({"capture": "film"}, "capture is 'film'; it must be one of auto"),
        ({"statistics": 3}, r"statistics is 3; it must be a DecodeStatistics\(\)"),
        ({"proposer": 3}, "proposer is 3; it must be a function of the draft's proposer"),
        ({"cache_implementation": "offloaded"}, "an offloaded cache"),
    ],
)
def test_what_has_no_meaning_with_a_draft_is_refused_with_the_reason(pair, asked, reason):
    target, draft = pair
    if "offloaded" in reason and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip(
            "transformers makes an offloaded cache before we are asked; a CUDA build of torch needs a GPU for it"
        )
    with pytest.raises(ValueError, match=reason):
        target.generate(**PADDED, max_new_tokens=5, custom_generate=draft.speculate, **asked)
    assert tiny.as_found(target)


def test_a_prompt_without_tokens_is_refused(pair):
    target, draft = pair
    nothing = {name: value[:1, :0] for name, value in PADDED.items()}
    with pytest.raises(ValueError, match=r"input_ids has shape \(1, 0\); a prompt needs at least one token"):
        target.generate(**nothing, max_new_tokens=5, custom_generate=draft.speculate)


def test_two_threads_on_one_target_take_turns(pair):
    target, draft = pair
    asked = {**PADDED, "max_new_tokens": 16, "do_sample": False}
    plain, texts = target.generate(**asked), []

    def run():
        texts.append(target.generate(**asked, custom_generate=draft.speculate))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 3
    assert all(torch.equal(text, plain) for text in texts)


@pytest.mark.filterwarnings("ignore")
def test_traced_blocks_give_the_same_text_while_batches_change_and_buffers_grow(monkeypatch):
    """The graphs that were traced, with their guards, run as they are; to compile each of them takes a minute.

    The target has a layer of either kind of attention.
    """
    kinds = {
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    }
    monkeypatch.setitem(tiny.FAMILIES, "gemma3 of two layers", tiny.FAMILIES["gemma3_text"] | kinds)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    target = tiny.target("gemma3 of two layers")
    draft = tiny.draft(target, target_layer_ids=[0, 1], num_hidden_layers=1)
    for rows, length, new in ((3, 12, 10), (1, 300, 6)):
        inputs = tiny.batch(length, pads=(0, 3, 5)[:rows])
        asked = inputs | {"max_new_tokens": new, "do_sample": False}
        plain = target.generate(**asked)
        assert torch.equal(target.generate(**asked, custom_generate=draft.speculate, capture="compile"), plain)
    assert len(draft.speculate.compiled_session.target.runner.verified_keys) == 2
    assert tiny.as_found(target)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; install g++")
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_give_the_same_text(monkeypatch):
    """Of the smallest pair, of one layer each."""
    # The compiler would first compile programs that try which instructions there are.
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)
    monkeypatch.setitem(tiny.FAMILIES, "smallest", {"model_type": "qwen3", "num_hidden_layers": 1})
    target = tiny.target("smallest")
    draft = tiny.draft(target, target_layer_ids=[0], num_hidden_layers=1)
    inputs = {name: value[:1] for name, value in PADDED.items()}
    asked = inputs | {"max_new_tokens": 12, "do_sample": False}
    plain = target.generate(**asked)
    assert torch.equal(target.generate(**asked, custom_generate=draft.speculate, capture="compile"), plain)
    assert draft.speculate.compiled_session.target.runner.verified_keys
    assert tiny.as_found(target)


SEEING = [(family, *way) for family in ("qwen3_5", "gemma3", "gemma4") for way in ((False, 2), (True, 1), (True, 2))]


@pytest.mark.parametrize(("family", "image", "rows"), [*SEEING, ("qwen3_5_moe", True, 2)])
def test_targets_that_see_images_decode_with_and_without_one(family, image, rows):
    target, inputs = tiny.seeing(family, image)
    if rows == 1:
        inputs = {name: value[: len(value) // 2] for name, value in inputs.items()}
    new = 24 if family == "gemma3" and image else 12  # its text begins with one token over and over
    plain, ours = both(target, tiny.draft(target), **inputs, max_new_tokens=new)
    assert torch.equal(plain, ours)
    assert len(set(plain[0, inputs["input_ids"].shape[1] :].tolist())) > 4


def test_draft_and_target_may_differ_in_dtype(pair):
    target, _ = pair
    draft = tiny.shallow()[1].to(torch.bfloat16)
    plain, ours = both(target, draft, **PADDED, max_new_tokens=12)
    assert torch.equal(plain, ours)


def test_a_target_without_a_draft_gets_its_own_resolved_and_loaded_once(hub, repo_id, monkeypatch):
    from dflash_hub import DFlashDraftSpec, dflash_generate, register_dflash_draft, registry

    monkeypatch.setattr(registry, "CATALOGUE", list(registry.CATALOGUE))
    target = tiny.target("qwen3")
    target.config.architectures = ["TinyForCausalLM"]
    draft = tiny.draft(target)
    draft.push_to_hub(repo_id)
    spec = DFlashDraftSpec(
        repo_id, hidden_size=32, num_target_layers=4, vocab_size=tiny.VOCAB, targets=("tiny/target",)
    )
    register_dflash_draft("TinyForCausalLM", spec)
    target.config._name_or_path = "tiny/target"
    try:
        plain = target.generate(**PADDED, max_new_tokens=12, do_sample=False)
        first = target.generate(**PADDED, max_new_tokens=12, do_sample=False, custom_generate=dflash_generate)
        hub.state.log.clear()
        streamer = Seen()
        second = target.generate(
            **PADDED, max_new_tokens=12, do_sample=False, custom_generate=dflash_generate, streamer=streamer
        )
    finally:
        del registry.DFLASH_DRAFT_REGISTRY["TinyForCausalLM"]
    assert torch.equal(plain, first)
    assert torch.equal(plain, second)
    assert streamer.ended == 1
    assert not hub.state.log, "the draft was asked for again"


def test_a_target_that_no_draft_is_known_for_is_told_so(pair):
    from dflash_hub import dflash_generate

    with pytest.raises(ValueError, match=r"No DFlash draft|made for|fits"):
        pair[0].generate(**PADDED, max_new_tokens=4, custom_generate=dflash_generate)


def test_a_target_that_is_gone_is_not_kept_alive():
    import gc
    import weakref

    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    both(target, draft, **PADDED, max_new_tokens=5)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("fault", ["raises", "lies", "does nothing"])
def test_what_cannot_be_captured_runs_as_it_is_and_says_so(pair, fault, monkeypatch, caplog):
    from dflash_hub import execution_dflash

    def record(run, device):
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        outputs = run()
        if fault == "does nothing":  # as a graph of another device than that of the block
            return lambda: None, outputs
        return (
            lambda: [one.mul_(-1) for one in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]
        ), outputs

    monkeypatch.setattr(execution_dflash, "record", record)
    monkeypatch.setattr(execution_dflash.logger, "warning_once", lambda text: said.append(text))
    said: list[str] = []
    target, draft = pair
    asked = {**PADDED, "max_new_tokens": 16, "do_sample": False}
    plain = target.generate(**asked)
    ours = target.generate(**asked, custom_generate=draft.speculate, capture="graphs")
    assert torch.equal(plain, ours)
    assert len(said) == 2
    assert "capture='graphs'" in said[0]


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize(("new", "rows"), [(12, 1), (14, 1), (15, 1), (14, 3)])
def test_a_target_that_learned_its_positions_writes_to_the_last_of_them(new, rows, capture, monkeypatch):
    """A block looks beyond the end of the text, where there is no position."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=4, n_positions=20, vocab_size=12)
    torch.manual_seed(0)
    target = tiny.scaled(AutoModelForCausalLM.from_config(config).eval(), "gpt2")
    inputs = tiny.batch(6, (0, 2, 1)[:rows])
    asked = inputs | {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(**asked)
    ours = target.generate(**asked, custom_generate=tiny.draft(target).speculate, capture=capture)
    assert torch.equal(ours, plain)
    assert plain.shape[1] == 6 + new


def test_padding_on_the_right_is_told_with_its_cure_and_the_text_is_plain(pair, monkeypatch):
    target, draft = pair
    said = []
    monkeypatch.setattr(support_dflash.logger, "warning_once", said.append)
    both(target, draft, **PADDED, max_new_tokens=4)
    assert said == []
    mask = PADDED["attention_mask"].flip(-1)
    plain, ours = both(target, draft, input_ids=PADDED["input_ids"], attention_mask=mask, max_new_tokens=9)
    assert torch.equal(plain, ours)
    assert len(said) == 1
    assert 'Pad on the left: tokenizer.padding_side = "left".' in said[0]

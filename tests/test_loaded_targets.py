"""Targets as people load them: offloaded, compiled, in training mode, with tokens added, from several threads."""

import functools
import threading
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

import tiny

PROMPT = {"input_ids": tiny.prompt(12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
ASKED = PROMPT | {"max_new_tokens": 10, "do_sample": False}


def same_text(target, draft, **more) -> bool:
    plain = target.generate(**ASKED | more)
    return torch.equal(target.generate(**ASKED | more, custom_generate=draft.speculate), plain)


# Training mode ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "nemotron_h"])
def test_gradient_checkpointing_in_training_mode_changes_no_text_and_stays_on(family):
    target = tiny.target(family)
    draft, expected = tiny.draft(target), target.generate(**ASKED)
    target.train()
    target.gradient_checkpointing_enable()
    draft.train()
    draft.gradient_checkpointing_enable()
    assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate), expected)
    # Without a cache every version gives that text; with one, 5.15 reads the last token only.
    assert torch.equal(target.generate(**ASKED, use_cache=False), expected)
    for model in (target, draft):
        assert model.training
        assert model.is_gradient_checkpointing


def dropping(rate: float):
    config = AutoConfig.for_model("gpt2", vocab_size=12, n_embd=32, n_layer=4, n_head=4, n_positions=99)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = rate
    config.eos_token_id = None
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("part", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_in_training_mode_is_refused_until_the_target_is_in_evaluation_mode(part):
    config = dropping(0.0).config
    setattr(config, part, 0.2)
    target = AutoModelForCausalLM.from_config(config).eval()
    draft = tiny.draft(target)
    speculate, expected = draft.speculate, target.generate(**ASKED)
    assert torch.equal(target.generate(**ASKED, custom_generate=speculate), expected)
    target.train()
    with pytest.raises(ValueError, match="is in training mode, and its forward draws random numbers"):
        target.generate(**ASKED, custom_generate=speculate)
    assert target.training
    target.eval()
    assert torch.equal(target.generate(**ASKED, custom_generate=speculate), expected)


@pytest.mark.quick
def test_training_mode_without_dropout_gives_the_targets_text():
    target = dropping(0.0).train()
    assert same_text(target, tiny.draft(target))


# Offloaded weights --------------------------------------------------------------------------------------------------


PARTS = ("model.embed_tokens", *(f"model.layers.{layer}" for layer in range(4)), "model.norm", "lm_head")
CPU = dict.fromkeys((*PARTS, "model.rotary_emb"), "cpu")


def on_disk(*parts: str):
    """Load with these parts on disk, by device_map."""
    return lambda accelerate, target, folder: reloaded(target, folder, CPU | dict.fromkeys(parts, "disk"))


def reloaded(target, folder, device_map):
    target.save_pretrained(folder)
    options = {"device_map": device_map, "offload_folder": folder / "off", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


WAYS = {
    "map of one device": lambda accelerate, target, folder: reloaded(target, folder, {"": "cpu"}),
    "tapped layers on disk": on_disk("model.layers.1", "model.layers.2", "model.norm"),
    "embedding on disk": on_disk("model.embed_tokens"),
    "head on disk": on_disk("lm_head"),
    "all on disk": lambda accelerate, target, folder: reloaded(target, folder, {"": "disk"}),
    "cpu_offload": lambda accelerate, target, folder: accelerate.cpu_offload(
        target, execution_device="cpu", offload_buffers=True
    ),
    "disk_offload": lambda accelerate, target, folder: accelerate.disk_offload(target, folder, execution_device="cpu"),
    "dispatch_model": lambda accelerate, target, folder: accelerate.dispatch_model(
        target, CPU | {"model.layers.1": "disk"}, main_device="cpu", offload_dir=folder
    ),
    "with hook": lambda accelerate, target, folder: accelerate.cpu_offload_with_hook(target, "cpu")[0],
}


@pytest.fixture(scope="module")
def accelerate():
    return pytest.importorskip("accelerate", reason="accelerate is not installed; pip install 'dflash-hub[train]'")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_targets_give_their_own_text(way, accelerate, tmp_path):
    target = tiny.target("qwen3")
    draft, expected = tiny.draft(target), target.generate(**ASKED)
    target = WAYS[way](accelerate, target, tmp_path)
    assert any(weight.is_meta for weight in target.parameters()) == (way not in ("map of one device", "with hook"))
    more = {"cpu_offload": ("compile",), "all on disk": ("eager",)}
    for capture in ("auto", *more.get(way, ())):
        text = target.generate(**ASKED, custom_generate=draft.speculate, capture=capture)
        assert torch.equal(text, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma2", "qwen3_5_text"])
def test_other_families_that_are_offloaded_too(family, accelerate):
    target = tiny.target(family)
    draft, expected = tiny.draft(target), target.generate(**ASKED)
    target = accelerate.cpu_offload(target, execution_device="cpu")
    assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("blocks", "part"), [(["Qwen3Model"], "embedding"), (["Linear"], None), ([], None)])
def test_an_embedding_without_a_loader_of_its_own_is_refused_before_any_forward(blocks, part, accelerate):
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    expected = target.generate(**ASKED)
    target = accelerate.cpu_offload(target, execution_device="cpu", preload_module_classes=blocks)
    if part is None:
        assert torch.equal(target.generate(**ASKED, custom_generate=draft.speculate), expected)
        return
    target.model.layers[0].register_forward_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=f"The {part} of Qwen3ForCausalLM is on the meta device"):
        target.generate(**ASKED, custom_generate=draft.speculate)


@pytest.mark.quick
def test_a_target_that_has_no_weights_at_all_is_refused_by_name():
    target = tiny.target("qwen3").to("meta")
    draft = tiny.draft(tiny.target("qwen3"))
    with pytest.raises(ValueError, match="The embedding of Qwen3ForCausalLM is on the meta device"):
        draft.spec_generate(target, PROMPT["input_ids"])


@pytest.mark.quick
def test_a_draft_without_its_weights_is_refused_by_name():
    target = tiny.target("qwen3")
    draft = tiny.draft(target).to("meta")
    with pytest.raises(ValueError, match="Weights of the draft are on the meta device"):
        target.generate(**ASKED, custom_generate=draft.speculate)


# Vocabularies -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("rows", "multiple", "tied", "kind"),
    [
        pytest.param(14, None, True, {}, id="added"),
        pytest.param(13, 16, False, {}, id="padded"),
        pytest.param(64, None, True, tiny.SECOND, id="many"),
        pytest.param(10, None, False, tiny.SECOND, id="fewer"),
    ],
)
def test_rows_added_to_a_vocabulary_or_padding_taken_away_do_not_make_another_target(rows, multiple, tied, kind):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, **kind)
    if tied:
        target.config.tie_word_embeddings = True
        target.tie_weights()
    speculate = draft.speculate
    ids = PROMPT["input_ids"].clamp_max(9)
    target.generate(**ASKED | {"input_ids": ids}, custom_generate=speculate)
    target.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    expected = target.generate(**ASKED | {"input_ids": ids})
    assert torch.equal(target.generate(**ASKED | {"input_ids": ids}, custom_generate=speculate), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("rows", "mask", "message"),
    [
        (11, 11, "mask_token_id is 11 in the draft, but the target has 11 embedding rows"),
        (8, 3, "vocab_size is 12 in the draft, but the target has 8"),
    ],
)
def test_a_vocabulary_that_lost_the_mask_token_or_most_others_is_refused_by_name(rows, mask, message):
    target = tiny.target("qwen3")
    draft = tiny.draft(target, mask_token_id=mask)
    target.resize_token_embeddings(rows)
    with pytest.raises(ValueError, match=message):
        target.generate(**ASKED, custom_generate=draft.speculate)


# Threads ------------------------------------------------------------------------------------------------------------


def in_threads(calls) -> list:
    """What each of `calls` gave, or raised; each runs in a thread of its own."""
    given = [None] * len(calls)

    def run(index, call):
        try:
            given[index] = call()
        except Exception as error:
            given[index] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


def pairs_of(kind: str) -> list:
    """Three targets and drafts that decode at the same time."""
    target = tiny.target("qwen3")
    drafts = [tiny.draft(target, seed=seed) for seed in range(3)]
    if kind == "one target":
        return [(target, draft) for draft in drafts]
    if kind == "one draft":
        return [(tiny.target("qwen3", seed=seed), drafts[0]) for seed in range(3)]
    others = [Qwen3ForCausalLM(target.config).eval() for _ in range(2)]
    return list(zip([target, *others], drafts, strict=True))


@pytest.mark.parametrize("kind", ["one target", "one draft", "one config"])
def test_decodes_that_share_a_model_or_a_config_take_turns(kind):
    pairs = pairs_of(kind)
    ids = [tiny.prompt(9 + index, seed=index) for index in range(3)]
    expected = [tiny.greedy(target, text, 16) for (target, _), text in zip(pairs, ids, strict=True)]
    asked = {"max_new_tokens": 16, "do_sample": False}
    calls = []
    for (target, draft), text in zip(pairs, ids, strict=True):
        more = {"attention_mask": torch.ones_like(text), "custom_generate": draft.speculate}
        calls.append(functools.partial(target.generate, text, **asked, **more))
    for given, plain in zip(in_threads(calls), expected, strict=True):
        assert torch.equal(given, plain), given
    for target, draft in pairs:
        assert tiny.as_found(target)
        assert draft.config._attn_implementation == "sdpa"


# Compiled targets ---------------------------------------------------------------------------------------------------


def compile_forward(target):
    target.forward = torch.compile(target.forward, backend="eager")


def compile_decoder(target):
    target.model = torch.compile(target.model, backend="eager")


def compile_layers(target):
    for layer in target.model.layers:
        layer.compile(backend="eager")


COMPILED = {
    "wrapper": lambda target: torch.compile(target, backend="eager"),
    "forward": compile_forward,
    "in place": lambda target: target.compile(backend="eager"),
    "decoder": compile_decoder,
    "layers": compile_layers,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_targets_give_their_own_text_and_stay_compiled(how):
    target = tiny.target("qwen3")
    draft, expected = tiny.draft(target), target.generate(**ASKED)
    made = COMPILED[how](target)
    compiled = target if made is None else made
    before = [dict(vars(module)) for module in compiled.modules()]
    assert torch.equal(compiled.generate(**ASKED, custom_generate=draft.speculate), expected)
    assert torch.equal(draft.spec_generate(compiled, PROMPT["input_ids"], max_new_tokens=10), expected)
    for module, found in zip(compiled.modules(), before, strict=True):
        for name in ("forward", "_compiled_call_impl"):
            assert vars(module).get(name) is found.get(name)


def test_a_wrapper_of_ones_own_around_a_compiled_forward_still_runs():
    target, calls = tiny.target("qwen3"), []
    compiled = torch.compile(target.lm_head.forward, backend="eager")

    @functools.wraps(compiled)
    def counted(states):
        calls.append(states.shape[1])
        return compiled(states)

    target.lm_head.forward = counted
    target.generate(**ASKED, custom_generate=tiny.draft(target).speculate)
    assert calls


# Grad modes, dtypes, attention, generation configs ------------------------------------------------------------------


MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize("mode", MODES)
def test_no_grad_mode_changes_the_text_and_no_graph_is_held(mode):
    target = tiny.target("qwen3").requires_grad_(True)
    target.enable_input_require_grads()
    draft = tiny.draft(target).requires_grad_(True)
    with MODES[mode]():
        assert same_text(target, draft)
        assert torch.equal(draft.spec_generate(target, PROMPT["input_ids"], 10), target.generate(**ASKED))
        output = target.generate(
            **ASKED, custom_generate=draft.speculate, return_dict_in_generate=True, output_logits=True
        )
    tensors = [*output.logits, *(layer.keys for layer in output[tiny.CACHE].layers)]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize(
    ("first", "second"), [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
def test_a_cache_of_one_grad_mode_goes_on_in_another(first, second):
    target = tiny.target("gemma2")
    texts = []
    for more in ({}, {"custom_generate": tiny.draft(target).speculate}):
        with first():
            turn = target.generate(**ASKED, **more, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, tiny.prompt(5, seed=9)], dim=1)
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        with second():
            texts.append(target.generate(ids, **asked, **more, **{tiny.CACHE: turn[tiny.CACHE]}))
    assert torch.equal(*texts)


def embedding_in_bfloat16(target, draft):
    target.get_input_embeddings().to(torch.bfloat16)


SETTINGS = {
    "bfloat16, draft in float32": lambda target, draft: target.to(torch.bfloat16) and None,
    "float16, draft in float32": lambda target, draft: target.half() and None,
    "draft in bfloat16": lambda target, draft: draft.to(torch.bfloat16) and None,
    "embedding in bfloat16": embedding_in_bfloat16,
    "no gradients": lambda target, draft: target.requires_grad_(False) and None,
    "eager": lambda target, draft: target.set_attn_implementation("eager"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
def test_dtypes_and_attention_of_any_kind_change_no_text(setting):
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    SETTINGS[setting](target, draft)
    assert same_text(target, draft)


@pytest.mark.parametrize(
    "odd",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_legacy_cache": True},
        {"max_length": None},
        {"max_length": 14},
        {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_a_generation_config_with_odd_values_is_followed(odd):
    target = tiny.target("qwen3")
    for name, value in odd.items():
        setattr(target.generation_config, name, value)
    draft, asked = tiny.draft(target), PROMPT | {"max_new_tokens": 10}
    plain = target.generate(**asked)
    assert torch.equal(target.generate(**asked, custom_generate=draft.speculate), plain)
    assert len(plain) == odd.get("num_return_sequences", 1)


def test_weights_that_are_quantised_by_their_inputs_are_stopped_by_the_self_check():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = torch.ao.quantization.quantize_dynamic(tiny.target("qwen3"), {torch.nn.Linear}, torch.qint8)
    draft = tiny.draft(target)
    # One scale serves all tokens of a forward, so a token beside others is not what it is alone.
    with pytest.raises(ValueError, match="A block over dflash-hub's cache is not what Qwen3ForCausalLM"):
        target.generate(**ASKED, custom_generate=draft.speculate)

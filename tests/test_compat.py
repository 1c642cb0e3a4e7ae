"""What leans on a version of transformers lies in one file, and works with old names and new ones."""

import ast

import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

import tiny
from dflash_hub import compat_dflash as compat
from dflash_hub.cache_dflash import rewindable_cache
from paths import ROOT

OURS = [path for folder in (".", "training") for path in sorted((ROOT / folder).glob("*.py"))]
# Names that a library asks others to use, or hands out under an underscore.
OF_OTHERS = {
    "_parameters": "torch.nn.Module: its own parameters by name",
    "_forward_hooks": "torch.nn.Module: what runs after its forward",
    "_forward_pre_hooks": "torch.nn.Module: what runs before its forward",
    "_buffers": "torch.nn.Module: its own buffers by name",
    "_schema": "torch: the arguments and results of an operation",
    "_to_copy": "torch: the operation behind `to`",
    "_unsafe_view": "torch: a view whose schema calls its result new",
    "_getframe": "sys",
    "_compile": "flex_attention: whether its mask is made by compiled code",
    "_internal_call": "Trainer.save_model: the Trainer's own way of saving, without a push",
    "_replace": "typing.NamedTuple: its public way of changing a field",
    "_apply": "torch.nn.Module: what moves and casts a module",
    "_init_weights": "PreTrainedModel: what a model overrides to begin with weights of its own",
    "_from_config": "AutoModel calls it on what is registered",
    "_save": "Trainer: overridden",
    "_save_checkpoint": "Trainer: overridden",
    "_push_from_checkpoint": "Trainer: overridden",
}


def names_used(tree: ast.AST) -> set[str]:
    """Private names that code reads from something else than itself, passes as keywords, or spells out."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            used.add(node.attr)
        if isinstance(node, ast.keyword) and node.arg:
            used.add(node.arg)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            used |= {argument.value for argument in node.args[1:] if isinstance(argument, ast.Constant)}
    return {name for name in used if isinstance(name, str) and name.startswith("_") and not name.startswith("__")}


def names_defined(tree: ast.AST) -> set[str]:
    """Names that code gives to functions, attributes, arguments and variables of its own."""
    defined = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            defined.add(node.attr)
        if isinstance(node, ast.arg):
            defined.add(node.arg)
    return defined


@pytest.mark.quick
def test_no_private_name_of_transformers_is_used_outside_of_one_file():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in OURS}
    ours = set().union(*(names_defined(tree) for path, tree in trees.items() if path.name != "compat_dflash.py"))
    for path, tree in trees.items():
        if path.name != "compat_dflash.py":
            assert not names_used(tree) - ours - set(OF_OTHERS), path.name


def test_the_names_that_the_trainer_is_overridden_by_are_there():
    pytest.importorskip("accelerate", reason="accelerate is not installed; pip install 'dflash-hub[train]' runs this")
    trainer = transformers.Trainer
    overridden = ["_save", "_save_checkpoint", "_push_from_checkpoint", "get_batch_samples", "create_model_card"]
    assert all(hasattr(trainer, name) for name in overridden)


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_the_cache_is_found_by_each_of_its_names(name):
    scope: dict = {}
    exec(f"def forward(input_ids, {name}=None): pass", scope)
    assert compat.cache_name(scope["forward"]) == name
    cache = object()
    assert compat.cache_in({name: cache, "use_cache": True}) is cache
    assert compat.without_cache({name: cache, "use_cache": True}) == {"use_cache": True}


def test_a_forward_without_a_cache_is_refused_with_the_versions():
    with pytest.raises(ValueError, match=r"takes no cache by any name .* transformers \d"):
        compat.cache_name(lambda input_ids: None)


def test_a_draft_takes_its_cache_by_either_name_and_not_by_both():
    target = tiny.target("qwen3")
    draft = tiny.draft(target)
    noise, context = torch.randn(1, 5, 32), torch.randn(1, 7, 64)
    results = []
    for name in ("cache", "past_key_values"):
        cache = rewindable_cache(draft.config)
        output = draft(noise, context, **{name: cache})
        assert getattr(output, compat.cache_field(BaseModelOutputWithPast)) is cache
        assert cache.get_seq_length() == 12
        results.append(output.last_hidden_state)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="name the same thing"):
        draft(noise, context, cache=cache, past_key_values=cache)


def test_a_generate_that_keeps_its_streamer_elsewhere_is_an_error():
    scope: dict = {"__name__": compat.GENERATE, "sys": __import__("sys")}
    exec("def generate(tokens):\n    return sys._getframe(0)", scope)
    with pytest.raises(RuntimeError, match="holds no 'streamer'"):
        compat.local_of_generate("streamer", scope["generate"](1))
    assert compat.local_of_generate("tokens", scope["generate"](1)) == 1
    assert compat.local_of_generate("streamer", None) is None

"""The table of kinds: each row is complete, and kinds are named nowhere else."""

import re

import pytest

import tiny
from dflash_hub import load_draft
from dflash_hub.kinds import KINDS, kind_of
from dflash_hub.layouts_dflash import BASE, DRAFT_LAYOUTS, FIELDS
from dflash_hub.training.heads import HEADS
from dflash_hub.training.metrics import Metrics
from paths import ROOT, TINY


def test_every_kind_has_a_layout_and_every_layout_a_kind():
    assert list(KINDS) == list(DRAFT_LAYOUTS)


@pytest.mark.quick
@pytest.mark.parametrize("name", KINDS)
def test_a_row_names_what_there_is(name):
    kind, layout = KINDS[name], DRAFT_LAYOUTS[name]
    assert kind.model_class.config_class is kind.config_class
    assert kind.reader == kind.config_class.architecture == kind.model_class.__name__
    assert kind.reader in kind.architectures
    assert kind.name_part or name == BASE
    own = set(kind.config_class.__dataclass_fields__)
    assert {*layout.own, *layout.required, *layout.scales, *layout.mirrored, *kind.head_fields} <= own
    assert {*layout.own, *layout.scales} <= set(FIELDS)
    assert set(layout.on_top) <= set(layout.own)
    assert (layout.engines_architecture or kind.reader) in kind.architectures
    assert kind.head is None or kind.head in HEADS
    assert set(kind.metrics) <= {*Metrics.__dataclass_fields__, *dir(Metrics)}
    assert kind.demo_folder is None or kind_of(load_draft(kind.demo_draft(TINY)).config) is kind


def test_a_kind_that_does_not_exist_is_refused_with_the_kinds_there_are():
    from dflash_hub import DFlashDraftSpec

    with pytest.raises(ValueError, match=f"variant is 'eagle'; it must be one of {', '.join(KINDS)}"):
        DFlashDraftSpec("x").build(tiny.target("qwen3").config, "eagle", mask_token_id=3)


@pytest.mark.parametrize(("name", "pattern"), [("dflash2", "dflash ?2"), ("dspark", "dspark"), ("domino", "domino")])
def test_a_further_kind_is_named_in_its_own_files_and_the_tables_alone(name, pattern):
    """Its config, model and entry for engines, the two tables, and the public names."""
    code = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    for folder in ("training", "commands", "publishing", "evaluation"):
        code += ROOT.glob(f"{folder}/*.py")
    named = {path.name for path in code if re.search(pattern, path.read_text(encoding="utf-8"), re.IGNORECASE)}
    own = {f"configuration_{name}.py", f"modeling_{name}.py", f"{name}.py"}
    others = {"layouts.py"}  # other projects' heads, whose names begin alike
    assert named == own | others | {"kinds.py", "layouts_dflash.py", "__init__.py"}

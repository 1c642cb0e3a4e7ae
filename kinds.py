# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""List the kinds of drafts, one row for each; the registry, layouts, commands, training and benchmarks use this table.

A kind also has an entry in `layouts_dflash.DRAFT_LAYOUTS`, because that file travels and this one does not.
CONTRIBUTING.md explains how to add a kind.
"""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_dflash import DFlashConfig
    from .modeling_dflash import DFlashDraftModel

MUSE = "MuseGlimmerAssistantModel"
"""The architecture of the Muse assistant of transformers, a DFlash draft."""

METRICS = ("accuracy", "acceptance_length")
"""The metrics that training reports for every draft; see `training.metrics.Metrics`."""
SELECTOR_METRICS = (
    "base_loss",
    "selector_loss",
    "base_accuracy",
    "candidate_recall",
    "selector_accuracy",
)
"""Those that it reports for a draft with a selector too."""
FURTHER_LOSSES = ("selector_loss", "confidence_loss")
"""Those that are the loss of a further head."""


@dataclass(frozen=True)
class SpeculatorsDefaults:
    """Hold what a config.json in the speculators layout means where it lacks a key.

    Args:
        sample_from_anchor: None where older files mean False and newer ones True.
        sliding_window_non_causal: whether sliding layers are bidirectional inside a block.
        others: further fields, whose defaults there are not those of our config.
    """

    sample_from_anchor: bool | None = False
    sliding_window_non_causal: bool = False
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DraftKind:
    """Describe a kind of draft.

    Args:
        name: the `model_type` of its config, and its name in `drafts.json` and in options.
        config, model: module and class of each. They are imported on first use, since both need torch.
        title: its name in messages.
        architectures: names of its model class in published config.json files.
        name_part: a part of the architecture that no other kind has; "" for the kind that others extend.
        demo_folder: folder of the built-in pair's draft of this kind, in `examples/tiny_pair`; None without one.
        head: name of its heads in `training.heads.HEADS`; None where the loss is that of its logits alone.
        loss: the published losses of a position and their weights, as the option `--loss` of the command `train`.
        head_fields: fields of its config that the command `train` has options for.
        metrics: the metrics that training reports.
        trained_with: fields of a fresh draft that the command `train` sets, since they are no defaults of its config.
        speculators: the defaults of its config.json in the speculators layout; None if that has no such kind.
        layouts: published layouts of a config.json, but for that of speculators, from which it is read; by their names
            in `drafts.json`.
    """

    name: str
    config: tuple[str, str]
    model: tuple[str, str]
    title: str
    architectures: tuple[str, ...]
    name_part: str = ""
    demo_folder: str | None = None
    head: str | None = None
    loss: str = "ce=1"
    head_fields: tuple[str, ...] = ()
    metrics: tuple[str, ...] = METRICS
    trained_with: dict[str, Any] = field(default_factory=dict)
    speculators: SpeculatorsDefaults | None = None
    layouts: tuple[str, ...] = ("z-lab",)

    @property
    def reader(self) -> str:
        """Name of the class that loads it, for messages."""
        return self.model[1]

    @property
    def config_class(self) -> "type[DFlashConfig]":
        module, name = self.config
        return getattr(import_module(f".{module}", __package__), name)

    @property
    def model_class(self) -> "type[DFlashDraftModel]":
        module, name = self.model
        return getattr(import_module(f".{module}", __package__), name)

    def demo_draft(self, pair: Path) -> Path:
        """Return the folder of the draft of this kind in the built-in pair's folder.

        Raises:
            ValueError: the pair has none.
        """
        if self.demo_folder is None:
            shown = ", ".join(kind.name for kind in KINDS.values() if kind.demo_folder)
            raise ValueError(
                f"The built-in pair has no draft of the kind {self.name}; choose one of {shown}."
            )
        return pair / self.demo_folder


_ROWS = (
    DraftKind(
        "dflash",
        ("configuration_dflash", "DFlashConfig"),
        ("modeling_dflash", "DFlashDraftModel"),
        title="DFlash",
        architectures=("DFlashDraftModel", "Qwen3DFlashDraftModel", MUSE),
        demo_folder="draft",
        speculators=SpeculatorsDefaults(),
        layouts=("z-lab", "muse"),
    ),
    DraftKind(
        "dspark",
        ("configuration_dspark", "DSparkConfig"),
        ("modeling_dspark", "DSparkDraftModel"),
        title="DSpark",
        architectures=("DSparkDraftModel", "Qwen3DSparkModel", "DSparkSpeculator"),
        name_part="DSpark",
        head="markov",
        loss="ce=0.1,tv=1.8",
        head_fields=("markov_rank", "markov_head_type", "enable_confidence_head"),
        metrics=(*METRICS, "base_accuracy", "confidence_loss"),
        trained_with={"enable_confidence_head": True},
        speculators=SpeculatorsDefaults(
            sample_from_anchor=None, others={"enable_confidence_head": True}
        ),
        layouts=("deepspec", "specforge"),
    ),
    DraftKind(
        "dflash2",
        ("configuration_dflash2", "DFlash2Config"),
        ("modeling_dflash2", "DFlash2DraftModel"),
        title="DFlash 2",
        architectures=("DFlash2DraftModel", "Qwen3DFlash2DraftModel"),
        name_part="DFlash2",
        demo_folder="draft2",
        head="selector",
        head_fields=("selector_rank", "selector_top_k"),
        metrics=(*METRICS, *SELECTOR_METRICS),
        speculators=SpeculatorsDefaults(sliding_window_non_causal=True),
    ),
    DraftKind(
        "domino",
        ("configuration_domino", "DominoConfig"),
        ("modeling_domino", "DominoDraftModel"),
        title="Domino",
        architectures=("DominoDraftModel", "DFlashDraftModel"),
        name_part="Domino",
        head="prefix",
        head_fields=("emb_dim", "gru_hidden_dim"),
        metrics=(*METRICS, "base_accuracy"),
    ),
)

KINDS: dict[str, DraftKind] = {kind.name: kind for kind in _ROWS}
"""The kinds by name. Where a checkpoint has drafts of several kinds, the later kind is preferred."""

SECOND_KIND = "dflash2"
"""The kind whose class the reference implementation's registry calls `draft2_cls`."""

DEMO_KIND = [kind.name for kind in _ROWS if kind.demo_folder][-1]
"""The kind that the demo shows."""


def kind_of(config: Any) -> DraftKind:
    """Return the kind of a draft from its config, or from its config's class."""
    return KINDS[config.model_type]


def kind_named(name: str) -> DraftKind:
    """Return the kind with this name.

    Raises:
        ValueError: there is none.
    """
    if name not in list(KINDS):
        raise ValueError(f"variant is {name!r}; it must be one of {', '.join(KINDS)}.")
    return KINDS[name]

# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The model card of a draft: made of the template in `hub_repo/`, or an existing one completed."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..repository_dflash import PLACEHOLDER

TAGS = ("dflash", "speculative-decoding", "draft-model", "custom_generate")


def write_card(
    draft: Any, folder: Any, existing: ModelCard | None, repo_id: str | None, tags: list[str] | None
) -> None:
    """Write README.md into `folder`: the `existing` card with its metadata completed, or a new one.

    Without a `repo_id` the card has a placeholder in its place, and nothing is asked of the Hub.
    """
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= (
        draft.card_known
        | _lasting(draft.source_card(online=repo_id is not None))
        | draft.card_metadata
    )
    card = existing or _new_card(draft, repo_id or PLACEHOLDER, metadata)
    if repo_id is not None:
        title = f"# {PLACEHOLDER.split('/')[-1]}\n"
        card.text = card.text.replace(PLACEHOLDER, repo_id).replace(
            title, f"# {repo_id.split('/')[-1]}\n"
        )
    for key, value in metadata.items():
        if card.data.get(key) is None or key in draft.card_metadata:
            card.data[key] = value
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *TAGS, *(tags or ())]))
    card.save(Path(folder) / "README.md")


def _lasting(card: ModelCard | None) -> dict[str, Any]:
    """What of a card's metadata stays true when its draft is pushed elsewhere."""
    kept = ("base_model", "license", "license_name", "license_link", "datasets", "language")
    data = card.data.to_dict() if card is not None else {}
    return {key: data[key] for key in kept if data.get(key) is not None}


def _new_card(draft: Any, repo_id: str, metadata: dict[str, Any]) -> ModelCard:
    """Return a card made of the template."""
    template = Path(__file__).parents[1] / "hub_repo" / "README.md"
    target = metadata.get("base_model") or "THE-TARGET-OF-THIS-DRAFT"
    facts = {
        "repo_id": repo_id,
        "target": target[0] if isinstance(target, list) else target,
        "config": draft.config,
        "parameters": f"{draft.num_parameters():,}",
        "drafted": draft.config.block_size - 1,
    }
    text = template.read_text(encoding="utf-8")
    return ModelCard.from_template(ModelCardData(**metadata), template_str=text, **facts)

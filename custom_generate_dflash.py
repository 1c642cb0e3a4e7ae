# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decode with this repository's draft: `target.generate(..., custom_generate="org/draft", trust_remote_code=True)`.

Every pushed draft has a copy of this file as `custom_generate/generate.py`, where transformers looks for it. It needs
only transformers. The draft is loaded once, and reused by later calls.
"""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoModel

_DRAFTS: dict[tuple, Any] = {}
_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")


def generate(model: Any, **kwargs: Any) -> Any:
    """Return the output of `model.generate(**kwargs)`, decoded faster with the draft of this repository.

    Args:
        model: the target that this draft was made for.
        kwargs: all arguments of `generate`, and `statistics`, `draft_sampling`, `capture` and `strict` of the draft's
            `speculate`.

    Raises:
        ValueError: the draft was not made for this target, or an option cannot be combined with a draft.
    """
    # `generate` does not pass on the name of the repository
    repository = sys._getframe(1).f_locals.get("custom_generate")
    if not isinstance(repository, str):
        raise ValueError(
            'Call this by `target.generate(..., custom_generate="org/draft", trust_remote_code=True)`.'
        )
    hub = {name: kwargs.pop(name) for name in _HUB if kwargs.get(name) is not None}
    draft = _draft(repository, model, hub)
    return model.generate(custom_generate=draft.speculate, **kwargs)


def _draft(repository: str, model: Any, hub: dict[str, Any]) -> Any:
    """Load the draft at the commit that this file came from, on the target's device and in its dtype."""
    commit = Path(__file__).parents[1].name
    if not Path(repository).is_dir():
        hub = hub | {"revision": commit}
    tensors = (*model.parameters(), *model.buffers())
    # Offloaded weights are on the meta device.
    device = next((tensor.device for tensor in tensors if not tensor.is_meta), "cpu")
    key = (repository, commit, device, model.dtype)
    if key not in _DRAFTS:
        loaded = AutoModel.from_pretrained(
            repository, dtype=model.dtype, trust_remote_code=True, **hub
        )
        _DRAFTS[key] = loaded.to(device).eval()
    return _DRAFTS[key]

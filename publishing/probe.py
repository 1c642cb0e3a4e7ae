# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Loads a staged repository as a stranger would, and prints its config and a digest of every tensor as JSON.

Run as a script, by path, in a process of its own: it makes `dflash_hub` impossible to import, so that only the code in
the repository can answer.
"""

import hashlib
import json
import sys
from typing import Any


def digests(model: Any) -> dict[str, str]:
    """Tensor name -> dtype, shape and SHA-256 of the bytes."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def digest(tensor: Any) -> str:
    """Dtype, shape and SHA-256 of the bytes."""
    import torch

    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def main(folder: str) -> None:
    sys.modules["dflash_hub"] = None  # type: ignore[assignment]
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    print(
        json.dumps({"class": type(model).__module__, "digests": digests(model), "config": config})
    )


if __name__ == "__main__":
    main(sys.argv[1])

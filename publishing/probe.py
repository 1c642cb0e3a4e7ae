# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Load a staged repository without dflash_hub; print its config and a digest of every tensor as JSON.

Runs as a script, by path, in a fresh process. It blocks the import of `dflash_hub`, so only the code in the repository
can run.
"""

import hashlib
import json
import sys
from typing import Any


def digests(model: Any) -> dict[str, str]:
    """Return the digest of each tensor: name -> digest."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def digest(tensor: Any) -> str:
    """Return dtype, shape and SHA-256 of the bytes, as text."""
    import torch

    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def main(folder: str) -> None:
    """Load the repository in `folder` and print what was loaded."""
    sys.modules["dflash_hub"] = None  # type: ignore[assignment]
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    print(
        json.dumps({"class": type(model).__module__, "digests": digests(model), "config": config})
    )


if __name__ == "__main__":
    main(sys.argv[1])

"""llama.cpp: `convert_hf_to_gguf.py` converts a draft, and its own `gguf` reads the file back.

The converter knows a tokenizer by the hash of a text that it encodes. It does not know that of a tiny target, so it is
given the name that it would have found. The rest of the vocabulary it reads from the target.
"""

import contextlib
import io
import sys
from pathlib import Path

import convert_hf_to_gguf as converter  # puts its own gguf on the path
from conversion.base import TextModel
from gguf import GGUFReader

from answers import JOB, answer

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def read(folder: Path) -> dict:
    """Convert a draft; return the keys of the file and the shapes of its tensors."""
    out = JOB / "out" / f"{folder.name}.gguf"
    sys.argv = ["convert", str(folder), "--target-model-dir", str(JOB / "target"), "--outtype", "f32"]
    sys.argv += ["--outfile", str(out)]
    with contextlib.redirect_stdout(io.StringIO()):
        converter.main()
    file = GGUFReader(out)
    keys = {name: field.contents() for name, field in file.fields.items() if not name.startswith("tokenizer.ggml.")}
    mask = file.fields.get("tokenizer.ggml.mask_token_id")
    keys["mask_token_id"] = mask and mask.contents()
    return {"keys": keys, "tensors": {tensor.name: tensor.shape.tolist() for tensor in file.tensors}}


answer(read)

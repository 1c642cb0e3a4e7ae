"""What all scripts of this folder share; they run in the environment of their reader, and know nothing of ours."""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOB = Path(sys.argv[1])
"""A folder with the drafts in `drafts`, their target in `target`, and a text; `out` is for results."""


def answer(read: Callable[[Path], Any]) -> None:
    """Print what `read` returns for each draft, or the error that it raises, as one line of JSON.

    The drafts of a job may be of several layouts: the folder of one is `drafts/<layout>/<name>`.
    """
    answers = {}
    for folder in sorted(JOB.glob("drafts/*/*")):
        try:
            found = read(folder)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        answers[f"{folder.parent.name}/{folder.name}"] = found
    print(json.dumps(answers))

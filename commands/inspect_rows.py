# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""`dflash-hub train --inspect`: print rows as they would be trained on."""

from itertools import groupby, islice
from typing import Any

from rich.text import Text

from ..training.arguments import DFlashTrainingArguments
from ..training.reading import BadRow, with_file
from ..training.setup import TrainOptions, inspect
from .shared import console


def inspect_rows(options: TrainOptions, args: DFlashTrainingArguments) -> None:
    """Print the documents of the first rows: supervised tokens in colour, or in brackets where there is none.

    Raises:
        BadRow: a row cannot be trained on; names its place.
    """
    tokenizer, rows = inspect(options, args)
    try:
        for place, documents in islice(rows, options.inspect):
            for ids, supervised, reason in documents:
                title = f"{place}: {len(ids):,} tokens, {sum(supervised):,} supervised"
                title += f"; left out, {reason}" if reason else ""
                console.rule(Text(title), align="left")
                console.print(coloured(tokenizer, ids, supervised), soft_wrap=True)
    except BadRow as error:
        raise with_file(error, options.data) from error


def coloured(tokenizer: Any, ids: list[int], supervised: list[int]) -> Text:
    """Return the text of a document, its supervised tokens marked."""
    text = Text()
    plain = console.color_system is None or console.no_color
    for is_supervised, pairs in groupby(zip(ids, supervised, strict=True), lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in pairs])
        if is_supervised:
            text.append(f"[{piece}]" if plain else piece, style="bold green")
        else:
            text.append(piece, style="dim")
    return text

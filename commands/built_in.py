# Copyright 2026 the dflash-hub authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The built-in pair, by its name `demo`."""

from pathlib import Path

from ..kinds import DEMO_KIND, KINDS, kind_named

DEMO = "demo"
"""Names the built-in target, and its draft. A folder of this name is ./demo."""
FOLDER = Path(__file__).parents[1] / "examples" / "tiny_pair"
TARGET = str(FOLDER / "target")
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
"""The built-in target continues texts; so the messages of a conversation are one."""

BUILT_IN_DRAFTS = {f"{DEMO}-{name}": name for name, kind in KINDS.items() if kind.demo_folder}
"""Names of all built-in drafts, and their kinds."""
BUILT_IN_DRAFTS[DEMO] = DEMO_KIND

OF_TARGET = f"{DEMO} is the built-in one"
"""For the help of options that take a target."""
OF_DRAFT = f"{', '.join(sorted(BUILT_IN_DRAFTS))} are built in"
"""For the help of options that take a draft."""


def target_named(name: str | None) -> str | None:
    """Return a name or path of a target; `demo` as its folder."""
    return TARGET if name == DEMO else name


def draft_named(name: str | None) -> str | None:
    """Return a name or path of a draft; that of a built-in one as its folder."""
    if name not in BUILT_IN_DRAFTS:
        return name
    return str(kind_named(BUILT_IN_DRAFTS[str(name)]).demo_draft(FOLDER))


def draft_of(target: str | None) -> str | None:
    """Return the built-in draft of the built-in target; None for another target."""
    return draft_named(DEMO) if target == TARGET else None


def name_of(model: str) -> str:
    """Return what a target or a draft is called: its name or path, and that of a built-in one."""
    if model == TARGET:
        return DEMO
    return next((name for name in sorted(BUILT_IN_DRAFTS) if draft_named(name) == model), model)


def in_words(argv: list[str]) -> list[str]:
    """Return a command line with the folders of the built-in pair for its names, after --target and --draft."""
    found = []
    last = ""
    for word in argv:
        flag = word.partition("=")[0]
        if flag != word and flag in ("--target", "--draft"):
            word = f"{flag}={_named(flag, word.removeprefix(f'{flag}='))}"
        elif last in ("--target", "--draft"):
            word = _named(last, word)
        found.append(word)
        last = word
    return found


def _named(flag: str, value: str) -> str:
    return str(target_named(value) if flag == "--target" else draft_named(value))

"""Foreign text in Markdown: names come from files that anybody may have written, so none may become markup."""

from __future__ import annotations

_LONGEST_NAME = 120


def code(name: str) -> str:
    """A name as a code span, inert in tables as well."""
    shown = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return "`" + shown.replace("`", "'").replace("|", "\\|") + "`"


def plain(message: str) -> str:
    """A message as plain text on one line: nothing in it is markup, links or mentions anybody."""
    escaped = "".join(c if c.isprintable() else " " for c in message)
    escaped = escaped.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for character in "`*_[]|~#!":
        escaped = escaped.replace(character, f"\\{character}")
    # A zero-width joiner keeps names of people and addresses from becoming mentions and links.
    return escaped.replace("@", "@\u200d").replace("://", ":\u200d//")

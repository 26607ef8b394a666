"""Text from outside: a path as its user writes it, and text that is shown to somebody."""

from __future__ import annotations

import re
from pathlib import Path

from core.errors import ConfigError

ONLY = "environment"
"""The name of the environment of a config that names one alone."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls of a terminal, of the direction of writing, and halves of surrogate pairs."""


def user_path(field: str, text: str) -> Path:
    """Returns the path that `text`, the value of config field `field`, means: `~` and `~name` stand for a
    home directory.

    Raises ConfigError when nobody has that home, or when a file system takes no such text.
    """
    if "\0" in text:
        raise ConfigError(f"{field} = {text!r} holds a NUL character, which no path does.")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # There is no such user, or neither HOME nor an entry of one's own.
        name = text.split("/")[0]
        why = (
            f"there is no user {name[1:]!r} on this machine"
            if name != "~"
            else "this user has no home directory (HOME is not set)"
        )
        raise ConfigError(
            f"{field} = {text}: {name} has no meaning here: {why}. Write the path out."
        ) from None


def option_of(name: str, option: str) -> tuple[str, str | None]:
    """Returns a name without `?option=value` (or `&option=value`), and that value; None where it says none.

    "log.jsonl?share=0.5" has the share "0.5"; so has "x?split=dev&share=0.5", which is "x?split=dev" without.
    """
    found = re.fullmatch(rf"(.*?)([?&]){option}=([^?&]*)(?:&(.*))?", name, re.DOTALL)
    if found is None:
        return name, None
    before, sign, value, after = found.groups()
    return (before if after is None else f"{before}{sign}{after}"), value


def printable(text: str) -> str:
    """Returns the text with its control characters written out, except line ends and tabs: a completion moves
    no cursor.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(count: int, what: str) -> str:
    """Writes a number of things: 1 actor, 2 actors."""
    return f"{count} {what}{'s' * (count != 1)}"


def bounded(text: str, max_lines: int = 12, max_chars: int = 1000) -> str:
    """Returns the beginning of the text, with dots where it was cut."""
    kept = "\n".join(text.strip().splitlines()[:max_lines])[:max_chars].rstrip()
    return kept if kept == text.strip() else f"{kept} ..."


def headline(text: str) -> str:
    """Returns the first line of the text, and the second one too where the first ends with a colon; dots
    where lines of its list are left out. Example: "no reward: boom" of "no reward:\\n  boom".
    """
    lines = [line.strip() for line in text.strip().splitlines()] or [""]
    num_lines = 2 if lines[0].endswith(":") else 1
    line = " ".join(lines[:num_lines])
    if line.endswith(":"):
        return f"{line[:-1]}."
    return f"{line} ..." if num_lines == 2 < len(lines) else line


def shown_name(environment: str, path: str) -> str:
    """Returns how an environment is called in errors: by its name in the whole run, or by its path where the
    user gave no name.
    """
    return path if environment.rpartition(".")[2] == ONLY else environment


def key_of(environment: str) -> str:
    """Returns the config's key of an environment by its name in the whole run, for errors:
    `environments.game`; that of a suite, `math.game`, is `eval.suites.math.environments.game`.
    """
    suite, _, name = environment.rpartition(".")
    key = f"eval.suites.{suite}.environments" if suite else "environments"
    return key if name == ONLY else f"{key}.{name}"

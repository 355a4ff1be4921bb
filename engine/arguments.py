"""Reads `vllm serve` arguments without vLLM's parser: which options are there, and with what value.

Knows the forms that vLLM takes: `--key value`, `--key=value`, `--key.sub value`, underscores for dashes.
"""

from __future__ import annotations

from collections.abc import Sequence


class Arguments:
    """One command line."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._values: dict[str, str] = {}
        for index, text in enumerate(arguments):
            if not text.startswith("-") or _is_number(text):
                continue
            key, separator, value = text.partition("=")
            if not separator and index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
                value = arguments[index + 1]
            self._values[_normal(key)] = value

    def has(self, *options: str) -> bool:
        """True if any of the options is given, also as `--option.sub`."""
        return any(key == option or key.startswith(option + ".") for key in self._values for option in options)

    def value(self, *options: str) -> str | None:
        """The value of the last of the options that is given; "" for a flag."""
        found = [value for key, value in self._values.items() if key in options]
        return found[-1] if found else None


def _normal(key: str) -> str:
    if not key.startswith("--"):
        return key
    head, dot, tail = key.partition(".")
    return head.replace("_", "-") + dot + tail


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

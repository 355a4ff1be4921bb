"""A template that the server keeps, and what fills it: facts only."""

from __future__ import annotations

from typing import Any

import msgspec

from client.answers import Context
from client.errors import Refused


class Filled(msgspec.Struct, frozen=True):
    """A template with its variables: a prompt for `generate`. more: what comes behind it, a text or messages."""

    context: Context
    variables: dict[str, str]
    more: str | list[dict[str, Any]] = ""

    def followed_by(self, more: str | list[dict[str, Any]]) -> Filled:
        """The same, with a text or messages behind it."""
        return Filled(self.context, self.variables, more)


class Template(msgspec.Struct, frozen=True):
    """A context of kind `template`."""

    context: Context

    @property
    def id(self) -> str:
        return self.context.id

    @property
    def variables(self) -> list[str]:
        return self.context.variables

    def fill(self, **variables: str) -> Filled:
        """Raises Refused, without asking the server, if a variable is missing or unknown."""
        missing = [name for name in self.variables if name not in variables]
        unknown = [name for name in variables if name not in self.variables]
        if missing or unknown:
            raise Refused(
                f"the template's variables are {', '.join(self.variables) or 'none'}; "
                f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
            )
        return Filled(self.context, variables)

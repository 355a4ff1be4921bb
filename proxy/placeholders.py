"""Templates: texts, or messages, with `{{variable}}` in them. Pure functions.

    "You are {{role}}. Answer: {{question}}"
     └ constant ┘└─ from the first variable on, every request has tokens of its own

Values are put in once and not looked at again, so a value may contain braces.
"""

from __future__ import annotations

import re
from typing import Any

from proxy.body import MAX_BODY_BYTES
from proxy.errors import RequestRefused

_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


def variables_of(template: str | list[dict[str, Any]]) -> list[str]:
    """The names, in the order in which they come first."""
    return list(dict.fromkeys(name for text in _texts(template) for name in _VARIABLE.findall(text)))


def constant_text(template: str) -> str:
    """What stands before the first variable."""
    found = _VARIABLE.search(template)
    return template if found is None else template[: found.start()]


def constant_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages before the first variable, and of its own message the text before it."""
    constant: list[dict[str, Any]] = []
    for message in messages:
        if not variables_of([message]):
            constant.append(message)
            continue
        content = message.get("content")
        begun = constant_text(content) if isinstance(content, str) else _constant_parts(content)
        return [*constant, message | {"content": begun}] if begun else constant
    return constant


def fill(template: str | list[dict[str, Any]], values: object) -> str | list[dict[str, Any]]:
    """The template with its values. Raises RequestRefused: 400 that names what is missing, unknown or no string, 413 if
    values that come again and again make it too long."""
    checked = _checked(variables_of(template), values)
    if sum(len(checked[name]) for text in _texts(template) for name in _VARIABLE.findall(text)) > MAX_BODY_BYTES:
        raise RequestRefused(f"the filled template is larger than {MAX_BODY_BYTES} bytes", 413, code="body_too_large")
    if isinstance(template, str):
        return _filled(template, checked)
    return [message | {"content": _filled_content(message.get("content"), checked)} for message in template]


def _checked(names: list[str], values: object) -> dict[str, str]:
    if not isinstance(values, dict):
        raise RequestRefused("context.variables must be an object of strings", param="context.variables")
    missing = [name for name in names if name not in values]
    unknown = [name for name in values if name not in names]
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"unknown: {', '.join(unknown)}"] if unknown else []
        raise RequestRefused(
            f"the template's variables are {', '.join(names) or 'none'}; {'; '.join(parts)}",
            param="context.variables",
            code="wrong_variables",
        )
    for name, value in values.items():
        if not isinstance(value, str):
            raise RequestRefused(
                f"variable {name} must be a string, not {type(value).__name__}",
                param=f"context.variables.{name}",
                code="wrong_variables",
            )
    return values


def _filled(text: str, values: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda found: values[found[1]], text)


def _filled_content(content: Any, values: dict[str, str]) -> Any:
    if isinstance(content, str):
        return _filled(content, values)
    if isinstance(content, list):
        return [_filled_part(part, values) for part in content]
    return content


def _filled_part(part: Any, values: dict[str, str]) -> Any:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part | {"text": _filled(part["text"], values)}
    return part


def _constant_parts(content: Any) -> list[Any]:
    """Of a message in parts, those before the first variable."""
    parts: list[Any] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str) and _VARIABLE.search(text):
            begun = constant_text(text)
            return [*parts, part | {"text": begun}] if begun else parts
        parts.append(part)
    return parts


def _texts(template: str | list[dict[str, Any]]) -> list[str]:
    """Every text in which a variable may stand."""
    if isinstance(template, str):
        return [template]
    texts: list[str] = []
    for message in template:
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return texts

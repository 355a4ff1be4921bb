"""`baton cache warm FILE ...`: a context of each text, computed ahead, with a line each as they are done.

prompts.jsonl   {"text": "...", "name": "manual"}      one context a line, with the fields of POST /v1/contexts
                {"messages": [...], "pin": true}
manual.txt      any other file: its whole text, under the file's name
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from client.answers import Context
from client.errors import BatonClientError
from client.sync_client import BatonClient
from core.errors import ConfigError

_JSON_LINES = (".jsonl", ".ndjson")


def run(options: argparse.Namespace) -> int:
    """0 if every context was made, else 1. Raises ConfigError before anything is sent if a file is no good."""
    defaults: dict[str, Any] = {"ttl_s": options.ttl_s, "pin": options.pin or None}
    asked = [
        {name: value for name, value in defaults.items() if value is not None} | fields
        for path in options.files
        for fields in contexts_of(Path(path), options.endpoint)
    ]
    key = _read(Path(options.api_key_file)).strip() if options.api_key_file else None
    num_failed = 0
    with BatonClient(options.url, api_key=key) as client:
        for number, fields in enumerate(asked, start=1):
            place = f"[{number}/{len(asked)}] {fields.get('name') or ''}".rstrip()
            try:
                print(f"{place} {_line(client.cache_context(**fields))}", flush=True)
            except BatonClientError as error:
                num_failed += 1
                print(f"{place} failed: {error}", file=sys.stderr, flush=True)
    return 1 if num_failed else 0


def contexts_of(path: Path, endpoint: str | None) -> list[dict[str, Any]]:
    """What one file asks for. Raises ConfigError that names the file and the line."""
    text = _read(path)
    if path.suffix in _JSON_LINES:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
        return [_fields(path, number, line) for number, line in lines]
    if not text.strip():
        raise ConfigError(f"{path} is empty")
    return [{"text": text, "name": path.name} | ({"endpoint": endpoint} if endpoint else {})]


def _fields(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f'{path}, line {number} must be an object such as {{"text": "...", "name": "manual"}}')
    return fields


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _line(context: Context) -> str:
    line = f"{context.id}: {context.tokens:,} tokens, {context.blocks or 0:,} blocks, {context.bytes or 0:,} bytes"
    return line + (f" ({context.note})" if context.note else "")

"""The table of fields is exactly vLLM's. Runs vLLM's import in a process of its own: it takes ten seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from proxy.fields import CHAT, COMPLETION, LEGACY

SCRIPT = """
import json
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as Chat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Completion
print("FIELDS" + json.dumps([sorted(Chat.model_fields), sorted(Completion.model_fields)]))
"""


@pytest.mark.engine
def test_every_field_of_vllms_requests_has_a_line_in_the_table_and_no_line_is_stale() -> None:
    pytest.importorskip("vllm.version")
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("FIELDS"))
    chat, completion = (set(names) for names in json.loads(line.removeprefix("FIELDS")))
    assert (chat - CHAT.keys(), completion - COMPLETION.keys()) == (set(), set()), "new in vLLM: decide what they do"
    assert (CHAT.keys() - chat, COMPLETION.keys() - completion) == (set(), set()), "gone from vLLM"
    assert not LEGACY & (chat | completion)

"""`baton demo`: 1P1D with the bundled model, one chat asked twice, and what became of each."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from cluster.bundled import BUNDLED_NAME
from cluster.launcher import Cluster
from cluster.members import get
from cluster.options import ClusterOptions
from cluster.progress import Progress
from cluster.serve import stopping
from core.errors import BatonError
from engine.build import Device, installed_build

MAX_TOKENS = 96
BLOCK_SIZE = "32"
_MOMENTS = ("queued", "routed", "accepted", "moving", "landed", "first_token", "done")
_REPORT_TIMEOUT_S = 3.0

SYSTEM = "You are a player of the King's Men. Answer in the voice of the play."
PASSAGE = """\
Now is the winter of our discontent
Made glorious summer by this sun of York;
And all the clouds that lour'd upon our house
In the deep bosom of the ocean buried.
Now are our brows bound with victorious wreaths;
Our bruised arms hung up for monuments;
Our stern alarums changed to merry meetings,
Our dreadful marches to delightful measures.
Grim-visaged war hath smooth'd his wrinkled front;
And now, instead of mounting barded steeds
To fright the souls of fearful adversaries,
He capers nimbly in a lady's chamber
To the lascivious pleasing of a lute.

Good my lord, what news from the court? Speak, and tell me what the king hath said."""


def run(given: argparse.Namespace) -> int:
    """Everything that it starts is stopped again, whatever ends it."""
    print("Baton demo: one prefill and one decode instance, the KV cache pushed from one to the other", flush=True)
    transport = given.transport
    if transport == "auto" and installed_build().device is Device.GPU:
        transport = "cuda_ipc"
        print("On a GPU, by cuda_ipc: written, and not measured yet", flush=True)
    arguments = ("--block-size", BLOCK_SIZE)
    options = ClusterOptions(arguments_prefill=arguments, arguments_decode=arguments, transport=transport)
    progress = Progress(sys.stdout)
    cluster = Cluster("1P1D", options, progress)
    with stopping(cluster):
        cluster.start()
        progress.done("both instances are ready")
        print(f"\n{PASSAGE.splitlines()[-1]}\n", flush=True)
        first = record_of(cluster.url, ask(cluster.url))
        print(f"\n{table({'this request': first})}\n\nThe same request once more:\n", flush=True)
        again = record_of(cluster.url, ask(cluster.url))
        print(f"\n{table({'first': first, 'again': again})}\n\n{verdict(again)}", flush=True)
    print("stopped everything that was started", flush=True)
    return 0


def ask(url: str) -> str:
    """Streams the answer to standard output; returns the request's id."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120.0)
    try:
        response = client.chat.completions.with_raw_response.create(
            model=BUNDLED_NAME,
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": PASSAGE}],
            max_tokens=MAX_TOKENS,
            seed=1616,
            stream=True,
        )
        for chunk in response.parse():
            if chunk.choices and chunk.choices[0].delta.content:
                print(chunk.choices[0].delta.content, end="", flush=True)
        print(flush=True)
        return str(response.headers["x-request-id"])
    except openai.OpenAIError as error:
        raise BatonError(f"the request failed: {error}") from error
    finally:
        client.close()


def record_of(url: str, request_id: str) -> dict[str, Any]:
    """The proxy's record, once the decode instance has reported what it did."""
    deadline = time.monotonic() + _REPORT_TIMEOUT_S
    while True:
        status, body = get(f"{url}/requests/{request_id}")
        if status != 200:
            raise BatonError(f"the proxy has no record of request {request_id} (status {status})")
        record: dict[str, Any] = json.loads(body)
        if record.get("outcome") or time.monotonic() > deadline:
            return record
        time.sleep(0.05)


def table(records: dict[str, dict[str, Any]]) -> str:
    """A column per record: its path, its moments, its tokens."""
    rows = [("", list(records))]
    rows += [("path", [_path(record) for record in records.values()])]
    for moment in _MOMENTS:
        rows += [(moment.replace("_", " "), [_ms(record, moment) for record in records.values()])]
    for key in ("prompt", "handed_over", "found_locally", "from_cache", "computed"):
        name = "prompt tokens" if key == "prompt" else f"  {key.replace('_', ' ')}"
        if key != "from_cache" or any(record["tokens"].get(key) for record in records.values()):
            rows += [(name, [_shown(record["tokens"].get(key)) for record in records.values()])]
    rows += [("bytes moved", [f"{record.get('bytes') or 0:,}" for record in records.values()])]
    rows += [("GB/s", [_rate(record) for record in records.values()])]
    width = max(len(cell) for _, cells in rows for cell in cells)
    lines = [f"  {name:<16}" + "".join(f"  {cell:>{width}}" for cell in cells) for name, cells in rows]
    return "\n".join([lines[0], "  " + "-" * (len(lines[1]) - 2), *lines[1:]])


def verdict(record: dict[str, Any]) -> str:
    """What the repetition showed, in a sentence."""
    tokens = record["tokens"]
    if tokens.get("prompt") is None:
        return "The decode instance has not reported what it did."
    return (
        f"Of {tokens['prompt']} prompt tokens the decode instance found {tokens['found_locally']} in its own cache, "
        f"got {tokens['handed_over']} handed over and computed {tokens['computed']}."
    )


def _path(record: dict[str, Any]) -> str:
    path = record["path"]
    if not path.get("prefill"):
        return f"{path.get('decode')} alone ({path.get('why')})"
    moved = f" by {path['transport']}" if path.get("transport") else f" ({path.get('why') or record.get('outcome')})"
    return f"{path['prefill']} > {path.get('decode')}{moved}"


def _ms(record: dict[str, Any], moment: str) -> str:
    value = record["moments_ms"].get(moment)
    return "-" if value is None else f"{value:.1f} ms"


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def _rate(record: dict[str, Any]) -> str:
    value = record.get("gb_per_s")
    return "-" if value is None else f"{value:.2g}"

"""One template, many requests: its constant part is computed once, before the batch begins.

scripts/launch 1P1D --cache 1GiB
.venv/bin/python examples/batch.py
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from baton import AsyncBatonClient

TEMPLATE = (Path(__file__).parent / "documents" / "julius-caesar.txt").read_text() + "\n{{speaker}}:\n{{line}}"
LINES = [
    {"speaker": "FIRST CITIZEN", "line": "Methinks there is much reason in"},
    {"speaker": "SECOND CITIZEN", "line": "If thou consider rightly of the matter,"},
    {"speaker": "THIRD CITIZEN", "line": "Has he, masters? I fear"},
    {"speaker": "FOURTH CITIZEN", "line": "Mark'd ye his words? He would not"},
]


async def run(url: str) -> None:
    async with AsyncBatonClient(url) as client:
        template = await client.template(TEMPLATE, name="the-forum", ttl_s=600)
        kept = template.context
        print(
            f"{kept.name}: {kept.tokens} tokens, {kept.blocks} blocks are kept; variables: {', '.join(kept.variables)}"
        )
        answers = await client.batch(template, LINES, concurrency=2, max_tokens=20, temperature=0)
        for values, answer in zip(LINES, answers, strict=True):
            if isinstance(answer, Exception):
                print(f"\n{values['speaker']}: failed: {answer}")
                continue
            print(f"\n{values['speaker']}: {values['line']}{answer.text}")
            record = await client.record(answer.request_id)
            print(f"  [{record.tokens}]")
        await client.drop_context(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description="A batch over one template.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    asyncio.run(run(parser.parse_args().url))


if __name__ == "__main__":
    main()

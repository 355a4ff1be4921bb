"""A conversation of several turns over one text: no turn computes again what the turns before it have computed.

scripts/launch 1P1D --cache 1GiB
.venv/bin/python examples/chat.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from baton import BatonClient

PLAY = (Path(__file__).parent / "documents" / "richard-iii.txt").read_text()
QUESTIONS = ("Who speaks here, and of whom?", "What does he say of peace?", "And what will he do now?")


def main() -> None:
    parser = argparse.ArgumentParser(description="A conversation over one text.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    url = parser.parse_args().url
    with BatonClient(url) as client:
        play = client.cache_context(text=PLAY, name="richard-iii", endpoint="chat", ttl_s=600)
        print(f"{play.name}: {play.tokens} tokens, {play.blocks} blocks are kept")
        conversation = client.conversation(play, max_tokens=40, temperature=0)
        for question in QUESTIONS:
            print(f"\n> {question}")
            for piece in conversation.stream(question):
                print(piece, end="", flush=True)
            assert conversation.last is not None
            print(f"\n  [{client.record(conversation.last.request_id).tokens}]")
        client.drop_context(play)


if __name__ == "__main__":
    main()

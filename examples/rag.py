"""Answers over documents that are in the cache before the first question comes.

Every document is a context; a question names those that it needs, in an order that stays the same (here: by name),
because what is reused is the longest prefix that was computed in that order.

    scripts/launch 1P1D --cache 1GiB
    .venv/bin/python examples/rag.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from baton import BatonClient

DOCUMENTS = Path(__file__).parent / "documents"
QUESTIONS = (
    ("Who has had enough of the war?", ("richard-iii",)),
    ("Whose tears are spoken of?", ("julius-caesar", "richard-iii")),
    ("Which of the two speaks to a crowd?", ("julius-caesar", "richard-iii")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers over documents in the cache.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    url = parser.parse_args().url
    with BatonClient(url) as client:
        documents = {
            path.stem: client.cache_context(text=path.read_text(), name=path.stem, endpoint="chat", ttl_s=600)
            for path in sorted(DOCUMENTS.glob("*.txt"))
        }
        for name, document in documents.items():
            print(f"{name}: {document.tokens} tokens, {document.blocks} blocks are kept")
        for question, names in QUESTIONS:
            chosen = [documents[name] for name in sorted(names)]
            answer = client.generate_with_contexts(chosen, question, max_tokens=40, temperature=0)
            print(f"\n> {question}\n{answer.text}")
            for name, part in zip(sorted(names), answer.contexts, strict=True):
                print(f"  {name}: {part.reuse}")
            print(f"  [{client.record(answer.request_id).tokens}]")
        for document in documents.values():
            client.drop_context(document)


if __name__ == "__main__":
    main()

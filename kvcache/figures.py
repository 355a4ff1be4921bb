"""What a cache server says of itself, by name: sizes in bytes, the rest in blocks unless its name says otherwise."""

from __future__ import annotations

from dataclasses import asdict

from kvcache.counts import Reason
from kvcache.hierarchy import Hierarchy
from kvcache.index import Index
from kvcache.labels import Labels


def figures(index: Index, hierarchy: Hierarchy) -> dict[str, float]:
    """What `baton cache stats` shows: the arena's, then each tier's with its name in front."""
    usage = {f"{name}_bytes": float(value) for name, value in asdict(index.usage).items()}
    counts = {f"{name}_blocks": float(value) for name, value in asdict(index.counts).items()}
    counts |= {f"evicted_{reason.value}_blocks": float(index.reasons[reason]) for reason in Reason}
    counts["dropped_blocks"] = counts.pop("evicted_drop_blocks")
    result = {"capacity_bytes": float(index.capacity_bytes), "blocks": float(len(index.complete))} | usage | counts
    result["questions"] = float(index.questions)
    result |= {"tenants": float(len(index.tenant_bytes)), "clearing": float(hierarchy.num_clearing)}
    for level in hierarchy.levels:
        held = level.tier.figures()
        values = {"blocks": held.blocks, "bytes": held.num_bytes, "evicted": held.evicted, "corrupt": held.corrupt}
        values["encoded_bytes"] = held.encoded_bytes
        values |= asdict(level.counts) | {"bypassed": int(level.is_bypassed)} | held.more
        result |= {f"{level.tier.name}_{name}": float(value) for name, value in values.items()}
    return result


def label_figures(labels: Labels) -> dict[str, float]:
    """What `baton cache stats` shows of them."""
    values = {"labels": len(labels), "labels_refused": labels.refused, "labels_unpinned": labels.unpinned}
    values["labels_unsaved"] = int(labels.unsaved)
    return {name: float(value) for name, value in values.items()}

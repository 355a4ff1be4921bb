"""Names for the blocks of prompts: which blocks they speak of, until when, and which of them may not be evicted.

    Name ──▶ label ── keys, wanted from now on ──▶ pinned as they become complete ──▶ found, listed, never evicted
                └─ deadline, DropLabel ──▶ blocks that no other label names leave the arena and the tiers below

A label without a deadline ends when the last of its blocks was evicted. What a tenant names, only that tenant names
again: a label's identity is its tenant and its name. A server that is started again reads them from its notes, which
are renewed a moment after each change.

Memory model: keys only, bounded by MAX_LABELS, MAX_KEYS and MAX_ALL_KEYS; about 150 bytes per key.
Threading: the server's event loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from core.clock import Clock
from core.handoff import Label
from kvcache.counts import Reason
from kvcache.index import Index
from kvcache.keys import BlockKey, join_keys, split_keys
from kvcache.label_notes import LabelNote, LabelNotes
from kvcache.ranges import aligned
from kvcache.wire import LabelFigures

MAX_LABELS = 10_000
MAX_KEYS = 65_536
"""Of one label: what a prompt has beyond them is not named."""

MAX_ALL_KEYS = 1 << 20
PINNED_SHARE = 0.5
"""Of the arena, for blocks that labels pin. The rest is for everybody else."""

GONE_PERIOD_S = 5.0
"""How often labels are looked at whose blocks may all have been evicted."""

PAUSE_PER_NOTE = 50.0
UNSEEN_S = 120.0
"""How long a label may wait for its first block: a long prompt's prefill."""


class Named(msgspec.Struct, frozen=True):
    """What a label speaks of. block_bytes: of one block over all layers."""

    tenant: bytes
    keys: tuple[BlockKey, ...]
    block_bytes: int
    num_tokens: int = 0


@dataclass
class _Held:
    """One label that lives. Times are monotonic; named_s: when a request carried it last."""

    label: Label
    named: Named
    created_s: float
    named_s: float
    deadline_s: float
    is_pinned: bool = False


class Labels:
    """All labels of one arena. Takes over what `notes` still know.

    refused: names that found no room. unpinned: those that could not be pinned. unsaved: whether the notes have no
    room for all labels, which a restart would then forget.
    """

    def __init__(self, index: Index, clock: Clock, notes: LabelNotes | None = None) -> None:
        self.refused = 0
        self.unpinned = 0
        self.unsaved = False
        self._notes = notes
        self._is_noted = True
        self._note_s = 0.0
        self._index = index
        self._clock = clock
        self._all: dict[tuple[bytes, str], _Held] = {}
        self._names: Counter[BlockKey] = Counter()
        self._pins: Counter[BlockKey] = Counter()
        self._num_keys = 0
        self._pinned_bytes = 0
        self._look_s = 0.0
        for note in notes.read() if notes is not None else ():
            self._take_over(note)

    def __len__(self) -> int:
        return len(self._all)

    def name(self, label: Label, named: Named) -> None:
        """The label speaks of these blocks from now on, and of no others. A pin that it has stays."""
        identity, now_s = (named.tenant, label.name), self._clock.monotonic_s()
        keys = tuple(dict.fromkeys(named.keys))[:MAX_KEYS]
        named = msgspec.structs.replace(named, keys=keys)
        held = _Held(label, named, now_s, now_s, now_s + label.ttl_s if label.ttl_s else math.inf)
        old = self._all.get(identity)
        num_more = len(keys) - (len(old.named.keys) if old else 0)
        if (old is None and len(self._all) >= MAX_LABELS) or self._num_keys + num_more > MAX_ALL_KEYS:
            self.refused += 1
            return
        wants_pin = label.pin
        if old is not None:
            held.created_s = old.created_s
            wants_pin |= old.is_pinned
            self._remove(old)
        self._add(held)
        if wants_pin and not self._pin(held):
            self.unpinned += 1

    def pin(self, name: str, tenant: bytes | None, *, pinned: bool) -> tuple[int, str]:
        """Pins labels of this name, or lets them go. How many there are, and why it was not done (any more)."""
        met = self._of(name, tenant)
        for held in met:
            if not pinned:
                self._unpin(held)
            elif not self._pin(held):
                most_bytes = int(self._index.capacity_bytes * PINNED_SHARE)
                return len(
                    met
                ), f"labels may pin {most_bytes} bytes, half of the arena; {self._pinned_bytes} are pinned"
        return len(met), ""

    def drop(self, name: str, tenant: bytes | None) -> tuple[int, list[BlockKey]]:
        """Forgets labels of this name and their blocks. How many there were, and the keys to forget below the arena."""
        met = self._of(name, tenant)
        return len(met), self._drop(met)

    def clear(self) -> None:
        """Forgets every label; the blocks stay."""
        for held in list(self._all.values()):
            self._remove(held)

    def expire(self) -> list[BlockKey]:
        """Ends labels that are past their deadline or have lost every block. To be called every now and then. Returns
        keys that are to be forgotten below the arena."""
        now_s = self._clock.monotonic_s()
        if now_s >= self._look_s:
            self._look_s = now_s + GONE_PERIOD_S
            for held in [h for h in self._all.values() if h.deadline_s == math.inf and self._is_gone(h, now_s)]:
                self._remove(held)
        return self._drop([held for held in self._all.values() if now_s >= held.deadline_s])

    def note(self) -> None:
        """Notes what has changed, for the next server; rarely enough to take a fiftieth of the time at most. To be
        called every now and then."""
        begun_s = self._clock.monotonic_s()
        if self._notes is None or self._is_noted or begun_s < self._note_s:
            return
        self.unsaved = not self._notes.write([_note_of(held) for held in self._all.values()])
        ended_s = self._clock.monotonic_s()
        self._is_noted, self._note_s = True, ended_s + (ended_s - begun_s) * PAUSE_PER_NOTE

    def figures(self) -> list[LabelFigures]:
        """Every label, the oldest first."""
        return [self._figures_of(held) for held in sorted(self._all.values(), key=lambda held: held.created_s)]

    def _of(self, name: str, tenant: bytes | None) -> list[_Held]:
        if tenant is not None:
            held = self._all.get((tenant, name))
            return [held] if held is not None else []
        return [held for (_, known), held in self._all.items() if known == name]

    def _drop(self, ended: Iterable[_Held]) -> list[BlockKey]:
        forgotten: list[BlockKey] = []
        for held in ended:
            self._remove(held)
            forgotten += [key for key in held.named.keys if key not in self._names]
        if forgotten:
            self._index.drop(forgotten, Reason.LABEL)
        return forgotten

    def _take_over(self, note: LabelNote) -> None:
        label = Label(note.name, note.ttl_s, note.is_pinned)
        named = Named(note.tenant, tuple(split_keys(note.keys)), note.block_bytes, note.num_tokens)
        deadline_s = note.deadline_s or math.inf
        held = _Held(label, named, note.created_s, self._clock.monotonic_s(), deadline_s)
        self._add(held)
        if note.is_pinned:
            self._pin(held)

    def _add(self, held: _Held) -> None:
        self._all[held.named.tenant, held.label.name] = held
        self._names.update(held.named.keys)
        self._num_keys += len(held.named.keys)
        self._is_noted = False

    def _remove(self, held: _Held) -> None:
        del self._all[held.named.tenant, held.label.name]
        self._unpin(held)
        _subtract(self._names, held.named.keys)
        self._num_keys -= len(held.named.keys)
        self._is_noted = False

    def _pin(self, held: _Held) -> bool:
        """False if labels would pin too much."""
        if held.is_pinned:
            return True
        new = [key for key in held.named.keys if key not in self._pins]
        num_bytes = len(new) * aligned(held.named.block_bytes)
        if self._pinned_bytes + num_bytes > self._index.capacity_bytes * PINNED_SHARE:
            return False
        self._pins.update(held.named.keys)
        self._pinned_bytes += num_bytes
        self._index.complete.leaving.keep(new)
        held.is_pinned = True
        self._is_noted = False
        return True

    def _unpin(self, held: _Held) -> None:
        if held.is_pinned:
            freed = _subtract(self._pins, held.named.keys)
            self._pinned_bytes -= len(freed) * aligned(held.named.block_bytes)
            self._index.complete.leaving.let_go(freed)
            held.is_pinned = False
            self._is_noted = False

    def _is_gone(self, held: _Held, now_s: float) -> bool:
        return now_s - held.named_s >= UNSEEN_S and not any(self._index.complete.get(key) for key in held.named.keys)

    def _figures_of(self, held: _Held) -> LabelFigures:
        entries = [entry for key in held.named.keys if (entry := self._index.complete.get(key)) is not None]
        left_s = held.deadline_s - self._clock.monotonic_s()
        return LabelFigures(
            name=held.label.name,
            blocks=len(entries),
            num_blocks=len(held.named.keys),
            num_tokens=held.named.num_tokens,
            num_bytes=sum(entry.num_bytes for entry in entries),
            pinned=held.is_pinned,
            expires_in_s=None if held.deadline_s == math.inf else max(left_s, 0.0),
            tenant=held.named.tenant,
        )


def _note_of(held: _Held) -> LabelNote:
    named, deadline_s = held.named, 0.0 if held.deadline_s == math.inf else held.deadline_s
    return LabelNote(
        held.label.name,
        named.tenant,
        join_keys(named.keys),
        named.block_bytes,
        named.num_tokens,
        held.label.ttl_s,
        held.created_s,
        deadline_s,
        held.is_pinned,
    )


def _subtract(counter: Counter[BlockKey], keys: Sequence[BlockKey]) -> list[BlockKey]:
    """One less of each; those that are not counted any more."""
    gone = []
    for key in keys:
        counter[key] -= 1
        if counter[key] <= 0:
            del counter[key]
            gone.append(key)
    return gone

"""What an asker knows of a holder becomes what the holder has, whatever is dropped, delayed or too much on the way."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from core.clock import ManualClock
from kvcache import peer_words as words
from kvcache.change_log import Change, ChangeLog
from kvcache.directory import Directory
from kvcache.index import Index
from kvcache.keys import split_keys
from kvcache.peer_session import Session
from kvcache.ranges import ALIGNMENT
from tests.kvcache.places import key, ledger_of

CAPACITY = 12 * ALIGNMENT
OWNER = 1
NUMBERS = st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True)


def test_a_directory_knows_a_prefix_over_several_peers_and_forgets_one_with_all_it_had() -> None:
    directory = Directory()
    directory.add("a", [key(1), key(3)])
    directory.add("b", [key(2), key(3)])
    chain = [key(number) for number in (1, 2, 3, 4)]
    assert directory.prefix(chain, ["a", "b"]) == 3
    assert directory.prefix(chain, ["a"]) == 1
    assert directory.prefix(chain, ["b", "c"]) == 0
    assert sorted(directory.holders(key(3))) == ["a", "b"]
    assert len(directory) == 4
    directory.forget("a")
    assert directory.holders(key(3)) == ["b"]
    assert directory.prefix(chain, ["a", "b"]) == 0
    assert len(directory) == 2


def test_a_directory_is_bounded() -> None:
    directory = Directory(max_keys=10)
    directory.add("a", [key(number) for number in range(8)])
    directory.add("b", [key(number) for number in range(8)])
    assert len(directory) == 10
    directory.discard("a", [key(number) for number in range(100)])
    assert len(directory) == 2
    directory.add("b", [key(number) for number in range(8)])
    assert len(directory) == 8


def test_a_log_gives_each_reader_what_it_lacks_or_says_that_it_cannot() -> None:
    log = ChangeLog(max_changes=4)
    for number in range(4):
        log.add(key(number), True)
    assert log.since(1, 2) == [Change(key(1), True), Change(key(2), True)]
    assert log.since(log.end, 10) == []
    log.add(key(4), False)
    assert log.since(1, 10) is None
    assert log.since(log.end - 1, 10) == [Change(key(4), False)]


class Told(RuleBasedStateMachine):
    """A holder's index and log, and an asker that is told; what it is told may have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger, self.memory = ledger_of(CAPACITY)
        self.index = Index(CAPACITY, self.ledger, ManualClock())
        log = ChangeLog(max_changes=8)
        self.index.complete.on_change = log.add
        self.session = Session(self.index, log, self.send, 0.0)
        self.room = 0
        self.directory = Directory()
        self.session.subscribe()

    def teardown(self) -> None:
        self.room = 1000
        while self.session.announce():
            pass
        assert len(self.directory) == len(self.index.complete)
        assert self.directory.prefix(self.index.complete.keys(), ["holder"]) == len(self.index.complete)
        self.memory.close()

    def send(self, word: words.ToAsker) -> bool:
        """What the asker's link does with it."""
        if self.room == 0:
            return False
        self.room -= 1
        match words.decode_at_asker(words.encode(word)):
            case words.Known(keys, is_first):
                if is_first:
                    self.directory.forget("holder")
                self.directory.add("holder", split_keys(keys))
            case words.Changed(added, removed):
                self.directory.add("holder", split_keys(added))
                self.directory.discard("holder", split_keys(removed))
        return True

    @rule(numbers=NUMBERS)
    def store(self, numbers: list[int]) -> None:
        for number in numbers:
            for _, offset in self.index.reserve(OWNER, [key(number)], 1):
                self.index.commit(OWNER, key(number), offset, number)

    @rule(numbers=NUMBERS)
    def drop(self, numbers: list[int]) -> None:
        self.index.drop([key(number) for number in numbers])

    @rule(room=st.integers(0, 3))
    def tell(self, room: int) -> None:
        self.room = room
        self.session.announce()


TestTold = Told.TestCase
TestTold.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

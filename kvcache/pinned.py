"""An arena's memory as a device may use it.

Memory model: pinned memory stays mapped until it is let go of.
Threading: made on the loading thread; any thread may let go.
"""

from __future__ import annotations

import weakref

from transport.device import Device
from transport.mapping import Mapping


class Pinned:
    """A mapping that a device may copy from and to. address: where the device sees it."""

    def __init__(self, device: Device, mapping: Mapping) -> None:
        """Takes some tenths of a second per GiB. Raises TransferError, with the remedy, if it cannot be pinned."""
        self.address = device.pin(mapping.address, mapping.num_bytes)
        self._unpin = weakref.finalize(self, _unpin, device, mapping)
        self._unpin.atexit = False

    def unpin(self) -> None:
        """Nothing is copying there any more. Also done when this is collected."""
        self._unpin()


def _unpin(device: Device, mapping: Mapping) -> None:
    """While the memory is still mapped: this is what keeps the mapping until then."""
    device.unpin(mapping.address)

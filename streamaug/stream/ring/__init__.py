"""The ring: orders one way, images the other, in memory of the host or of a GPU that trainer and producer share."""

from streamaug.stream.ring.ring import FAILED, READY, STAGES, STARTING, Layout, Mailboxes, Ring, Slot

__all__ = ["FAILED", "READY", "STAGES", "STARTING", "Layout", "Mailboxes", "Ring", "Slot"]

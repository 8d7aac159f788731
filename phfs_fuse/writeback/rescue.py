"""Moves the bytes of files that cannot be stored to `saved/`, with a note of what they were. Owns no state.

No I/O but that of the local disk, and no await.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from phfs_fuse.pending.changes import Changes
from phfs_fuse.state.staging import Layer, StagingArea
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node


class Rescue:
    def __init__(self, inodes: Inodes, area: StagingArea, changes: Changes) -> None:
        self._inodes = inodes
        self._area = area
        self._changes = changes

    def has_room(self, node: Node) -> bool:
        return self._area.saved.has_room(node.staged.local_bytes if node.staged is not None else 0)

    def keep(self, node: Node, reason: str, *, is_waiting: bool) -> list[Path]:
        """Move all layers of `node`, for good or (`is_waiting`) until the next mount takes them back.
        Raises: OSError."""
        layers = node.staged.layers if node.staged is not None else []
        notes = [self._note(node, layer, reason, is_waiting=is_waiting) for layer in layers]
        kept = [self._area.save_aside(layer.path, note) for layer, note in zip(layers, notes, strict=True)]
        return [path for path in kept if path is not None]

    def keep_refused(self) -> list[Path]:
        """Nothing is mounted any more: move the bytes that the store has refused, as far as there is room, until the
        next mount takes them back. Raises: OSError."""
        kept: list[Path] = []
        for node in self._changes.files.waiting():
            if node.dirty is not None and (refusal := node.dirty.refusal) is not None and self.has_room(node):
                kept += self.keep(node, refusal.line, is_waiting=True)
        return kept

    def _note(self, node: Node, layer: Layer, reason: str, *, is_waiting: bool) -> Mapping[str, object]:
        base = node.base
        return {
            "path": os.fsdecode(self._inodes.raw_path(node)),
            "key": self._inodes.key(node),
            "reason": reason,
            "at": time.time(),
            "size": layer.size,
            "ranges": [list(extent) for extent in layer.extents] if layer.gaps() else None,
            "version": None if base is None else {"key": base.key, "etag": base.etag, "size": base.size},
            **({"layer": [layer.id, node.ino]} if is_waiting else {}),
        }

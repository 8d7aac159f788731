"""What a mount answers on its control socket (`control_socket.Controllable`). Owns no state."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import phfs_fuse
from phfs_fuse import metrics
from phfs_fuse.state.refusal import Refusal
from phfs_fuse.worker.wiring import Mount


class Answers:
    def __init__(self, mount: Mount) -> None:
        self._mount = mount

    def pending(self) -> Mapping[str, int]:
        now = self._mount.settling.pending()
        return {
            "files_pending": now.files + now.deletes,
            "bytes_pending": now.bytes,
            "bytes_done": metrics.UPLOADED_BYTES.values[""],
        }

    def status(self) -> Mapping[str, object]:
        config, settling = self._mount.config, self._mount.settling
        pending, usage = settling.pending(), self._mount.blocks.usage()
        saved = self._mount.area.saved
        asked = usage.hits + usage.misses
        return {
            "mountpoint": str(config.kernel.mountpoint),
            "url": config.store.url,
            "endpoint": config.store.endpoint_url,
            "pid": os.getpid(),
            "keeper_pid": os.getppid(),
            "version": phfs_fuse.__version__,
            "uptime_seconds": time.monotonic() - self._mount.started,
            "starts": self._mount.starts,
            "read_only": config.tree.read_only,
            "pending": {
                "files": pending.files,
                "deletes": pending.deletes,
                "bytes": pending.bytes,
                "oldest_seconds": pending.oldest_seconds,
            },
            "cache": {
                "bytes": usage.bytes,
                "limit": usage.limit,
                "hits": usage.hits,
                "misses": usage.misses,
                "hit_rate": usage.hits / asked if asked else None,
            },
            "dirty": {"bytes": pending.bytes, "limit": settling.dirty_bytes_max},
            "uploaded": {"files": metrics.UPLOADED_FILES.values[""], "bytes": metrics.UPLOADED_BYTES.values[""]},
            "inodes": len(self._mount.inodes),
            "open_files": self._mount.vfs.open_files,
            "quotas": self._mount.quotas.shown(),
            "left_uploads": self._left_uploads(),
            "conflicts": len(self._mount.journal.conflicts()),
            "illegal_keys": self._mount.namespace.illegal_keys,
            "unforeseen": dict(metrics.UNFORESEEN.values),
            "errors": [{"path": path, "reason": reason, "count": count} for path, reason, count in settling.errors()],
            "events": self._mount.events.status(),
            "counters": metrics.snapshot(),
            "saved": dict(zip(("entries", "bytes", "limit"), (*saved.usage, saved.limit), strict=True)),
            "refused": [_refused(refusal) for refusal in settling.refused()],
            "store": {"state": settling.store_state},
        }

    def _left_uploads(self) -> Mapping[str, object]:
        left = self._mount.writeback.multiparts.left()
        return {
            "aborts": left.aborts,
            "unanswered": left.intents,
            "kept": [
                {"key": one.key, "upload_id": one.upload_id, "begun": one.started_ns / 1e9} for one in left.kept
            ],
        }

    def conflicts(self) -> Sequence[Mapping[str, object]]:
        return [
            {
                "path": os.fsdecode(row.path),
                "kept_as": os.fsdecode(row.kept_as),
                "outside": row.outside,
                "at": row.at_ns / 1e9,
            }
            for row in self._mount.journal.conflicts()
        ]

    def settled(self, path: str, kept_as: str) -> None:
        self._mount.journal.drop_conflict(os.fsencode(path), os.fsencode(kept_as))

    def limit(self, *, cache_bytes: int | None, dirty_bytes: int | None) -> None:
        """Raises: ConfigError."""
        config = self._mount.config
        if cache_bytes is not None:
            self._mount.blocks.limit(replace(config.cache, size_max=cache_bytes).size_max)
        if dirty_bytes is not None:
            limits = replace(config.writeback, dirty_bytes_max=dirty_bytes)
            self._mount.settling.limit(limits.dirty_bytes_max)
            self._mount.area.saved.limit = limits.saved_max

    def set_quota(self, path: str, size: int | None) -> None:
        self._mount.quotas.set(path, size)

    def refused(self) -> Sequence[str]:
        return [refusal.line for refusal in self._mount.settling.refused()]

    async def sync(self, path: str | None, *, retry: bool) -> None:
        await self._mount.flush_kernel()
        if retry:
            self._mount.settling.retry_refused()
        await self._mount.vfs.settle_path(path or "")


def _refused(refusal: Refusal) -> Mapping[str, object]:
    return {
        "operation": refusal.operation.value,
        "key": refusal.key,
        "path": os.fsdecode(refusal.path),
        "reason": refusal.reason,
        "errno": errno.errorcode.get(refusal.errno, str(refusal.errno)),
        "at": refusal.at_ns / 1e9,
        "line": refusal.line,
    }

"""The volumes of this node: what a call does to one of them, of the kubelet or of `upkeep`.

State: the records, and which inline volumes are being mounted. A call holds its volume; what is on its way is in the
records before it is done.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from phfs_csi.config import INLINE_MAX
from phfs_csi.errors import AlreadyExists, CsiError, FailedPrecondition, Internal, ResourceExhausted
from phfs_csi.node.drains import Drains
from phfs_csi.node.mounter import Mounter, State
from phfs_csi.node.records import Records, TargetRecord, VolumeRecord
from phfs_csi.request.params import AccessMode, PublishParams, StageParams, VolumeParams
from phfs_fuse.state.refusal import summary

log = logging.getLogger(__name__)

REVIVE_SECONDS: Final = 60.0  # for one mount to be served again


class Volumes:
    """Raises from each call: CsiError."""

    def __init__(self, records: Records, mounter: Mounter, drains: Drains, inline_max: int = INLINE_MAX) -> None:
        self._records = records
        self._mounter = mounter
        self._drains = drains
        self._inline_max = inline_max
        self._inline_lock = threading.Lock()
        self._inline_begun: set[str] = set()  # whose records may not be there yet
        self.changed = threading.Event()  # their number; who reacts to that clears it

    # --- what the kubelet asks

    def stage(self, want: StageParams, seconds: float) -> None:
        """Mount the volume at its staging path; the same call again succeeds."""
        record = _record(want.volume, want, path=want.staging_target_path)
        with self._records.hold(want.volume.volume_id):
            self._stage(record, want.volume, seconds)

    def publish(self, want: PublishParams, seconds: float) -> None:
        """Show the volume at the target path; the same call again succeeds."""
        with self._records.hold(want.volume_id):
            if want.inline is not None:
                record = _record(want.inline, want, path=want.target_path, is_inline=True)
                with self._room_for_inline(record):
                    self._stage(record, want.inline, seconds)
            else:
                self._bind(want, seconds)

    def unpublish(self, volume_id: str, target: Path, seconds: float) -> None:
        with self._records.hold(volume_id):
            inline, found = self._records.at(target), self._records.target_at(target)
            if inline is not None and not inline.is_inline:
                raise FailedPrecondition(f"{target}: is where {inline.volume_id} is staged, not published")
            for record in (inline, found[0] if found else None):
                if record is not None and record.volume_id != volume_id:
                    raise FailedPrecondition(f"{target}: is published, but not for {volume_id}")
            if inline is not None:
                self._end(inline, seconds)
            if inline is None and found is None:
                _remove_unmounted(target)
                return
            self._mounter.unbind(target)
            if found is not None:
                self._records.remove_target(found[0], target)

    def unstage(self, volume_id: str, path: Path, seconds: float) -> None:
        """Upload for as long as the volume says, then unmount; the rest is uploaded in the background."""
        with self._records.hold(volume_id):
            record = self._records.mounted(volume_id)
            if record is None:
                self._require_free(path)
                self._mounter.clear(path)  # left over
            if record is None or record.path != path:
                return
            self._require_unpublished(record)
            self._end(record, seconds)

    def expand(self, volume_id: str, quota_bytes: int) -> None:
        """Another size: open files go on."""
        with self._records.hold(volume_id):
            if (record := self._records.mounted(volume_id)) is not None:
                record = replace(record, settings={**record.settings, "quota": str(quota_bytes)})
                self._records.save(record)
                self._mounter.set_quota(record)

    # --- what is done without a call, see `upkeep`

    @property
    def mounted(self) -> list[VolumeRecord]:
        return [record for record in self._records.volumes() if not record.is_ended]

    def take_up(self, record: VolumeRecord, patience_seconds: float = 0) -> None:
        """Have a mount served that is recorded, whatever became of it. Raises: Aborted, a call is at work."""
        with self._records.hold(record.volume_id, patience_seconds):
            now = self._records.current(record)
            if now is None or now.is_ended:
                return
            state = self._mounter.state(now)
            if state is State.SERVED:
                self._bind_again(now)
            elif state is State.ABSENT and not now.path.is_dir():
                log.warning("volume=%s: is not staged any more, %s is gone", now.volume_id, now.path)
                self._forget(replace(now, is_ended=True))
            else:
                log.warning("not served, taken up again: volume=%s", now.volume_id)
                self._revive(now, REVIVE_SECONDS)

    def abandon(self, record: VolumeRecord) -> None:
        """Nobody can take up its connection, for which programs wait: they get an error, and a new mount is made."""
        with suppress(CsiError), self._records.hold(record.volume_id, 0):
            self._mounter.abandon(record)
            log.error("volume=%s: given up, to be mounted anew", record.volume_id)

    # --- how

    def _stage(self, record: VolumeRecord, volume: VolumeParams, seconds: float) -> None:
        before = self._records.mounted(record.volume_id)
        if before is not None:
            _require_same(before, record)
            record = replace(record, mount_group=before.mount_group)
        self._require_free(record.path, mounted=record.volume_id)
        deadline = time.monotonic() + seconds
        self._drains.cancel(record)
        left = self._records.current(record)  # ended, with something to upload
        self._records.save(record)
        self._records.save_credentials(record, volume.credentials)
        if before is not None and self._mounter.state(before) is State.SERVED:
            if before.settings != record.settings:
                self._mounter.set_quota(record)
            return
        try:
            self._revive(record, deadline - time.monotonic())
        except BaseException:
            if before is None:
                self._forget(replace(left or record, is_ended=True))
            raise
        self.changed.set()

    @contextmanager
    def _room_for_inline(self, record: VolumeRecord) -> Iterator[None]:
        """Raises: FailedPrecondition, ResourceExhausted."""
        if not self._inline_max:
            raise FailedPrecondition(f"{record.volume_id}: inline volumes are turned off on this node")
        with self._inline_lock:
            mounted = {found.volume_id for found in self.mounted if found.is_inline} | self._inline_begun
            if len(mounted - {record.volume_id}) >= self._inline_max:
                raise ResourceExhausted(
                    f"{record.volume_id}: {self._inline_max} inline volumes are mounted on this node, the most that "
                    "--inline-max allows"
                )
            self._inline_begun.add(record.volume_id)
        try:
            yield
        finally:
            with self._inline_lock:
                self._inline_begun.discard(record.volume_id)

    def _forget(self, record: VolumeRecord) -> None:
        """A volume that is not mounted: what is left of it is uploaded in the background."""
        if self._drains.has_leftovers(record):
            self._records.save(record)
        else:
            self._records.remove(record)

    def _bind(self, want: PublishParams, seconds: float) -> None:
        record = self._records.mounted(want.volume_id)
        if record is None or record.path != want.staging_target_path:
            raise FailedPrecondition(f"{want.volume_id}: is not staged at {want.staging_target_path}")
        if want.mount_group not in (None, record.mount_group):
            raise FailedPrecondition(
                f"{want.volume_id}: is mounted with fsGroup {record.mount_group} on this node, and can have one only"
            )
        self._require_free(want.target_path, bound=want.volume_id)
        target = TargetRecord(volume_id=want.volume_id, path=want.target_path, read_only=want.read_only)
        others = [other for other in self._records.targets(record) if other.path != target.path]
        if others and AccessMode.SINGLE_NODE_SINGLE_WRITER in (want.access_mode, record.access_mode):
            raise FailedPrecondition(
                f"{want.volume_id}: is published at {others[0].path}, and only one pod may have it"
            )
        if self._mounter.state(record) is not State.SERVED:
            self._revive(record, seconds)
        found = self._records.target_at(target.path)
        if found is not None and self._mounter.is_bound(record, target.path):
            if found[1] != target:
                raise AlreadyExists(f"{target.path}: is published with another volume or read-only setting")
            return
        self._records.save_target(record, target)
        self._mounter.bind(record, target.path, read_only=target.read_only)

    def _revive(self, record: VolumeRecord, seconds: float) -> None:
        """Have the mount served, by who takes up its connection or anew, and its targets show it."""
        self._mounter.mount(record, seconds)
        log.info("mounted volume=%s source=%s path=%s", record.volume_id, record.source, record.path)
        self._bind_again(record)

    def _bind_again(self, record: VolumeRecord) -> None:
        """One that cannot be bound keeps neither the other ones nor new pods waiting."""
        for target in self._records.targets(record):
            if self._mounter.is_bound(record, target.path):
                continue
            if not target.path.parent.exists():  # the pod is gone, and nobody said so
                self._records.remove_target(record, target.path)
                continue
            try:
                self._mounter.bind(record, target.path, read_only=target.read_only)
            except CsiError as exc:
                log.error("volume=%s: not bound again target=%s: %s", record.volume_id, target.path, exc)
            else:
                log.warning("bound again volume=%s target=%s", record.volume_id, target.path)

    def _require_free(self, path: Path, *, mounted: str = "", bound: str = "") -> None:
        """Raises: FailedPrecondition when a volume is mounted or bound there, but for those that are named: it would
        be taken off, or its connection be served as that of another one."""
        target = self._records.target_at(path)
        for found, allowed in ((self._records.at(path), mounted), (target and target[0], bound)):
            if found is not None and found.volume_id != allowed:
                raise FailedPrecondition(f"{path}: the volume {found.volume_id} is there")

    def _require_unpublished(self, record: VolumeRecord) -> None:
        for target in self._records.targets(record):
            if self._mounter.is_bound(record, target.path):
                raise FailedPrecondition(f"{record.volume_id}: is still published at {target.path}")
            self._records.remove_target(record, target.path)

    def _end(self, record: VolumeRecord, seconds: float) -> None:
        if self._mounter.state(record) is State.DEAD:  # what programs wrote may still wait for somebody to serve it
            with suppress(CsiError):
                self._mounter.mount(record, seconds)
        self._records.save(replace(record, is_ended=True))  # first: what is left is uploaded whatever happens now
        self._mounter.end(record, min(seconds, record.drain_seconds))
        self._mounter.clear(record.path)
        if count := self._records.refused(record):
            log.error("volume=%s: %s; tried again in the background", record.volume_id, summary(count))
        self._forget(replace(record, is_ended=True))
        log.info("unmounted volume=%s path=%s", record.volume_id, record.path)
        self.changed.set()


def _remove_unmounted(target: Path) -> None:
    """Nothing was published there, as far as the records know. Raises: FailedPrecondition, Internal."""
    try:
        target.rmdir()
    except FileNotFoundError:
        pass
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise FailedPrecondition(f"{target}: what is mounted here this plugin has not published") from exc
        raise Internal(f"{target}: not removed: {exc.strerror}") from exc


def _record(
    volume: VolumeParams, want: StageParams | PublishParams, *, path: Path, is_inline: bool = False
) -> VolumeRecord:
    return VolumeRecord(
        volume_id=volume.volume_id,
        source=volume.source,
        path=path,
        settings=volume.settings,
        access_mode=want.access_mode,
        read_only=want.read_only,
        mount_group=want.mount_group,
        cache_bytes_max=volume.cache_bytes_max,
        drain_seconds=volume.drain_seconds,
        has_credentials=bool(volume.credentials.access_key),
        has_ca_bundle=bool(volume.credentials.ca_bundle),
        is_inline=is_inline,
    )


def _require_same(before: VolumeRecord, now: VolumeRecord) -> None:
    """Raises: AlreadyExists that names what is otherwise, FailedPrecondition."""
    if before.path != now.path:
        raise FailedPrecondition(f"{now.volume_id}: is mounted at {before.path}")
    for name in ("source", "access_mode", "read_only"):
        if getattr(before, name) != getattr(now, name):
            raise AlreadyExists(f"{now.volume_id}: is mounted already, with another {name}")
    if now.mount_group not in (None, before.mount_group):
        raise AlreadyExists(f"{now.volume_id}: is mounted already, with fsGroup {before.mount_group}")
    if without_quota(before.settings) != without_quota(now.settings):
        raise AlreadyExists(f"{now.volume_id}: is mounted already, with other settings")


def without_quota(settings: Mapping[str, str]) -> dict[str, str]:
    """A quota changes while the volume is mounted."""
    return {name: value for name, value in settings.items() if name != "quota"}

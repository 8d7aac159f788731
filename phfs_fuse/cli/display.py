"""How the commands show things: progress of uploads, the table of mounts. Owns no state.

Names are chosen by other people: what is shown here is escaped, so that none steers the terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.table import Table

from phfs_fuse.host.logs import printable
from phfs_fuse.host.saved_files import Entry
from phfs_fuse.launch import client

PLAIN_SECONDS: Final = 5.0  # between two lines where no bar can be drawn
PIPE_COLUMNS: Final = 10_000
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def follow(label: str, events: Iterable[client.Progress]) -> None:
    """Consume `events`, with a bar on a terminal and a line now and then elsewhere (on standard error)."""
    if sys.stderr.isatty():
        _bar(label, events)
    else:
        _lines(label, events)


def _bar(label: str, events: Iterable[client.Progress]) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: TaskID | None = None
        for event in events:
            if task is None:
                task = bar.add_task(escape(printable(label)))
            total = event.bytes_done + event.bytes_pending
            text = f"{escape(printable(label))}: {event.files_pending} files wait"
            bar.update(task, description=text, completed=event.bytes_done, total=total)


def _lines(label: str, events: Iterable[client.Progress]) -> None:
    shown = time.monotonic()
    for event in events:
        if event.files_pending and time.monotonic() - shown >= PLAIN_SECONDS:
            shown = time.monotonic()
            print(
                f"{printable(label)}: {event.files_pending} files, {size(event.bytes_pending)} wait", file=sys.stderr
            )


def mounts(answers: Iterable[Mapping[str, Any]]) -> None:
    """A table, one row per mount, and the errors below it."""
    table = Table("MOUNT POINT", "VOLUME", "STATE", "PENDING", "CACHE", "HITS", "CONFLICTS", box=None)
    errors, quotas, refused, uploads, aside = [], [], [], [], []
    for answer in answers:
        table.add_row(*map(_cell, _row(answer)))
        errors += [(answer["mountpoint"], error) for error in answer.get("errors", ())]
        aside += [(answer["mountpoint"], answer["saved"])] if answer.get("saved", {}).get("entries") else []
        refused += [(answer["mountpoint"], refusal) for refusal in answer.get("refused", ())]
        uploads += [(answer["mountpoint"], one) for one in answer.get("left_uploads", {}).get("kept", ())]
        quotas += [(answer["mountpoint"], quota) for quota in answer.get("quotas", ())]
    # A pipe has no width: one line per mount for grep.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)
    console.print(table)
    lines = [os.path.join(mountpoint, quota["path"]) + ": " + _quota(quota) for mountpoint, quota in quotas]
    lines += [f"{mountpoint}: {_saved(kept)}" for mountpoint, kept in aside]
    lines += [f"{mountpoint}: {refusal['line']}" for mountpoint, refusal in refused]
    lines += [f"{mountpoint}: {_kept(upload)}" for mountpoint, upload in uploads]
    for mountpoint, error in errors:
        lines.append(f"{mountpoint}: {error['path']}: {error['reason']} ({error['count']} times)")
    for line in lines:
        console.print(printable(line), markup=False)


def conflicts(found: Iterable[client.Conflict]) -> None:
    """A table, one row per conflict."""
    table = Table("FILE", "OURS IS KEPT AS", "SINCE", box=None)
    for one in found:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at))
        table.add_row(*map(_cell, (one.original, one.copy if one.kept_as else "- (lost)", since)))
    Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)


def saved(entries: Iterable[Entry]) -> None:
    """A table, one row per entry."""
    table = Table("ID", "FILE", "BYTES", "SINCE", "WHY", box=None)
    for one in entries:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.note.get("at", one.data.stat().st_mtime)))
        file = str(one.note.get("path") or one.note.get("key") or "-")
        held = size(one.bytes) + {True: "", False: " of some ranges", None: ""}[one.is_whole]
        why = ("next mount: " if one.is_waiting else "") + str(one.note.get("reason", "-"))
        table.add_row(*map(_cell, (one.id, file, held, since, why)))
    Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)


def _cell(text: str) -> str:
    return escape(printable(text))


def _row(answer: Mapping[str, Any]) -> tuple[str, ...]:
    if "pending" not in answer:
        return answer["mountpoint"], answer["url"], answer["state"], "", "", "", ""
    pending, cache = answer["pending"], answer["cache"]
    waits = "-"
    if count := pending["files"] + pending["deletes"]:
        waits = f"{count} changes, {size(pending['bytes'])}, {duration(pending['oldest_seconds'])}"
    state = ("read-only, " if answer["read_only"] else "") + f"store {answer['store']['state']}"
    if "events" in answer:  # not of a worker before there were any
        state += f", events {answer['events']['state']}"
    used = f"{size(cache['bytes'])} of {size(cache['limit'])}"
    hits = "-" if cache["hit_rate"] is None else f"{cache['hit_rate']:.0%}"  # None: nothing was read yet
    return answer["mountpoint"], answer["url"], state, waits, used, hits, str(answer["conflicts"])


def _quota(quota: Mapping[str, Any]) -> str:
    known = "" if quota["counted"] else ", being counted"
    refused = f", refused {quota['refused']} times" if quota["refused"] else ""
    return f"{size(quota['used'])} of {size(quota['limit'])}, {size(quota['free'])} free{known}{refused}"


def _kept(upload: Mapping[str, Any]) -> str:
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(upload["begun"]))
    return (
        f"{upload['key']}: multipart upload {upload['upload_id']}, begun {begun}, may be another client's and is kept"
    )


def _saved(kept: Mapping[str, Any]) -> str:
    limit = "" if kept["limit"] is None else f" of {size(kept['limit'])}"
    return f"{kept['entries']} in saved/, {size(kept['bytes'])}{limit}, which no file has; phfs saved list shows them"


def size(count: float) -> str:
    """`0 B`, `1.5 MiB`."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.1f} {_UNITS[unit]}" if unit and count < 100 else f"{count:.0f} {_UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """`0 s`, `90 s`, `5 min`, `3 h`."""
    seconds = seconds or 0
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

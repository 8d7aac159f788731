"""`phfs saved`: list, export and drop the bytes that could not be stored, with or without a mount. Owns no state."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from phfs_fuse.config.dirs import state_home
from phfs_fuse.errors import LocalStateError, UsageError
from phfs_fuse.host import registry
from phfs_fuse.host.logs import printable
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.saved_files import NAME, Entry, Saved
from phfs_fuse.launch import client

_FOR: Final = "A mount point, a state directory (--state-dir of a mount), or one volume's folder in it. Default: all."
_Place = Annotated[str | None, typer.Option("--of", metavar="PLACE", help=_FOR)]

app = typer.Typer(help="Bytes that could be stored nowhere: list, export, drop.", no_args_is_help=True)


@app.command("list")
def show(
    place: Annotated[str | None, typer.Argument(metavar="[PLACE]", help=_FOR)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list.")] = False,
) -> int:
    """What lies in saved/, with the file that each was to be, and why it is there."""
    found = [(saved, entry) for saved in _places(place) for entry in saved.entries()]
    if as_json:
        print(json.dumps([_fields(saved, entry) for saved, entry in found], indent=1))
    elif found:
        from phfs_fuse.cli import display

        display.saved(entry for _, entry in found)
    else:
        print("nothing was saved")
    return 0


@app.command()
def export(
    entry_id: Annotated[str, typer.Argument(metavar="ID", help="As listed.")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; it must not be there yet.")],
    place: _Place = None,
) -> int:
    """Copy one to a file. What it does not hold is zero there."""
    saved, entry = _find(entry_id, place)
    try:
        saved.export(entry, target)
    except OSError as exc:
        raise LocalStateError(f"{exc.filename or target}: {exc.strerror}") from exc
    if entry.is_whole is False:
        rest = f"the rest was in {_version(entry)}"
        print(printable(f"only bytes {_ranges(entry)} are those of the change; {rest}"))
    return 0


@app.command()
def drop(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="As listed.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that is listed.")] = False,
    place: _Place = None,
) -> int:
    """Delete some for good, those too that the next mount would try to store."""
    if everything == bool(ids):
        raise UsageError("say which: phfs saved drop ID..., or --all")
    if everything:
        for saved in _places(place):
            saved.drop(saved.entries())
    for saved, entry in [_find(entry_id, place) for entry_id in ids or ()]:
        saved.drop([entry])
    return 0


def _places(place: str | None) -> list[Saved]:
    """Of all volumes at `place`. Raises: UsageError."""
    if place is None:
        running = [Path(record.control_socket).parent for record in registry.records()]
        return _saved([*running, *_volumes(state_home())])
    if (record := registry.find(os.path.realpath(place))) is not None:
        return _saved([Path(record.control_socket).parent])
    path = Path(place)
    if place in mount_table():
        record, _ = client.mount_of(place, mount_table())
        return _saved([Path(record.control_socket).parent])
    if not path.is_dir():
        raise UsageError(f"{place}: no mount point and no state directory")
    return _saved([path.parent if path.name == NAME else path, *_volumes(path)])


def _volumes(state_dir: Path) -> list[Path]:
    return sorted(path for path in state_dir.glob("*") if path.is_dir())


def _saved(volumes: Sequence[Path]) -> list[Saved]:
    """Those of `volumes` that have saved something, each once."""
    found = dict.fromkeys(Path(os.path.realpath(volume)) / NAME for volume in volumes)
    return [Saved(path) for path in found if path.is_dir()]


def _find(entry_id: str, place: str | None) -> tuple[Saved, Entry]:
    """Raises: UsageError."""
    found = [(saved, entry) for saved in _places(place) for entry in saved.entries() if entry.id == entry_id]
    if len(found) != 1:
        why = "is not listed" if not found else "is that of several, name one volume with --of"
        raise UsageError(f"{entry_id}: {why}; phfs saved list shows them")
    return found[0]


def _fields(saved: Saved, entry: Entry) -> dict[str, Any]:
    """Of one entry, for programs."""
    return {
        **entry.note,
        "id": entry.id,
        "file": str(entry.data),
        "bytes": entry.bytes,
        "whole": entry.is_whole,
        "waiting": entry.is_waiting,
        "volume": str(saved.directory.parent),
    }


def _ranges(entry: Entry) -> str:
    return ", ".join(f"{start} to {end - 1}" for start, end in entry.note["ranges"]) or "none"


def _version(entry: Entry) -> str:
    version = entry.note.get("version") or {}
    return f"version {version.get('etag', '?')} of {version.get('key', '?')}"

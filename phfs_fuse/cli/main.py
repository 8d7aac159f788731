"""The `phfs` and `mount.phfs` commands: argv -> calls, errors -> one line and an exit code. Owns no state."""

from __future__ import annotations

import getopt
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from phfs_fuse.cli import saved
from phfs_fuse.cli.program import guarded, program, say
from phfs_fuse.config import resolve
from phfs_fuse.config.options import SETTINGS, Setting
from phfs_fuse.config.resolve import GivenValue, Layer
from phfs_fuse.config.values import Raw
from phfs_fuse.errors import MountpointError, StoreRefused, UsageError
from phfs_fuse.host import logs, processes, registry
from phfs_fuse.host.mount_table import locate, mount_table
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.launch import client, preflight

log = logging.getLogger(__name__)
app = program("phfs", "Mount a prefix of an S3 bucket as a POSIX tree.")
app.add_typer(saved.app, name="saved")
END_SECONDS = 10.0  # for the processes of a mount to end after it


# --- mount


def mount(
    arguments: list[str],
    options: Layer,
    flags: Mapping[str, Raw | Sequence[Raw] | None],
    *,
    foreground: bool,
    fake: bool = False,
) -> int:
    """Mount and return 0 when the mount is ready, with `foreground` its exit code when it has ended.

    `fake` checks everything that can be checked without the store, and mounts nothing.
    """
    if not 1 <= len(arguments) <= 2:
        raise UsageError("say what to mount and where: [s3://BUCKET[/PREFIX]] MOUNTPOINT")
    mountpoint, _ = locate(arguments[-1], mount_table())
    given = resolve.gather(resolve.from_flags(flags), options)
    resolved = resolve.resolve(arguments[0] if len(arguments) == 2 else None, Path(mountpoint), given)
    logs.setup(resolved.config.log_level, resolved.config.log_format)
    config = preflight.export_credentials(resolved)
    preflight.check(config)
    if fake:
        return 0
    from phfs_fuse.launch import launcher

    return launcher.start(config, preflight.write_config(config), foreground=foreground)


def _mount_command(**given: Any) -> int:
    """Mount s3://BUCKET[/PREFIX], or with --group the space of a group, on an empty directory.

    Returns when the mount is ready. Settings are also read from -o, PHFS_* variables and a --config file.
    """
    arguments, options, foreground = given.pop("arguments"), given.pop("options"), given.pop("foreground")
    flags = {name.replace("_", "-"): raw for name, raw in given.items()}
    return mount(arguments, resolve.from_options(options or ()), flags, foreground=foreground)


def drain(source: str | None, options: Layer, flags: Mapping[str, Raw | None]) -> NoReturn:
    """Become the process that uploads, and end with its exit code."""
    resolved = resolve.resolve(source, Path("/"), resolve.gather(resolve.from_flags(flags), options))
    config = preflight.export_credentials(resolved)
    preflight.check_directories(config)
    directory = config.writeback.directory  # in place of the mount point: it names the process to others
    config = replace(config, kernel=replace(config.kernel, mountpoint=directory))
    from phfs_fuse.host import fusemount

    command = [*fusemount.python(), "phfs_fuse.worker.drain", f"--config={preflight.write_config(config)}"]
    os.execve(sys.executable, command, fusemount.environment())


def _drain_command(**given: Any) -> NoReturn:
    """Upload what an ended mount of this volume has left in its state directory, without mounting.

    The settings are those of phfs mount: endpoint and state directory tell which volume it is.
    """
    source, options = given.pop("source"), given.pop("options")
    flags = {name.replace("_", "-"): raw for name, raw in given.items()}
    drain(source, resolve.from_options(options or ()), flags)


_OPTIONS = Annotated[
    list[str] | None, typer.Option("-o", metavar="OPT[,OPT]", help="Options as in fstab: name or name=value.")
]
_MOUNT_PARAMETERS: Mapping[str, Any] = {
    "arguments": Annotated[list[str], typer.Argument(metavar="[s3://BUCKET[/PREFIX]] MOUNTPOINT")],
    "options": _OPTIONS,
    "foreground": Annotated[bool, typer.Option("--foreground", "-f", help="Stay, and log to standard error.")],
}
_DRAIN_PARAMETERS: Mapping[str, Any] = {
    "source": Annotated[str | None, typer.Argument(metavar="[s3://BUCKET[/PREFIX]]")],
    "options": _OPTIONS,
}


def _signature(first: Mapping[str, Any]) -> inspect.Signature:
    """And one parameter per setting, from the table: the only list of flags."""
    parameters = {**first, **{setting.name.replace("-", "_"): _flag(setting) for setting in SETTINGS if setting.flag}}
    defaults = {"arguments": inspect.Parameter.empty, "foreground": False}
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(name, kind, default=defaults.get(name), annotation=annotation)
            for name, annotation in parameters.items()
        ]
    )


def _flag(setting: Setting) -> Any:
    text = f"{setting.help} [{setting.default}]" if setting.default else setting.help
    if setting.is_switch:
        return Annotated[bool | None, typer.Option(f"--{setting.name}/--no-{setting.name}", help=text)]
    kind: Any = list[str] | None if setting.is_list else str | None
    return Annotated[kind, typer.Option(f"--{setting.name}", metavar=setting.kind.metavar, help=text)]


for _name, _command, _parameters in (
    ("mount", _mount_command, _MOUNT_PARAMETERS),
    ("drain", _drain_command, _DRAIN_PARAMETERS),
):
    vars(_command)["__signature__"] = _signature(_parameters)
    app.command(_name)(_command)


# --- running mounts


@app.command()
def umount(
    mountpoint: str,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Give up when uploads take longer.")] = None,
    lazy: Annotated[bool, typer.Option("--lazy", help="Detach even while files are in use.")] = False,
) -> int:
    """Upload what is pending, then unmount."""
    from phfs_fuse.cli import display
    from phfs_fuse.launch import launcher

    table, seconds = mount_table(), _seconds("--timeout", timeout)
    place, entry = locate(mountpoint, table)
    if entry is None or entry.mountpoint != place:
        raise MountpointError(f"{place}: no phfs mount is here")
    record = registry.find(place)
    if record is None or not record.alive:
        launcher.unmount(Path(place), lazy=True)
        say(f"{place}: removed a dead mount; what was not uploaded goes up with the next mount of the volume")
        return 0
    try:
        display.follow(place, client.umount(record, seconds, lazy=lazy))
    except StoreRefused:  # and unmounted
        processes.ended(record.keeper_pid, 0 if lazy else END_SECONDS)
        raise
    if not lazy:  # what is in use lives on detached
        processes.ended(record.keeper_pid, END_SECONDS)
    return 0


@app.command()
def sync(
    path: Annotated[str | None, typer.Argument(help="A file or directory in a mount. Default: all mounts.")] = None,
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="Give up when uploads take longer.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="First try again what the store has refused.")] = False,
) -> int:
    """Wait until everything, or one path, is in the store."""
    seconds = _seconds("--timeout", timeout)
    if path is not None:
        record, inner = client.mount_of(path, mount_table())
        _drain(record, inner or None, seconds, retry=retry)
        return 0
    for record in registry.records():
        if record.alive:
            _drain(record, None, seconds, retry=retry)
    return 0


@app.command()
def status(
    mountpoint: Annotated[str | None, typer.Argument(help="Default: all mounts.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one object, or a list of all.")] = False,
) -> int:
    """Show what is mounted, pending uploads, cache, conflicts, errors."""
    if mountpoint is not None:
        answers = [client.status(client.mount_of(mountpoint, mount_table())[0])]
    else:
        answers = [_status_or_state(record) for record in registry.records()]
    if as_json:
        print(json.dumps(answers if mountpoint is None else answers[0], indent=1))
    elif answers:
        from phfs_fuse.cli import display

        display.mounts(answers)
    else:
        print("nothing is mounted")
    return 0


@app.command(epilog="phfs conflicts resolve --keep ours|theirs|both PATH settles the one of PATH.")
def conflicts(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[MOUNTPOINT] | resolve PATH")] = None,
    keep: Annotated[str | None, typer.Option(metavar="ours|theirs|both", help="With resolve: what stays.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a list.")] = False,
) -> int:
    """List what somebody else had changed under unsaved bytes, and settle it."""
    from phfs_fuse.cli import conflicts as settle

    match arguments or []:
        case ["resolve", path]:
            settle.resolve(path, keep)
        case [] | [_] if keep is None:
            settle.show(arguments[0] if arguments else None, as_json=as_json)
        case _:
            raise UsageError("usage: phfs conflicts [MOUNTPOINT], or phfs conflicts resolve --keep WHAT PATH")
    return 0


@app.command()
def upgrade(
    mountpoint: Annotated[str | None, typer.Argument(help="Default: all mounts.")] = None,
) -> int:
    """Let a worker of the version that is installed now take over; open files go on."""
    if mountpoint is not None:
        records = [client.mount_of(mountpoint, mount_table())[0]]
    else:
        records = [record for record in registry.records() if record.alive]
    for record in records:
        before, after = client.upgrade(record)
        print(f"{logs.printable(record.mountpoint)}: {before} -> {after}")
    return 0


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Work here. Default: a temporary directory.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the directory behind.")] = False,
    once: Annotated[bool, typer.Option("--once", help="Check that it works, then end.")] = False,
) -> int:
    """Start a small S3 store with sample groups and mount one, to try things."""
    from phfs_fuse.cli import demo as show

    return show.run(directory, keep=keep, once=once)


@app.command()
def bench(
    against: Annotated[str, typer.Option(metavar="SYSTEM,...", help="The other mounts.")] = "rclone",
    endpoint_url: Annotated[str | None, typer.Option(metavar="URL", help="The store, when it is not AWS.")] = None,
    bucket: Annotated[str | None, typer.Option(metavar="NAME", help="An existing bucket: a prefix is used.")] = None,
    minio: Annotated[Path | None, typer.Option(metavar="BINARY", help="Start this MinIO for the run.")] = None,
    embedded: Annotated[bool, typer.Option("--embedded", help="Start moto for the run: slow, to try it.")] = False,
    dirs: Annotated[
        str | None, typer.Option(metavar="NAME=PATH,...", help="Compare directories that are mounted already.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="WORKLOAD,...", help="Default: all.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the workloads and end.")] = False,
    size: Annotated[str, typer.Option(metavar="full|small", help="small: to try it.")] = "full",
    reps: Annotated[int, typer.Option(metavar="N", help="Repetitions.")] = 3,
    latency_ms: Annotated[float, typer.Option(metavar="L", help="Added to each round trip to the store.")] = 0.0,
    counts: Annotated[bool, typer.Option(help="Count requests and bytes in a repetition of its own.")] = True,
    timeout: Annotated[str, typer.Option(metavar="TIME", help="Of each step of a workload.")] = "10m",
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Caches of the mounts. Default: that for temporary files.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All raw figures.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="A bar chart.")] = None,
) -> int:
    """Run workloads on phfs and on other mounts of the same store, side by side."""
    from phfs_fuse.bench import command

    if show_list:
        command.show_workloads()
        return 0
    options = command.Options(
        against=against,
        endpoint_url=endpoint_url,
        bucket=bucket,
        minio=minio,
        embedded=embedded,
        dirs=dirs,
        only=only,
        size=size,
        repetitions=reps,
        latency_ms=latency_ms,
        counts=counts,
        timeout_seconds=_seconds("--timeout", timeout) or 0,
        work_dir=work_dir,
        json_file=json_file,
        plot_file=plot,
    )
    return command.run(options)


def _drain(record: MountRecord, path: str | None, seconds: float | None, *, retry: bool) -> None:
    from phfs_fuse.cli import display

    display.follow(record.mountpoint, client.sync(record, path, seconds, retry=retry))


def _status_or_state(record: MountRecord) -> client.Answer:
    """A mount that does not answer is shown, not an error: the others are of interest too."""
    try:
        return client.status(record)
    except MountpointError:
        state = "no answer" if record.alive else "dead"
        return {
            "mountpoint": record.mountpoint,
            "url": record.url,
            "keeper_pid": record.keeper_pid,
            "state": state,
        }


def _seconds(flag: str, raw: str | None) -> float | None:
    from phfs_fuse.config.values import seconds
    from phfs_fuse.errors import ConfigError

    try:
        return None if raw is None else seconds(raw)
    except ValueError as exc:
        raise ConfigError(flag, raw, str(exc)) from exc


# --- entry points


def main() -> None:
    """The `phfs` command."""
    sys.exit(_guarded("phfs", lambda: app(prog_name="phfs", standalone_mode=False)))


def mount_helper() -> None:
    """`mount.phfs SOURCE MOUNTPOINT [-sfnv] [-o options]`, called by mount(8); its exit codes are mount's.

    Source: mount(8), external helpers and exit status.
    """
    code = _guarded("mount.phfs", lambda: _help_mount(sys.argv[1:]))
    sys.exit({0: 0, UsageError.exit_code: 1}.get(code, 32))


def _help_mount(argv: Sequence[str]) -> int:
    try:
        flags, arguments = getopt.gnu_getopt(list(argv), "sfnvo:t:N:")
    except getopt.GetoptError as exc:
        raise UsageError(str(exc)) from exc
    if len(arguments) != 2:
        raise UsageError("usage: mount.phfs SOURCE MOUNTPOINT [-sfnv] [-o options]")
    names = [name for name, _ in flags]
    options = resolve.from_options([text for name, text in flags if name == "-o"], sloppy="-s" in names)
    options = {"fs-name": GivenValue(arguments[0], "-o fs-name"), **options}  # mount -a compares it with fstab
    if "group" in options and not arguments[0].startswith("s3:"):
        arguments = arguments[1:]  # the group says what to mount
    return mount(arguments, options, {}, foreground=False, fake="-f" in names)


def _guarded(name: str, call: Callable[[], int | None]) -> int:
    logs.setup(os.environ.get("PHFS_LOG_LEVEL", "warning"), "text")
    return guarded(name, call, debug="PHFS_LOG_LEVEL=debug")

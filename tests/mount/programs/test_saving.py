"""How notebook servers and editors save: backups, temporary files, renames; nothing may be left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.mount.place import Place, saved

pytestmark = pytest.mark.fuse


def notebook(version: int) -> str:
    return json.dumps({"cells": [{"source": f"print({version})"}] * 100, "nbformat": 4})


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def save_with_backup(path: Path, text: str) -> None:
    """A notebook server's way: copy beside, write in place, remove the copy."""
    backup = path.with_name(f".~{path.name}")
    if path.exists():
        shutil.copy2(path, backup)
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    backup.unlink(missing_ok=True)


def save_by_rename(path: Path, text: str) -> None:
    """Its other way: write beside, sync, rename over."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        shutil.copystat(path, beside)
    beside.replace(path)
    fsync(path.parent)


@pytest.mark.parametrize("save", [save_with_backup, save_by_rename])
def test_notebook_with_checkpoints(place: Place, mnt: Path, tmp_path: Path, save) -> None:  # type: ignore[no-untyped-def]
    path = mnt / "Untitled.ipynb"
    checkpoint = mnt / ".ipynb_checkpoints/Untitled-checkpoint.ipynb"
    for version in range(5):
        save(path, notebook(version))
        checkpoint.parent.mkdir(exist_ok=True)
        shutil.copy2(path, checkpoint)
        assert path.read_text() == notebook(version)
        assert checkpoint.stat().st_mtime_ns == path.stat().st_mtime_ns
    save(path, notebook(9))
    stored = saved(place, mnt, tmp_path / "stored")
    assert names(stored) == [".ipynb_checkpoints", "Untitled.ipynb"]
    assert (stored / "Untitled.ipynb").read_text() == notebook(9)
    assert (stored / ".ipynb_checkpoints/Untitled-checkpoint.ipynb").read_text() == notebook(4)


def test_checkpoint_restored(place: Place, mnt: Path, tmp_path: Path) -> None:
    path, checkpoint = mnt / "a.ipynb", mnt / "a-checkpoint.ipynb"
    save_by_rename(path, notebook(1))
    shutil.copy2(path, checkpoint)
    save_by_rename(path, notebook(2))
    shutil.copy2(checkpoint, path)
    assert (saved(place, mnt, tmp_path / "stored") / "a.ipynb").read_text() == notebook(1)


def test_editor_writes_beside_and_renames_over(place: Place, mnt: Path, tmp_path: Path) -> None:
    path = mnt / "script.py"
    path.write_text("old\n" * 1000)
    path.chmod(0o750)
    if os.geteuid() == 0:
        os.chown(path, 1234, 4321)
    before = path.stat()
    for version in range(4):
        beside = mnt / "script.py.new"
        with beside.open("x") as file:
            os.fchmod(file.fileno(), before.st_mode & 0o7777)
            if os.geteuid() == 0:
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            file.write(f"version {version}\n")
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        assert path.read_text() == f"version {version}\n"
    after = (saved(place, mnt, tmp_path / "stored") / "script.py").stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert names(tmp_path / "stored") == ["script.py"]


def test_editor_renames_to_a_backup_and_writes_anew(place: Place, mnt: Path, tmp_path: Path) -> None:
    path, backup = mnt / "text", mnt / "text~"
    path.write_text("version 0\n")
    for version in range(1, 4):
        path.rename(backup)
        with path.open("x") as file:
            file.write(f"version {version}\n")
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(backup, path)
        assert backup.read_text() == f"version {version - 1}\n"
    stored = saved(place, mnt, tmp_path / "stored")
    assert ((stored / "text").read_text(), (stored / "text~").read_text()) == ("version 3\n", "version 2\n")
    backup.unlink()
    assert names(saved(place, mnt, tmp_path / "again")) == ["text"]


def test_swap_file_beside_while_editing(place: Place, mnt: Path, tmp_path: Path) -> None:
    path, swap = mnt / "text", mnt / ".text.swp"
    path.write_text("old")
    with swap.open("xb", buffering=0) as file:
        for block in range(8):
            file.seek(block * 4096)
            file.write(bytes([block + 1]) * 4096)
            os.fsync(file.fileno())
        path.write_text("new")
        assert swap.read_bytes() == b"".join(bytes([block + 1]) * 4096 for block in range(8))
    swap.unlink()
    assert names(saved(place, mnt, tmp_path / "stored")) == ["text"]


def test_rewritten_many_times(place: Place, mnt: Path, tmp_path: Path) -> None:
    for version in range(200):
        (mnt / "status.json").write_text(f"{version}" * (version % 17 + 1))
    assert (saved(place, mnt, tmp_path / "stored") / "status.json").read_text() == "199" * (199 % 17 + 1)

"""The commands as processes: exit code and line as a shell sees them, where no mount is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HELPER = "from phfs_fuse.cli.main import mount_helper; mount_helper()"


def run(*arguments: str, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PHFS_", "AWS_", "XDG_"))}
    environ = kept | {"PHFS_RUNTIME_DIR": str(place), "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--version"], 0, ""),
        (["status"], 0, ""),
        (["mount", "s3://bucket", "/no/such/place"], 4, "phfs: /no/such/place: does not exist; mkdir makes it"),
        (["mount", "s3://bucket", "/proc"], 4, "phfs: /proc: proc is mounted here already"),
        (["mount", "--qqqq", "s3://bucket", "/mnt"], 2, "phfs: No such option: --qqqq"),
        (["umount", "/no/such/place"], 4, "phfs: /no/such/place: no phfs mount is here"),
        (["sync", "/"], 4, "phfs: /: is not in a phfs mount"),
    ],
)
def test_exit_code_and_line(tmp_path: Path, arguments: list[str], code: int, line: str) -> None:
    found = run("-m", "phfs_fuse", *arguments, place=tmp_path)
    assert (found.returncode, found.stderr.strip()) == (code, line)


def test_the_helper_of_mount(tmp_path: Path) -> None:
    found = run("-c", HELPER, "s3://bucket", "/no/such/place", "-o", "rw", place=tmp_path)
    assert (found.returncode, found.stdout) == (32, "")
    assert found.stderr == "mount.phfs: /no/such/place: does not exist; mkdir makes it\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["phfs_fuse.mount", "--help"], 0, "usage: python -m phfs_fuse.mount"),
        (["phfs_fuse.keeper", "--help"], 0, "usage: python -m phfs_fuse.keeper"),
        (["phfs_fuse.fusemount", "/no/such/place"], 1, "/no/such/place: "),
        (["phfs_fuse.fusemount", "--lazy", "/no/such/place"], 1, "/no/such/place: "),
    ],
)
def test_the_names_by_which_a_keeper_of_another_version_starts_its_processes(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    found = run("-m", *arguments, place=tmp_path)
    assert found.returncode == code
    assert (found.stdout or found.stderr).startswith(said)


def test_debug_shows_where_an_unexpected_error_came_from(tmp_path: Path) -> None:
    script = """
from phfs_fuse.cli import main
from phfs_fuse.host import registry
registry.records = None
main.main()
"""
    quiet = run("-c", script, "sync", place=tmp_path)
    assert (quiet.returncode, quiet.stderr.count("\n")) == (1, 1)
    assert quiet.stderr.startswith("phfs: unexpected TypeError: ")
    loud = run("-c", script, "sync", place=tmp_path, PHFS_LOG_LEVEL="debug")
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("cli.main", {"boto3", "botocore", "awscrt", "trio", "pyfuse3", "moto", "rich", "tomllib"}),
        ("keeper.keeper", {"boto3", "botocore", "awscrt", "trio", "pyfuse3", "typer", "tomllib"}),
        ("worker.main, phfs_fuse.store.crt", {"typer", "rich", "tomllib"}),  # boto3 makes the sessions (ADR 2)
    ],
)
def test_each_process_loads_only_what_it_needs(tmp_path: Path, modules: str, heavy: set[str]) -> None:
    """A mount starts three of them, one after the other."""
    script = f"import sys; import phfs_fuse.{modules}; print(*sys.modules)"
    loaded = set(run("-c", script, place=tmp_path).stdout.split())
    assert loaded & heavy == set()
    assert "phfs_fuse" in loaded

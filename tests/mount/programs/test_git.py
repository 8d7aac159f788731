"""git on the mount; at the end the repository is rebuilt from the objects alone and checked there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mount.place import Place, run, saved
from tests.mount.trees import tree

pytestmark = pytest.mark.fuse
ENV = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


def git(repository: Path, *argv: str | Path) -> str:
    return run("git", "-c", "safe.directory=*", *argv, cwd=repository, env=ENV).strip()


def commit(repository: Path, message: str) -> None:
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", message)


def work_tree(repository: Path) -> dict[str, tuple[int, str]]:
    """Path -> mode and content of what is checked out."""
    found = tree(repository, times=False, leave_out=lambda name: f"{name}/".startswith(".git/"))
    return {name: (entry.mode, entry.data) for name, entry in found.items()}


def check(repository: Path) -> None:
    git(repository, "fsck", "--full", "--strict")
    assert git(repository, "status", "--porcelain") == ""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("upstream")
    git(root, "init", "-q", "-b", "main")
    for number in range(40):
        folder = root / f"src/{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}.txt").write_text(f"{number}\n" * 50)
    (root / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("src/0/f0.txt")
    commit(root, "first")
    git(root, "checkout", "-q", "-b", "other")
    (root / "src/0").rename(root / "moved")
    (root / "link").unlink()
    (root / "src/1/f1.txt").write_text("changed on other\n")
    commit(root, "move a folder")
    git(root, "checkout", "-q", "main")
    return root


def test_clone_branch_merge_gc_fsck(place: Place, mnt: Path, upstream: Path, tmp_path: Path) -> None:
    clone = mnt / "clone"
    git(mnt, "clone", "-q", "--no-local", upstream, clone)
    assert work_tree(clone) == work_tree(upstream)
    git(clone, "checkout", "-q", "-b", "topic")
    (clone / "src/2/new.txt").write_text("new\n")
    (clone / "src/2/f2.txt").unlink()
    commit(clone, "topic")
    git(clone, "merge", "-q", "--no-edit", "origin/other")
    check(clone)
    git(clone, "repack", "-q", "-a", "-d")
    git(clone, "gc", "-q", "--prune=now")
    check(clone)

    stored = saved(place, mnt, tmp_path / "stored") / "clone"
    check(stored)
    assert (stored / "moved/f0.txt").exists()
    assert not (stored / "src/0").exists()


def test_checkouts_give_the_right_trees(place: Place, mnt: Path, upstream: Path, tmp_path: Path) -> None:
    """Back and forth between branches that add, remove, move and change files."""
    clone = mnt / "clone"
    git(mnt, "clone", "-q", "--no-local", upstream, clone)
    for _ in range(3):
        for branch in ("other", "main"):
            git(clone, "checkout", "-q", branch)
            git(upstream, "checkout", "-q", branch)
            assert work_tree(clone) == work_tree(upstream)
            assert git(clone, "status", "--porcelain") == ""
    git(upstream, "checkout", "-q", "main")
    place.remount()
    check(clone)
    saved(place, mnt, tmp_path / "stored")


def test_stash_rebase_and_worktree(place: Place, mnt: Path, upstream: Path, tmp_path: Path) -> None:
    clone = mnt / "clone"
    git(mnt, "clone", "-q", "--no-local", upstream, clone)
    (clone / "run.sh").write_text("#!/bin/sh\necho ran twice\n")
    git(clone, "stash")
    (clone / "own.txt").write_text("own\n")
    commit(clone, "own")
    git(clone, "rebase", "-q", "origin/other")
    git(clone, "stash", "pop")
    commit(clone, "twice")
    git(clone, "worktree", "add", "-q", "../second", "origin/main")
    assert work_tree(mnt / "second") == work_tree(upstream)
    check(clone)
    assert run(clone / "run.sh") == "ran twice\n"
    saved(place, mnt, tmp_path / "stored")


def test_clone_within_the_mount_does_without_hard_links(
    place: Place, mnt: Path, upstream: Path, tmp_path: Path
) -> None:
    git(mnt, "clone", "-q", "--bare", "--no-local", upstream, mnt / "bare.git")
    git(mnt, "clone", "-q", mnt / "bare.git", mnt / "clone")
    (mnt / "clone/pushed").write_text("pushed\n")
    commit(mnt / "clone", "pushed")
    git(mnt / "clone", "push", "-q", "origin", "main")
    stored = saved(place, mnt, tmp_path / "stored")
    git(stored / "bare.git", "fsck", "--full", "--strict")
    assert git(stored / "bare.git", "show", "main:pushed") == "pushed"

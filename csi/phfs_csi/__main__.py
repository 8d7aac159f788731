"""The `phfs-csi` command."""

from __future__ import annotations


def main() -> None:
    """Entry point."""
    raise SystemExit("phfs-csi: not ready")

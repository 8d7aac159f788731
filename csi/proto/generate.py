"""Generates `phfs_csi.proto` from the definitions here: `python csi/proto/generate.py [DIRECTORY]`."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

DEFINITIONS = Path(__file__).parent
PACKAGE = "phfs_csi/proto"  # the stubs import each other by this name


def generate(out: Path) -> None:
    """Writes the stubs below `out`, in the directory of their package."""
    words = [f"-I{PACKAGE}={DEFINITIONS}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    outs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    files = [str(path) for path in sorted(DEFINITIONS.glob("*.proto"))]
    if protoc.main(["protoc", *words, *outs, *files]):
        raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if sys.argv[1:] else DEFINITIONS.parent)

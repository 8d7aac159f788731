"""Libraries that write in the middle of their files or map them into memory."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.mount.place import Place, saved, script

pytestmark = pytest.mark.fuse


def test_h5py(place: Place, mnt: Path, tmp_path: Path) -> None:
    write = """if True:
        import h5py, numpy, sys
        with h5py.File(sys.argv[1], "w") as file:
            file.create_dataset("x", data=numpy.arange(200_000), chunks=(1000,), maxshape=(None,))
            file.create_group("g").attrs["name"] = "first"
        with h5py.File(sys.argv[1], "r+") as file:
            file["x"].resize((300_000,))
            file["x"][200_000:] = numpy.arange(200_000, 300_000)
            file["x"][::1000] = -1
            file["g/y"] = numpy.ones((50, 50))
            file["g"].attrs["name"] = "second"
    """
    read = """if True:
        import h5py, numpy, sys
        wanted = numpy.arange(300_000)
        wanted[::1000] = -1
        with h5py.File(sys.argv[1], "r") as file:
            assert (file["x"][:] == wanted).all()
            assert file["g/y"][:].sum() == 2500
            assert file["g"].attrs["name"] == "second"
    """
    script(write, mnt / "data.h5")
    script(read, mnt / "data.h5")
    script(read, saved(place, mnt, tmp_path / "stored") / "data.h5")
    place.remount()
    script(read, mnt / "data.h5")


def test_numpy_memmap(place: Place, mnt: Path, tmp_path: Path) -> None:
    script(
        """if True:
        import numpy, sys
        made = numpy.memmap(sys.argv[1], dtype="i4", mode="w+", shape=(500, 1000))
        made[:] = numpy.arange(500_000).reshape(500, 1000)
        made.flush()
        """,
        mnt / "array",
    )
    place.pull(mnt, tmp_path / "first")  # so that the next change is one of a stored object
    script(
        """if True:
        import numpy, sys
        changed = numpy.memmap(sys.argv[1], dtype="i4", mode="r+", shape=(500, 1000))
        changed[100:110, 5] = -7
        changed[499, 999] = -8
        """,  # no flush: the pages go when the mapping does
        mnt / "array",
    )
    read = """if True:
        import numpy, sys
        wanted = numpy.arange(500_000, dtype="i4").reshape(500, 1000)
        wanted[100:110, 5] = -7
        wanted[499, 999] = -8
        assert (numpy.memmap(sys.argv[1], dtype="i4", mode="r", shape=(500, 1000)) == wanted).all()
    """
    script(read, mnt / "array")
    script(read, saved(place, mnt, tmp_path / "stored") / "array")


def test_numpy_save_and_npz(place: Place, mnt: Path, tmp_path: Path) -> None:
    script(
        """if True:
        import numpy, os, sys
        os.chdir(sys.argv[1])
        a = numpy.random.default_rng(1).random((300, 300))
        numpy.save("a.npy", a)
        numpy.savez_compressed("b.npz", a=a, b=a * 2)
        assert (numpy.load("a.npy", mmap_mode="r")[7] == a[7]).all()
        assert (numpy.load("b.npz")["b"] == a * 2).all()
        """,
        mnt,
    )
    saved(place, mnt, tmp_path / "stored")


def test_parquet(place: Place, mnt: Path, tmp_path: Path) -> None:
    script(
        """if True:
        import pyarrow, pyarrow.parquet, sys
        texts = [str(n) for n in range(100_000)]
        table = pyarrow.table({"x": range(100_000), "y": texts, "z": [1.5] * 100_000})
        pyarrow.parquet.write_table(table, sys.argv[1], row_group_size=10_000)
        """,
        mnt / "t.parquet",
    )
    read = """if True:
        import pyarrow.compute, pyarrow.parquet, sys
        for mapped in (False, True):
            x = pyarrow.parquet.read_table(sys.argv[1], columns=["x"], memory_map=mapped)
            assert x.column_names == ["x"] and pyarrow.compute.sum(x["x"]).as_py() == sum(range(100_000))
        assert pyarrow.parquet.ParquetFile(sys.argv[1]).read_row_group(7)["y"][0].as_py() == "70000"
    """
    script(read, mnt / "t.parquet")
    place.remount()
    script(read, mnt / "t.parquet")
    script(read, saved(place, mnt, tmp_path / "stored") / "t.parquet")


def test_parquet_dataset(place: Place, mnt: Path, tmp_path: Path) -> None:
    script(
        """if True:
        import pyarrow, pyarrow.parquet, sys
        table = pyarrow.table({"day": [n % 7 for n in range(1000)], "x": range(1000)})
        pyarrow.parquet.write_to_dataset(table, sys.argv[1], partition_cols=["day"])
        found = pyarrow.parquet.read_table(sys.argv[1], filters=[("day", "=", 3)])
        assert sorted(found["x"].to_pylist()) == list(range(3, 1000, 7))
        """,
        mnt / "set",
    )
    assert len(list((saved(place, mnt, tmp_path / "stored") / "set").iterdir())) == 7


def test_zip_append(place: Place, mnt: Path, tmp_path: Path) -> None:
    path = mnt / "a.zip"
    for number in range(5):
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"member{number}", f"{number}" * 10_000)
        if number == 2:
            place.remount()
    for file in (path, saved(place, mnt, tmp_path / "stored") / "a.zip"):
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
            assert archive.namelist() == [f"member{number}" for number in range(5)]
            assert archive.read("member4") == b"4" * 10_000

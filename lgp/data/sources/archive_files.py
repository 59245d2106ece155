"""Archive files: tar, compressed or not, and zip. Members are listed, and read where they are; none is extracted."""

import bz2
import functools
import gzip
import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from lgp.data.sources.cells import printable
from lgp.data.sources.image_cells import same, state_of
from lgp.data.sources.listing import fail
from lgp.data.sources.offers import Read
from lgp.errors import LgpError, one_line

LARGEST_BYTES = 2 * 2**30  # no image is larger; a member that declares more is meant to fill the memory
CHUNK_BYTES = 2**20
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)
OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
        path: its name as a relative path with `/`, which can be printed.
        name: its name as the archive has it.
        offset: where its data (tar) or its header (zip) starts, in bytes.
        size: in bytes, not compressed.
        fault: why it is not read, empty if it can be.
    """

    path: str
    name: str
    offset: int
    size: int
    fault: str


Scan = Callable[[Path], Iterator[tuple[Member, Callable[[], bytes]]]]
"""Lists the files of an archive in their order. The callable reads a file, before the next one is listed.

It raises `LgpError` for an archive that cannot be read.
"""

Reads = Callable[[Path, Sequence[Member]], Iterator[Read]]
"""Returns how to read members, which are in the order of the archive."""


def tar_members(path: Path) -> Iterator[tuple[Member, Callable[[], bytes]]]:
    """List the files of a tar archive. It is a `Scan`."""
    try:
        with _decompressed(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else the archive keeps them all
                if not info.isdir():
                    fault = _fault_of_tar(info) or _fault_of(info.name, info.size)
                    member = Member(_path(info.name), info.name, info.offset_data, info.size, fault)
                    yield member, partial(_part, stream, info.offset_data, info.size)
            _check_end(path, stream, tar.offset)
    except DAMAGED as e:
        raise LgpError(f"{path} cannot be read as a tar archive: {one_line(e)}; mend or remove it") from None


def tar_reads(path: Path, members: Sequence[Member]) -> Iterator[Read]:
    """Return how to read members of a tar archive. It is a `Reads`. A compressed one is streamed here."""
    if _opener(path) is None:
        yield from (partial(read_part, path, member.offset, size=member.size) for member in members)
        return
    done = 0
    try:
        with _decompressed(path) as stream:
            for member in members:
                yield partial(same, _part(stream, member.offset, member.size))
                done += 1
    except DAMAGED as e:
        yield from [partial(fail, f"its archive is damaged: {one_line(e)}")] * (len(members) - done)


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Read a part of a file."""
    with path.open("rb") as file:
        return _part(file, offset, size)


def zip_members(path: Path) -> Iterator[tuple[Member, Callable[[], bytes]]]:
    """List the files of a zip archive. It is a `Scan`."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                name = info.filename.replace("\\", "/")  # as some writers of Windows have it
                if not name.endswith("/"):
                    fault = _fault_of_zip(info) or _fault_of(name, info.file_size)
                    member = Member(_path(name), info.filename, info.header_offset, info.file_size, fault)
                    yield member, partial(archive.read, info)
    except (*DAMAGED, NotImplementedError) as e:
        raise LgpError(f"{path} cannot be read as a zip archive: {one_line(e)}; mend or remove it") from None


def zip_reads(path: Path, members: Sequence[Member]) -> Iterator[Read]:
    """Return how to read members of a zip archive. It is a `Reads`."""
    state = state_of(path)
    return (partial(read_member, path, member.name, state, size=member.size) for member in members)


def read_member(path: Path, name: str, state: str, size: int) -> bytes:
    """Read a member of a zip archive, which stays open in this process. `state` changes where the archive does."""
    data = _opened_zip(path, state, os.getpid()).read(name)
    if len(data) != size:
        raise ValueError(f"it has {len(data):,} bytes, and {size:,} when the archive was listed")
    return data


@functools.lru_cache(maxsize=4)
def _opened_zip(path: Path, state: str, process: int) -> zipfile.ZipFile:
    # a forked process would share the position in a file that its parent opened
    return zipfile.ZipFile(path)


def _part(stream: IO[bytes], offset: int, size: int) -> bytes:
    stream.seek(offset)
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("the archive ends within it")
    return data


def _opener(path: Path) -> Callable[[Path], Any] | None:
    with path.open("rb") as file:
        return OPENERS.get(file.read(2))


def _decompressed(path: Path) -> Any:
    """Open an archive. Positions in a compressed one are those of its content; going back in it starts anew."""
    opener = _opener(path)
    return path.open("rb") if opener is None else opener(path)


def _check_end(path: Path, stream: IO[bytes], end: int) -> None:
    """Raise `LgpError` if something follows the last member: `tarfile` takes a damaged header for the end."""
    stream.seek(end)
    while chunk := stream.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            raise LgpError(
                f"{path} has more after byte {end:,}, which cannot be read as tar: it is damaged, or several archives "
                "joined in one file; mend it, or give the archives one by one"
            )


def _path(name: str) -> str:
    return printable(name if ".." in name else posixpath.normpath(name))


def _fault_of(name: str, size: int) -> str:
    if name.startswith("/") or ".." in name.split("/") or name[1:3] == ":/":
        return "its path leads out of the archive"
    if size > LARGEST_BYTES:
        return f"it declares {size / 2**30:.1f} GiB, more than {LARGEST_BYTES // 2**30} GiB"
    return ""


def _fault_of_tar(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "a link"
    return "" if info.isreg() and not info.issparse() else "no regular file"


def _fault_of_zip(info: zipfile.ZipInfo) -> str:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the writer says nothing
    if kind == stat.S_IFLNK:
        return "a link"
    return "" if kind in (0, stat.S_IFREG) else "no regular file"

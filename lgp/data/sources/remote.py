"""Sources on servers (`s3://`, `gs://`, `https://`): their files are fetched once into a local folder."""

import itertools
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from lgp.errors import LgpError, check_disk_space, is_disk_full, one_line, without_credentials

FILES, LOG, UNFINISHED, LOCK = "files", "fetched.jsonl", "unfinished", "lock"
TAGS = ("ETag", "etag", "md5Hash", "generation", "mtime", "Last-Modified", "LastModified", "updated", "created")
CONNECTIONS = 8
CHUNK = 64  # files that wait for a connection at once
EXTRAS = {"s3": "'lgp[s3]'", "gs": "gcsfs", "gcs": "gcsfs"}


class _Remote(NamedTuple):
    """A file on a server.

    Attributes:
        path: where its file system has it.
        name: its path below the source, or its own name if it is the source.
        size: in bytes, None where the server does not say.
        tag: what changes where its content does, empty where the server does not say.
    """

    path: str
    name: str
    size: int | None
    tag: str

    @property
    def line(self) -> str:
        """What is noted of a file that is complete. It holds no address."""
        return json.dumps([self.name, self.size, self.tag])


def fetched(url: str, store: Path) -> Path:
    """Fetch a file, or all files below a prefix, into a folder. What is there and has not changed stays.

    A file appears in the folder when it is complete. Files that the server no longer has are removed.

    Args:
        url: with its protocol: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `https://HOST/FILE`.
        store: a folder for this address alone.

    Returns:
        The file, or the folder of the files.

    Raises:
        LgpError: nothing is found, or the network, the credentials, a library or space on the disk is missing. The
            message has no credentials.
    """
    with _errors(url):
        system, remotes, is_file = _listed(url)
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(store / LOCK):
            _fetch_all(url, system, remotes, store)
    return store / FILES / remotes[0].name if is_file else store / FILES


def _listed(url: str) -> tuple[Any, list[_Remote], bool]:
    """Return the file system, the files in the order of their names, and whether the address is of one file."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    info = system.info(path)
    is_file = info["type"] == "file" and not urlsplit(url).path.endswith("/")
    if is_file:
        remotes = [_remote(path, PurePosixPath(unquote(urlsplit(path).path)).name, info)]
    else:
        found = system.find(path, detail=True).items()
        remotes = [_remote(p, p[len(path) :].lstrip("/"), _complete(system, p, i)) for p, i in found if _is_file(p, i)]
    if not remotes or not all(remote.name for remote in remotes):
        raise LgpError(f"{_shown(url)} holds no files: check the address")
    return system, sorted(remotes, key=lambda remote: remote.name), is_file


def _is_file(path: str, info: dict[str, Any]) -> bool:
    """Tell files from markers of folders, and from the links by which a server's list of files is sorted."""
    return info["type"] == "file" and not path.endswith("/") and not (path.startswith("http") and "?" in path)


def _complete(system: Any, path: str, info: dict[str, Any]) -> dict[str, Any]:
    return info if info.get("size") is not None else system.info(path)


def _remote(path: str, name: str, info: dict[str, Any]) -> _Remote:
    if ".." in PurePosixPath(name).parts:
        raise LgpError(f"the file {name!r} on the server leads out of its folder: rename it there")
    tag = next((str(info[key]) for key in TAGS if info.get(key) is not None), "")
    return _Remote(path, str(PurePosixPath(name)), info.get("size"), tag)


def _fetch_all(url: str, system: Any, remotes: list[_Remote], store: Path) -> None:
    noted = _noted(store)
    _remove(noted.keys() - {remote.name for remote in remotes}, store)
    missing = [remote for remote in remotes if not _is_complete(remote, noted, store)]
    check_disk_space(store, sum(remote.size or 0 for remote in missing))
    (store / UNFINISHED).mkdir(exist_ok=True)
    with (store / LOG).open("a", encoding="utf-8") as log, ThreadPoolExecutor(CONNECTIONS) as pool:
        fetch = partial(_fetch, url, system, store, log, threading.Lock())
        pending = iter(missing)
        while chunk := list(itertools.islice(pending, CHUNK)):
            list(pool.map(fetch, chunk))


def _noted(store: Path) -> dict[str, str]:
    """Return the lines that are noted of complete files, the last one by name. A line that was cut off is left out."""
    lines = (store / LOG).read_text(encoding="utf-8").splitlines() if (store / LOG).exists() else []
    noted = {}
    for line in lines:
        try:
            noted[str(json.loads(line)[0])] = line
        except (ValueError, LookupError, TypeError):
            continue
    return noted


def _is_complete(remote: _Remote, noted: dict[str, str], store: Path) -> bool:
    file = store / FILES / remote.name
    if noted.get(remote.name) != remote.line or not file.is_file():
        return False
    return remote.size is None or file.stat().st_size == remote.size


def _remove(names: set[str], store: Path) -> None:
    """Remove files that were fetched and are no longer on the server."""
    for name in names:
        (store / FILES / name).unlink(missing_ok=True)


def _fetch(url: str, system: Any, store: Path, log: IO[str], lock: threading.Lock, remote: _Remote) -> None:
    """Stream a file to the disk, and note it when it is complete."""
    unfinished = store / UNFINISHED / str(threading.get_ident())
    system.get_file(remote.path, str(unfinished))
    size = unfinished.stat().st_size
    if remote.size is not None and size != remote.size:
        raise LgpError(
            f"{_shown(url)}: {remote.name} has {remote.size:,} bytes, but {size:,} arrived: it changed, or the "
            "connection broke; run again"
        )
    file = store / FILES / remote.name
    file.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, file)
    with lock:
        log.write(f"{remote.line}\n")
        log.flush()


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn whatever a server's client raises into `LgpError`, without credentials."""
    protocol = url.partition("://")[0]
    try:
        yield
    except LgpError:
        raise
    except ImportError as e:
        what = EXTRAS.get(protocol, "the package it names")
        raise LgpError(f"{protocol}:// cannot be opened: {one_line(e)}; pip install {what}") from None
    except FileNotFoundError:
        raise LgpError(f"{_shown(url)} does not exist: check the address") from None
    except Exception as e:  # clients of servers raise errors of several libraries
        if isinstance(e, OSError) and is_disk_full(e):
            raise
        raise LgpError(
            f"{_shown(url)} cannot be read: {type(e).__name__}: {without_credentials(one_line(e))}; check the "
            "address, the network and the credentials (s3:// takes those of the AWS command line; for a public bucket "
            "set FSSPEC_S3_ANON=true)"
        ) from None


def _shown(url: str) -> str:
    return without_credentials(url).partition("?")[0]

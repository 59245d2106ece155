"""The content of a source's files, as digests: what `data.noticed_by: digest` compares in place of their times.

A file whose size, inode and times (of content and of inode) are those of its last digest is not read again, so looking
twice is cheap.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from lgp.compute.processes import cores
from lgp.data.sources.offers import Offers, state_text
from lgp.data.sources.opening import DOWNLOADS, SUFFIXES
from lgp.data.sources.specs import TABLES, Source
from lgp.errors import LgpError

CACHE = Path(".lgp") / "file_digests.json"
OF_FILE = re.compile(r"\d+-\d+")  # what `state_text` returns, at the beginning of a state


def by_contents(offers: Offers, sources: Sequence[Source]) -> list[str]:
    """Return the state of each image, with the digest of its file in place of the size and time.

    Files are looked for at the places of the sources. A state whose file lies elsewhere (a data set of the hub) stays
    as it is.

    Args:
        offers: the source.
        sources: the key `data.source`.
    """
    wanted = {found[0] for state in offers.states if (found := OF_FILE.match(state))}
    files = [(file, about) for file, about in _files(sources) if state_text(about) in wanted]
    of_state: dict[str, str] = {}
    for (_, about), digest in zip(files, _digests(files), strict=True):
        # files of the same size and time have one state, which is of all their contents in order
        before = of_state.get(state_text(about))
        of_state[state_text(about)] = sha256(f"{before}{digest}".encode()).hexdigest() if before else digest
    return [OF_FILE.sub(lambda found: of_state.get(found[0], found[0]), state, count=1) for state in offers.states]


def _digests(files: Sequence[tuple[str, os.stat_result]]) -> list[str]:
    """Return the SHA-256 of each file, and keep them."""
    cache = Path(os.environ.get("DVC_ROOT", ".")) / CACHE
    kept = _kept(cache)
    keys = [_key(file, about) for file, about in files]
    missing = {key: file for key, (file, _) in zip(keys, files, strict=True) if key not in kept}
    with ThreadPoolExecutor(cores()) as threads:
        taken = dict(zip(missing, threads.map(_digest, missing.values()), strict=True))
    now = {key: kept.get(key) or taken[key] for key in keys}
    if now != kept:
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(now), encoding="utf-8")
        os.replace(unfinished, cache)
    return list(now.values())


def _key(file: str, about: os.stat_result) -> str:
    # the time of the inode also changes where a tool sets the time of the content back
    return f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns} {about.st_ino} {file}"


def _kept(cache: Path) -> dict[str, str]:
    """Return the digests of the last time, none where they are gone or damaged."""
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _digest(file: str) -> str:
    try:
        with open(file, "rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _files(sources: Sequence[Source]) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files, by their absolute paths, at the places of the sources, each place in the order of its names."""
    seen: set[str] = set()
    for place in dict.fromkeys(place for source in sources for place in _places(source)):
        for file in _below(os.path.abspath(place)):
            if file in seen:
                continue
            seen.add(file)
            try:
                yield file, os.stat(file)
            except OSError:  # a link to nothing
                continue


def _places(source: Source) -> Iterator[Path]:
    """Yield the files and folders that a source may read. Paths of a table start at its folder, or at `root`."""
    root = Path(os.environ.get("DVC_ROOT", "."))
    text = source if isinstance(source, str) else source.place
    if "://" in text:
        yield root / DOWNLOADS / sha256(text.encode()).hexdigest()[:16]
        return
    # not Path.expanduser: it raises for a ~ that names no user
    path = root / os.path.expanduser(text)
    files = [path] if path.exists() else _expanded(path)
    yield from files
    if any(SUFFIXES.get(file.suffix.lower()) in (*TABLES, "parquet") for file in files if file.is_file()):
        yield path.parent
    if not isinstance(source, str) and source.root is not None:
        yield root / os.path.expanduser(source.root)


def _expanded(pattern: Path) -> list[Path]:
    from lgp.data.sources.archives import expand

    try:
        return expand(str(pattern))
    except LgpError:  # a name of the hub, of torchvision, or of a built-in set
        return []


def _below(place: str) -> Iterator[str]:
    """Yield the files in a folder and below, through links, each folder once. A place may be a file itself."""
    if os.path.isfile(place):
        yield place
    real = {os.path.realpath(place)}
    for folder, folders, files in os.walk(place, followlinks=True):
        below = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders)}
        folders[:] = [name for name, leads_to in below.items() if leads_to not in real]
        real.update(below.values())
        yield from (f"{folder}/{name}" for name in sorted(files))

"""Archives of images: tar and zip, one or many, as WebDataset shards, with a list of labels, or with class folders."""

import glob
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from lgp.data.sources.archive_files import (
    DAMAGED,
    Member,
    Reads,
    Scan,
    tar_members,
    tar_reads,
    zip_members,
    zip_reads,
)
from lgp.data.sources.cells import is_clutter, printable, split_word
from lgp.data.sources.image_cells import state_of
from lgp.data.sources.listing import LISTS, Listing, OfFolders, by_folders
from lgp.data.sources.member_labels import SIDECARS, Said, in_manifest, in_sidecar, manifest_rows, notes_on_manifest
from lgp.data.sources.offers import Columns, Offers, Read, Skipped
from lgp.errors import LgpError, one_line

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".tga"),
)
SIDECAR_BYTES = 2**20  # a larger file does not label one image
LIST_BYTES = 2**28
MOST_NAMES = 10**6  # that braces may stand for


@dataclass
class _Archive:
    """An archive, and what listing it found.

    Attributes:
        file: its path.
        prefix: what stands before the paths of its members, in the identity of an image.
        word: the word of `SPLITS` in its name, None without one.
        state: its size and time.
        members: the files that can be read, by path, in their order.
        sidecars: what a file beside an image says, by its path.
        lists: the content of lists of images, by their path.
        images: the images, with what is said of them.
    """

    file: Path
    prefix: str
    word: str | None
    state: str
    members: dict[str, Member] = field(default_factory=dict)
    sidecars: dict[str, Said | LgpError | None] = field(default_factory=dict)
    lists: dict[str, bytes] = field(default_factory=dict)
    images: dict[str, Said] = field(default_factory=dict)


def tar_source(files: list[Path], columns: Columns) -> Offers:
    """List the images of tar archives, plain or compressed: WebDataset shards, or folders as an image folder has them.

    An image's label is in a file beside it (`0001.cls`, or the field `label` of `0001.json`), else in a list of images
    (labels.csv, metadata.csv, metadata.jsonl), else it is the folder's name. Its split is in these too, else the first
    known word in the name of its archive, if there are several archives.

    Raises:
        LgpError: an archive, or a file of labels in it, cannot be read.
    """
    return _offers(files, columns, tar_members, tar_reads)


def zip_source(files: list[Path], columns: Columns) -> Offers:
    """List the images of zip archives, as `tar_source` does.

    Raises:
        LgpError: an archive, or a file of labels in it, cannot be read.
    """
    return _offers(files, columns, zip_members, zip_reads)


def expand(pattern: str) -> list[Path]:
    """Return the files that a pattern names: `shards-{0000..0009}.tar`, `{train,val}-*.tar`.

    Raises:
        LgpError: no file matches, or one that braces name is missing.
    """
    # not Path.expanduser: it raises for a ~ that names no user
    if os.path.exists(os.path.expanduser(pattern)):
        return [Path(os.path.expanduser(pattern))]
    found: list[Path] = []
    for name in _braces(pattern):
        matches = sorted(glob.glob(os.path.expanduser(name), recursive=True))
        if not matches:
            raise LgpError(f"{pattern} matches nothing{'' if name == pattern else f' for {name}'}: check the path")
        found.extend(Path(match) for match in matches)
    if not found:
        raise LgpError(f"{pattern} names no files: a range goes from the lower number to the higher, {{0000..0009}}")
    return list(dict.fromkeys(found))


def _braces(pattern: str) -> Iterator[str]:
    """Write a pattern out: each of its innermost braces is a range of numbers or a choice."""
    braces = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if not braces:
        yield pattern
        return
    for choice in _choices(braces[1]):
        yield from _braces(pattern[: braces.start()] + choice + pattern[braces.end() :])


def _choices(inside: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not numbers:
        return inside.split(",")
    first, last = map(int, numbers.groups())
    if last - first >= MOST_NAMES:
        raise LgpError(f"{{{inside}}} names {last - first + 1:,} files, at most {MOST_NAMES:,} are valid")
    return [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]


def _offers(files: Sequence[Path], columns: Columns, scan: Scan, reads: Reads) -> Offers:
    listing = Listing()
    archives = _archives(list(dict.fromkeys(files)))
    for archive in archives:
        _scan(archive, columns, scan, listing)
        _find_images(archive, columns, listing)
    of_folders = iter(by_folders([path for archive in archives for path in archive.images]))
    kept = []
    for archive in archives:
        images = [(archive.members[path], said, next(of_folders)) for path, said in archive.images.items()]
        kept.append([member for member, said, of in images if _list_image(archive, member, said, of, listing)])
    return listing.offers(partial(_reads, [archive.file for archive in archives], kept, reads))


def _reads(files: list[Path], kept: list[list[Member]], reads: Reads, positions: Sequence[int]) -> Iterator[Read]:
    """Stream the images at ascending positions, archive by archive."""
    chosen, start = np.asarray(positions, dtype=np.int64), 0
    for file, members in zip(files, kept, strict=True):
        wanted = chosen[(chosen >= start) & (chosen < start + len(members))] - start
        if len(wanted):
            yield from reads(file, [members[i] for i in wanted.tolist()])
        start += len(members)


def _archives(files: list[Path]) -> list[_Archive]:
    """Name archives by their path below the folder that holds all. A single one has no name, and says no split."""
    if len(files) == 1:
        return [_Archive(files[0], "", None, state_of(files[0]))]
    above = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    archives = []
    for file in files:
        name = Path(os.path.relpath(os.path.abspath(file), above))
        word = next(filter(None, map(split_word, (name.name, *reversed(name.parts[:-1])))), None)
        archives.append(_Archive(file, f"{printable(name.as_posix())}/", word, state_of(file)))
    return archives


def _scan(archive: _Archive, columns: Columns, scan: Scan, listing: Listing) -> None:
    """List the members of an archive, and read those that say something of images."""
    for member, read in scan(archive.file):
        where = archive.prefix + member.path
        if member.fault:
            listing.skipped.append(Skipped(where, member.fault))
            continue
        if is_clutter(member.path):
            listing.clutter.append(Skipped(where, "hidden, or of an operating system"))
            continue
        if member.path in archive.members:
            earlier = archive.members.pop(member.path)  # the later one also takes its place in the order
            listing.skipped.append(Skipped(f"{where}@{earlier.offset}", "a later member has the same name"))
        archive.members[member.path] = member
        if posixpath.basename(member.path).lower() in LISTS and member.size <= LIST_BYTES:
            archive.lists[member.path] = _content(where, read)
        elif posixpath.splitext(member.path)[1].lower() in SIDECARS and member.size <= SIDECAR_BYTES:
            archive.sidecars[member.path] = _said_beside(where, read, columns)


def _content(where: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except (*DAMAGED, RuntimeError, NotImplementedError) as e:  # zipfile's errors for what is encrypted, or unknown
        raise LgpError(f"{where} cannot be read: {one_line(e)}; mend or remove it") from None


def _said_beside(where: str, read: Callable[[], bytes], columns: Columns) -> Said | LgpError | None:
    """Return what a file beside an image says, or the error, which counts only if there is such an image."""
    try:
        return in_sidecar(where, _content(where, read), columns)
    except LgpError as e:
        return e


def _find_images(archive: _Archive, columns: Columns, listing: Listing) -> None:
    """Tell the images among the members, and join what is said of each. All other members are skipped."""
    listed = _listed(archive, columns, listing)
    beside = {posixpath.splitext(path)[0]: path for path in sorted(archive.sidecars, reverse=True)}
    candidates = [path for path in archive.members if path in listed or _may_be_image(path)]
    stems = {posixpath.splitext(path)[0] for path in candidates}
    used = set(archive.lists)
    for path in candidates:
        stem = posixpath.splitext(path)[0]
        key = stem if stem in beside else _sample(path)
        if key != stem and key in beside and key in stems:
            listing.skipped.append(Skipped(archive.prefix + path, f"a further file of the sample {key}"))
            used.add(path)
            continue
        said = archive.sidecars[beside[key]] if key in beside else None
        if isinstance(said, LgpError):
            raise said
        if said is not None:
            used.add(beside[key])
        archive.images[path] = _joined(said or Said(), listed.get(path, Said()))
    for path in archive.members:
        if path not in archive.images and path not in used:
            listing.skipped.append(Skipped(archive.prefix + path, "not an image, and says nothing of one"))


def _may_be_image(path: str) -> bool:
    """Return whether a member is an image by the ending of its name. In a folder, one without an ending may be."""
    ending = posixpath.splitext(path)[1].lower()
    return ending in IMAGE_ENDINGS or (not ending and "/" in path)


def _sample(path: str) -> str:
    """Return the name of the sample that a WebDataset's file belongs to: up to the first dot of its name."""
    folder, name = posixpath.split(path)
    return posixpath.join(folder, name.partition(".")[0])


def _listed(archive: _Archive, columns: Columns, listing: Listing) -> dict[str, Said]:
    """Return what lists of images say, by path of the image.

    Raises:
        LgpError: a list cannot be read, or an image has two labels.
    """
    listed: dict[str, Said] = {}
    folders = []  # of lists that give labels: the folders below them name no classes
    for path, data in archive.lists.items():
        where, rows = archive.prefix + path, 0
        of_list = manifest_rows(where, data)
        listing.notes += notes_on_manifest(where, of_list, columns)
        for number, image, said in in_manifest(where, posixpath.dirname(path), of_list, columns):
            rows += 1
            if image not in archive.members:
                listing.skipped.append(Skipped(f"{where}#{number}", f"names {image!r}, which the archive lacks"))
            elif listed.setdefault(image, said) != said:
                raise LgpError(f"{where}: row {number} says something else of {image} than an earlier row: mend one")
        if not rows:
            listing.skipped.append(Skipped(where, "names no images"))
        if any(said.labels for said in listed.values()):
            folders.append(PurePosixPath(path).parent)
    for path in archive.members.keys() - listed.keys():
        if _may_be_image(path) and any(PurePosixPath(path).is_relative_to(folder) for folder in folders):
            listed[path] = Said(labels=True)
    return listed


def _joined(first: Said, second: Said) -> Said:
    """Join what is said of an image. The first goes before the second."""
    label = first.label if first.labels else second.label
    return Said(label, first.word or second.word, first.group or second.group, first.labels or second.labels)


def _list_image(archive: _Archive, member: Member, said: Said, of: OfFolders | None, listing: Listing) -> bool:
    """List an image. Return whether it is one of the data set: it is not in a folder beside those of splits."""
    path = archive.prefix + member.path
    if of is None and said == Said():
        listing.skipped.append(Skipped(path, "beside folders of splits, and in none of them"))
        return False
    word, label = of or OfFolders()
    state = f"{archive.state}-{member.offset}-{member.size}"
    listing.add(path, said.word or word or archive.word, said.label if said.labels else label, said.group, state)
    return True

"""Images of a source are stored once, in pieces, and a killed run goes on."""

import functools
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from made_offers import bitmap, data_params, noise, offers_from, offers_of, same, slow, stored
from PIL import Image

from lgp.compute.liveness import lives
from lgp.data import reading, writing
from lgp.data.conversion import decode, encode
from lgp.data.leaks import perceptual_hashes
from lgp.data.reading import content_of
from lgp.data.sources.offers import Read, Skipped, read_file
from lgp.data.stored import shards_in
from lgp.data.writing import store
from lgp.errors import LgpError


def encoded_in(out: Path) -> list[bytes]:
    shards = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in shards_in(out)]
    return [data for shard in shards for data in shard["image"].to_pylist()]


def bytes_in(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_images_of_the_models_size_become_one_array(tmp_path: Path) -> None:
    pixels = [noise(8, 8, 3) for _ in range(5)]
    result, out = stored(tmp_path, offers_from([encode(image) for image in pixels]), data_params())
    assert [path.name for path in out.iterdir()] == ["images.npy"]
    assert np.array_equal(np.load(out / "images.npy"), np.stack(pixels))
    assert list(result.table) == ["position", "height", "width", "content", "hash", "sums"]
    assert result.table["position"].tolist() == list(range(5))
    assert result.table["content"].tolist() == [content_of(image) for image in pixels]
    assert result.table["hash"].tolist() == perceptual_hashes(pixels).tolist()
    assert result.table["hash"].dtype == np.uint64
    assert (result.table[["height", "width"]] == 8).all(axis=None)


def test_one_image_of_another_size_leaves_all_encoded(tmp_path: Path) -> None:
    images = [encode(noise(8, 8, 3)) for _ in range(5)] + [encode(noise(9, 11, 3))]
    result, out = stored(tmp_path, offers_from(images), data_params())
    assert [path.name for path in out.iterdir()] == ["images-00000.arrow"]
    assert encoded_in(out) == images
    assert result.table[["height", "width"]].iloc[-1].tolist() == [9, 11]
    assert not list((tmp_path / "work").glob("*.pixels"))


def test_images_too_many_for_an_array_stay_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ARRAY_BYTES", 5 * 8 * 8 * 3 - 1)
    images = [encode(noise(8, 8, 3)) for _ in range(5)]
    assert encoded_in(stored(tmp_path, offers_from(images), data_params())[1]) == images


def test_shards_hold_batches_of_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encode(noise(9, 9, 3)) for _ in range(200)]
    monkeypatch.setattr(writing, "PIECE_BYTES", sum(map(len, images[:130])))
    _, out = stored(tmp_path, offers_from(images), data_params())
    assert encoded_in(out) == images
    readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in shards_in(out)]
    assert [[r.get_batch(i).num_rows for i in range(r.num_record_batches)] for r in readers] == [[64, 64, 2], [64, 6]]


def test_unreadable_images_are_listed_and_take_no_row(tmp_path: Path) -> None:
    images = [encode(noise(8, 8, 3)), b"", encode(noise(8, 8, 3))[:60], encode(noise(8, 8, 3))]
    reads = [functools.partial(same, data) for data in images] + [functools.partial(read_file, tmp_path / "gone")]
    result, out = stored(tmp_path, offers_of(reads), data_params())
    assert result.table["position"].tolist() == [0, 3]
    assert np.array_equal(np.load(out / "images.npy")[1], decode(images[3], 3))
    assert [skipped.path for skipped in result.unreadable] == ["1.png", "2.png", "4.png"]
    assert result.unreadable[0] == Skipped("1.png", "empty")
    assert result.unreadable[1].reason.startswith("damaged: ")
    assert result.unreadable[2].reason == "No such file or directory"


@pytest.mark.parametrize("images", [[], [b""], [b""] * 300])
def test_no_image_at_all_writes_nothing(tmp_path: Path, images: list[bytes]) -> None:
    result, out = stored(tmp_path, offers_from(images), data_params(), workers=2)
    assert len(result.table) == 0
    assert len(result.unreadable) == len(images)
    assert not list(out.iterdir())


def test_only_the_given_positions_are_stored(tmp_path: Path) -> None:
    images = [noise(8, 8, 3) for _ in range(9)]
    work, out = (tmp_path / name for name in ("work", "out"))
    work.mkdir()
    out.mkdir()
    result = store(offers_from(images), np.array([1, 4, 8]), data_params(), work, out)
    assert result.table["position"].tolist() == [1, 4, 8]
    assert np.array_equal(np.load(out / "images.npy"), np.stack([images[i] for i in (1, 4, 8)]))


def test_identity_is_the_pixels_however_they_are_encoded(tmp_path: Path) -> None:
    pixels = noise(9, 7, 3)
    bmp, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(bmp, "bmp")
    Image.fromarray(pixels).save(png, "png", compress_level=9)
    turned = np.ascontiguousarray(pixels.reshape(7, 9, 3))
    result, _ = stored(tmp_path, offers_from([bmp.getvalue(), png.getvalue(), pixels, turned]), data_params())
    contents = result.table["content"].tolist()
    assert contents[0] == contents[1] == contents[2] != contents[3]
    assert all(len(content) == 32 for content in contents)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_arrays_keep_their_pixels(tmp_path: Path, channels: int) -> None:
    for name, shape in (("array", (8, 8, channels)), ("encoded", (9, 5, channels))):
        images = [noise(*shape) for _ in range(3)]
        _, out = stored(tmp_path / name, offers_from(images), data_params(channels))
        if name == "array":
            assert np.array_equal(np.load(out / "images.npy"), np.stack(images))
        else:
            assert all(np.array_equal(decode(e, channels), i) for e, i in zip(encoded_in(out), images, strict=True))


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    wave = np.clip(np.mgrid[:40, :60].sum(axis=0) * 2, 0, 255).astype(np.uint8)
    images = [encode(np.repeat(wave[..., None], 3, axis=2)), encode(noise(16, 50, 3)), encode(noise(9, 9, 3))]
    result, out = stored(tmp_path, offers_from(images), data_params(store_short_side=16))
    first, *others = encoded_in(out)
    assert others == images[1:]
    assert first.startswith(b"\xff\xd8")  # JPEG
    pixels = decode(first, 3)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels[..., 0].astype(int) - np.asarray(Image.fromarray(wave).resize((24, 16)))).max() < 12
    assert result.table["height"].tolist() == [16, 16, 9]
    assert result.table["content"][0] == content_of(pixels)


def test_small_copies_with_alpha_lose_nothing_more(tmp_path: Path) -> None:
    _, out = stored(tmp_path, offers_from([noise(40, 30, 4)]), data_params(channels=4, store_short_side=10))
    (data,) = encoded_in(out)
    assert data.startswith(b"\x89PNG")
    assert decode(data, 4).shape == (13, 10, 4)


def files_in(tmp_path: Path, count: int = 4) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(count)]
    for path in paths:
        path.write_bytes(encode(noise(8, 8, 3)))
    return paths


def test_references_hold_no_pixels(tmp_path: Path) -> None:
    paths = files_in(tmp_path)
    paths[2].write_bytes(b"")
    offers = offers_of([functools.partial(read_file, path) for path in paths])
    result, out = stored(tmp_path, offers, data_params(storage="reference"))
    assert not list(out.iterdir())
    assert {path.suffix for path in (tmp_path / "work").iterdir()} == {"", ".parquet"}
    kept = [paths[i] for i in (0, 1, 3)]
    assert result.table["file"].tolist() == [os.fsencode(path) for path in kept]
    assert result.table["size"].tolist() == [path.stat().st_size for path in kept]
    assert result.table["mtime_ns"].tolist() == [path.stat().st_mtime_ns for path in kept]
    assert result.unreadable == [Skipped("2.png", "empty")]


def test_references_to_what_is_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match=r"data\.storage is reference, but .* set data\.storage to copy"):
        stored(tmp_path, offers_from([noise(8, 8, 3)]), data_params(storage="reference"))
    with pytest.raises(LgpError, match=r"data\.store_short_side to null"):
        stored(tmp_path, offers_from([]), data_params(storage="reference", store_short_side=8))


def mixed(count: int, sizes: Sequence[int] = (8, 8, 8, 9)) -> list[bytes | np.ndarray]:
    """Encoded images, arrays, and some that are damaged."""
    made: list[bytes | np.ndarray] = [noise(8, sizes[i % len(sizes)], 3) for i in range(count)]
    return [b"x" if i % 17 == 3 else encode(image) if i % 2 else image for i, image in enumerate(made)]


@pytest.mark.parametrize("sizes", [(8,), (8, 8, 8, 9)])
def test_processes_store_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int]) -> None:
    monkeypatch.setattr(writing, "PIECE_IMAGES", 61)
    monkeypatch.setattr(reading, "MOST", 30)
    offers = offers_from(mixed(300, sizes))
    (alone, one), (together, two) = (stored(tmp_path / str(n), offers, data_params(), workers=n) for n in (1, 2))
    assert bytes_in(one) == bytes_in(two)
    assert alone.table.equals(together.table)
    assert alone.unreadable == together.unreadable
    assert len(alone.table) + len(alone.unreadable) == 300
    kept = [offers.reads([i]) for i in alone.table["position"]]
    pixels = [decode(next(read)(), 3) for read in kept]
    found = list(np.load(one / "images.npy")) if len(sizes) == 1 else [decode(data, 3) for data in encoded_in(one)]
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, pixels, strict=True))
    assert alone.table["content"].tolist() == [content_of(image) for image in pixels]
    assert alone.table["hash"].tolist() == perceptual_hashes(pixels).tolist()


class Killed(BaseException):
    """What a test ends a store with."""


@pytest.mark.parametrize("sizes", [(8,), (8, 8, 8, 9), (8,) * 45 + (9,)])
@pytest.mark.parametrize("after", [0, 1, 9, 10, 11, 37, 49])
def test_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(writing, "PIECE_IMAGES", 10)
    monkeypatch.setattr(reading, "MOST", 2)
    images = mixed(50, sizes)
    whole, expected = stored(tmp_path / "whole", offers_from(images), data_params())
    asked: list[int] = []

    def reads(positions: Sequence[int], last: int = 50) -> Iterator[Read]:
        for position in positions:
            if position == last:
                raise Killed
            asked.append(position)
            yield functools.partial(same, images[position])

    offers = offers_from(images)
    for last in (after, min(after + 5, 49)):
        object.__setattr__(offers, "reads", functools.partial(reads, last=last))
        with pytest.raises(Killed):
            stored(tmp_path, offers, data_params())
    asked.clear()
    object.__setattr__(offers, "reads", reads)
    result, out = stored(tmp_path, offers, data_params())
    assert len(asked) < 50 - after + 10  # whole pieces are not read again
    assert bytes_in(out) == bytes_in(expected)
    assert result.table.equals(whole.table)
    assert result.unreadable == whole.unreadable


@pytest.mark.parametrize(
    ("module", "name", "sizes"),
    [(os, "replace", (8,)), (os, "replace", (8, 9)), (os, "link", (8, 9)), (writing.shutil, "copyfileobj", (8,))],
)
def test_run_killed_as_it_writes_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(writing, "PIECE_IMAGES", 10)
    offers = offers_from(mixed(35, sizes))
    _, expected = stored(tmp_path / "whole", offers, data_params())
    calls, original = [], getattr(module, name)

    def killed_at_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, killed_at_third)
        with pytest.raises(Killed):
            stored(tmp_path, offers, data_params())
    _, out = stored(tmp_path, offers, data_params())
    assert bytes_in(out) == bytes_in(expected)


def test_pieces_of_other_settings_or_images_are_not_taken(tmp_path: Path) -> None:
    offers = offers_from([noise(8, 8, 3) for _ in range(4)])
    stored(tmp_path, offers, data_params())
    for changed, params in (
        (offers, data_params(channels=1)),
        (offers_from([noise(8, 8, 3) for _ in range(5)]), data_params()),
        (offers, data_params(store_short_side=4)),
    ):
        (tmp_path / "out" / "images.npy").unlink(missing_ok=True)
        result, out = stored(tmp_path, changed, params)
        fresh, expected = stored(
            tmp_path / f"{len(changed)} {params.channels} {params.store_short_side}", changed, params
        )
        assert bytes_in(out) == bytes_in(expected)
        assert result.table.equals(fresh.table)


def test_failed_process_is_one_clear_error(tmp_path: Path) -> None:
    offers = offers_of([functools.partial(same, noise(8, 8, 3))] * 300 + [functools.partial(os._exit, 3)] * 300)
    with pytest.raises(LgpError, match="a process that decodes images was killed"):
        stored(tmp_path, offers, data_params(), workers=2)


SCRIPT = """
import functools, sys
from pathlib import Path
from made_offers import data_params, offers_of, stuck
from lgp.data import reading, writing
from lgp.data.writing import store
reading.MOST, writing.PIECE_IMAGES = 16, 40
offers = offers_of([functools.partial(stuck, i) for i in range(300)])
work, out = map(Path, sys.argv[1:])
store(offers, range(300), data_params(), work, out, 2)
"""


def test_run_that_is_killed_leaves_no_process_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PIECE_IMAGES", 40)
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(work), str(out)], env=surroundings)
    while not (work / "00001.parquet").exists():
        assert run.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    until = time.monotonic() + 60
    while any(lives(worker) for worker in workers):  # in a container nobody may collect those that ended
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not list(out.iterdir())
    asked: list[int] = []
    reads = [functools.partial(slow, i) for i in range(300)]
    offers = offers_of(reads)
    object.__setattr__(offers, "reads", lambda at: (asked.append(i) or reads[i] for i in at))
    result = store(offers, range(300), data_params(), work, out, 2)
    assert asked[0] >= 80
    assert asked[-1] == 299
    assert np.array_equal(np.load(out / "images.npy"), np.stack([slow(i) for i in range(300)]))
    assert result.table["position"].tolist() == list(range(300))


MEMORY = """
import functools, re, sys
from pathlib import Path
from made_offers import bitmap, data_params, offers_of
from lgp.data import reading, writing
from lgp.data.writing import store
writing.PIECE_BYTES = writing.BATCH_BYTES = reading.IN_FLIGHT_BYTES = 4 * 2**20
# not getrusage, which counts what the process was before it became Python
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
offers = offers_of([functools.partial(bitmap, i) for i in range(1000)])
work, out = map(Path, sys.argv[1:])
before = peak()
store(offers, range(1000), data_params(), work, out, 2)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """120 MB of encoded images take a small part of it, in the main process."""
    folders = [tmp_path / name for name in ("work", "out")]
    for folder in folders:
        folder.mkdir()
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", MEMORY, *map(str, folders)]
    done = subprocess.run(command, env=surroundings, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 50
    assert len(shards_in(folders[1])) > 25


GROWING = """
import functools, io, re, resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from made_offers import data_params, offers_of, same
from lgp.data import reading, writing
from lgp.data.sources.offers import read_file
from lgp.data.writing import store

def image(side, number):
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), number % 256, dtype=np.uint8)).save(buffer, "bmp")
    return buffer.getvalue()

def held(at):
    return (functools.partial(same, image(18 if i < 600 else 590, i)) for i in at)

def file(number):
    path = Path(sys.argv[3]) / f"{number}.bmp"
    path.write_bytes(image(18 if number < 600 else 590, number))
    return functools.partial(read_file, str(path))

writing.PIECE_BYTES = writing.BATCH_BYTES = reading.IN_FLIGHT_BYTES = 8 * 2**20
offers = offers_of([None] * 800)
object.__setattr__(offers, "reads", held if sys.argv[4] == "held" else (lambda at: iter([file(i) for i in at])))
work, out = map(Path, sys.argv[1:3])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
store(offers, range(800), data_params(), work, out, 2)
print(peak() - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024 - before)
"""


@pytest.mark.parametrize("kind", ["held", "files"])
def test_memory_is_bounded_where_images_grow(tmp_path: Path, kind: str) -> None:
    """600 images of 1 kB and 200 of 1 MB, in a budget of 8 MB: of bytes that a `Read` holds, and of files."""
    folders = [tmp_path / name for name in ("work", "out", "files")]
    for folder in folders:
        folder.mkdir()
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", GROWING, *map(str, folders), kind]
    done = subprocess.run(command, env=surroundings, check=True, capture_output=True, text=True)
    main, worker = map(int, done.stdout.split())
    assert main < 110
    assert worker < 110


def test_chunks_are_bounded_in_images_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST", 3)
    reads = [functools.partial(same, bytes(size)) for size in (1, 1, 1, 1, 5, 6, 30, 2, 2)]
    chunks = list(reading._chunks(iter(reads), 10, 0))
    assert [total for _, total in chunks] == [3, 6, 6, 30, 4]
    assert [total for _, total in reading._chunks(reads, 10, 4)] == [10, 10, 9, 10, 34, 6, 6]


def test_bytes_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "IN_FLIGHT_BYTES", 100)
    begun: list[int] = []

    def begin(chunk: list[Any]) -> Any:
        begun.extend(len(read.args[0]) for read in chunk)
        assert sum(begun) <= 100 or len(begun) == 1

        def end() -> list[Any]:
            del begun[: len(chunk)]
            return chunk

        return end

    reads = [functools.partial(same, bytes(size)) for size in (1, 5, 20, 60, 90, 30, 300, 10, 99, 1, 1)]
    assert list(reading._in_chunks(reads, begin, 4, 0)) == reads


def test_source_is_read_little_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "IN_FLIGHT_BYTES", 2**17)
    asked, ahead = [], []
    reads = [functools.partial(bitmap, i) for i in range(300)]
    offers = offers_of(reads)
    object.__setattr__(offers, "reads", lambda at: (asked.append(i) or reads[i] for i in at))
    add = writing._Pieces.add
    monkeypatch.setattr(
        writing._Pieces, "add", lambda self, i, image: ahead.append(len(asked) - i) or add(self, i, image)
    )
    stored(tmp_path, offers, data_params(), workers=2)
    assert max(ahead) <= 6  # four chunks of one image, one that waits, and one that is weighed


def test_progress_is_shown_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    stored(tmp_path, offers_from([noise(8, 8, 3) for _ in range(30)]), data_params())
    assert "30/30" in terminal.getvalue()
    assert "images/s" in terminal.getvalue()

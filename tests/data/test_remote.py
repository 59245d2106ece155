"""Fetching sources from servers: in memory, by HTTP, and by the protocol of S3."""

import os
import threading
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lgp.data.sources import remote
from lgp.data.sources.remote import fetched
from lgp.errors import LgpError


@pytest.fixture
def server() -> Iterator[Any]:
    """A folder of `memory://`, empty at first."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


class Counted:
    """Counts the files that are fetched, and may fail at one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type, fails_at: str | None = None) -> None:
        self.names: list[str] = []
        whole = kind.get_file  # type: ignore[attr-defined]

        def get_file(system: Any, path: str, local: str, **options: Any) -> None:
            self.names.append(path.rpartition("/")[2])
            if fails_at and path.endswith(fails_at):
                Path(local).write_bytes(b"half")
                raise ConnectionResetError("the connection broke")
            whole(system, path, local, **options)

        monkeypatch.setattr(kind, "get_file", get_file)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_below_a_prefix_are_fetched_once(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {f"d{i % 3}/{i}.png": bytes([i]) * i for i in range(100)}
    for name, data in contents.items():
        server.pipe(f"/bucket/{name}", data)
    server.pipe("/bucket-of-others/x", b"x")
    counted = Counted(monkeypatch, type(server))
    folder = fetched("memory://bucket", tmp_path / "store")
    assert files_below(folder) == contents
    assert len(counted.names) == 100
    assert fetched("memory://bucket/", tmp_path / "store") == folder
    assert len(counted.names) == 100
    assert os.listdir(tmp_path / "store/unfinished") == []


def test_changed_added_and_removed_files(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        server.pipe(f"/bucket/{name}", name.encode())
    folder = fetched("memory://bucket", tmp_path)
    (folder / "mine").write_bytes(b"not fetched")
    server.pipe("/bucket/a", b"A")  # of the same size
    server.rm("/bucket/b")
    server.pipe("/bucket/d", b"d")
    counted = Counted(monkeypatch, type(server))
    fetched("memory://bucket", tmp_path)
    assert files_below(folder) == {"a": b"A", "c": b"c", "d": b"d", "mine": b"not fetched"}
    assert sorted(counted.names) == ["a", "d"]


def test_an_interrupted_fetch_goes_on(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CONNECTIONS", 1)
    for i in range(5):
        server.pipe(f"/bucket/{i}", bytes([i]) * 9)
    with monkeypatch.context() as broken:
        Counted(broken, type(server), fails_at="3")
        with pytest.raises(
            LgpError, match=r"memory://bucket cannot be read: ConnectionResetError: the connection broke"
        ):
            fetched("memory://bucket", tmp_path)
    assert sorted(files_below(tmp_path / "files"))[:3] == ["0", "1", "2"]
    assert "3" not in files_below(tmp_path / "files")
    with (tmp_path / "fetched.jsonl").open("a") as log:
        log.write('["cut off')
    (tmp_path / "files/1").write_bytes(b"cut")
    counted = Counted(monkeypatch, type(server))
    assert len(files_below(fetched("memory://bucket", tmp_path))) == 5
    assert {"1", "3"} <= set(counted.names)
    assert not {"0", "2"} & set(counted.names)


def test_a_file_that_arrives_short_is_refused(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pipe("/bucket/a", b"whole")
    monkeypatch.setattr(type(server), "get_file", lambda _, path, local: Path(local).write_bytes(b"who"))
    with pytest.raises(LgpError, match="a has 5 bytes, but 3 arrived"):
        fetched("memory://bucket", tmp_path)
    assert files_below(tmp_path / "files") == {}


def test_a_single_file(server: Any, tmp_path: Path) -> None:
    server.pipe("/bucket/deep/train.tar", b"tar")
    assert fetched("memory://bucket/deep/train.tar", tmp_path) == tmp_path / "files/train.tar"
    assert (tmp_path / "files/train.tar").read_bytes() == b"tar"


def test_names_that_lead_out_are_refused(server: Any, tmp_path: Path) -> None:
    server.store["/bucket/x/../../../evil"] = server.store.get("/") or _memory_file(server)
    with pytest.raises(LgpError, match="leads out of its folder"):
        fetched("memory://bucket", tmp_path / "store")
    assert not (tmp_path / "evil").exists()


def _memory_file(server: Any) -> Any:
    server.pipe("/other", b"evil")
    return server.store["/other"]


def test_what_cannot_be_found_or_opened(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.mkdir("/empty")
    for url, message in (
        ("memory://none", r"memory://none does not exist: check the address"),
        ("memory://empty", r"memory://empty holds no files"),
        ("nonsense://x", r"nonsense://x cannot be read: ValueError: Protocol not known"),
    ):
        with pytest.raises(LgpError, match=message):
            fetched(url, tmp_path)

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(LgpError, match=r"s3:// cannot be opened: Install s3fs to access S3; pip install 'lgp\[s3\]'"):
        fetched("s3://bucket/x", tmp_path)


@pytest.mark.parametrize(
    "url",
    ["https://me:secret@host/a.tar?X-Signature=secret", "https://host/a?token=secret", "https://me:se@cret@host/a"],
)
def test_credentials_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    def fails(given: str) -> None:
        raise OSError(f"403, message='Forbidden', url='{given}' or URL({given}?more=secret)")

    monkeypatch.setattr("fsspec.core.url_to_fs", fails)
    with pytest.raises(LgpError, match="403") as caught:
        fetched(url, tmp_path)
    assert "cret" not in str(caught.value).replace("credentials", "")
    assert "https://host/a" in str(caught.value)


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def http(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of a folder."""
    folder = tmp_path / "served"
    (folder / "sub").mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


def test_a_file_and_a_folder_of_a_web_server(http: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = http
    (folder / "a b.tar").write_bytes(b"tar" * 1000)
    (folder / "sub/x.png").write_bytes(b"png")
    file = fetched(f"{address}/a%20b.tar?token=secret", tmp_path / "file")
    assert (file.name, file.read_bytes()) == ("a b.tar", b"tar" * 1000)
    assert "secret" not in (tmp_path / "file/fetched.jsonl").read_text()
    assert files_below(fetched(f"{address}/sub/", tmp_path / "folder")) == {"x.png": b"png"}
    (folder / "a b.tar").write_bytes(b"TAR" * 1000)
    os.utime(folder / "a b.tar", (1e9, 1e9))
    assert fetched(f"{address}/a%20b.tar", tmp_path / "file").read_bytes() == b"TAR" * 1000
    with pytest.raises(LgpError, match=r"/none\.tar does not exist"):
        fetched(f"{address}/none.tar?token=secret", tmp_path / "none")


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match=r"http://127\.0\.0\.1:9/a\.tar (cannot be read|does not exist)"):
        fetched("http://127.0.0.1:9/a.tar", tmp_path)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that speaks the protocol of S3, with an empty bucket; a client of it."""
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="mine")
    yield client
    client.close()
    server.stop()


def test_an_s3_bucket(s3: Any, tmp_path: Path) -> None:
    contents = {f"train/{i}.png": os.urandom(1000 + i) for i in range(20)} | {"odd name+ü.png": b"odd"}
    for name, data in contents.items():
        s3.put_object(Bucket="mine", Key=f"data/{name}", Body=data)
    s3.put_object(Bucket="mine", Key="data/train/", Body=b"")  # as the console makes a folder
    s3.put_object(Bucket="mine", Key="data2/x", Body=b"other")
    folder = fetched("s3://mine/data", tmp_path)
    assert files_below(folder) == contents
    noted = (tmp_path / "fetched.jsonl").read_text()
    s3.put_object(Bucket="mine", Key="data/train/3.png", Body=b"n" * 1003)
    s3.delete_object(Bucket="mine", Key="data/train/4.png")
    fetched("s3://mine/data/", tmp_path)
    (fetched_again,) = (tmp_path / "fetched.jsonl").read_text().removeprefix(noted).splitlines()
    assert "train/3.png" in fetched_again
    assert files_below(folder) == {k: v for k, v in contents.items() if k != "train/4.png"} | {
        "train/3.png": b"n" * 1003
    }
    assert fetched("s3://mine/data/train/3.png", tmp_path / "one").read_bytes() == b"n" * 1003


def test_what_s3_does_not_have(s3: Any, tmp_path: Path) -> None:
    for url in (f"s3://{uuid.uuid4()}/x", "s3://mine/none"):
        with pytest.raises(LgpError, match=f"{url} does not exist"):
            fetched(url, tmp_path)


def test_s3_without_credentials_or_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = fsspec.get_filesystem_class("s3") if pytest.importorskip("s3fs") else None
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    system.clear_instance_cache()
    with pytest.raises(LgpError, match=r"s3://mine/x cannot be read: NoCredentialsError: .*FSSPEC_S3_ANON=true"):
        fetched("s3://mine/x", tmp_path)

"""The demo's certificate authority, and keys that no two nodes of a machine share."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import os
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from clients.node import claim_key
from experiments import certificates
from experiments.certificates import make
from experiments.healthy import healthy


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    found = tmp_path / "public", tmp_path / "link", tmp_path / "nodes"
    make(*found, keys=3, hosts=["superlink", "localhost", "127.0.0.1"])
    return found


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(folders: tuple[Path, Path, Path]) -> Iterator[int]:
    """The port of an HTTPS server with the made certificate."""
    _, link, _ = folders
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(link / "server.crt", link / "server.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_client_that_trusts_the_authority_trusts_the_link_and_no_other(
    folders: tuple[Path, Path, Path], served: int, tmp_path: Path
) -> None:
    authority = str(folders[0] / "ca.crt")
    assert healthy(f"https://localhost:{served}/health", authority)
    assert healthy(f"https://127.0.0.1:{served}/health", authority)
    assert healthy(f"tcp://127.0.0.1:{served}")
    assert not healthy(f"https://localhost:{served}/other", authority)
    assert not healthy(f"https://localhost:{served}/health")
    other = tmp_path / "other"
    make(other / "public", other / "link", other / "nodes", keys=0, hosts=["localhost"])
    assert not healthy(f"https://localhost:{served}/health", str(other / "public" / "ca.crt"))


def test_what_is_there_is_kept_and_what_ends_soon_is_made_anew(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    public, link, nodes = folders

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*.*")}

    before, first = contents(), (nodes / "0").read_bytes()
    make(*folders, keys=4, hosts=["superlink"])
    after = contents()
    assert {path for path in after if path not in before} == {str(public / "nodes" / "3.pub")}
    assert all(after[path] == data for path, data in before.items())
    monkeypatch.setattr(certificates, "_RENEW_DAYS", 400)  # of the 365 that a certificate lasts
    make(*folders, keys=4, hosts=["superlink"])
    assert contents()[str(link / "server.crt")] != before[str(link / "server.crt")]
    assert (nodes / "0").read_bytes() == first  # a node keeps its key


def test_an_old_certificate_is_trusted_until_it_ends(
    folders: tuple[Path, Path, Path], served: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SuperLink shows it until it is started again, while health checks and new runs read the new file."""
    public, link, _ = folders
    old = (public / "ca.crt").read_bytes()
    make(*folders, keys=3, hosts=["superlink", "hub.example.org"])  # a host more
    assert (public / "ca.crt").read_bytes().endswith(old) and (public / "ca.crt").read_bytes() != old
    assert healthy(f"https://localhost:{served}/health", str(public / "ca.crt"))
    with pytest.raises(ssl.SSLError):  # and the new one by the new CA alone
        _shake_hands(link, old.decode(), "hub.example.org")
    _shake_hands(link, (public / "ca.crt").read_text(), "hub.example.org")
    monkeypatch.setattr(certificates, "_RENEW_DAYS", 400)
    (link / "server.crt").unlink()  # killed after the CA's file was written
    make(*folders, keys=3, hosts=["superlink"])
    assert healthy(f"https://localhost:{served}/health", str(public / "ca.crt"))
    monkeypatch.setattr(certificates, "_DAYS", 0)
    (public / "ca.crt").write_bytes(old)
    make(*folders, keys=3, hosts=["superlink"])
    make(*folders, keys=3, hosts=["superlink"])  # what has ended goes
    assert (public / "ca.crt").read_bytes().count(b"BEGIN") == 2


def test_a_hub_without_clients_of_its_own_makes_no_keys(tmp_path: Path) -> None:
    given = [f"--{name}={tmp_path / name}" for name in ("public", "link", "nodes")]
    certificates.main(["make", "--clients=0", *given, "--hosts", "hub.example.org"])
    assert not list((tmp_path / "nodes").iterdir()) and not list((tmp_path / "public/nodes").iterdir())
    _shake_hands(tmp_path / "link", (tmp_path / "public/ca.crt").read_text(), "hub.example.org")


def _shake_hands(link: Path, authority: str, host: str) -> None:
    """TLS in memory, with the SuperLink's files; ssl.SSLError where they are not trusted."""
    client_side, server_side = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(link / "server.crt", link / "server.key")
    serving = server.wrap_bio(client_side, server_side, server_side=True)
    client = ssl.create_default_context(cadata=authority)
    asking = client.wrap_bio(server_side, client_side, server_hostname=host)
    for one in (asking, serving, asking):
        with contextlib.suppress(ssl.SSLWantReadError):
            one.do_handshake()
    assert asking.getpeercert()


def test_private_files_are_private_and_public_halves_fit(folders: tuple[Path, Path, Path]) -> None:
    public, link, nodes = folders
    for path in [*nodes.iterdir(), link / "server.key", link / "superexec.secret"]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for number in range(3):
        key = serialization.load_ssh_private_key((nodes / str(number)).read_bytes(), None)
        line = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        assert (public / "nodes" / f"{number}.pub").read_bytes() == line + b"\n"


def test_each_node_has_a_key_of_its_own_and_the_same_again(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    keys, locks = folders[2], tmp_path / "locks"
    held = {node: claim_key(keys, locks, node) for node in ("a", "b", "c")}
    assert [held[node][0].name for node in "abc"] == ["0", "1", "2"]
    with pytest.raises(SystemExit, match="all of its 3 keys are taken"):
        claim_key(keys, locks, "d")
    for node in "abc":  # closing the file is what the end of a process does, however it ends
        os.close(held[node][1])
    again, lock = claim_key(keys, locks, "c")
    assert again.name == "2"
    with pytest.raises(BlockingIOError), (locks / "2.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not os.get_inheritable(lock)
    other, second = claim_key(keys, locks, "new")  # a stranger takes what is free
    assert other.name == "0"
    os.close(lock)
    os.close(second)

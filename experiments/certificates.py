"""A certificate authority and node keys for one machine: ``python -m experiments.certificates``.

``make`` writes three folders: ``public`` (the certificate of the CA, the public keys), ``link`` (certificate
and key of the SuperLink, and the secret that it shares with its SuperExec) and ``nodes`` (the nodes' private
keys). What is there already is kept; a certificate that ends within a month, or lacks one of the hosts, is
made anew. The CA's key is never written, so a new certificate comes with a new CA. Earlier CAs stay in the
CA's file until they end: a SuperLink that is up shows its old certificate until it is started again.
``register`` tells the SuperLink the public keys.

For a try on one machine. Between sites each site makes its own key, and only the public half travels.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import fedmask._env  # noqa: F401  (before flwr is imported)

_DAYS, _RENEW_DAYS = 365, 30
_LEAST_KEYS = 64  # so that --scale needs no more
_PEM = serialization.Encoding.PEM


def make(public: Path, link: Path, nodes: Path, *, keys: int, hosts: Sequence[str]) -> None:
    """Write what is missing; ``keys``: how many nodes can have one; ``hosts``: names and addresses of the
    SuperLink."""
    for folder in (public / "nodes", link, nodes):
        folder.mkdir(parents=True, exist_ok=True)
    if not _sound(public / "ca.crt") or not _sound(link / "server.crt", hosts):
        _make_certificates(public, link, hosts)
    if not (link / "superexec.secret").exists():
        _write(link / "superexec.secret", secrets.token_hex(32).encode())
    for number in range(keys):
        if not (nodes / str(number)).exists() or not (public / "nodes" / f"{number}.pub").exists():
            key = ec.generate_private_key(ec.SECP384R1())
            line = key.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
            _write(public / "nodes" / f"{number}.pub", line + b"\n", mode=0o644)
            _write(nodes / str(number), _private(key, serialization.PrivateFormat.OpenSSH))


def register(public: Path, address: str) -> int:
    """Register all public keys with the SuperLink; those that it knows are left. The number of new ones."""
    from flwr.cli.typing import SuperLinkConnection
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.proto.control_pb2 import RegisterNodeRequest

    connection = SuperLinkConnection(
        name="here", address=address, root_certificates=str(public / "ca.crt"), insecure=False
    )
    client, new = init_http_client_from_connection(connection), 0
    try:
        for path in sorted((public / "nodes").glob("*.pub"), key=lambda path: int(path.stem)):
            key = serialization.load_ssh_public_key(path.read_bytes())
            data = key.public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            try:
                client.RegisterNode(request=RegisterNodeRequest(public_key=data))
                new += 1
            except Exception as error:
                if "already in use" not in f"{error} {getattr(getattr(error, 'response', None), 'text', '')}":
                    raise
    finally:
        client.close()
    return new


def _make_certificates(public: Path, link: Path, hosts: Sequence[str]) -> None:
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmask demo CA")])
    usage = {"content_commitment": False, "key_encipherment": False, "data_encipherment": False,
             "key_agreement": False, "encipher_only": False, "decipher_only": False}  # fmt: skip
    subject_id = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject_id)
    root = (
        _certificate(name, name, authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=False, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
        .add_extension(subject_id, critical=False)
        .sign(authority, hashes.SHA384())
    )
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    leaf = (
        _certificate(own, name, server)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=False, crl_sign=False, **usage), critical=True
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer_id, critical=False)
        .sign(authority, hashes.SHA384())
    )
    # The CA first: whoever is killed here, or reads meanwhile, trusts the old certificate and the new one.
    trusted = [root, *_not_ended(public / "ca.crt")]
    _write(public / "ca.crt", b"".join(one.public_bytes(_PEM) for one in trusted), mode=0o644)
    _write(link / "server.key", _private(server, serialization.PrivateFormat.PKCS8))
    _write(link / "server.crt", leaf.public_bytes(_PEM), mode=0o644)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _sound(path: Path, hosts: Sequence[str] = ()) -> bool:
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        if hosts:
            names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            if not {_host(host) for host in hosts} <= set(names):
                return False
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=_RENEW_DAYS)
    return found.not_valid_after_utc > ends


def _not_ended(path: Path) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError):
        return []
    return [one for one in found if one.not_valid_after_utc > datetime.datetime.now(datetime.UTC)]


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(_PEM, form, serialization.NoEncryption())


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
    os.replace(part, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.certificates", description=__doc__)
    parser.add_argument("verb", choices=("make", "register"))
    for folder in ("public", "link", "nodes"):
        parser.add_argument(f"--{folder}", type=Path, default=Path("/keys") / folder)
    parser.add_argument(
        "--clients", type=int, default=4, help=f"keys for so many nodes, or for {_LEAST_KEYS}; 0: none"
    )
    parser.add_argument("--hosts", nargs="+", default=["superlink", "localhost", "127.0.0.1"])
    parser.add_argument("--superlink", default="superlink:8000", help="HOST:PORT")
    given = parser.parse_args(arguments)
    if given.verb == "make":
        keys = max(given.clients, _LEAST_KEYS) if given.clients else 0
        make(given.public, given.link, given.nodes, keys=keys, hosts=given.hosts)
        print(f"{given.public}: the CA's certificate and {keys} public keys", file=sys.stderr)
    else:
        print(f"{register(given.public, given.superlink)} new keys registered", file=sys.stderr)


if __name__ == "__main__":
    main()

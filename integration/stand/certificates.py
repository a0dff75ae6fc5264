"""Certificates of a throw-away authority, for both ends of a connection to this machine.

cacert.pem      servercert.pem   serverkey.pem   clientcert.pem   clientkey.pem    libvirt's
ca-cert.pem     server-cert.pem  server-key.pem  client-cert.pem  client-key.pem   QEMU's, NBD's
"""

from __future__ import annotations

import subprocess
from pathlib import Path

_AUTHORITY = "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"
_ENDS = {
    "server": ("extendedKeyUsage=serverAuth", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
    "client": ("extendedKeyUsage=clientAuth",),
}


def make_certificates(folder: Path) -> Path:
    """Make keys and certificates, good for a day, in `folder`; returns it."""
    _openssl("req", "-x509", *_key(folder, "ca"), *_subject("authority", *_AUTHORITY))
    authority = ("-CA", f"{folder}/ca-cert.pem", "-CAkey", f"{folder}/ca-key.pem")
    usage = "keyUsage=critical,digitalSignature,keyEncipherment"
    for end, extensions in _ENDS.items():
        subject = _subject(end, "basicConstraints=critical,CA:FALSE", usage, *extensions)
        _openssl("req", "-x509", *authority, *_key(folder, end), *subject)
    for path in sorted(folder.glob("*-*.pem")):
        path.with_name(path.name.replace("-", "")).symlink_to(path.name)
    return folder


def _key(folder: Path, name: str) -> tuple[str, ...]:
    key, certificate = f"{folder}/{name}-key.pem", f"{folder}/{name}-cert.pem"
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "1")
    return (*new, "-keyout", key, "-out", certificate)


def _subject(name: str, *extensions: str) -> list[str]:
    added = [word for extension in extensions for word in ("-addext", extension)]
    return ["-subj", f"/CN={name}", *added]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)

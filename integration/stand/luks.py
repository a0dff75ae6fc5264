"""Encrypted images that are there at once.

qemu-img measures for seconds how fast this machine is before it makes one, and where the kernel
counts time in ticks it fails now and then.  So their LUKS header is one that was computed: its
key material is all zeroes, which as good as any decrypts to some key, and has this digest.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

KEY = b"open sesame"
_DIGEST = bytes.fromhex("97757c184156271cf8f1780a0fc38d36c18b8c0e")
_ITERATIONS = 1000
_SLOTS, _FIRST, _SECTORS, _STRIPES = 8, 8, 128, 4000
_PAYLOAD = (_FIRST + _SLOTS * _SECTORS) * 512
_ENABLED, _DISABLED = 0x00AC71F3, 0x0000DEAD

_EXTENSION = 0x0537BE77  # qcow2.txt: full disk encryption header pointer
_CLUSTER = 65536


def _header() -> bytes:
    """LUKS On-Disk Format Specification 1.2.3, figure 1."""
    cipher, mode, digest = (word.ljust(32, b"\0") for word in (b"aes", b"cbc-plain64", b"sha256"))
    head = b"LUKS\xba\xbe\0\1" + cipher + mode + digest
    head += struct.pack(">II", _PAYLOAD // 512, 16) + _DIGEST
    head += bytes(32) + struct.pack(">I", _ITERATIONS)
    head += b"00000000-0000-4000-8000-000000000000".ljust(40, b"\0")
    for slot in range(_SLOTS):
        used = (_DISABLED, 0) if slot else (_ENABLED, _ITERATIONS)
        head += struct.pack(">II", *used) + bytes(32)
        head += struct.pack(">II", _FIRST + slot * _SECTORS, _STRIPES)
    return head


def make_raw(path: Path, size: int) -> None:
    """A LUKS container that holds `size` bytes."""
    with path.open("xb") as file:
        file.write(_header())
        file.truncate(_PAYLOAD + size)


def make_qcow2(path: Path, size: int, key: Path) -> None:
    """A qcow2 image of `size` bytes that is encrypted.

    key -- file with `KEY`
    """
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    with path.open("r+b") as file:
        head = file.read(_CLUSTER)
        end = -(-file.seek(0, 2) // _CLUSTER) * _CLUSTER
        (start,) = struct.unpack_from(">I", head, 100)
        extension = struct.pack(">IIQQ", _EXTENSION, 16, end, _PAYLOAD)
        head = head[:start] + extension + head[start : -len(extension)]
        file.seek(0)
        file.write(head[:32] + struct.pack(">I", 2) + head[36:])
        file.seek(end)
        file.write(_header())
        file.truncate(end + -(-_PAYLOAD // _CLUSTER) * _CLUSTER)
    # It finds the clusters of the header, which nothing counts yet.
    options = f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"
    subprocess.run(
        ["qemu-img", "check", "-q", "-r", "all", "--object", secret(key), "--image-opts", options],
        check=True,
        capture_output=True,
    )


def secret(key: Path) -> str:
    """The object that gives QEMU's programs the key."""
    return f"secret,id=key,file={key}"

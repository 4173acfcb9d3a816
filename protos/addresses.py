"""Addresses, HOST:PORT, read in one place: whom to dial, and where to listen."""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from offsite.protos.documents import quoted
from offsite.protos.errors import InputError

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # as gRPC looks for them, in this order


@dataclass(frozen=True)
class Address:
    """A host, by name or number, and a port."""

    host: str  # IPv6 without brackets
    port: int

    def __str__(self) -> str:
        """Write it as it is dialled: ``tuning.example.org:8443``, ``[::1]:8443``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether it is this machine itself."""
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host == "localhost"

    def proxy(self, environment: Mapping[str, str] = os.environ) -> str:
        """Name the environment variable whose proxy a connection goes through; empty if there is none."""
        name = next((name for name in _PROXIES if environment.get(name)), "")
        spared = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
        beyond = any(self.host.endswith(one.strip()) for one in spared.split(",") if one.strip())
        return "" if self.loopback or beyond else name


def parse(text: str, *, listening: bool = False) -> Address:
    """Read HOST:PORT; port 0, any free one, only to listen. Raises InputError that says what to write instead."""
    if "://" in text:
        raise InputError(f"{quoted(text)} is a URL; write HOST:PORT{_of_url(text)}")
    host, colon, port = text.rpartition(":")
    if _is_ipv6(text):
        raise InputError(f"{quoted(text)} is an IPv6 address without a port; write it in brackets, [{text}]:8443")
    if host.startswith("[") and host.endswith("]") and _is_ipv6(host[1:-1]):
        host = host[1:-1]
    elif not _HOST.fullmatch(host):
        what = "no port" if not colon else "no host" if not host else f"{quoted(host)} is no host name or IP address"
        raise InputError(f"{quoted(text)} is not an address ({what}); expected HOST:PORT, such as 127.0.0.1:8443")
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and (not listening) <= int(port) <= 65535):
        least = 0 if listening else 1
        raise InputError(f"{quoted(text)} is not an address; expected HOST:PORT with a port from {least} to 65535")
    return Address(host, int(port))


def parse_all(text: str) -> tuple[Address, ...]:
    """Read one HOST:PORT, or several with commas between, of a coordinator's gateways; raises InputError."""
    return tuple(parse(part.strip()) for part in text.split(","))


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _of_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        return f", here {Address(parts.hostname, parts.port or 8443)}" if parts.hostname else ""
    except ValueError:
        return ""

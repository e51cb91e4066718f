"""Addresses of servers: checked, and read from a file whose lines come and go during a run.

    check_endpoints("openai:qwen3", ["http://localhost:8000"])      # ["http://localhost:8000/v1"]
    file = EndpointsFile("endpoints.txt")
    file.read_all(), file.read_changed()

The file has one address per line; empty lines and those that begin with # are left out. Leaves out what is asked at an
address (servers.py).
"""

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from cai.base import cli
from cai.base.errors import InputError, shorten


def check_endpoints(model: str, endpoints: Sequence[str]) -> list[str]:
    """The base addresses, each ending with its path (`/v1` by default); sends no request.

    Raises InputError for a missing name, for an address that is not a valid URL, and for one that holds a secret: it
    would be written into the manifest.
    """
    where = "--endpoint"
    if not model.removeprefix("openai:"):
        raise InputError("openai: without a name", where="--model", expected="openai:NAME, as the server calls it")
    if not endpoints:
        raise InputError(f"no address for {model}", where=where, remedy="Name one: --endpoint http://localhost:8000/v1")
    addresses: list[str] = []
    for endpoint in endpoints:
        try:
            parts = urlsplit(endpoint)
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.scheme not in ("http", "https"):
            # Not shown: what can't be parsed may hold a password.
            raise InputError("not a valid URL", where=where, expected="http://HOST:PORT/v1 or https://…")
        host = f"[{host}]" if ":" in host else host
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(
                f"the address of {host} has more than host and path",
                where=where,
                expected="no user, password or query: it is written into the manifest",
                remedy="Put a key into the environment, as OPENAI_API_KEY, or see --key-name",
            )
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        address = f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"
        if address in addresses:
            raise InputError(f"the same address twice: {address}", where=where, remedy="Name it once")
        addresses.append(address)
    return addresses


class EndpointsFile:
    """The file of --endpoints-file. path: its name."""

    def __init__(self, path: str):
        self.path = path
        self._stamp: tuple[int, ...] | None = None  # of the last reading

    def read_all(self) -> list[str]:
        """The addresses. Raises InputError for a file that is not there or has none, and for one that is no URL."""
        addresses, faults = self._read()
        if faults:
            raise faults[0]
        if not addresses:
            raise InputError(
                "no address",
                where=self.path,
                expected="one per line, such as http://node1:8000/v1",
                remedy="Wait for the first replica",
            )
        return addresses

    def read_changed(self) -> list[str] | None:
        """The addresses if the file has changed since it was last read, else None.

        A file that can't be read has no news; a line that is no address is left out with a warning.
        """
        try:
            if self._stamp == self._read_stamp():
                return None
            addresses, faults = self._read()
        except (OSError, InputError):
            return None
        for fault in faults:
            cli.warn(f"{fault}; this line is left out")
        return addresses

    def forget(self) -> None:
        """Take the file as changed."""
        self._stamp = None

    def _read_stamp(self) -> tuple[int, ...]:
        status = os.stat(self.path)
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> tuple[list[str], list[InputError]]:
        """(the addresses, each once; the errors of the other lines)."""
        try:
            self._stamp = self._read_stamp()
            with open(self.path, encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
        except OSError as error:
            raise InputError(
                f"cannot read it: {error.strerror or error}", where=self.path, remedy="Check the path"
            ) from error
        addresses: list[str] = []
        faults = []
        for number, line in enumerate(map(str.strip, lines), 1):
            if not line or line.startswith("#"):
                continue
            try:
                addresses += check_endpoints("openai:x", [line])
            except InputError as error:
                faults.append(InputError(shorten(error), where=self.path, line=number))
        return list(dict.fromkeys(addresses)), faults

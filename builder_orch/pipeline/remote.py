"""A Dockerfile or a context from a URL: fetched within limits, unpacked with suspicion.

Credentials in a URL go to its own origin only and into no message; git repositories are not
cloned, because that runs what the repository brings along.
"""

import asyncio
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, NoReturn

from aiohttp import (
    ClientConnectorCertificateError,
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    encode_basic_auth,
)
from yarl import URL

from builder_orch import __version__
from builder_orch.api.dialer import connector, passes_on, proxy_for
from builder_orch.api.failures import unconnected
from builder_orch.api.models import printable
from builder_orch.errors import ContextRefused, UsageFailure
from builder_orch.tunnel.carrier.proxy import Outside

REDIRECTS: Final = 5
DOCKERFILE_OCTETS: Final = 1 << 20
ARCHIVE_OCTETS: Final = 1 << 30
"""As it travels, so mostly compressed."""
UNPACKED_OCTETS: Final = 4 << 30
MEMBERS: Final = 200_000
FETCH_S: Final = 600.0
IDLE_S: Final = 30.0
"""Without an octet for this long a transfer is given up."""
CHUNK: Final = 256 * 1024

_MOVED = {301, 302, 303, 307, 308}
_GIT = ("git://", "git@", "ssh://", "git+", "github.com/")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one transfer."""

    octets: int
    redirects: int = REDIRECTS
    total_s: float = FETCH_S
    idle_s: float = IDLE_S


def check_url(text: str) -> URL:
    """A URL that a file may be fetched from; UsageFailure says why it is none."""
    bare = text.partition("#")[0].partition("?")[0].rstrip("/")
    if text.startswith(_GIT) or bare.endswith(".git"):
        raise UsageFailure(
            f"{shown(text)} is a git repository, and those are not cloned: git would run what the "
            "repository's configuration says",
            hint="Clone it yourself and name the directory, or give the URL of its .tar.gz.",
        )
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in {"http", "https"} or not url.host:
        raise UsageFailure(f"{shown(text)} is no URL of a file", hint="It looks like https://...")
    return url


def shown(text: str) -> str:
    """A URL without what may be secret in it: user, password, query."""
    scheme, colon, rest = text.partition("://")
    if not colon:
        return text.partition("?")[0].rpartition("@")[2]
    place, slash, path = rest.partition("/")
    path = path.partition("?")[0].partition("#")[0]
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


async def fetch(text: str, into: Path, limits: Limits, variables: Mapping[str, str]) -> None:
    """Write what a URL gives to a new file; ContextRefused or UsageFailure say why not.

    `variables` say by which proxy. Certificates are always checked.
    """
    url = check_url(text)
    auth = None if url.user is None else encode_basic_auth(url.user, url.password or "")
    first = url.origin()
    timeout = ClientTimeout(total=limits.total_s, sock_connect=10.0, sock_read=limits.idle_s)
    headers = {"User-Agent": f"fly-build/{__version__}", "Accept-Encoding": "identity"}
    try:
        for _ in range(limits.redirects + 1):
            own = {"Authorization": auth} if auth and url.origin() == first else {}
            outside = Outside.of(variables, url.scheme)
            proxy, login = _passing_on(url, outside)
            async with (
                ClientSession(
                    connector=connector(url, outside),
                    timeout=timeout,
                    headers=headers,
                    cookie_jar=DummyCookieJar(),
                    auto_decompress=False,
                ) as session,
                session.get(
                    url.with_user(None),
                    headers=own,
                    allow_redirects=False,
                    proxy=proxy,
                    proxy_headers=login,
                ) as response,
            ):
                if response.status not in _MOVED:
                    await _save(response, into, limits, text)
                    return
                url = _next(url, response, text)
        _refuse(text, f"more than {limits.redirects} redirects")
    except TimeoutError:
        _refuse(text, f"it took longer than {limits.total_s:g} s, or stood still")
    except ClientConnectorCertificateError as error:
        _refuse(text, f"the server's certificate: {printable(str(error.certificate_error))}")
    except ClientConnectorError as error:
        _refuse(text, unconnected(error))
    except (ClientError, OSError) as error:
        _refuse(text, f"{getattr(error, 'strerror', None) or 'the connection broke'}")


def _passing_on(url: URL, outside: Outside) -> tuple[str | None, dict[str, str] | None]:
    """The proxy that has to make the request for us, if it is so, and what it is told of us."""
    proxy = proxy_for(url, outside)
    if proxy is None or not passes_on(proxy, url):
        return None, None
    # aiohttp sends it to the proxy under the name that a proxy expects, and to nobody else.
    login = encode_basic_auth(proxy.user, proxy.password) if proxy.user else ""
    return f"{proxy.kind}://{proxy}", {"Authorization": login} if login else None


def _next(url: URL, response: ClientResponse, text: str) -> URL:
    try:
        there = url.with_user(None).join(URL(response.headers.get("Location", "")))
    except ValueError:
        there = URL()
    if there.scheme not in {"http", "https"} or not there.host:
        _refuse(text, "it redirects to what is no URL")
    if url.scheme == "https" and there.scheme != "https":
        _refuse(text, "it redirects from https to http")
    # What a redirect says of user and password is somebody else's idea.
    return there.with_user(None)


async def _save(response: ClientResponse, into: Path, limits: Limits, text: str) -> None:
    if response.status != 200:
        _refuse(text, f"the answer was {response.status} {response.reason or ''}".rstrip())
    if (response.content_length or 0) > limits.octets:
        _refuse(text, f"it is {response.content_length} bytes, more than {limits.octets}")
    octets = 0
    with into.open("xb") as file:
        async for chunk in response.content.iter_chunked(CHUNK):
            octets += len(chunk)
            if octets > limits.octets:
                _refuse(text, f"it is more than {limits.octets} bytes")
            await asyncio.to_thread(file.write, chunk)


def _refuse(text: str, why: str) -> NoReturn:
    raise ContextRefused(
        f"{shown(text)} was not fetched: {why}",
        hint="Check the URL, or fetch it yourself and name the directory.",
    ) from None


def unpack(archive: Path, into: Path, name: str) -> Path:
    """Unpack a tar, compressed or not, into an empty directory; the context's root in it.

    Nothing is written outside, through a link, or of any kind but files, directories and links;
    ContextRefused names the first member that is something else. One directory alone at the
    top, as archives of repositories have it, is the root.
    """
    try:
        with tarfile.open(archive, "r|*") as tar:
            _Unpacking(into, name).all_of(tar)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, TypeError) as error:
        # TypeError is what some versions of tarfile make of a gzip header that ends too early.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ContextRefused(
            f"{name} is no tar archive, or a broken one: {error}",
            hint="A context is a .tar, .tar.gz, .tar.bz2 or .tar.xz; a Dockerfile goes to --file.",
        ) from None
    inside = list(into.iterdir())
    return inside[0] if len(inside) == 1 and _is_plain_directory(inside[0]) else into


def _is_plain_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


class _Unpacking:
    """One archive on its way to disk."""

    def __init__(self, into: Path, name: str) -> None:
        self._into = into
        self._name = name
        self._octets = 0
        self._directories: dict[str, tarfile.TarInfo] = {}
        self._files: set[str] = set()

    def all_of(self, tar: tarfile.TarFile) -> None:
        for number, member in enumerate(tar):
            if number >= MEMBERS:
                self._refuse(member, f"is one of more than {MEMBERS}")
            self._octets += max(0, member.size)
            if self._octets > UNPACKED_OCTETS:
                self._refuse(member, f"makes it more than {UNPACKED_OCTETS} bytes")
            self._one(tar, member)
        # Times of directories last: what was put into them has changed those.
        for name, member in self._directories.items():
            path = self._into / name
            path.chmod(member.mode & 0o7777 | 0o700)
            _set_time(path, member)

    def _one(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name)
        if name == ".":
            return
        if name.startswith(("/", "../")) or name == ".." or "\0" in name:
            self._refuse(member, "leads out of the archive")
        path = self._into / name
        self._above(member, name)
        if member.isdir():
            self._directory(member, path)
            self._directories[name] = member
        elif path.is_symlink() or path.exists():
            self._refuse(member, "is there twice")
        elif member.isreg():
            content = tar.extractfile(member)
            assert content is not None
            _write(path, content, member)
            self._files.add(name)
        elif member.islnk() and posixpath.normpath(member.linkname) in self._files:
            path.hardlink_to(self._into / posixpath.normpath(member.linkname))
            self._files.add(name)
        elif member.issym():
            path.symlink_to(member.linkname)
        else:
            self._refuse(member, "is no file, directory or link to one that came before")

    def _above(self, member: tarfile.TarInfo, name: str) -> None:
        """Every directory above has to be one, and none a link that leads elsewhere."""
        for above in _parents(name):
            self._directory(member, self._into / above)

    def _directory(self, member: tarfile.TarInfo, path: Path) -> None:
        try:
            path.mkdir()
        except FileExistsError:
            if not _is_plain_directory(path):
                self._refuse(member, "lies below what is no directory")

    def _refuse(self, member: tarfile.TarInfo, why: str) -> NoReturn:
        raise ContextRefused(
            f"{self._name}: {member.name!r} {why}", hint="Make the archive anew, without it."
        )


def _parents(name: str) -> Iterator[str]:
    at = name.find("/")
    while at >= 0:
        yield name[:at]
        at = name.find("/", at + 1)


def _write(path: Path, content: IO[bytes], member: tarfile.TarInfo) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        while octets := content.read(CHUNK):
            _write_all(lambda part: os.write(descriptor, part), octets)
        os.fchmod(descriptor, member.mode & 0o7777 | 0o400)
    finally:
        os.close(descriptor)
    _set_time(path, member)


def _write_all(write: Callable[[memoryview], int], octets: bytes) -> None:
    left = memoryview(octets)
    while left:
        left = left[write(left) :]


def _set_time(path: Path, member: tarfile.TarInfo) -> None:
    seconds = max(0, min(int(member.mtime), 1 << 40))
    os.utime(path, (seconds, seconds))

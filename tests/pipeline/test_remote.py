"""What a URL gives: fetched within limits, its credentials to nobody else, unpacked warily."""

import asyncio
import base64
import gzip
import io
import os
import socket
import ssl
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder_orch.errors import ContextRefused, UsageFailure
from builder_orch.pipeline.remote import Limits, check_url, fetch, shown, unpack
from tests.api.rig import bound, certificate_for
from tests.tunnel.carrier.gate import Proxy, Socks

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
SMALL = Limits(1000, redirects=2, total_s=20.0, idle_s=20.0)
BASIC = "Basic " + base64.b64encode(b"me:planted").decode()


@asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """The authority of a server that gives this answer to everything."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    # Some answers here never end.
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, sock, ssl_context=tls).start()
    try:
        yield f"127.0.0.1:{sock.getsockname()[1]}"
    finally:
        await runner.cleanup()


async def got(url: str, into: Path, limits: Limits = SMALL, **variables: str) -> bytes:
    path = into / "got"
    await fetch(url, path, limits, variables)
    return path.read_bytes()


async def test_a_file_is_fetched_with_credentials_for_its_own_origin_only(tmp_path: Path) -> None:
    heard: dict[str, str | None] = {}

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        heard["elsewhere"] = request.headers.get("Authorization")
        return web.Response(body=b"FROM scratch\n")

    async def answer(request: web.Request) -> web.StreamResponse:
        heard[request.path] = request.headers.get("Authorization")
        there = "/second" if request.path == "/first" else f"http://you:other@{other}/third"
        raise web.HTTPFound(there)

    async with serving(elsewhere) as other, serving(answer) as host:
        octets = await got(f"http://me:planted@{host}/first", tmp_path)
    assert octets == b"FROM scratch\n"
    assert heard == {"/first": BASIC, "/second": BASIC, "elsewhere": None}


async def test_a_proxy_gets_its_own_credentials_and_the_file_none_of_them(tmp_path: Path) -> None:
    heard: list[tuple[str, str | None, str | None]] = []

    async def proxy(request: web.Request) -> web.StreamResponse:
        names = ("Proxy-Authorization", "Authorization")
        first, second = (request.headers.get(name) for name in names)
        heard.append((str(request.url), first, second))
        return web.Response(body=b"through")

    async with serving(proxy) as host:
        url = "http://files.test/D"
        assert await got(url, tmp_path, HTTP_PROXY=f"http://me:planted@{host}") == b"through"
    assert heard == [("http://files.test/D", BASIC, None)]


async def test_each_scheme_has_its_proxy(tmp_path: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(path := certificate_for(tmp_path, "files.test"))
    heard: list[str | None] = []

    async def plain(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(f"https://{secure.replace('127.0.0.1', 'files.test')}/D")

    async def answer(request: web.Request) -> web.StreamResponse:
        heard.append(request.headers.get("Proxy-Authorization"))
        return web.Response(body=b"FROM scratch\n")

    proxy, socks = Proxy(credentials="me:planted"), Socks(credentials="me:planted")
    async with (
        serving(answer, tls) as secure,
        serving(plain) as passing,
        proxy.running() as connecting,
        socks.running() as sockets,
    ):
        for number, variables in enumerate(
            (
                {"http_proxy": passing, "https_proxy": f"http://me:planted@{connecting}"},
                {"HTTP_PROXY": passing, "ALL_PROXY": f"socks5h://me:planted@{sockets}"},
            )
        ):
            (into := tmp_path / f"{number}").mkdir()
            variables["FLY_BUILD_CA_FILE"] = str(path)
            assert await got("http://files.test/D", into, SMALL, **variables) == b"FROM scratch\n"
    assert heard == [None, None]
    assert [head.split()[:2] for head in proxy.asked] == [
        ["CONNECT", secure.replace("127.0.0.1", "files.test")]
    ]
    assert socks.asked == [f"files.test {secure.rpartition(':')[2]}"]


@pytest.mark.parametrize(
    ("url", "proxy", "why"),
    [
        ("https://files.test/D", Proxy(credentials="me:other"), r"the proxy .* \(407 "),
        ("http://files.test/D", Proxy(answer=b"HTTP/1.1 407 No\r\n\r\n"), "answer was 407 No"),
        ("https://files.test/D", Proxy(answer=None), "the proxy .* closed the connection"),
    ],
)
async def test_a_proxy_that_does_not_is_the_cause(
    tmp_path: Path, url: str, proxy: Proxy, why: str
) -> None:
    async with proxy.running() as address:
        with pytest.raises(ContextRefused, match=why) as caught:
            await got(url, tmp_path, ALL_PROXY=f"http://me:planted@{address}")
    assert "planted" not in str(caught.value) + caught.value.hint


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there_is_the_cause(tmp_path: Path, scheme: str) -> None:
    with bound() as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ContextRefused, match=f"the proxy {address}.*: Connection refused"):
            await got(f"{scheme}://files.test/D", tmp_path, ALL_PROXY=address)


async def test_a_proxy_of_another_kind_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageFailure, match="a socks4 proxy is not supported"):
        await got("http://files.test/D", tmp_path, ALL_PROXY="socks4://me:planted@p.test")


async def large(request: web.Request) -> web.StreamResponse:
    return web.Response(body=bytes(1001))


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(100))


async def silent(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def circle(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound(request.path)


async def to_file(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": "file:///etc/passwd"})


async def nowhere(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302)


async def missing(request: web.Request) -> web.StreamResponse:
    raise web.HTTPNotFound


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (large, "it is 1001 bytes, more than 1000"),
        (endless, "it is more than 1000 bytes"),
        (circle, "more than 2 redirects"),
        (to_file, "it redirects to what is no URL"),
        (nowhere, "redirects"),
        (missing, "the answer was 404 Not Found"),
        (silent, "it took longer than 20 s, or stood still"),
    ],
)
async def test_what_goes_too_far_is_refused_and_says_nothing_secret(
    tmp_path: Path, answer: Answer, said: str
) -> None:
    limits = Limits(1000, redirects=2, total_s=20.0, idle_s=0.05 if answer is silent else 20.0)
    async with serving(answer) as host:
        with pytest.raises(ContextRefused, match=said) as caught:
            await got(f"http://me:planted@{host}/x?signature=planted", tmp_path, limits)
    assert "planted" not in str(caught.value) + caught.value.hint
    assert caught.value.__suppress_context__


async def test_nobody_there_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    why = rf"was not fetched: no connection to 127\.0\.0\.1:{port}: Connection refused$"
    with pytest.raises(ContextRefused, match=why):
        await got(f"http://127.0.0.1:{port}/", tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "git@github.com:a/b.git", "https://github.com/a/b.git", "ssh://git@x.test/a",
        "https://x.test/b.git#main:sub", "git://x.test/a", "github.com/a/b",
    ],
)  # fmt: skip
def test_a_git_repository_is_refused_with_the_reason(url: str) -> None:
    with pytest.raises(UsageFailure, match="is a git repository, and those are not cloned"):
        check_url(url)


@pytest.mark.parametrize("url", ["ftp://x.test/a", "http://", "https:///a", "http://[", "x"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(UsageFailure, match="no URL of a file"):
        check_url(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://u:p@x.test:8/a/b?token=t#f", "https://x.test:8/a/b"),
        ("https://x.test", "https://x.test"),
        ("git@x.test:a?b", "x.test:a"),
        ("https://u:p/q@x.test/a", "https://u:p/q@x.test/a"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url: str, expected: str) -> None:
    assert shown(url) == expected


# --- archives


def member(name: str, content: bytes = b"", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(content), 1_000_000, 0o644
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_becomes_what_was_packed(tmp_path: Path, into: Path, mode: str) -> None:
    file = archive(
        tmp_path / "a",
        member("./Dockerfile", b"FROM scratch\n"),
        member("sub", type=tarfile.DIRTYPE, mode=0o750),
        member("sub/run", b"#!", mode=0o4755),
        member("sub/link", type=tarfile.SYMTYPE, linkname="../../../etc/passwd"),
        member("hard", type=tarfile.LNKTYPE, linkname="./sub/run"),
        mode=mode,
    )
    root = unpack(file, into, "a")
    assert root == into
    assert (root / "Dockerfile").read_bytes() == b"FROM scratch\n"
    assert (root / "sub" / "run").stat().st_mode & 0o7777 == 0o4755
    assert (root / "sub" / "run").stat().st_mtime == (root / "sub").stat().st_mtime == 1_000_000
    assert os.readlink(root / "sub" / "link") == "../../../etc/passwd"  # noqa: PTH115
    assert (root / "hard").samefile(root / "sub" / "run")


def test_the_one_directory_of_a_repository_is_the_context(tmp_path: Path, into: Path) -> None:
    file = archive(tmp_path / "a", member("repo-1.0/Dockerfile", b"FROM scratch\n"))
    assert unpack(file, into, "a") == into / "repo-1.0"


LINK = member("d", type=tarfile.SYMTYPE, linkname="/tmp")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([member("../evil")], "leads out"),
        ([member("/etc/evil")], "leads out"),
        ([member("a/../../evil")], "leads out"),
        ([LINK, member("d/evil")], "below what is no directory"),
        ([LINK, member("d", type=tarfile.DIRTYPE)], "below what is no directory"),
        ([LINK, member("d", b"evil")], "there twice"),
        ([member("a", b"1"), member("a", b"2")], "there twice"),
        ([member("a"), member("a/b")], "below what is no directory"),
        ([member("p", type=tarfile.FIFOTYPE)], "no file, directory or link"),
        ([member("c", type=tarfile.CHRTYPE)], "no file, directory or link"),
        ([member("h", type=tarfile.LNKTYPE, linkname="/etc/passwd")], "no file, directory or"),
        ([member("h", type=tarfile.LNKTYPE, linkname="../x")], "no file, directory or link"),
        ([LINK, member("h", type=tarfile.LNKTYPE, linkname="d")], "no file, directory or link"),
    ],
)
def test_a_hostile_archive_is_refused_and_nothing_lands_outside(
    tmp_path: Path, into: Path, members: list[tuple[tarfile.TarInfo, bytes]], said: str
) -> None:
    before = set(tmp_path.iterdir())
    file = archive(tmp_path / "a", *members)
    with pytest.raises(ContextRefused, match=said):
        unpack(file, into, "a")
    assert set(tmp_path.iterdir()) - {file} == before


def test_what_would_unpack_to_too_much_is_refused_before_it_is_written(
    tmp_path: Path, into: Path
) -> None:
    info, _ = member("bomb")
    info.size = 5 << 30
    file = tmp_path / "a"
    file.write_bytes(info.tobuf())
    with pytest.raises(ContextRefused, match="makes it more than"):
        unpack(file, into, "a")
    assert list(into.iterdir()) == []


WHOLE = [member("Dockerfile", b"FROM scratch\n"), member("data", os.urandom(3000))]


@settings(deadline=None)
@given(st.binary(max_size=600), st.integers(0, 3000), st.booleans())
@example(b"", 3, True)
def test_garbage_is_no_archive(
    tmp_path_factory: pytest.TempPathFactory, octets: bytes, cut: int, packed: bool
) -> None:
    folder = tmp_path_factory.mktemp("garbage")
    whole = archive(folder / "whole", *WHOLE, mode="w:gz" if packed else "w").read_bytes()
    for number, content in enumerate((octets, gzip.compress(octets), whole[:cut] + octets)):
        (folder / "a").write_bytes(content)
        (folder / str(number)).mkdir()
        try:
            unpack(folder / "a", folder / str(number), "a")
        except ContextRefused as error:
            assert str(error)  # noqa: PT017

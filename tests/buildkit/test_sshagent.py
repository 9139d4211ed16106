"""Keys from files as an agent: OpenSSH's own programs list them, sign with them and check that."""

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.buildkit.sshagent import FAILURE, READ, KeyAgent, Unusable, string

KINDS = [
    ["-t", "ed25519"],
    ["-t", "rsa", "-b", "2048"],
    ["-t", "ecdsa", "-b", "256"],
    ["-t", "ecdsa", "-b", "384"],
    ["-t", "ecdsa", "-b", "521"],
    ["-t", "rsa", "-b", "2048", "-m", "PEM"],
    ["-t", "ecdsa", "-m", "PKCS8"],
]

pytestmark = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None or shutil.which("ssh-add") is None,
    reason="OpenSSH's programs, which make the keys and judge the signatures, are not installed",
)


def make_key(path: Path, kind: list[str], passphrase: str = "") -> Path:
    words = ["ssh-keygen", "-q", *kind, "-N", passphrase, "-C", "", "-f", str(path)]
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    return path


@asynccontextmanager
async def listening(agent: KeyAgent, path: Path) -> AsyncGenerator[dict[str, str]]:
    """The agent on a socket, and the variables of a program that is to use it."""
    conversations: set[asyncio.Task[None]] = set()

    async def octets(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
        while piece := await reader.read(READ):
            yield piece

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        conversations.add(task)

        async def answer(reply: bytes) -> None:
            writer.write(reply)
            await writer.drain()

        with contextlib.suppress(ConnectionError):
            async with aclosing(octets(reader)) as incoming:
                await agent.converse(incoming, answer)
        writer.close()

    server = await asyncio.start_unix_server(accept, path)
    try:
        yield {"SSH_AUTH_SOCK": str(path), "PATH": "/usr/bin:/bin"}
    finally:
        server.close()
        await asyncio.gather(*conversations)


async def run(words: list[str], variables: dict[str, str], stdin: bytes = b"") -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *words,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = await process.communicate(stdin)
    return process.returncode or 0, said.decode()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind).replace("--", "-"))
async def test_openssh_signs_with_a_key_from_a_file(
    home: Path, tmp_path: Path, kind: list[str]
) -> None:
    key = make_key(tmp_path / "key", kind)
    public = (tmp_path / "key.pub").read_text()
    async with listening(KeyAgent.of([key]), home / "agent") as variables:
        _, listed = await run(["ssh-add", "-L"], variables)
        assert listed.split()[:2] == public.split()[:2]
        key.unlink()
        sign = ["ssh-keygen", "-Y", "sign", "-n", "test", "-f", f"{key}.pub"]
        code, signature = await run(sign, variables, b"signed by the agent alone")
        assert code == 0, signature
    (tmp_path / "signature").write_text(signature[signature.index("-----BEGIN") :])
    (tmp_path / "allowed").write_text(f"me {public}")
    judge = [
        "ssh-keygen",
        "-Y",
        "verify",
        "-n",
        "test",
        "-I",
        "me",
        "-f",
        str(tmp_path / "allowed"),
    ]
    judge += ["-s", str(tmp_path / "signature")]
    code, said = await run(judge, {}, b"signed by the agent alone")
    assert code == 0, said


async def test_several_keys_are_listed_in_their_order(home: Path, tmp_path: Path) -> None:
    keys = [make_key(tmp_path / name, KINDS[0]) for name in ("one", "two")]
    async with listening(KeyAgent.of(keys), home / "agent") as variables:
        _, listed = await run(["ssh-add", "-L"], variables)
        assert [line.split()[2] for line in listed.splitlines()] == ["one", "two"]
        # It keeps what it was made with, and takes nothing.
        code, _ = await run(["ssh-add", "-D"], variables)
        assert code != 0


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]], ids=["openssh", "pem"])
def test_a_key_behind_a_passphrase_is_refused_with_the_reason(
    tmp_path: Path, kind: list[str]
) -> None:
    key = make_key(tmp_path / "key", kind, "planted-passphrase")
    with pytest.raises(Unusable, match="behind a passphrase") as caught:
        KeyAgent.of([key])
    assert str(key) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"planted", b"-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(Unusable, match="no private key") as caught:
        KeyAgent.of([tmp_path / "key"])
    assert "planted" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="No such file"):
        KeyAgent.of([tmp_path / "key"])


@given(st.binary(max_size=64))
def test_whatever_is_asked_is_answered(request: bytes) -> None:
    assert KeyAgent(()).reply(request)[0] in {FAILURE, 12}


async def test_a_message_without_an_end_ends_the_conversation() -> None:
    async def incoming() -> AsyncGenerator[bytes, None]:
        yield (1 << 30).to_bytes(4, "big")

    async def answer(octets: bytes) -> None:
        raise AssertionError(octets)

    with pytest.raises(ConnectionAbortedError):
        await KeyAgent(()).converse(incoming(), answer)
    assert string(b"ab") == b"\0\0\0\2ab"

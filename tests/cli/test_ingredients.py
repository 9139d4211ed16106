"""Secrets, agents and the user's own mark: what is taken, what is refused, and what is kept."""

import socket
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from builder_orch.buildkit.sshagent import KeyAgent, SocketAgent
from builder_orch.cli.ingredients import find_agents, own_node, read_secrets
from builder_orch.errors import UsageFailure


def test_a_secret_comes_from_a_file_when_it_is_asked_for_or_from_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    found = read_secrets([f"id=a,src={file}", "id=b,env=TOKEN"], {"TOKEN": "x=1,2"})
    file.write_text("new")
    assert {name: get() for name, get in found.items()} == {"a": b"new", "b": b"x=1,2"}


@pytest.mark.parametrize(
    "text",
    ["", "a", "id=a", "id=a,type=x,env=HOME", "src=/etc/hostname",
     "id=a,src=/etc/hostname,env=HOME", "id=a,scr=/x",
     "id=a,src=/gone", "id=a,src=/tmp", "id=a,env=GONE"],
)  # fmt: skip
def test_any_other_secret_is_refused_without_showing_one(text: str) -> None:
    with pytest.raises(UsageFailure) as caught:
        read_secrets([text], {"HOME": "planted-value"})
    assert caught.value.hint
    assert "planted" not in str(caught.value)


def test_a_name_alone_is_a_variable_or_else_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "NPM").write_text("file")
    (tmp_path / "other").write_text("file")
    variables = {"NPM": "variable", "EMPTY": ""}
    texts = ["id=NPM", "id=other", "id=EMPTY", "type=env,id=a,src=NPM", "type=file,id=b,src=NPM"]
    found = read_secrets(texts, variables)
    assert {name: get() for name, get in found.items()} == {
        "NPM": b"variable", "other": b"file", "EMPTY": b"", "a": b"variable", "b": b"file",
    }  # fmt: skip


def test_an_agent_is_a_socket_that_is_there_or_made_of_key_files(
    home: Path, tmp_path: Path
) -> None:
    path = home / "agent"
    keys = [tmp_path / "one", tmp_path / "two"]
    for key in keys:
        private = Ed25519PrivateKey.generate()
        key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        variables = {"SSH_AUTH_SOCK": str(path)}
        texts = ["default", f"k={path}", f"f={keys[0]},{keys[1]}"]
        found = find_agents(texts, variables)
        made = found.pop("f")
        assert found == {"default": SocketAgent(path), "k": SocketAgent(path)}
        assert isinstance(made, KeyAgent)
        assert [key.comment for key in made.keys] == ["one", "two"]
        keys[1].write_text("planted")
        for text, given in (
            ("default", {}), ("k=/gone", {}), (f"k={home}", {}), ("=x", variables),
            (f"k={keys[0]},{keys[1]}", variables),
        ):  # fmt: skip
            with pytest.raises(UsageFailure) as caught:
                find_agents([text], given)
            assert "planted" not in str(caught.value)


def test_the_users_mark_is_made_once_and_is_nobody_elses_to_read(tmp_path: Path) -> None:
    file = tmp_path / "a" / "node"
    mark = own_node(file)
    assert len(mark) == 32
    assert own_node(file) == mark
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["node"]


def test_where_the_mark_cannot_be_kept_it_is_new_every_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = tmp_path / "file" / "node"
    assert own_node(file) != own_node(file)

"""Logins as `docker login` keeps them, found by host; and which of them a build may ask for."""

import base64
import json
import os
from pathlib import Path

import pytest

from builder_orch.errors import UsageFailure
from builder_orch.pipeline.dockerfile import Dockerfile
from builder_orch.pipeline.logins import DockerConfig, Named, registry_of

HELPER = """\
#!/bin/sh
[ "$1" = get ] || exit 3
read -r server
case $server in
  helped.test) echo '{"ServerURL": "x", "Username": "me", "Secret": "planted-helped"}' ;;
  token.test) echo '{"Username": "<token>", "Secret": "planted-token"}' ;;
  none.test) echo 'credentials not found in native keychain'; exit 1 ;;
  broken.test) echo 'planted-out'; echo 'the keychain is locked' >&2; exit 1 ;;
  odd.test) echo 'planted-out' ;;
  slow.test) exec sleep 600 ;;
  *) exit 9 ;;
esac
"""


def coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


AUTHS: dict[str, dict[str, str]] = {
    "plain.test:5000": {"auth": coded("name:pass:word")},
    "https://url.test/v2/": {"username": "u", "password": "secret"},
    "identity.test": {"auth": coded("ignored:"), "identitytoken": "planted-identity"},
    "https://index.docker.io/v1/": {"auth": coded("hub:planted-hub")},
    "empty.test": {},
    "bad.test": {"auth": "planted-%"},
}


@pytest.fixture
def config(tmp_path: Path) -> DockerConfig:
    program = tmp_path / "bin" / "docker-credential-test"
    program.parent.mkdir()
    program.write_text(HELPER)
    program.chmod(0o755)
    hosts = ("helped", "token", "none", "broken", "odd", "slow")
    helpers = {f"{name}.test": "test" for name in hosts} | {"gone.test": "gone", "x.test": "../sh"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": AUTHS, "credHelpers": helpers, "other": 1}))
    return DockerConfig(file, {"PATH": f"{program.parent}:{os.environ['PATH']}"})


@pytest.mark.parametrize(
    ("host", "name", "password"),
    [
        ("plain.test:5000", "name", "pass:word"),
        ("url.test", "u", "secret"),
        ("identity.test", "", "planted-identity"),
        ("registry-1.docker.io", "hub", "planted-hub"),
        ("docker.io", "hub", "planted-hub"),
        ("helped.test", "me", "planted-helped"),
        ("token.test", "", "planted-token"),
    ],
)
async def test_a_login_is_found_by_its_host(
    config: DockerConfig, host: str, name: str, password: str
) -> None:
    login = await config.login(host)
    assert login is not None
    assert (login.username, login.password.reveal()) == (name, password)
    assert password not in repr(login)


@pytest.mark.parametrize("host", ["none.test", "empty.test", "plain.test", "unknown.test"])
async def test_for_other_hosts_there_is_none(config: DockerConfig, host: str) -> None:
    assert await config.login(host) is None


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("broken.test", "docker-credential-test ended with code 1: the keychain is locked"),
        ("odd.test", "answered with something else"),
        ("gone.test", "docker-credential-gone, which is not in PATH"),
        ("x.test", "not in PATH"),
        ("bad.test", "not Base64"),
    ],
)
async def test_what_does_not_work_is_told_without_a_secret(
    config: DockerConfig, host: str, said: str
) -> None:
    with pytest.raises(UsageFailure, match=said) as caught:
        await config.login(host)
    assert caught.value.hint
    assert "planted" not in str(caught.value)


async def test_a_helper_that_does_not_answer_is_ended(
    config: DockerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder_orch.pipeline.logins.HELPER_S", 0.05)
    with pytest.raises(UsageFailure, match=r"gave no answer within 0\.05 s"):
        await config.login("slow.test")


async def test_a_store_is_asked_for_all_hosts_and_files_after_it(config: DockerConfig) -> None:
    config.file.write_text(json.dumps({"auths": AUTHS, "credsStore": "test"}))
    helped = await config.login("helped.test")
    assert helped is not None
    assert helped.username == "me"
    assert await config.login("none.test") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"auths": 7, "credHelpers": []}'])
async def test_a_file_of_another_kind(config: DockerConfig, content: str) -> None:
    config.file.write_text(content)
    if content == "{":
        with pytest.raises(UsageFailure, match="not JSON"):
            await config.login("plain.test:5000")
    else:
        assert await config.login("plain.test:5000") is None
    config.file.unlink()
    assert await config.login("plain.test:5000") is None


DOCKERFILE = """\
ARG BASE=arg.test/base
FROM from.test:5000/a/b:1 AS one
COPY --from=copy.test/x /a /b
RUN --mount=type=bind,from=mount.test/y,target=/y true
COPY --from=one /a /b
FROM scratch
COPY --from=0 /a /b
"""


def named(text: str, **build_args: str) -> Named:
    return Named.by(Dockerfile.parse(text, "Dockerfile"), build_args, ["image.test/app:1"])


def test_a_build_names_its_registries() -> None:
    found = named(DOCKERFILE)
    asked = ["from.test:5000", "copy.test", "mount.test", "image.test", "other.test", "docker.io"]
    assert [host in found for host in asked] == [True, True, True, True, False, False]
    assert "registry-1.docker.io" in named("FROM busybox\n")


def test_a_name_that_is_put_together_may_be_any_that_is_written_there() -> None:
    text = "ARG HOST\nARG OTHER=default.test\nFROM ${HOST}/base AS a\nFROM scratch\n"
    found = named(text, HOST="given.test:5000")
    assert "given.test:5000" in found
    assert "other.test" not in found


def test_the_host_is_in_the_name_or_it_is_the_hub() -> None:
    expected = {
        "busybox": "docker.io", "team/app:1": "docker.io", "docker.io/app": "docker.io",
        "localhost/app": "localhost", "a.test/app@sha256:1": "a.test", "x:5000/app": "x:5000",
        "127.0.0.1:5000/app": "127.0.0.1:5000",
    }  # fmt: skip
    assert {name: registry_of(name) for name in expected} == expected

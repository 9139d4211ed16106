"""`fly-build build` as a process: results that come here, secrets that go nowhere, many at once."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import docker
import pytest

from tests.system.embedded import Embedded, Ended, app

pytestmark = pytest.mark.system

CANARY = "planted-" + os.urandom(12).hex()
BY_KIT = {"FLY_BUILD_BUILDER": "auto"}
SHELL = 'SHELL ["/bin/busybox", "sh", "-c"]'


def build(embedded: Embedded, folder: Path, *words: object, **more: str) -> Ended:
    return embedded.run("build", folder, "--create-app", "--json", *words, **BY_KIT, **more)


def value(ended: Ended, name: str) -> str:
    assert ended.code == 0, ended.said
    return str(json.loads(ended.out)[name])


def test_a_directory_comes_here_and_a_secret_stays_out_of_all(
    embedded: Embedded, tmp_path: Path
) -> None:
    folder = app(
        tmp_path / "app",
        SHELL,
        "RUN --mount=type=secret,id=TOKEN,required busybox sha256sum /run/secrets/TOKEN > /sum",
        name="results",
    )
    out = tmp_path / "out"
    words = ("--secret", "id=TOKEN", "--dest", f"type=local,dest={out}")
    ended = build(embedded, folder, *words, TOKEN=CANARY)
    assert value(ended, "dest") == str(out)
    assert (out / "sum").read_text().endswith("/run/secrets/TOKEN\n")
    verbose = build(embedded, folder, "--secret", "id=TOKEN", "--no-push", TOKEN=CANARY)
    image = value(verbose, "image_id")
    assert CANARY not in ended.said + verbose.said
    with embedded.engine() as engine:
        assert CANARY not in json.dumps([engine.history(image), engine.inspect_image(image)])
        assert CANARY.encode() not in b"".join(engine.get_image(image))
    left = [
        path for path in embedded.home.rglob("*") if path.is_file() and "overlay2" not in str(path)
    ]
    assert not [path for path in left if CANARY.encode() in path.read_bytes()]


def test_an_image_is_loaded_into_the_engine_here(
    embedded: Embedded, engine_socket: Path, tmp_path: Path
) -> None:
    folder = app(tmp_path / "app", "LABEL a=b", name="results")
    words = ("--load", "--tag", "r.test/loaded:1", "--label", "mark=1")
    ended = build(embedded, folder, *words, DOCKER_HOST=f"unix://{engine_socket}")
    assert value(ended, "loaded") == "r.test/loaded:1"
    assert "image" not in json.loads(ended.out)
    client = docker.APIClient(base_url=f"unix://{engine_socket}", version="auto")
    with closing(client):
        found = client.inspect_image("r.test/loaded:1")
    assert found["Id"] == value(ended, "image_id")
    assert found["Config"]["Labels"] == {"a": "b", "mark": "1"}
    missing = build(embedded, folder, "--load", DOCKER_HOST="unix:///nonexistent")
    assert missing.code == 2
    assert "no Docker engine on this machine" in missing.err


def test_what_is_refused_is_refused_before_anything_is_sent(
    embedded: Embedded, tmp_path: Path
) -> None:
    folder = app(tmp_path / "app", name="results")
    ended = build(embedded, folder, "--platform", "linux/amd64,linux/arm64")
    assert ended.code == 2
    assert "containerd's image store" in ended.err
    classic = embedded.run("build", folder, "--cache-to", "type=inline", "--create-app")
    assert classic.code == 2
    assert "--cache-to needs BuildKit" in classic.err


@pytest.mark.long
def test_four_builds_at_the_same_time_do_not_meet(embedded: Embedded, tmp_path: Path) -> None:
    folders = []
    for number in range(4):
        folder = app(tmp_path / str(number), "COPY mark /mark", name=f"many-{number}")
        (folder / "mark").write_text(f"mark {number}")
        folders.append(folder)
    with ThreadPoolExecutor(4) as pool:
        ended = list(
            pool.map(lambda folder: build(embedded, folder, "--image-label", "1"), folders)
        )
    with embedded.engine() as engine:
        for number, one in enumerate(ended):
            reference = value(one, "image")
            assert f"/many-{number}@sha256:" in reference
            found = engine.inspect_image(value(one, "image_id"))
            assert reference in found["RepoDigests"]
            assert found["RepoTags"] == [value(one, "tag")]
            assert f"mark {number}".encode() in b"".join(engine.get_image(found["Id"]))

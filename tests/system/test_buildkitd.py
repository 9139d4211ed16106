"""A buildkitd of its own as judge: what Docker's own store cannot do, and TLS both ways.

The program is taken from FLY_BUILD_BUILDKITD or PATH; Debian has none, so that is up to whoever
runs this (`go build github.com/moby/buildkit/cmd/buildkitd` makes one; it needs runc).
"""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from builder_orch.api.models import Secret
from builder_orch.buildkit.control import NATIVE, connected
from builder_orch.buildkit.messages import Cache
from builder_orch.buildkit.session import CONTROL
from builder_orch.buildkit.wire import number_field
from builder_orch.errors import BuilderLost, PushDenied, UsageFailure
from builder_orch.events import Event, Log, Step
from builder_orch.pipeline.bare import Daemon, build_bare
from builder_orch.pipeline.context import Directory
from builder_orch.pipeline.deploy import Deployed, Order
from builder_orch.pipeline.engine import Login
from builder_orch.pipeline.liveness import Patience
from builder_orch.pipeline.output import Form, Output
from builder_orch.pipeline.outside import Logins
from builder_orch.selfhost.process import find_program
from builder_orch.selfhost.registry import Action, Registry

PROGRAM = os.environ.get("FLY_BUILD_BUILDKITD") or shutil.which("buildkitd") or ""
BUSYBOX = os.path.realpath(shutil.which("busybox", path="/bin:/usr/bin") or "")


def lacking() -> str:
    if not PROGRAM:
        return "no buildkitd in FLY_BUILD_BUILDKITD or PATH"
    if not shutil.which("runc"):
        return "no runc, which buildkitd runs steps with"
    if os.geteuid() != 0:
        return "buildkitd needs root"
    return "" if BUSYBOX else "no busybox to build an image from"


pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(lacking()), reason=f"no buildkitd: {lacking()}"),
]


@dataclass(frozen=True)
class Place:
    """A daemon on a socket and, with certificates, on a port; a folder that it forgets."""

    unix: str
    tcp: str
    certificates: Path


def certify(folder: Path) -> None:
    """An authority and, by it, the daemon's certificate and ours."""
    run = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    run += ["-nodes", "-days", "2", "-subj"]
    made = {"ca": "/CN=authority", "server": "/CN=127.0.0.1", "cert": "/CN=client"}
    for name, subject in made.items():
        words = [*run, subject, "-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"]
        if name == "server":
            words += ["-addext", "subjectAltName=IP:127.0.0.1"]
        if name != "ca":
            words += ["-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca.key"]
            words += ["-addext", "basicConstraints=critical,CA:FALSE"]
        subprocess.run(words, check=True, capture_output=True)
    (folder / "cert.key").rename(folder / "key.pem")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("kitd")
    certify(folder)
    sock = Path("/tmp") / f"fly-kitd-{os.urandom(4).hex()}"
    words = [PROGRAM, "--root", str(folder / "root"), "--oci-worker-net", "host"]
    words += [
        "--containerd-worker=false",
        "--addr",
        f"unix://{sock}",
        "--addr",
        "tcp://127.0.0.1:0",
    ]
    words += ["--tlscacert", f"{folder}/ca.pem"]
    words += ["--tlscert", f"{folder}/server.pem", "--tlskey", f"{folder}/server.key"]
    log = (folder / "log").open("w")
    process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        yield Place(f"unix://{sock}", f"tcp://{_port(process, folder / 'log')}", folder)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        log.close()
        sock.unlink(missing_ok=True)


def _port(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """Where it says that it listens; the second of its addresses."""
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if "running server on 127.0.0.1" in line:
                return line.split("running server on ")[1].strip('"')
    raise AssertionError(log.read_text())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    shutil.copy(BUSYBOX, folder / "busybox")
    (folder / "id").write_text(os.urandom(16).hex())
    return folder


def order(root: Path, *lines: str, **more: object) -> Order:
    """A build of busybox and these lines; nothing is pushed unless `more` says so."""
    head = ["FROM scratch", "COPY id busybox /bin/", 'SHELL ["/bin/busybox", "sh", "-c"]']
    (root / "Dockerfile").write_text("\n".join([*head, *lines, ""]))
    return replace(Order(Directory(root), "", publish=False, node="tests"), **more)  # type: ignore[arg-type]


async def nobody(host: str) -> Login | None:
    return None


async def build(
    place: Place,
    wanted: Order,
    events: list[Event] | None = None,
    *,
    daemon: Daemon | None = None,
    logins: Logins = nobody,
) -> Deployed:
    daemon = daemon or Daemon.at(place.unix, None)
    emit = (events if events is not None else []).append
    return await build_bare(wanted, daemon, logins, None, Patience(), emit)


def output(events: list[Event]) -> list[str]:
    return [one.text for one in events if isinstance(one, Log) and one.stream != "engine"]


async def test_limits_reach_the_step(place: Place, root: Path) -> None:
    events: list[Event] = []
    wanted = order(root, "RUN ulimit -n; ulimit -Hn", ulimits={"nofile": "777:888"})
    await build(place, wanted, events)
    assert output(events) == ["777", "888"]


async def test_named_contexts_are_sent_by_their_own_rules(
    place: Place, root: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("kept")
    (other / "secret").write_text("planted")
    (other / ".dockerignore").write_text("secret\n.dockerignore\n")
    events: list[Event] = []
    wanted = order(
        root, "COPY --from=other . /o", "RUN busybox ls -a /o", contexts={"other": other}
    )
    await build(place, wanted, events)
    assert output(events) == [".", "..", "kept"]


async def test_an_oci_archive_for_two_platforms_is_whole(
    place: Place, root: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "oci.tar"
    (root / "Dockerfile").write_text("FROM scratch\nCOPY id /\n")
    wanted = replace(
        order(root), platforms=("linux/amd64", "linux/arm64"), output=Output(Form.OCI, archive)
    )
    (root / "Dockerfile").write_text("FROM scratch\nCOPY id /\n")
    await build(place, wanted)
    with tarfile.open(archive) as tar:
        files = {one.name: tar.extractfile(one) for one in tar if one.isfile()}
        blobs = {name: file.read() for name, file in files.items() if file is not None}
    for name, octets in blobs.items():
        if name.startswith("blobs/sha256/"):
            assert hashlib.sha256(octets).hexdigest() == name.rpartition("/")[2]
    index = json.loads(blobs["index.json"])
    image = json.loads(blobs["blobs/sha256/" + index["manifests"][0]["digest"][7:]])
    found = {one["platform"]["architecture"] for one in image["manifests"]}
    assert {"amd64", "arm64"} <= found


async def test_files_and_a_docker_archive_come_from_it_too(
    place: Place, root: Path, tmp_path: Path
) -> None:
    out, archive = tmp_path / "out", tmp_path / "image.tar"
    await build(place, order(root, "COPY id /deep/er/", output=Output(Form.LOCAL, out)))
    assert (out / "deep" / "er" / "id").read_text() == (root / "id").read_text()
    wanted = order(root, output=Output(Form.DOCKER, archive), image="r.test/app:1")
    await build(place, wanted)
    with tarfile.open(archive) as tar:
        listed = tar.extractfile("manifest.json")
        assert listed is not None
        assert json.loads(listed.read())[0]["RepoTags"] == ["r.test/app:1"]


async def test_certificates_are_asked_for_both_ways(
    place: Place, root: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    wanted = order(root, "RUN echo over TLS")
    daemon = Daemon.at(place.tcp, place.certificates)
    await build(place, wanted, events, daemon=daemon)
    assert output(events) == ["over TLS"]
    with pytest.raises(BuilderLost, match=r"the buildkitd cannot be used|no TLS|closed"):
        await build(place, wanted, daemon=Daemon.at(place.tcp, None))
    other = tmp_path / "other"
    other.mkdir()
    certify(other)
    with pytest.raises(BuilderLost, match=r"TLS: CERTIFICATE_VERIFY_FAILED"):
        await build(place, wanted, daemon=Daemon.at(place.tcp, other))
    with pytest.raises(UsageFailure, match="--buildkit-certs"):
        Daemon.at(place.tcp, tmp_path)


def authorize(password: str, repository: str, action: Action) -> bool:
    return password == "good"


@pytest.fixture
async def registry(home: Path) -> AsyncIterator[str]:
    if not find_program("docker-registry"):
        pytest.skip("docker-registry is not installed")

    async def listen(port: int, host: str = "127.0.0.1") -> socket.socket:
        listener = socket.create_server((host, port))
        listener.setblocking(False)
        return listener

    async with Registry(home, listen=listen, authorize=authorize, report=print) as made:
        yield made.address


async def test_a_push_asks_for_the_login_and_a_cache_is_kept_there(
    place: Place, root: Path, registry: str
) -> None:
    asked: list[str] = []

    def logins(password: str) -> Logins:
        async def login(host: str) -> Login | None:
            asked.append(host)
            return Login("x", Secret(password))

        return login

    cache = Cache("registry", {"ref": f"{registry}/hello:cache", "mode": "max"})
    wanted = order(
        root, "RUN echo made", image=f"{registry}/hello:1", publish=True, cache_to=(cache,)
    )
    with pytest.raises(PushDenied, match=f"refuses to let us push {registry}/hello:1"):
        await build(place, wanted, logins=logins("bad"))
    made = await build(place, wanted, logins=logins("good"))
    assert made.pushed is not None
    assert made.pushed.reference.startswith(f"{registry}/hello@sha256:")
    assert set(asked) == {registry}
    # Forget all that this daemon has, so that only the registry can have kept it.
    async with connected(await Daemon.at(place.unix, None).connect("pruning"), NATIVE) as open_:
        call = open_.channel.call(f"{CONTROL}/Prune")
        await call.send(number_field(2, 1), end=True)
        while await call.receive() is not None:
            pass
    again = replace(wanted, publish=False, cache_to=(), cache_from=(cache,))
    events: list[Event] = []
    await build(place, again, events, logins=logins("good"))
    assert output(events) == []
    assert [one.cached for one in events if isinstance(one, Step)][-1]


def run(*words: object, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "FLY_BUILD_HOME": str(folder)}
    environment |= more
    command = [sys.executable, "-m", "builder_orch", "build", *map(str, words)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_command_builds_by_it_without_a_platform(
    place: Place, root: Path, home: Path, tmp_path: Path
) -> None:
    order(root, "RUN echo $(ulimit -n)")
    words = [root, "--buildkit-host", place.tcp, "--buildkit-certs", place.certificates]
    ended = run(*words, folder=home)
    assert ended.returncode == 2, ended.stderr
    assert "--tag REGISTRY/NAME:TAG" in ended.stderr
    ended = run(*words, "--dest", tmp_path / "out", "--ulimit", "nofile=99", "--json", folder=home)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "bin" / "id").read_text() == (root / "id").read_text()
    assert json.loads(ended.stdout)["type"] == "local"
    ended = run(root, "--buildkit-host", f"unix://{tmp_path}/none", "--dest", "x", folder=home)
    assert ended.returncode == 12
    assert "no connection to the buildkitd" in ended.stderr


async def test_the_command_takes_the_logins_of_docker(
    place: Place, root: Path, home: Path, registry: str, tmp_path: Path
) -> None:
    order(root)
    words = (root, "--buildkit-host", place.unix, "--tag", f"{registry}/hello:2", "--json")
    ended = await asyncio.to_thread(run, *words, folder=home)
    assert ended.returncode != 0
    login = base64.b64encode(b"x:good").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {registry: {"auth": login}}}))
    ended = await asyncio.to_thread(run, *words, folder=home, DOCKER_CONFIG=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["image"].startswith(f"{registry}/hello@sha256:")
    assert login not in ended.stdout + ended.stderr

"""What is said on bad days: in which form, without secrets, and after a long silence."""

import json
from pathlib import Path

import pytest

from builder_orch.errors import Exit
from tests.system.conftest import SERVE, Forsaken
from tests.system.embedded import Embedded, app

pytestmark = pytest.mark.system

CANARY = "canary-5f3ad0c1"
LOGS = ("selfhost.log", "dockerd.log", "registry.log")


def test_json_is_one_object_on_stdout_also_of_a_failure(embedded: Embedded, tmp_path: Path) -> None:
    for folder, code in (
        (app(tmp_path / "bad", "COPY gone /", name="words"), Exit.BUILD_FAILED),
        (app(tmp_path / "good", "STOPSIGNAL SIGKILL", SERVE, name="words"), Exit.OK),
    ):
        ended = embedded.run("deploy", folder, "--create-app", "--output", "json")
        result = json.loads(ended.out)
        assert ended.code == result["exit_code"] == code
        assert ended.out.count("\n") == 1
        assert ("error" in result) == (code != Exit.OK)


def test_ndjson_has_stdout_for_itself_and_ends_with_the_result(
    embedded: Embedded, tmp_path: Path
) -> None:
    bad = app(tmp_path / "bad", 'RUN ["/bin/busybox", "false"]', name="stream")
    with embedded.running("deploy", bad, "--create-app"):
        pass
    ended = embedded.ended[-1]
    assert ended.err == ""
    assert [event["seq"] for event in ended.events] == list(range(len(ended.events)))
    assert ended.events[0]["t"] == "run.start"
    assert [event["t"] for event in ended.events[-2:]] == ["error", "result"]
    assert ended.code == ended.error["exit_code"] == Exit.BUILD_FAILED


def test_no_secret_is_ever_said(embedded: Embedded, tmp_path: Path) -> None:
    token = embedded.run("selfhost", "token").out.strip()
    made = embedded.ended.pop()
    assert token in made.out
    for lines in (("ARG SECRET", 'RUN ["/bin/busybox", "false"]'), ("ARG SECRET", SERVE)):
        folder = app(tmp_path / str(len(lines)), "STOPSIGNAL SIGKILL", *lines, name="secrets")
        words = ("--create-app", "--build-arg", f"SECRET={CANARY}", "--output", "ndjson")
        embedded.run("deploy", folder, *words, **embedded.elsewhere(token))
    (gateway,) = embedded.rows("select private_key from authorities where purpose = 'gateway'")
    passwords = (embedded.root / "engine/registry.secret").read_text()
    secrets = [CANARY, token, token.split("_", 2)[-1], embedded.record["token"], passwords]
    secrets.append(bytes(gateway[0]).hex())
    texts = [ended.said for ended in embedded.ended]
    texts += [(embedded.root / name).read_text(errors="replace") for name in LOGS]
    for secret in secrets:
        assert len(secret) >= len(CANARY)
        assert not any(secret in text for text in texts)
    assert not any("Traceback" in text for text in texts)


def test_who_built_on_a_platform_that_was_killed_is_told(
    forsaken: Forsaken, tmp_path: Path
) -> None:
    for phase, outcome in (("build", forsaken.building), ("push", forsaken.pushing)):
        ended = outcome.result()
        assert (ended.code, ended.err) == (Exit.BUILDER_LOST, "")
        assert ended.error["id"] == "RB-BUILDER-LOST"
        assert f"lost during the {phase}: no sign of life" in ended.error["message"]
        warned = [event["id"] for event in ended.events if event["t"] == "warning"]
        assert warned == ["builder-silent"] * 2 + ["clean-up"] * 2
    folder = app(tmp_path / "app", "STOPSIGNAL SIGKILL", SERVE, name="slow")
    ended = forsaken.platform.run("deploy", folder)
    assert ended.code == 0, ended.said

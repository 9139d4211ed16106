"""Which platform, which app, which Dockerfile: who is asked first, and what a wrong answer gets."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import NotLoggedIn, UsageFailure
from builder_orch.settings import (
    FLY_API,
    FLY_REGISTRY,
    Environment,
    PlatformFile,
    PlatformSettings,
    Project,
    find_project,
)

URL = "http://127.0.0.1:1234/graphql"


def write_platform(home: Path, **changes: object) -> None:
    folder = home / "selfhost"
    folder.mkdir(exist_ok=True)
    content = {
        "version": 1, "api_url": URL, "token": "embedded-token", "registry": "127.0.0.1:5000",
        "pid": os.getpid(), "organization": "personal",
    }  # fmt: skip
    (folder / "platform.json").write_text(json.dumps(content | changes))


def chosen(home: Path, url: str = "", **variables: str) -> PlatformSettings | None:
    return Environment({"FLY_BUILD_HOME": str(home), **variables}).platform(url)


def test_nothing_configured_and_nothing_running_is_no_platform(home: Path) -> None:
    assert chosen(home) is None
    assert chosen(home, FLY_BUILD_API_URL="", FLY_BUILD_TOKEN=" ", FLY_API_TOKEN="") is None


def test_the_platform_that_runs_here_is_the_default(home: Path) -> None:
    write_platform(home)
    found = chosen(home)
    assert found == PlatformSettings(
        URL, "embedded-token", "127.0.0.1:5000", "selfhost", selfhost=True
    )
    assert chosen(home, FLY_BUILD_API_URL=URL) == found


def test_a_platform_whose_process_is_gone_is_none(home: Path) -> None:
    write_platform(home, pid=2**22 + 1)
    assert chosen(home) is None


@pytest.mark.parametrize(
    ("variables", "token", "origin"),
    [
        ({"FLY_BUILD_TOKEN": "a", "FLY_API_TOKEN": "b"}, "a", "FLY_BUILD_TOKEN"),
        ({"FLY_BUILD_TOKEN": "", "FLY_API_TOKEN": "b", "FLY_ACCESS_TOKEN": "c"}, "b",
         "FLY_API_TOKEN"),
        ({"FLY_ACCESS_TOKEN": " c\n"}, "c", "FLY_ACCESS_TOKEN"),
    ],
)  # fmt: skip
def test_a_token_alone_is_for_fly_even_if_a_platform_runs_here(
    home: Path, variables: dict[str, str], token: str, origin: str
) -> None:
    write_platform(home)
    assert chosen(home, **variables) == PlatformSettings(FLY_API, token, FLY_REGISTRY, origin)


def test_a_token_may_come_from_a_file(home: Path) -> None:
    file = home / "token"
    file.write_text("from-file\n")
    found = chosen(home, FLY_BUILD_TOKEN_FILE=str(file), FLY_API_TOKEN="other")
    assert found is not None
    assert found.token == "from-file"
    file.write_text("\n")
    with pytest.raises(UsageFailure, match="is empty"):
        chosen(home, FLY_BUILD_TOKEN_FILE=str(file))
    with pytest.raises(UsageFailure, match="FLY_BUILD_TOKEN_FILE"):
        chosen(home, FLY_BUILD_TOKEN_FILE=str(home / "gone"))


def test_a_flag_beats_the_environment(home: Path) -> None:
    variables = {"FLY_BUILD_TOKEN": "t", "FLY_BUILD_REGISTRY": "r:1"}
    found = chosen(home, "https://a.test/graphql", FLY_BUILD_API_URL="https://b.test/", **variables)
    assert found == PlatformSettings("https://a.test/graphql", "t", "r:1", "--api-url")
    found = chosen(home, FLY_BUILD_API_URL="https://b.test", **variables)
    assert found is not None
    assert found.api_url == "https://b.test/graphql"


@pytest.mark.parametrize("name", ["FLY_API_TOKEN", "FLY_ACCESS_TOKEN"])
def test_flyctls_token_is_not_sent_to_another_platform(home: Path, name: str) -> None:
    with pytest.raises(NotLoggedIn):
        chosen(home, "https://elsewhere.test/graphql", **{name: "planted"})
    write_platform(home)
    found = chosen(home, FLY_BUILD_API_URL=URL, **{name: "planted"})
    assert found is not None
    assert found.token == "embedded-token"


def test_the_embedded_token_goes_to_no_other_platform(home: Path) -> None:
    write_platform(home)
    with pytest.raises(NotLoggedIn, match=r"elsewhere\.test"):
        chosen(home, "https://elsewhere.test/graphql")


@pytest.mark.parametrize("url", ["fly.io", "ftp://x/", "http://", "file:///etc/passwd"])
def test_what_is_no_url_is_refused(home: Path, url: str) -> None:
    with pytest.raises(UsageFailure, match="not a URL"):
        chosen(home, url, FLY_BUILD_TOKEN="t")


def test_a_platform_without_a_known_registry_is_refused(home: Path) -> None:
    with pytest.raises(UsageFailure, match="registry that belongs"):
        chosen(home, "https://a.test/graphql", FLY_BUILD_TOKEN="t")


def test_no_print_shows_a_token(home: Path) -> None:
    write_platform(home, token="planted-token")
    environment = Environment({"FLY_BUILD_HOME": str(home), "FLY_X_TOKEN": "planted"})
    read = PlatformFile.read(home / "selfhost")
    assert "planted" not in repr(environment) + repr(environment.platform()) + repr(read)


@pytest.mark.parametrize("changes", [{"version": 2}, {"token": 7}, {"registry": None}])
def test_a_platform_file_of_another_version_is_told(home: Path, changes: dict[str, object]) -> None:
    write_platform(home, **changes)
    with pytest.raises(UsageFailure, match=r"platform\.json"):
        chosen(home)


@given(st.binary(max_size=60))
def test_a_platform_file_of_any_octets_is_none_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("home")
    (folder / "platform.json").write_bytes(content)
    with pytest.raises(UsageFailure):
        PlatformFile.read(folder)


# --- fly.toml


def project(folder: Path, text: str) -> Project:
    (folder / "fly.toml").write_text(text)
    return find_project(folder)


def test_everything_that_a_file_may_say_is_read(tmp_path: Path) -> None:
    found = project(
        tmp_path,
        """
        app = "shop"
        when = 1979-05-27T07:32:00Z
        [build]
        dockerfile = "docker/Web"
        ignorefile = "docker/ignore"
        build-target = "final"
        [build.args]
        A = "x"
        B = 7
        C = true
        [http_service]
        internal_port = 3000
        """,
    )
    assert (found.app, found.target, found.port) == ("shop", "final", 3000)
    assert found.dockerfile == tmp_path / "docker/Web"
    assert found.ignorefile == tmp_path / "docker/ignore"
    assert found.build_args == {"A": "x", "B": "7", "C": "true"}
    assert json.loads(json.dumps(found.definition))["app"] == "shop"


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("", None),
        ("[[services]]\ninternal_port = 4000\n[[services]]\ninternal_port = 5000\n", 4000),
        ('[env]\nPORT = "6000"\n', 6000),
        ('[env]\nPORT = "99999x"\n', None),
        ("services = []\n", None),
    ],
)
def test_the_port_is_found_where_it_may_stand(tmp_path: Path, text: str, port: int | None) -> None:
    assert project(tmp_path, text).port == port


def test_the_file_is_searched_upward_to_the_top_of_the_repository(tmp_path: Path) -> None:
    (tmp_path / "fly.toml").write_text('app = "outer"')
    inner = tmp_path / "repository" / "a" / "b"
    inner.mkdir(parents=True)
    assert find_project(inner).app == "outer"
    (tmp_path / "repository" / ".git").mkdir()
    assert find_project(inner) == Project()
    (inner.parent / "fly.toml").write_text('app = "near"\n[build]\ndockerfile = "D"')
    found = find_project(inner)
    assert (found.app, found.dockerfile) == ("near", inner.parent / "D")
    assert find_project(inner, tmp_path / "fly.toml").app == "outer"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("app = \n", "fly.toml:1: "),
        ('ok = 1\n\napp = "x" "y"\n', "fly.toml:3: "),
        ("[build\n", "fly.toml:1: "),
        ("app = '''", "fly.toml: it ends too early: "),
        ("app = 7", "app has to be a string"),
        ("build = 7", "build has to be a table"),
        ("[build]\ndockerfile = 7", "[build] dockerfile has to be a string"),
        ("[build]\ndockerfile = 'https://x/D'", "is a URL"),
        ("[build.args]\nA = []", "[build.args] A has to be"),
        ("[build]\nimage = 'x'", "[build] image is not supported"),
        ("[build]\nbuilder = 'x'", "[build] builder is not supported"),
        ("[http_service]\ninternal_port = 0", "[http_service] internal_port has to be a port"),
        ("[http_service]\ninternal_port = 'x'", "has to be a port"),
        ("[[services]]\ninternal_port = true", "[services] internal_port has to be a port"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageFailure) as caught:
        project(tmp_path, text)
    assert said in str(caught.value)
    assert caught.value.hint


def test_a_file_that_is_no_text_or_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageFailure, match="there is no file"):
        find_project(tmp_path, tmp_path / "gone.toml")
    (tmp_path / "fly.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageFailure, match="UTF-8"):
        find_project(tmp_path)
    (tmp_path / "fly.toml").unlink()
    (tmp_path / "fly.toml").mkdir()
    with pytest.raises(UsageFailure, match="Is a directory"):
        find_project(tmp_path)


@given(st.text(max_size=80))
def test_any_text_is_a_project_or_a_usage_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("p") / "fly.toml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        found = find_project(path.parent)
    except UsageFailure:
        return
    json.dumps(found.definition)


def test_the_app_is_that_of_the_flag_then_the_variable_then_the_file() -> None:
    file = Project(app="file")
    assert Environment({"FLY_APP": "variable"}).app("flag", file) == "flag"
    assert Environment({"FLY_APP": "variable"}).app("", file) == "variable"
    assert Environment({"FLY_APP": ""}).app("", file) == "file"
    with pytest.raises(UsageFailure, match="no app was named"):
        Environment({}).app("", Project())


def test_a_name_that_no_app_can_have_is_told_with_its_place() -> None:
    file = Project(path=Path("/x/fly.toml"), app="Bad Name")
    with pytest.raises(UsageFailure, match=r"/x/fly\.toml: 'Bad Name' is no app name"):
        Environment({}).app("", file)
    with pytest.raises(UsageFailure, match="FLY_APP: '-' is no app name"):
        Environment({"FLY_APP": "-"}).app("", file)

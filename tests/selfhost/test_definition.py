"""What a definition asks for, and what is taken instead of nonsense."""

import pytest

from builder_orch.selfhost.definition import check_path, memory_limit, serving_port


@pytest.mark.parametrize(
    ("definition", "exposed", "port"),
    [
        ({}, (), 8080),
        ({}, (443, 80), 80),
        ({"env": {"PORT": "3000"}}, (80,), 3000),
        ({"services": [{"internal_port": 5000}]}, (80,), 5000),
        ({"http_service": {"internal_port": 4000}, "services": [{"internal_port": 5}]}, (), 4000),
        ({"http_service": {"internal_port": 0}}, (), 8080),
        ({"http_service": "nonsense", "services": 7}, (), 8080),
    ],
)
def test_the_port(definition: dict[str, object], exposed: tuple[int, ...], port: int) -> None:
    assert serving_port(definition, exposed) == port


@pytest.mark.parametrize(
    ("definition", "path"),
    [
        ({}, "/"),
        ({"http_service": {"checks": [{"path": "/up"}]}}, "/up"),
        ({"services": [{"http_checks": [{"path": "/live"}]}]}, "/live"),
        ({"checks": {"alive": {"type": "http", "path": "/ok"}}}, "/ok"),
        ({"http_service": {"checks": [{"path": "/x HTTP/1.1\r\nHost: evil"}]}}, "/"),
        ({"http_service": {"checks": [{"path": "relative"}]}}, "/"),
    ],
)
def test_the_checked_path(definition: dict[str, object], path: str) -> None:
    assert check_path(definition) == path


@pytest.mark.parametrize(
    ("vm", "mib"),
    [
        (None, 512),
        ([{"memory": "1gb"}], 1024),
        ({"memory": "256mb"}, 256),
        ({"memory_mb": 2048}, 2048),
        ({"memory": "lots"}, 512),
        ({"memory": 1}, 6),
    ],
)
def test_the_memory_limit(vm: object, mib: int) -> None:
    assert memory_limit({"vm": vm}) == mib << 20

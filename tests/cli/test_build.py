"""`fly-build build` says what it is and takes what `deploy` takes."""

import click

from builder_orch.cli.build import build
from builder_orch.cli.deploy import deploy


def names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def test_build_takes_the_flags_of_deploy_but_for_what_becomes_of_the_result() -> None:
    assert names(deploy) - names(build) == {"--build-only"}
    assert {"--tag", "-t", "--dest", "--load"} <= names(build) - names(deploy)
    assert {"--explain", "--explain-context", "--lock-context"} <= names(build) - names(deploy)


def test_every_option_has_its_variable() -> None:
    for command in (build, deploy):
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                long = next(name for name in parameter.opts if name.startswith("--"))
                assert parameter.envvar == "FLY_BUILD_" + long[2:].replace("-", "_").upper()

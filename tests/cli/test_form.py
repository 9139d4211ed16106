"""`--output` and `--json`: one choice, also where a command line cannot be read."""

import click
import pytest
from click.testing import CliRunner

from builder_orch.cli.form import output_option, wished


@click.command()
@output_option
def answering(output: str) -> None:
    """Say in which form it was asked to answer."""
    click.echo(output)


ROWS = [
    ([], {}, "text"),
    (["--output", "ndjson"], {}, "ndjson"),
    (["--output=json"], {}, "json"),
    (["--json"], {}, "json"),
    (["--output", "text", "--json"], {}, "json"),
    (["--json", "--output", "ndjson"], {}, "json"),
    ([], {"FLY_BUILD_OUTPUT": "ndjson"}, "ndjson"),
    (["--output", "text"], {"FLY_BUILD_OUTPUT": "ndjson"}, "text"),
    ([], {"FLY_BUILD_JSON": "1"}, "json"),
    ([], {"FLY_BUILD_JSON": "no"}, "text"),
]


@pytest.mark.parametrize(("words", "variables", "form"), ROWS)
def test_a_command_and_who_cannot_read_its_line_see_the_same_form(
    words: list[str], variables: dict[str, str], form: str
) -> None:
    assert CliRunner().invoke(answering, words, env=variables).output.strip() == form
    assert wished(words, variables) == form


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (["deploy", "--output"], "text"),
        (["deploy", "--output", "yaml"], "text"),
        (["builder", "connect", "--", "docker", "ps", "--json"], "text"),
        (["--output=json", "--", "x", "--output=ndjson"], "json"),
        (["--outputs", "json"], "text"),
    ],
)
def test_in_doubt_it_is_text(words: list[str], form: str) -> None:
    assert wished(words, {}) == form

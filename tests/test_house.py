"""The rules of the house that no linter knows, as tests."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from builder_orch.cli.main import fly_build
from builder_orch.errors import BuilderOrchError, Exit

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SOURCES = sorted((ROOT / "builder_orch").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHES = sorted((ROOT / "bench").rglob("*.py"))

FILE_LINES = 550
METHOD_LINES = 60
# Words that say nothing about what a thing is.
EMPTY_MODULES = {"utils", "util", "helpers", "helper", "managers", "manager", "common", "misc"}
EMPTY_WORDS = {
    "Manager", "Handler", "Helper", "Helpers", "Base", "Impl", "Data", "Info", "Util", "Utils",
}  # fmt: skip
UNSAFE_IMPORTS = {"pickle", "marshal", "shelve", "dill"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def every(path: Path, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, kinds))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


@pytest.mark.parametrize("path", SOURCES + TESTS + BENCHES, ids=relative)
def test_files_and_functions_can_be_read_in_one_go(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    long = {
        node.name: lines
        for node in every(path, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > METHOD_LINES
    }
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names_say_what_things_are(path: Path) -> None:
    assert EMPTY_MODULES.isdisjoint({path.stem, *path.relative_to(ROOT).parts})
    for node in every(path, ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        words = set(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", node.name))
        assert EMPTY_WORDS.isdisjoint(words), node.name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_module_says_in_its_first_line_what_it_is_for(path: Path) -> None:
    text = ast.get_docstring(tree(path))
    assert text
    assert not text.startswith(" ")


@pytest.mark.parametrize("path", SOURCES + BENCHES, ids=relative)
def test_nothing_runs_text_as_code(path: Path) -> None:
    for node in every(path, ast.Import, ast.ImportFrom, ast.Call):
        match node:
            case ast.Import():
                assert UNSAFE_IMPORTS.isdisjoint({name.name for name in node.names})
            case ast.ImportFrom():
                assert node.module not in UNSAFE_IMPORTS
            case ast.Call():
                assert dotted(node.func) not in UNSAFE_CALLS, node.lineno
                shell = [word.value for word in node.keywords if word.arg == "shell"]
                assert all(isinstance(v, ast.Constant) and v.value is False for v in shell)
            case _:
                raise AssertionError(node)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_layers_need_no_type_checking_blocks(path: Path) -> None:
    names = {node.id for node in every(path, ast.Name) if isinstance(node, ast.Name)}
    assert "TYPE_CHECKING" not in names


def test_every_kind_of_failure_has_a_name_of_its_own() -> None:
    leaves = BuilderOrchError.__subclasses__()
    kinds = [leaf.kind for leaf in leaves]
    assert len(set(kinds)) == len(kinds)
    assert all(kind.startswith("RB-") for kind in kinds)
    assert BuilderOrchError.kind not in kinds


# What the README promises


def code_lines() -> list[str]:
    """Lines of the README's shell blocks and its inline code, without prompts and comments."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|console|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines + re.findall(r"`([^`\n]+)`", prose)]


def promised(program: str) -> list[list[str]]:
    lines = [line for line in code_lines() if line.startswith(f"{program} ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that these words name, and the words left for it."""
    command: click.Command = fly_build
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"README promises {name!r} of {words}"
        command = found
    return command, rest


def test_commands_and_options_of_the_readme_exist() -> None:
    commands = promised("fly-build")
    assert len(commands) > 5
    for words in commands:
        command, rest = resolve(words)
        # What follows is for another program.
        rest = rest[: rest.index("--")] if "--" in rest else rest
        known = {name for parameter in command.params for name in parameter.opts}
        known |= {name for parameter in command.params for name in parameter.secondary_opts}
        known |= {"-h", "--help"}
        options = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert options <= known, words


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    context = click.Context(fly_build)
    for name in fly_build.list_commands(context):
        command = fly_build.get_command(context, name)
        inner = command.list_commands(context) if isinstance(command, click.Group) else []
        for words in [f"{name} {verb}" for verb in inner] or [name]:
            assert f"fly-build {words}" in text


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {words[0] for words in promised("make")}
    assert {"deploy", "test"} <= named <= targets


def test_exit_codes_of_the_readme_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(map(int, rows)) == sorted(code.value for code in Exit)


def test_files_that_the_readme_names_exist() -> None:
    names = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert names
    assert all((ROOT / name).exists() for name in names)


SCRIPTS = [
    ".ci/run",
    "examples/prepare",
    "workflows/check",
    "workflows/environment",
    "workflows/find-python",
    "workflows/system-packages",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_can_be_run_and_stop_at_errors(script: str) -> None:
    path = ROOT / script
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_mode & 0o111
    assert text.startswith("#!/usr/bin/env bash\n#")
    assert re.search(r"^set -e?uo pipefail$", text, re.MULTILINE)

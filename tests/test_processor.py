"""What OpenSSL is asked for, by maker of the processor and by what the user has said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder_orch.processor import CPUINFO, VARIABLE, VENDOR, WITHOUT_AVX512, choose_instructions

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\n"
ASK = f"import os, builder_orch; print(os.environ.get({VARIABLE!r}, ''))"


@pytest.mark.parametrize(("text", "asked"), [(INTEL, WITHOUT_AVX512), (AMD, None), (ARM, None)])
def test_only_where_wide_instructions_are_known_to_cost(
    tmp_path: Path, text: str, asked: str | None
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text)
    environ: dict[str, str] = {}
    choose_instructions(environ, cpuinfo)
    assert environ.get(VARIABLE) == asked


def test_a_system_that_does_not_tell_is_left_alone(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    choose_instructions(environ, tmp_path / "absent")
    assert environ == {}


def test_what_the_user_says_holds(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(INTEL)
    environ = {VARIABLE: "0x0"}
    choose_instructions(environ, cpuinfo)
    assert environ == {VARIABLE: "0x0"}


@pytest.mark.parametrize("said", [None, ":0x20"])
def test_it_is_asked_before_anything_loads_openssl(said: str | None) -> None:
    environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if said is not None:
        environ[VARIABLE] = said
    intel = CPUINFO.exists() and VENDOR in CPUINFO.read_bytes()
    words = [sys.executable, "-c", ASK]
    told = subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout
    assert told.strip() == (said or (WITHOUT_AVX512 if intel else ""))

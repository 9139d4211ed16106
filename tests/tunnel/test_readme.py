"""The program that the README shows does what the README says."""

import asyncio
import re
import sys
from pathlib import Path

from tests.tunnel.joined import GATEWAY, pair

README = Path(__file__).parents[2] / "README.md"


async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n<h1>inside</h1>")
    writer.close()


async def test_the_program_fetches_a_page_through_a_peer(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    body = program.split("\n\n", 1)[1]
    assert len([line for line in body.splitlines() if line]) <= 10
    configuration = tmp_path / "wg.conf"
    async with pair() as ends:
        await ends.serve(80, page)
        configuration.write_text(ends.config.dump())
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            str(configuration),
            str(GATEWAY),
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            said, _ = await child.communicate()
    assert child.returncode == 0
    assert said.decode().endswith("<h1>inside</h1>\n")

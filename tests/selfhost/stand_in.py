"""A program that behaves like a platform in the background, without any of its parts.

usage: stand_in HOME BEHAVIOUR [OPTION...] --report-to DESCRIPTOR

up       publishes itself, answers /healthz, ends at SIGTERM
deaf     the same, but SIGTERM does nothing
refuses  says in the pipe that there is no engine and ends with 10
crashes  ends with 3 after a line on standard error
stuck    takes the lock and never comes up
"""

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from builder_orch.errors import BuilderOrchError, EngineMissing
from builder_orch.selfhost.home import Home, Record


class Answer(BaseHTTPRequestHandler):
    """Always well."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name
        """Say nothing."""


def be(home: Home, behaviour: str) -> None:
    """Run until told to end."""
    if behaviour == "crashes":
        sys.stderr.write("the floor is \x1b[31mlava\n")
        sys.exit(3)
    with home.hold():
        if behaviour == "refuses":
            raise EngineMissing("there is no engine", hint="install docker.io")
        ended = threading.Event()
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN if behaviour == "deaf" else lambda *_: ended.set()
        )
        if behaviour != "stuck":
            server = HTTPServer(("127.0.0.1", 0), Answer)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/graphql"
            home.publish(Record(url, "token", "127.0.0.1:1", os.getpid(), "personal"))
        ended.wait()
        home.withdraw()


def main() -> int:
    root, behaviour, descriptor = sys.argv[1], sys.argv[2], sys.argv[-1]
    try:
        be(Home(Path(root)), behaviour)
    except BuilderOrchError as error:
        card = {"kind": error.kind, "message": str(error), "hint": error.hint}
        os.write(int(descriptor), json.dumps(card).encode())
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())

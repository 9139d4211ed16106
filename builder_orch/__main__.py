"""`python -m builder_orch` is `fly-build`."""

from builder_orch.cli.main import run

run()

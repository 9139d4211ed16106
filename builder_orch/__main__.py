"""`python -m builder_orch` is `fly-build`."""

from builder_orch.cli.main import run

if __name__ == "__main__":
    run()

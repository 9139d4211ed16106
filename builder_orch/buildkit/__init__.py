"""Builds by BuildKit over any stream: only what changed travels; read `solve` first."""

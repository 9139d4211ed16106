"""The platform API: operations, client and models."""

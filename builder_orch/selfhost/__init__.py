"""A platform of our own: API, gateway, builder, registry and release runner in one process."""

"""Carriers move datagrams outside."""

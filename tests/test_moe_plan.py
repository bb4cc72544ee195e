"""Routing plan tests."""

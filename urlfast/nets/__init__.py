"""Modules that more than one method uses."""

"""Measurements to be started by hand; none is a test."""

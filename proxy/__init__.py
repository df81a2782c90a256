"""Tollgate: an OpenAI-compatible reverse proxy that sells model access on prepaid credits."""

__version__ = "0.1.0"

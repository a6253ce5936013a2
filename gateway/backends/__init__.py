"""Backends behind one port: vLLM and OpenAI-compatible servers, and the embedded engine."""

"""A server that speaks the OpenAI protocol: `python -m tools.serve`."""

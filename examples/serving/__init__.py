"""The parts of examples/server.py."""

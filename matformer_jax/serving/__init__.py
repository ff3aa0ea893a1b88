"""The server: the engine that runs requests together, and HTTP in front of it."""

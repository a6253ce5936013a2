"""Bytes to a request and deltas to bytes: the HTTP protocol, one exchange over it, events and whole answers."""

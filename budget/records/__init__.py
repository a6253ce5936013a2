"""Small durable records: everything the store keeps that is not money. See port.py."""

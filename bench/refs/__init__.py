"""Reference gateways that do nothing but pass through: what each layer costs before any feature."""

"""Who may spend what: keys, limits and administrators, kept in the store, audited, and their usage."""

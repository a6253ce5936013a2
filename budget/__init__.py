"""What may be spent: caps, envelopes, ledgers and prices. Pure, but for the ledgers' storage."""

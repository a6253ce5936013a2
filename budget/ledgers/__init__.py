"""Where budgets live: one module per store, all behind budget.ledger."""

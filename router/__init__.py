"""Pure decisions: which mode, which backend. No I/O, no clock, no framework."""

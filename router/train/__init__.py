"""Training of the text scorer, off line: packages that ship data in, `router/scorer.json` and its card out.

Nothing in the gateway imports this; numpy is imported where it is used.
"""

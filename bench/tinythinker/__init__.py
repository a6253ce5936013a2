"""A model on which thinking matters, small enough for CI; docs/tinythinker_card.md is its card."""

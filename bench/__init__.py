"""One command per claim of the README; see bench/README.md."""

"""Questions of reasoning-gym as JSON lines on standard output; a process of its own, for what it needs is not ours.

    PYTHONHASHSEED=0 PYTHONPATH=<folder of the packages> python generate.py

Some generators go through sets of strings: only with a fixed hash seed are the questions the same each time.
"""

from __future__ import annotations

import json
import sys

SEED = 7
PER_GENERATOR = 12
# `composite` is made of the others; the rest take many seconds for boards that read like those of their siblings.
LEFT_OUT = frozenset(("composite", "intermediate_integration", "knight_swap", "sokoban"))


def main() -> None:
    """Write every generator's first questions."""
    out, sys.stdout = sys.stdout, sys.stderr  # some generators print
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    for name in sorted(set(DATASETS) - LEFT_OUT):
        for item in reasoning_gym.create_dataset(name, size=PER_GENERATOR, seed=SEED):
            out.write(json.dumps([name, item["question"]]) + "\n")


if __name__ == "__main__":
    main()

"""Write tests/goldens/*.npz from transformers 5.23.0: python tests/parity/make_goldens.py"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.parity.cases import CASES        # noqa: E402  the path comes first

GOLDENS = Path(__file__).parents[1] / "goldens"


def main():
    """One file a case: weights under w., inputs under i., outputs under o."""
    for case in CASES:
        parts = zip("wio", case.reference(seed=1))
        flat = {f"{head}.{name}": value for head, part in parts for name, value in part.items()}
        np.savez_compressed(GOLDENS / f"{case.name}.npz", **flat)
        print(case.name, sum(value.size for value in flat.values()), "numbers")


if __name__ == "__main__":
    main()

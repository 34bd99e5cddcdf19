"""What all models share. Imported before torch, it sets how torch's threads wait."""
import os

# A waiting thread spins. Where a second program runs, the thread that it waits for may have no
# core, and a step takes up to 60 times as long; short spins cost a tenth instead.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

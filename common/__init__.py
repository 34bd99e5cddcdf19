"""The rooms that all models share. Imported before torch it sets how torch's threads wait."""
import os

# A thread that waits for another spins; where a second program runs, the one that it waits for has
# no core to finish on, and a step takes up to 60 times as long. Short spins cost a tenth instead.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

"""What all models share. Imported before torch, it sets how torch's threads wait."""
import os
import signal
import sys
from pathlib import Path

# A waiting thread spins. Where a second program runs, the thread that it waits for may have no
# core, and a step takes up to 60 times as long; short spins cost a tenth instead.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# A Ctrl-C while a script of ours imports torch ends it without a traceback; see options.run_main.
root = Path(__file__).resolve().parents[1]
script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
if script.parent in (root, root / "lessons") \
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

"""Settings of every test."""
import os

# As in train.py: on a busy machine threads that spin take a test from seconds to minutes.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

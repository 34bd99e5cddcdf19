"""Settings of every test."""
import common                            # noqa: F401  before torch: it sets how threads wait

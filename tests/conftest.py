"""What every test shares: one seed, one thread, and hypothesis examples that never change."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Times on a shared two-core machine vary tenfold: a deadline would fail by chance.
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of later garbage collections: `observe` asks for whole ones.

    Those walk over a million objects of torch and transformers, which stay.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random numbers, whichever tests ran before."""
    torch.manual_seed(0)

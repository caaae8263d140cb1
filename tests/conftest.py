"""Settings of the whole suite: one thread a worker, repeatable Hypothesis runs."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "sdeflow",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("sdeflow")


pytest.register_assert_rewrite("tests")  # the asserts of shared helpers show their values too


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def global_state():
    """Every test starts from the same global seed and leaves torch's defaults as they were."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()

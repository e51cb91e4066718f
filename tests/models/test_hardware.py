"""Memory of each step for models of common sizes."""

import pytest

from cai.models import hardware


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Llama 3.2 1B", 1.236),
        ("Llama 3.2 3B", 3.213),
        ("Llama 3.1 8B", 8.030),
        ("Qwen2.5 14B", 14.770),
        ("Qwen2.5 32B", 32.764),
        ("Llama 3.1 70B", 70.554),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, billions):
    """The model cards' figures; ours leave out norms and biases."""
    assert hardware.published_shape(*hardware.PUBLISHED[name]).parameters == pytest.approx(billions * 1e9, rel=5e-4)


def test_a_model_of_a_published_size_needs_what_the_table_shows():
    """The check of a model and the table use one function; this holds on a GPU."""
    shape = hardware.published_shape(*hardware.PUBLISHED["Llama 3.2 1B"])
    on_gpu, on_cpu = hardware.step_memory(shape, gpu=True), hardware.step_memory(shape, gpu=False)
    assert on_gpu == {name: need["needs_gb"] for name, need in hardware.hardware_rows()[0]["steps"].items()}
    assert all(on_cpu[name] >= 1.2 * need for name, need in on_gpu.items() if "full" not in name)

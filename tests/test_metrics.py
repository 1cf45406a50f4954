import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifx.errors import ConfigError
from omnifx.metrics import frechet_distance, psnr, ssim


def images(batch=4, size=8, seed=0):
    return torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def features(num, dim=4, seed=0):
    return torch.randn(num, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("error", "expected_db"), [(0.2, 20.0), (0.02, 40.0), (2.0, 0.0)])
def test_psnr_of_a_constant_error_is_the_textbook_value(error, expected_db):
    reference = torch.zeros(3, 1, 8, 8)

    measured = psnr(reference + error, reference)

    assert measured.shape == (3,)
    assert measured.tolist() == pytest.approx([expected_db] * 3, abs=1e-5)


def test_psnr_judges_each_sample_by_itself():
    reference = images()
    samples = reference.clone()
    samples[1] += 0.2

    measured = psnr(samples, reference)

    assert measured[1].item() == pytest.approx(20.0, abs=1e-4)
    assert all(math.isinf(value) for value in measured[[0, 2, 3]].tolist())


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(0.1, 100))
def test_psnr_does_not_depend_on_the_units_of_the_data(scale):
    reference, samples = images(seed=0).double(), images(seed=1).double()

    measured = psnr(scale * samples, scale * reference, data_range=scale * 2)

    assert torch.allclose(measured, psnr(samples, reference))


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    reference = images(size=8)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))

    values = [ssim(reference + level * noise, reference) for level in (0.0, 0.05, 0.2, 0.8)]

    assert values[0] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.7


def test_ssim_with_window_11_is_the_ssim_of_the_paper():
    from torchmetrics.functional.image import structural_similarity_index_measure

    samples, reference = images(size=32, seed=0), images(size=32, seed=1)

    expected = structural_similarity_index_measure(samples.double(), reference.double(), sigma=1.5, data_range=2.0)

    assert ssim(samples, reference, window=11) == pytest.approx(expected.item())


@pytest.mark.parametrize("window", [3, 5, 7])
def test_ssim_sees_exactly_the_window_asked_for(window):
    reference = torch.zeros(1, 1, 32, 32)
    samples = reference.clone()
    samples[0, 0, 16, 16] = 1.0

    similarity = ssim(samples, reference, window=window)

    share_touched = window**2 / 32**2  # elsewhere both images are equal, and the similarity is 1
    assert 1 - share_touched <= similarity < 1


def test_frechet_distance_of_a_set_to_itself_is_zero():
    assert frechet_distance(features(50), features(50)) == pytest.approx(0.0, abs=1e-10)


def test_frechet_distance_of_a_shift_is_its_squared_length():
    shift = torch.tensor([3.0, 0.0, -4.0, 0.0])

    assert frechet_distance(features(50), features(50) + shift) == pytest.approx(25.0)


def test_frechet_distance_agrees_with_the_closed_form_of_a_scaling():
    a = features(200)
    variance = a.var(dim=0).sum().item()
    centred = a - a.mean(dim=0)

    assert frechet_distance(centred, 3 * centred) == pytest.approx((3 - 1) ** 2 * variance)


def test_frechet_distance_agrees_with_the_trace_of_the_matrix_root():
    a, b = features(40, seed=0) @ features(4, seed=2), features(60, seed=1)
    eigenvalues = torch.linalg.eigvals(a.T.cov() @ b.T.cov())
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()

    measured = frechet_distance(a, b)

    assert measured == pytest.approx((expected - 2 * eigenvalues.sqrt().real.sum()).item())
    assert measured == pytest.approx(frechet_distance(b, a))


def test_frechet_distance_bears_features_that_are_always_zero():
    a, b = features(50), features(50, seed=1)
    a[:, 0] = b[:, 0] = 0.0

    assert math.isfinite(frechet_distance(a, b))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(images(4), images(3)), r"psnr: .*same shape, got \[4, 1, 8, 8\] and \[3, 1, 8, 8\]"),
        (lambda: psnr(images(0), images(0)), r"psnr: expected a batch"),
        (lambda: psnr(images(), images(), data_range=0.0), r"psnr: data_range must be > 0"),
        (lambda: ssim(images(), images(3)), r"ssim: .*same shape"),
        (lambda: ssim(images()[0], images()[0]), r"ssim: expected images \[B, C, H, W\]"),
        (lambda: ssim(images(), images(), window=11), r"at most 8 .* got 11"),
        (lambda: ssim(images(), images(), window=4), r"must be odd.* got 4"),
        (lambda: frechet_distance(features(9, 4), features(9, 5)), r"got \[9, 4\] and \[9, 5\]"),
        (lambda: frechet_distance(features(1), features(9)), r"at least 2 samples"),
        (lambda: frechet_distance(features(9) / 0, features(9)), r"NaN or infinite"),
    ],
)
def test_inputs_that_cannot_be_compared_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_metrics_work_without_torchvision():
    script = "import sys; sys.modules['torchvision'] = None; import omnifx.learned_metrics, omnifx.metrics"

    subprocess.run([sys.executable, "-c", script], check=True)

"""The two schedulers against theory, against diffusers', and against each other."""

import inspect
import math
import statistics
import time
from fractions import Fraction

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from mini_ddpm.schedulers.scheduling_base import spaced_timesteps
from mini_ddpm.schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from mini_ddpm.schedulers.scheduling_mini_ddpm import MiniDDPMScheduler

PAIRS = {"ddpm": (MiniDDPMScheduler, DDPMScheduler), "ddim": (MiniDDIMScheduler, DDIMScheduler)}
BOTH = pytest.mark.parametrize("cls", [MiniDDPMScheduler, MiniDDIMScheduler])
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
OURS = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}  # our defaults, said to diffusers


def tensors(*shape, dtype=torch.float32, seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the noise schedule -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_betas_are_bit_identical_to_diffusers(cls, schedule, zero_snr):
    for total in (10, 1000, 4000):
        config = {"num_train_timesteps": total, "beta_schedule": schedule, "rescale_betas_zero_snr": zero_snr}
        ours, theirs = cls(**config), DDPMScheduler(**config)
        assert torch.equal(ours.betas, theirs.betas)
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@BOTH
def test_default_schedule_is_the_cosine(cls):
    def alpha_bar(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    theory = torch.tensor([alpha_bar(t + 1) / alpha_bar(0) for t in range(998)], dtype=torch.float64)
    torch.testing.assert_close(cls().alphas_cumprod[:998].double(), theory, rtol=1e-4, atol=0)
    assert cls().betas[-1] == pytest.approx(0.999)  # the cap


@BOTH
def test_cosine_is_another_word_for_the_cosine_schedule(cls, tmp_path):
    """What is saved has the name that every other tool and version knows."""
    for scheduler in (cls(beta_schedule="cosine"), cls.from_config(cls().config, beta_schedule="cosine")):
        assert scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert torch.equal(scheduler.betas, cls().betas)
        scheduler.save_pretrained(tmp_path)
        assert '"squaredcos_cap_v2"' in (tmp_path / "scheduler_config.json").read_text()
        for other in (DDPMScheduler, DDIMScheduler):
            assert torch.equal(other.from_config(scheduler.config).betas, cls().betas)
            assert torch.equal(other.from_pretrained(tmp_path).betas, cls().betas)


@BOTH
def test_add_noise_and_velocity_follow_their_formulas_at_any_shape_of_timesteps(cls):
    scheduler, x0, noise = cls(), tensors(1, 4, 4), tensors(1, 4, 4, seed=1)
    for timesteps in (500, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 3], dtype=torch.int32)):
        level = scheduler.alphas_cumprod[torch.as_tensor(timesteps).long()].reshape(-1, 1, 1, 1)
        noisy = scheduler.add_noise(x0, noise, timesteps)
        velocity = scheduler.get_velocity(x0, noise, timesteps)
        torch.testing.assert_close(noisy, level.sqrt() * x0 + (1 - level).sqrt() * noise)
        # v and x_t are (ε, x_0) turned by an angle, so turning back gives x_0.
        torch.testing.assert_close(level.sqrt() * noisy - (1 - level).sqrt() * velocity, x0, rtol=0, atol=1e-6)
        if isinstance(timesteps, torch.Tensor):
            theirs = DDPMScheduler(**OURS)
            torch.testing.assert_close(noisy, theirs.add_noise(x0, noise, timesteps), rtol=0, atol=1e-7)
            torch.testing.assert_close(velocity, theirs.get_velocity(x0, noise, timesteps), rtol=0, atol=1e-7)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_noise_of_the_first_timesteps(cls, dtype):
    scheduler, zeros = cls(), torch.zeros(20, 1, 4, 4)
    timesteps = torch.arange(20)
    expected = scheduler.add_noise(zeros, torch.ones_like(zeros), timesteps)
    half = scheduler.add_noise(zeros.to(dtype), torch.ones_like(zeros).to(dtype), timesteps)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, rtol=2**-7, atol=0)
    velocity = scheduler.get_velocity(torch.ones_like(zeros).to(dtype), zeros.to(dtype), timesteps)
    torch.testing.assert_close(-velocity.float(), expected, rtol=2**-7, atol=0)


# --- the timesteps ------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_every_step_count_has_a_proper_grid(cls, spacing):
    scheduler = cls(timestep_spacing=spacing, steps_offset=1)
    theirs = DDPMScheduler(timestep_spacing=spacing, steps_offset=1)
    grids = {n: spaced_timesteps(spacing, 1000, n, 1) for n in range(1, 1001)}
    differ = []
    for n, grid in grids.items():
        assert len(grid) == n
        assert grid[0] < 1000 and grid[-1] >= 0 and (grid.diff() < 0).all()
        if spacing == "trailing":
            assert grid[0] == 999
            # what progressive distillation needs: the student's timesteps are among the teacher's
            assert 2 * n > 1000 or torch.equal(grids[2 * n][::2], grid)
        theirs.set_timesteps(n)
        if not torch.equal(theirs.timesteps, grid):
            differ.append(n)
    for n in differ:  # only where diffusers' grid is not proper, or its float step has missed a tie
        theirs.set_timesteps(n)
        wrong = len(theirs.timesteps) != n or theirs.timesteps[-1] < 0 or theirs.timesteps[0] >= 1000
        exact = {i * 1000 / n if spacing == "trailing" else i * 999 / max(n - 1, 1) for i in range(n + 1)}
        assert wrong or n == 1 or any(value % 1 == 0.5 for value in exact), n
    scheduler.set_timesteps(61)
    assert torch.equal(scheduler.timesteps, grids[61])
    for n in (48, 61, 300):  # 48 has ties
        exact = {
            "trailing": [round(Fraction(i * 1000, n)) - 1 for i in range(n, 0, -1)],
            "linspace": [round(Fraction(i * 999, n - 1)) for i in reversed(range(n))],
            "leading": [i * (1000 // n) + 1 for i in reversed(range(n))],
        }
        assert grids[n].tolist() == exact[spacing]


@BOTH
def test_custom_timesteps(cls):
    scheduler = cls()
    scheduler.set_timesteps(timesteps=[900, 500, 20])
    assert scheduler.timesteps.tolist() == [900, 500, 20] and scheduler.num_inference_steps == 3
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [500, 20, -1]
    scheduler.set_timesteps(20)
    reference = scheduler.step(tensors(1, 4, 4), 499, tensors(1, 4, 4, seed=1), generator=seeded()).prev_sample
    scheduler.set_timesteps(timesteps=scheduler.timesteps)
    again = scheduler.step(tensors(1, 4, 4), 499, tensors(1, 4, 4, seed=1), generator=seeded()).prev_sample
    assert torch.equal(reference, again)


@BOTH
@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"num_inference_steps": 0}, ValueError),
        ({"num_inference_steps": -3}, ValueError),
        ({"num_inference_steps": 1001}, ValueError),
        ({"num_inference_steps": 2.5}, TypeError),
        ({"num_inference_steps": "20"}, TypeError),
        ({"num_inference_steps": True}, TypeError),
        ({}, ValueError),
        ({"num_inference_steps": 2, "timesteps": [3, 1]}, ValueError),
        ({"timesteps": []}, ValueError),
        ({"timesteps": [1, 3]}, ValueError),
        ({"timesteps": [3, 3]}, ValueError),
        ({"timesteps": [1000, 3]}, ValueError),
        ({"timesteps": [3, -1]}, ValueError),
        ({"timesteps": [3.5, 1.0]}, ValueError),
    ],
)
def test_bad_timesteps_are_refused_in_one_line(cls, kwargs, error):
    with pytest.raises(error) as raised:
        cls().set_timesteps(**kwargs)
    assert "\n" not in str(raised.value)


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [("beta_schedule", "cosinus"), ("prediction_type", "x0"), ("timestep_spacing", "even"), ("steps_offset", -1)],
)
def test_bad_config_is_refused_with_the_allowed_values(cls, name, value):
    with pytest.raises(ValueError, match=name) as raised:
        cls(**{name: value})
    assert repr(value) in str(raised.value)


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("beta_start", value) for value in (math.nan, math.inf, 0.0, -0.1, "0.1", None, True)),
        *(("beta_end", value) for value in (math.nan, -math.inf)),
        *(("clip_sample_range", value) for value in (math.nan, math.inf, 0.0, "1")),
        *(("dynamic_thresholding_ratio", value) for value in (math.nan, 0, 1.5)),
        ("sample_max_value", math.nan),
        *(("num_train_timesteps", value) for value in (0, 10.5, "1000", True, 10**7, 10**12)),
        *(("steps_offset", value) for value in (0.5, "1")),
        *(("trained_betas", value) for value in ([0.1, math.nan], [0.1, 0.0], [0.1, 1.5], [[0.1]], ["a"], 0.1)),
        *((name, "NaN") for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr")),
        *(("thresholding", value) for value in (0, None, math.nan)),
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused(cls, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be") as raised:
        cls(**{name: value})
    assert "\n" not in str(raised.value)


def test_a_switch_and_a_rescaling_of_one_scheduler_are_checked():
    with pytest.raises(ValueError, match="`set_alpha_to_one` must be True or False; got 'NaN'"):
        MiniDDIMScheduler(set_alpha_to_one="NaN")
    with pytest.raises(ValueError, match="`rescale_betas_zero_snr` gives no finite betas"):
        MiniDDPMScheduler(num_train_timesteps=1, rescale_betas_zero_snr=True)


@BOTH
@pytest.mark.parametrize("start, end", [(0.0001, 0.002), (0.001, 0.02), (0.01, 0.2), (0.1, 2)])
def test_the_betas_of_diffusers_own_tests_are_taken(cls, start, end):
    assert cls(beta_schedule="linear", beta_start=start, beta_end=end).betas.isfinite().all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_another_default_dtype_changes_nothing(cls, schedule, dtype):
    sample, output = tensors(1, 4, 4), tensors(1, 4, 4, seed=1)

    def run():
        scheduler = cls(beta_schedule=schedule, num_train_timesteps=100, rescale_betas_zero_snr=True)
        scheduler.set_timesteps(10)
        kwargs = {"eta": 1.0} if cls is MiniDDIMScheduler else {}
        step = scheduler.step(output, 49, sample, generator=seeded(), **kwargs)
        x_t = scheduler.add_noise(sample, output, torch.tensor([3, 5]))
        return scheduler.betas, scheduler.final_alpha_cumprod, step.prev_sample, step.pred_original_sample, x_t

    expected = run()
    torch.set_default_dtype(dtype)
    try:
        results = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_one_seed_gives_the_same_noise_in_every_dtype(cls, dtype):
    scheduler, kwargs = cls(), {"eta": 1.0} if cls is MiniDDIMScheduler else {}
    scheduler.set_timesteps(50)

    def noise(dtype):
        zeros = torch.zeros(2, 1, 8, 8, dtype=dtype)
        return scheduler.step(zeros, 499, zeros, generator=seeded(), **kwargs).prev_sample

    torch.testing.assert_close(noise(dtype).float(), noise(torch.float32), rtol=0.01, atol=1e-3)


# --- a step, against diffusers ------------------------------------------------------------------------------------


def compare(pair, num_inference_steps, eta=0.0, last=True, **config):
    """Step from the same x_t with the same noise at each timestep; the results may differ by 1e-6 of their size.

    With epsilon x̂_0 = (x_t - √(1-ᾱ) ε) / √ᾱ, so float32's rounding of x_t comes out 1/√ᾱ times as large.
    """
    ours, theirs = (cls(**{**OURS, **config}) for cls in PAIRS[pair])
    kwargs = {"eta": eta} if pair == "ddim" else {}
    channels = 2 if str(config.get("variance_type")).startswith("learned") else 1
    sample, output = tensors(3, 4, 4), tensors(3 * channels, 4, 4, seed=1)
    if config.get("variance_type") == "learned":
        output[:, 3:] = output[:, 3:].abs()
    ours.set_timesteps(num_inference_steps)
    theirs.set_timesteps(num_inference_steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for t in ours.timesteps[: None if last else -1]:
        mine = ours.step(output, t, sample, generator=seeded(), **kwargs)
        if eta and t == 999:
            # 1 - ᾱ_s - σ² cancels there, and in float32 diffusers keeps no digit of it. In float64 it agrees.
            noise = torch.randn(sample.shape, generator=seeded()).double()
            for name in ("alphas_cumprod", "final_alpha_cumprod"):
                setattr(theirs, name, getattr(theirs, name).double())
            other = theirs.step(output.double(), t, sample.double(), variance_noise=noise, **kwargs)
            for name in ("alphas_cumprod", "final_alpha_cumprod"):
                setattr(theirs, name, getattr(theirs, name).float())
        else:
            other = theirs.step(output, t, sample, generator=seeded(), **kwargs)
        for key in ("prev_sample", "pred_original_sample"):
            size = max(1.0, other[key].abs().max().item())
            if key == "pred_original_sample" and ours.config.prediction_type == "epsilon":
                size = max(size, ours.alphas_cumprod[t].item() ** -0.5)
            error = (mine[key] - other[key]).abs().max().item()
            assert error <= 1e-6 * size, (key, int(t), error, size)


@pytest.mark.parametrize("num_inference_steps", [10, 50, 1000])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("pair", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0)])
def test_step_equals_diffusers(pair, eta, prediction_type, num_inference_steps):
    compare(pair, num_inference_steps, eta, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample": False},
        {"clip_sample_range": 0.5},
        {"thresholding": True, "sample_max_value": 2.0},
        {"beta_schedule": "linear", "timestep_spacing": "leading", "steps_offset": 1},
        {"beta_schedule": "scaled_linear"},
        {"num_train_timesteps": 400},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_step_equals_diffusers_under_every_option(pair, prediction_type, config):
    compare(pair, 50, prediction_type=prediction_type, **config)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_step_equals_diffusers_at_zero_snr(pair, prediction_type):
    compare(pair, 50, prediction_type=prediction_type, rescale_betas_zero_snr=True)


def test_step_equals_diffusers_with_linspace():
    compare("ddpm", 50, timestep_spacing="linspace")  # diffusers' DDIM goes to t - T // n, not to the next timestep


def test_step_equals_diffusers_without_set_alpha_to_one():
    compare("ddim", 50, set_alpha_to_one=False, beta_schedule="linear")


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "fixed_large", "learned", "learned_range"])
def test_step_equals_diffusers_for_each_variance(variance_type):
    compare("ddpm", 50, last=False, variance_type=variance_type)  # diffusers adds noise at the last step


def test_fixed_large_log_is_fixed_large():
    results = []
    for variance_type in ("fixed_large", "fixed_large_log"):  # diffusers takes the square root of the logarithm: NaN
        scheduler = MiniDDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(50)
        results.append(scheduler.step(tensors(1, 4, 4), 499, tensors(1, 4, 4, seed=1), generator=seeded()).prev_sample)
    assert torch.equal(*results)


def test_use_clipped_model_output_equals_diffusers():
    for prediction_type in PREDICTION_TYPES:
        ours, theirs = (cls(**OURS, prediction_type=prediction_type) for cls in PAIRS["ddim"])
        ours.set_timesteps(50)
        theirs.set_timesteps(50)
        sample, output = tensors(1, 4, 4), tensors(1, 4, 4, seed=1)
        for t in ours.timesteps:
            mine = ours.step(output, t, sample, use_clipped_model_output=True).prev_sample
            other = theirs.step(output, t, sample, use_clipped_model_output=True).prev_sample
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_ddim_ignores_a_predicted_variance():
    scheduler = MiniDDIMScheduler()
    scheduler.set_timesteps(10)
    sample, output = tensors(1, 4, 4), tensors(1, 4, 4, seed=1)
    expected = scheduler.step(output, 499, sample).prev_sample
    assert torch.equal(scheduler.step(torch.cat([output, output], 1), 499, sample).prev_sample, expected)


def test_ddim_with_full_noise_is_ddpm():
    ddpm, ddim = MiniDDPMScheduler(clip_sample=False), MiniDDIMScheduler(clip_sample=False)
    sample, output = tensors(1, 4, 4).double(), tensors(1, 4, 4, seed=1).double()
    for n in (7, 50, 300):
        ddpm.set_timesteps(n)
        ddim.set_timesteps(n)
        for t in ddpm.timesteps:
            one = ddpm.step(output, t, sample, generator=seeded()).prev_sample
            two = ddim.step(output, t, sample, eta=1.0, generator=seeded()).prev_sample
            # β, rounded as diffusers rounds it, enters the two in different places.
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# --- a step, against theory ---------------------------------------------------------------------------------------

MEAN, STD = 0.2, 0.5


def gaussian_output(scheduler, sample, t):
    """What the ideal model returns if the data are N(MEAN, STD²): the posterior's mean, in closed form."""
    level = scheduler.alphas_cumprod[t].double()
    signal, noise = level.sqrt(), (1 - level).sqrt()
    error = (sample - signal * MEAN) / (level * STD**2 + 1 - level)
    x0, epsilon = MEAN + signal * STD**2 * error, noise * error
    return {"epsilon": epsilon, "sample": x0, "v_prediction": signal * epsilon - noise * x0}[
        scheduler.config.prediction_type
    ]


def ddim_error(num_inference_steps, prediction_type):
    """Largest distance from the probability-flow ODE's solution, which maps quantile to quantile, in standard ones."""
    scheduler = MiniDDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(num_inference_steps)
    level = scheduler.alphas_cumprod[-1].double()
    sample = start = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    for t in scheduler.timesteps:
        sample = scheduler.step(gaussian_output(scheduler, sample, t), t, sample).prev_sample
    exact = MEAN + STD * (start - level.sqrt() * MEAN) / (level * STD**2 + 1 - level).sqrt()
    return (sample - exact).abs().max().item() / (2 * STD)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_converges_with_order_one_at_every_step_count(prediction_type):
    # Step counts that do not divide T are the point: with diffusers' previous timestep the order at 300 is -2.
    for n in (7, 13, 61, 103, 300, 500):
        order = math.log2(ddim_error(n, prediction_type) / ddim_error(2 * n, prediction_type))
        assert order == pytest.approx(1, abs=0.15), (n, order)
    # and no step count falls off the line: the error of a first-order method is c / n, here c is about 1.6
    for n in (7, 13, 61, 103, 300, 600, 997, 1000):
        assert n * ddim_error(n, prediction_type) == pytest.approx(1.6, rel=0.15), n


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddpm_recovers_the_distribution(prediction_type):
    # With the ideal model each step is linear, x_s = a x_t + b + σ z, so mean and variance follow by recursion.
    scheduler = MiniDDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    probes = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    drawn = torch.randn(probes.shape, generator=seeded(), dtype=torch.float64)
    for n in (61, 103, 300, 600, 1000):  # at 61 and 103 diffusers' ends with a spread of 0
        scheduler.set_timesteps(n)
        mean, variance = 0.0, 1.0
        for t in scheduler.timesteps:
            result = scheduler.step(gaussian_output(scheduler, probes, t), t, probes, generator=seeded()).prev_sample
            sigma = ((result[0, 2] - result[0, 0]) / (drawn[0, 2] - drawn[0, 0])).item()
            offset, end = (result - sigma * drawn)[0, :2].tolist()
            mean, variance = offset + (end - offset) * mean, (end - offset) ** 2 * variance + sigma**2
        assert mean == pytest.approx(MEAN, abs=1e-3)
        # the spread comes out c / n too small, as of a first-order method; c is about 4
        assert n * (math.sqrt(variance) / STD - 1) == pytest.approx(-3.9, rel=0.2), n


@BOTH
def test_another_default_device_changes_nothing(cls):
    torch.set_default_device("meta")
    try:
        scheduler = cls()
        scheduler.set_timesteps(20)
    finally:
        torch.set_default_device(None)
    expected = cls()
    expected.set_timesteps(20)
    assert torch.equal(scheduler.alphas_cumprod, expected.alphas_cumprod)
    assert torch.equal(scheduler.timesteps, expected.timesteps)
    assert torch.equal(scheduler._table, expected._table)


@BOTH
def test_a_timestep_out_of_the_grid_steps_as_far_as_diffusers_does(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    assert int(scheduler.previous_timestep(555)) == 455


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_large", "fixed_large_log", "learned", "learned_range"]
)
def test_ddpm_adds_no_noise_at_the_last_step(variance_type, spacing):
    scheduler = MiniDDPMScheduler(variance_type=variance_type, timestep_spacing=spacing, steps_offset=5)
    scheduler.set_timesteps(20)
    sample, output = tensors(1, 4, 4), tensors(2 if "learned" in variance_type else 1, 4, 4, seed=1).abs()
    last = scheduler.timesteps[-1]
    results = [scheduler.step(output, last, sample, generator=seeded(seed)) for seed in (0, 1)]
    assert torch.equal(results[0].prev_sample, results[1].prev_sample)
    torch.testing.assert_close(results[0].prev_sample, results[0].pred_original_sample)
    per_row = scheduler.step(output, last.repeat(2), sample)  # looked up on the device
    torch.testing.assert_close(per_row.prev_sample, results[0].prev_sample)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_ddim_adds_no_noise_at_the_last_step(set_alpha_to_one):
    scheduler = MiniDDIMScheduler(set_alpha_to_one=set_alpha_to_one)
    scheduler.set_timesteps(20)
    sample, output = tensors(1, 4, 4), tensors(1, 4, 4, seed=1)
    last = scheduler.timesteps[-1]
    expected = scheduler.step(output, last, sample).prev_sample
    for timestep in (last, last.repeat(2)):
        result = scheduler.step(output, timestep, sample, eta=1.0, generator=seeded()).prev_sample
        torch.testing.assert_close(result, expected)


@BOTH
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_zero_snr_is_finite(cls, prediction_type):
    scheduler = cls(rescale_betas_zero_snr=True, prediction_type=prediction_type, clip_sample=False)
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(10)
    sample = tensors(1, 4, 4)
    for t in scheduler.timesteps:
        result = scheduler.step(0.9 * sample, t, sample, generator=seeded())
        assert result.prev_sample.isfinite().all() and result.pred_original_sample.isfinite().all()
    first = scheduler.step(0.9 * sample, 999, sample).pred_original_sample
    expected = {"epsilon": 0 * sample, "sample": 0.9 * sample, "v_prediction": -0.9 * sample}[prediction_type]
    torch.testing.assert_close(first, expected)


# --- how a step is called -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_way_to_say_the_timestep_gives_the_same_step(cls, dtype):
    scheduler = cls(prediction_type="v_prediction")
    scheduler.set_timesteps(20)
    sample, output = tensors(1, 4, 4, dtype=dtype), tensors(1, 4, 4, dtype=dtype, seed=1)
    before = sample.clone(), output.clone()
    expected = scheduler.step(output, 499, sample, generator=seeded())
    assert expected.prev_sample.dtype == expected.pred_original_sample.dtype == dtype
    for timestep in (torch.tensor(499), torch.tensor([499]), torch.tensor([499, 499], dtype=torch.int32)):
        result = scheduler.step(output, timestep, sample, generator=seeded(), return_dict=False)
        torch.testing.assert_close(result[0], expected.prev_sample)
        torch.testing.assert_close(result[1], expected.pred_original_sample)
    # a timestep for each row
    mixed = scheduler.step(output, torch.tensor([499, 99]), sample, generator=[seeded(0), seeded(1)]).prev_sample
    for row, (timestep, seed) in enumerate([(499, 0), (99, 1)]):
        one = slice(row, row + 1)
        alone = scheduler.step(output[one], timestep, sample[one], generator=seeded(seed)).prev_sample
        torch.testing.assert_close(mixed[one], alone)
    assert torch.equal(sample, before[0]) and torch.equal(output, before[1])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_the_rounding_of_its_result(cls, dtype):
    scheduler = cls(clip_sample=False)
    scheduler.set_timesteps(50)
    sample, output = tensors(1, 4, 4, dtype=dtype), tensors(1, 4, 4, dtype=dtype, seed=1)
    for t in scheduler.timesteps[-25:]:
        noise = scheduler.step(0 * output, t, 0 * sample, generator=seeded()).prev_sample  # in its own stream
        half = scheduler.step(output, t, sample, generator=seeded()).prev_sample.float() - noise.float()
        full = scheduler.step(output.float(), t, sample.float(), generator=seeded()).prev_sample
        full = full - scheduler.step(0 * output.float(), t, 0 * sample.float(), generator=seeded()).prev_sample
        torch.testing.assert_close(half, full, rtol=0, atol=3 * torch.finfo(dtype).eps * full.abs().max().item())


@BOTH
@pytest.mark.parametrize("thresholding", [False, True])
def test_a_step_reads_nothing_back_from_the_device(cls, thresholding):
    # A meta tensor has no data: whoever asks for its value fails, as whoever asks a GPU's waits.
    scheduler = cls(thresholding=thresholding)
    scheduler.set_timesteps(20, device="meta")
    sample = torch.empty(2, 1, 4, 4, device="meta")
    kwargs = {"eta": 0.5} if cls is MiniDDIMScheduler else {}
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.empty_like(sample), t, sample, **kwargs).prev_sample
    assert sample.shape == (2, 1, 4, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_a_step_does_not_synchronise_with_the_gpu(cls):
    scheduler, reference = cls(), cls()
    scheduler.set_timesteps(20, device="cuda")
    reference.set_timesteps(20)
    noise, output = tensors(1, 4, 4), tensors(1, 4, 4, seed=1)
    sample, device_output = noise.cuda(), output.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [scheduler.step(device_output, t, sample) for t in scheduler.timesteps]
        results += [scheduler.step(device_output, 499, sample)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = reference.step(output, int(reference.timesteps[-1]), noise).prev_sample
    torch.testing.assert_close(results[-2].prev_sample.cpu(), expected)


@BOTH
def test_step_compiles_once_for_all_timesteps(cls):
    scheduler = cls(prediction_type="v_prediction")
    sample, output = tensors(1, 4, 4), tensors(1, 4, 4, seed=1)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(scheduler.step, fullgraph=True, backend=backend)
    for n in (20, 7):
        scheduler.set_timesteps(n)
        for t in scheduler.timesteps:
            torch.manual_seed(0)
            compiled = step(output, t, sample, return_dict=False)[0]
            torch.manual_seed(0)
            torch.testing.assert_close(compiled, scheduler.step(output, t, sample).prev_sample)
    assert len(graphs) == 1
    for t in (999, 499, 99, 49, 9):  # ints: once more, not once each
        step(output, t, sample, return_dict=False)
    assert len(graphs) <= 3


@BOTH
def test_gradients_flow_through_a_step(cls):
    scheduler = cls()
    scheduler.set_timesteps(20)
    sample = tensors(1, 4, 4, dtype=torch.float64).requires_grad_()
    output = tensors(1, 4, 4, dtype=torch.float64, seed=1).requires_grad_()
    for timestep in (499, torch.tensor([499, 99])):
        assert torch.autograd.gradcheck(
            lambda m, x, t=timestep: scheduler.step(m, t, x, generator=seeded()).prev_sample, (output, sample)
        )


@BOTH
def test_bad_arguments_of_a_step_are_refused(cls):
    scheduler = cls()
    scheduler.set_timesteps(20)
    sample, output = tensors(1, 4, 4), tensors(1, 4, 4)
    noisy = {"eta": 1.0} if cls is MiniDDIMScheduler else {}
    for timestep in (-1, 1000, torch.tensor(1000)):
        with pytest.raises(ValueError, match=r"\[0, 999\]"):
            scheduler.step(output, timestep, sample)
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"2 rows; got {count}"):
            scheduler.step(output, 499, sample, generator=[seeded()] * count, **noisy)
    with pytest.raises(ValueError, match="model_output"):
        scheduler.step(tensors(3, 4, 4), 499, sample)


def test_bad_arguments_of_one_scheduler_are_refused():
    ddim, sample = MiniDDIMScheduler(), tensors(1, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        ddim.step(sample, 499, sample)
    ddim.set_timesteps(20)
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match="eta"):
            ddim.step(sample, 499, sample, eta=eta)
    with pytest.raises(ValueError, match="variance_noise"):
        ddim.step(sample, 499, sample, eta=1.0, generator=seeded(), variance_noise=sample)
    with pytest.raises(ValueError, match="learned_range"):
        MiniDDPMScheduler(variance_type="learned_range").step(sample, 499, sample)
    with pytest.raises(ValueError, match=r"fixed_small, .*'other'"):
        MiniDDPMScheduler(variance_type="other").step(sample, 499, sample)
    with pytest.raises(ValueError, match="trained_betas"):
        MiniDDPMScheduler(trained_betas=[0.1, 0.2]).set_timesteps(1)


# --- in diffusers' company ----------------------------------------------------------------------------------------

OTHERS = [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]


@BOTH
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("saved", [False, True], ids=["in_memory", "saved"])
def test_swap_keeps_the_noise_schedule_and_the_spacing(cls, other, saved, tmp_path):
    def swap(target, source):
        if not saved:
            return target.from_config(source.config)
        source.save_pretrained(tmp_path)
        return target.from_pretrained(tmp_path)

    for source, target in ((cls(), other), (other(), cls), (cls(beta_schedule="linear"), other)):
        swapped = swap(target, source)
        assert isinstance(swapped, target)
        assert torch.equal(swapped.alphas_cumprod, source.alphas_cumprod)
        for key in ("timestep_spacing", "beta_schedule", "prediction_type"):
            assert swapped.config[key] == source.config[key]
    there_and_back = swap(cls, swap(other, cls(clip_sample=False, rescale_betas_zero_snr=True)))
    assert there_and_back.config.rescale_betas_zero_snr is True


@pytest.mark.parametrize("pair", PAIRS)
def test_signatures_are_diffusers_own(pair):
    ours, theirs = PAIRS[pair]
    for name in (
        "__init__",
        "step",
        "set_timesteps",
        "add_noise",
        "get_velocity",
        "_get_variance",
        "_threshold_sample",
    ):
        mine = list(inspect.signature(getattr(ours, name)).parameters)
        other = list(inspect.signature(getattr(theirs, name)).parameters)
        assert mine[: len(other)] == other
    assert set(theirs().config) == set(ours().config)
    assert len(ours(num_train_timesteps=400)) == 400


@pytest.mark.parametrize("pair", PAIRS)
def test_a_step_costs_the_host_less_than_half_of_diffusers(pair):
    # About a quarter on an idle machine; the bound leaves room for a busy one.
    sample, output = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    schedulers = [cls(**OURS) for cls in PAIRS[pair]]
    for scheduler in schedulers:
        scheduler.set_timesteps(50)
    seconds = [[], []]
    for _ in range(30):
        for scheduler, record in zip(schedulers, seconds, strict=True):
            start = time.perf_counter()
            for t in scheduler.timesteps:
                scheduler.step(output, t, sample)
            record.append(time.perf_counter() - start)
    assert statistics.median(seconds[0]) < 0.5 * statistics.median(seconds[1])


# --- what faults planted at random were not noticed in ------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_before_set_timesteps_the_chain_is_whole(pair):
    ours, theirs = (cls(**OURS) for cls in PAIRS[pair])
    assert torch.equal(ours.timesteps, torch.arange(999, -1, -1)) and torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps is None and ours.custom_timesteps is False and ours.init_noise_sigma == 1.0
    assert torch.equal(ours.previous_timestep(torch.arange(1000)), torch.arange(-1, 999))
    if pair == "ddpm":
        sample, output = tensors(1, 4, 4), tensors(1, 4, 4, seed=1)
        for t in (999, 500, 1, 0):
            expected = theirs.step(output, t, sample, generator=seeded()).prev_sample
            torch.testing.assert_close(ours.step(output, t, sample, generator=seeded()).prev_sample, expected)


@BOTH
def test_a_single_custom_timestep(cls):
    scheduler = cls()
    scheduler.set_timesteps(timesteps=[400])
    assert scheduler.timesteps.tolist() == [400] and scheduler.num_inference_steps == 1 and scheduler.custom_timesteps
    assert scheduler.previous_timestep(400) == -1
    scheduler.set_timesteps(5)
    assert scheduler.custom_timesteps is False


def test_learned_variance_of_vectors():
    """Samples without height and width, (B, C), split like images."""
    scheduler = MiniDDPMScheduler(variance_type="learned_range")
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    sample, output = tensors(3), tensors(6, seed=1)
    stepped = scheduler.step(output, t, sample, generator=seeded()).prev_sample
    as_images = scheduler.step(output[:, :, None, None], t, sample[:, :, None, None], generator=seeded()).prev_sample
    assert torch.equal(stepped, as_images[:, :, 0, 0])
    with pytest.raises(ValueError, match="twice its channels"):
        scheduler.step(torch.zeros(2), t, torch.zeros(1))


@pytest.mark.parametrize(
    "variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
)
def test_get_variance_is_that_of_diffusers(variance_type):
    ours, theirs = MiniDDPMScheduler(**OURS), DDPMScheduler(**OURS)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
    predicted = tensors(1, 2, 2).clamp(-1, 1)
    for t in ours.timesteps[[0, 10, -2]]:
        arguments = (t, predicted, variance_type)
        torch.testing.assert_close(ours._get_variance(*arguments), theirs._get_variance(*arguments), rtol=1e-4, atol=0)


@BOTH
@pytest.mark.parametrize("scale", [0.3, 1.5, 4.0])
def test_dynamic_thresholding_is_that_of_diffusers(cls, scale):
    """Below 1 nothing is amplified; above, images are clipped to their quantile and scaled."""
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    sample = scale * tensors(1, 6, 6)
    expected = DDPMScheduler(**config)._threshold_sample(sample)
    torch.testing.assert_close(cls(**config)._threshold_sample(sample), expected)
    assert expected.abs().max() <= 1

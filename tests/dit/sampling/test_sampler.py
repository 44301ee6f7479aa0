import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from dit_qat.dit.diffusion import NoiseSchedule
from dit_qat.dit.models import DiT
from dit_qat.dit.randomness import generator_for
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8

KEPT = NoiseSchedule().alphas_cumprod.double()


@pytest.fixture(scope="module")
def model():
    """A small conditional model with learned variance, all weights random."""
    small = DiT(4, 2, 2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return small


def draw(model, config, indices, **options):
    """Return {index: image}."""
    images = {}
    for found, batch in sample_images(model, config, indices, **options):
        images |= dict(zip(found, batch, strict=True))
    return images


def assert_same_bytes(one, other):
    assert one.keys() == other.keys()
    for index in one:
        assert one[index].numpy().tobytes() == other[index].numpy().tobytes()


CONFIGS = [
    SamplerConfig("ddim", 4, batch_size=4),
    SamplerConfig("ddim", 4, eta=1.0, batch_size=4, guidance=2.0),
    SamplerConfig("ddpm", 4, batch_size=4),
    SamplerConfig("dpm_solver++", 4, batch_size=4, guidance=1.5),
    SamplerConfig("ddpm", 3, batch_size=1, clip_sample=True),
    SamplerConfig("ddpm", 3, batch_size=4, precision="bf16"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_an_image_has_the_same_bytes_whatever_else_is_asked_for(model, config):
    whole = draw(model, config, range(10))
    assert list(whole) == list(range(10))
    torch.rand(3)  # the global generator plays no part
    shuffled = draw(model, config, [7, 2, 9, 0, 4, 1, 8, 3, 6, 5])
    assert_same_bytes({i: shuffled[i] for i in range(10)}, whole)
    assert_same_bytes(draw(model, config, [6]), {6: whole[6]})
    # As three processes would share the work.
    parts = [draw(model, config, range(rank, 10, 3)) for rank in range(3)]
    merged = parts[0] | parts[1] | parts[2]
    assert_same_bytes({i: merged[i] for i in range(10)}, whole)


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda config: config.kind)
def test_images_and_seeds_differ(model, config):
    images = draw(model, config, range(4))
    other = SamplerConfig(**(vars(config) | {"seed": 1}))
    assert not torch.allclose(images[0], images[3])  # the same label
    assert not torch.allclose(images[0], draw(model, other, [0])[0])
    assert images[0].shape == (2, 4, 4)
    assert images[0].dtype == torch.float32


def test_labels_default_to_the_index_modulo_classes(model):
    config = SamplerConfig(steps=2, batch_size=4)
    default = draw(model, config, [1, 5, 6])
    assert_same_bytes(draw(model, config, [1, 5, 6], labels=[1, 2, 0]), default)
    assert_same_bytes(draw(model, config, [1, 5, 6], labels=lambda index: index % 3), default)
    changed = draw(model, config, [1, 5, 6], labels=[1, 0, 0])
    assert_same_bytes({i: changed[i] for i in (1, 6)}, {i: default[i] for i in (1, 6)})
    assert not torch.allclose(changed[5], default[5])


def test_guidance_moves_the_guided_channels_along_the_label(model):
    """One DDIM step is linear in the noise, so guidance extrapolates the images themselves."""
    one = {"kind": "ddim", "steps": 1, "batch_size": 4}
    plain = draw(model, SamplerConfig(**one), [1])[1]
    unlabelled = draw(model, SamplerConfig(**one), [1], labels=[model.null_class])[1]
    guided = draw(model, SamplerConfig(**one, guidance=4.0, guided_channels=1), [1])[1]
    expected = unlabelled[0] + 4 * (plain[0] - unlabelled[0])
    torch.testing.assert_close(guided[0], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(guided[1], plain[1], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(guided[0], plain[0], atol=0.1)


def test_guidance_zero_ignores_the_label(model):
    config = SamplerConfig(steps=2, batch_size=4, guidance=0.0, guided_channels=None)
    one, other = (draw(model, config, [0], labels=[label])[0] for label in (0, 1))
    torch.testing.assert_close(one, other)


def test_modes_are_restored_between_batches_and_after_errors(model):
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []
    handle = model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    for _, images in sample_images(model, SamplerConfig(steps=1, batch_size=2), range(4)):
        assert [module.training for module in model.modules()] == modes
        assert not torch.is_inference_mode_enabled()
        images.requires_grad_().sum().backward()  # ordinary tensors
    assert seen == [False, False]
    handle.remove()
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(OSError, match="stop"):
        draw(model, SamplerConfig(steps=1, batch_size=2), [0])
    handle.remove()
    assert [module.training for module in model.modules()] == modes


class ExactGaussian(DiT):
    """The optimal prediction for pixels that are independent normal variables."""

    mean, std = 0.4, 0.5

    def __init__(self, steps, learn_sigma=False):
        super().__init__(
            16, 16, 1, hidden_size=4, depth=1, num_heads=1, num_classes=0, learn_sigma=learn_sigma
        )
        self.timesteps = torch.linspace(999, 0, steps).round().long().tolist()
        self.calls = []

    def forward(self, x, t, y=None):
        t = int(t[0])
        self.calls.append(t)
        noise = (1 - KEPT[t]).sqrt() * (x - KEPT[t].sqrt() * self.mean) / self.marginal(t)
        if not self.learn_sigma:
            return noise
        return torch.cat([noise, torch.full_like(x, self.variance_value(t))], dim=1)

    def marginal(self, t):
        return KEPT[t] * self.std**2 + 1 - KEPT[t]

    def ancestral_step(self, t):
        """Return beta, posterior variance, and the share of x_0 in the posterior mean."""
        place = self.timesteps.index(t) + 1
        before = KEPT[self.timesteps[place]] if place < len(self.timesteps) else torch.tensor(1.0)
        beta = 1 - KEPT[t] / before
        posterior = beta * (1 - before) / (1 - KEPT[t])
        return beta, posterior, before.sqrt() * beta / (1 - KEPT[t])

    def variance_value(self, t):
        """Where the true variance of a reverse step lies between the posterior's and beta."""
        if t == 0:
            return 0.0
        beta, posterior, share = self.ancestral_step(t)
        true = posterior + share**2 * self.std**2 * (1 - KEPT[t]) / self.marginal(t)
        return float(2 * (true / posterior).log() / (beta / posterior).log() - 1)

    def small_variance_std(self):
        """The spread that DDPM ends with when every step adds the posterior variance only."""
        variance = torch.tensor(1.0).double()
        for t in self.timesteps:
            beta, posterior, share = self.ancestral_step(t)
            gain = share * KEPT[t].sqrt() * self.std**2 / self.marginal(t)
            gain += (1 - beta).sqrt() * posterior / beta
            variance = gain**2 * variance + posterior
        return variance.sqrt().item()


def statistics(exact, config):
    """Mean and spread of 16,384 pixels: standard errors of 0.004 and 0.003."""
    pixels = torch.stack([*draw(exact, config, range(64)).values()])
    assert exact.calls
    return pixels.mean().item(), pixels.std().item()


@pytest.mark.parametrize(
    ("kind", "steps", "learn_sigma"),
    [
        ("ddim", 200, False),
        ("ddim", 200, True),
        ("dpm_solver++", 30, False),
        ("ddpm", 10, True),  # with the true variance, ancestral sampling is exact at any length
    ],
)
def test_exact_predictions_reproduce_a_normal_distribution(kind, steps, learn_sigma):
    exact = ExactGaussian(steps, learn_sigma and kind == "ddpm")
    if learn_sigma and kind == "ddim":
        exact.learn_sigma = True
        exact.variance_value = lambda t: math.nan  # must not be looked at
    mean, std = statistics(exact, SamplerConfig(kind, steps, batch_size=64))
    assert len(exact.calls) == steps
    assert mean == pytest.approx(exact.mean, abs=0.015)
    assert std == pytest.approx(exact.std, abs=0.015)


@pytest.mark.parametrize(("kind", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_without_learned_variance_steps_add_the_posterior_variance(kind, eta):
    exact = ExactGaussian(20)
    mean, std = statistics(exact, SamplerConfig(kind, 20, eta=eta, batch_size=64))
    assert mean == pytest.approx(exact.mean, abs=0.015)
    assert std == pytest.approx(exact.small_variance_std(), abs=0.01)
    assert std < exact.std - 0.1  # so few steps without the true variance lose spread


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 600])
def test_ddim_follows_its_update_rule_exactly(steps):
    """Eq. 12 of arXiv:2010.02502 in float64, from each timestep to the very next one."""
    exact = ExactGaussian(steps)
    config = SamplerConfig("ddim", steps, batch_size=1, seed=3)
    image = draw(exact, config, [5])[5]
    calls = list(exact.calls)
    x = torch.randn(1, 1, 16, 16, generator=generator_for(3, "image", 5)).double()
    for t, after in zip(calls, [*calls[1:], None], strict=True):
        noise = exact(x, torch.tensor([t]))
        x_0 = (x - (1 - KEPT[t]).sqrt() * noise) / KEPT[t].sqrt()
        kept = torch.tensor(1.0).double() if after is None else KEPT[after]
        x = kept.sqrt() * x_0 + (1 - kept).sqrt() * noise
    torch.testing.assert_close(image, x[0].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [2, 10, 50, 250, 333, 1000])
@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_timesteps_are_the_linspace_of_diffusers(kind, steps):
    exact = ExactGaussian(steps)
    draw(exact, SamplerConfig(kind, steps, batch_size=1), [0])
    theirs = DDPMScheduler(timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    assert exact.calls == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpm_solver++"])
def test_other_spacings_are_those_of_diffusers(kind, spacing, steps):
    steps = min(steps, 999 if kind == "dpm_solver++" else 1000)
    exact = ExactGaussian(2)
    draw(exact, SamplerConfig(kind, steps, batch_size=1, spacing=spacing), [0])
    solver = DPMSolverMultistepScheduler if kind == "dpm_solver++" else DDPMScheduler
    theirs = solver(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert exact.calls == theirs.timesteps.tolist()


@pytest.mark.parametrize(
    ("steps", "spacing"), [(7, "leading"), (50, "leading"), (300, "leading"), (50, "trailing")]
)
def test_ddim_equals_stock_diffusers_where_its_steps_are_even(model, steps, spacing):
    config = SamplerConfig("ddim", steps, batch_size=2, spacing=spacing)
    ours = draw(model, config, [1])[1]
    stock = DDIMScheduler(
        timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True, steps_offset=0
    )
    stock.set_timesteps(steps)
    noise = [torch.randn(1, 2, 4, 4, generator=generator_for(0, "image", i)) for i in (0, 1)]
    x, y = torch.cat(noise), torch.tensor([0, 1])
    with torch.inference_mode():
        for t in stock.timesteps:
            output = model(x, t.expand(2), y)[:, :2]
            x = stock.step(output, t, x).prev_sample
    torch.testing.assert_close(ours, x[1], rtol=1e-4, atol=1e-4 * x[1].abs().max().item())


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "dpm_solver++"])
def test_clipping_keeps_the_last_prediction_in_range(model, kind):
    plain = SamplerConfig(kind, 3, batch_size=2)
    clipped = SamplerConfig(kind, 3, batch_size=2, clip_sample=True)
    assert draw(model, plain, [0])[0].abs().max() > 1
    assert draw(model, clipped, [0])[0].abs().max() <= 1


def test_bfloat16_is_close_to_float32_but_not_equal(model):
    config = SamplerConfig(steps=1, batch_size=2)
    one = draw(model, config, [0])[0]
    other = draw(model, SamplerConfig(steps=1, batch_size=2, precision="bf16"), [0])[0]
    assert not torch.equal(one, other)
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99


def test_uint8_rounds_to_nearest_and_clips():
    values = torch.arange(256)
    assert torch.equal(to_uint8(values / 127.5 - 1), values.to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    inside = np.nextafter(np.float32(-1 + 1.02 / 255), np.float32(1))
    assert to_uint8(torch.tensor([inside, -1 + 0.98 / 255])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "euler"},
        {"steps": 0},
        {"steps": 1001},
        {"steps": 1000, "kind": "dpm_solver++"},
        {"guidance": -1.0},
        {"guidance": math.nan},
        {"guided_channels": 0},
        {"eta": 1.5},
        {"eta": 0.5, "kind": "ddpm"},
        {"batch_size": 0},
        {"precision": "fp16"},
        {"spacing": "even"},
    ],
)
def test_wrong_settings_are_named(wrong):
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=rf"SamplerConfig\({name}=.*must be"):
        SamplerConfig(**wrong)


@pytest.mark.parametrize(
    ("indices", "labels", "message"),
    [
        ([1, 1], None, "without duplicates"),
        ([-1], None, "from 0"),
        ([1, 2], [0], "1 labels for 2 indices"),
        ([1, 2], [0, 4], "image 2 has label 4.*0 to 3"),
        ([1, 2], lambda index: index - 2, "image 1 has label -1"),
    ],
)
def test_wrong_requests_fail_before_any_work(model, indices, labels, message):
    with pytest.raises(ValueError, match=message):
        sample_images(model, SamplerConfig(batch_size=2), indices, labels)


def test_images_that_are_not_finite_are_an_error_instead_of_black():
    class Diverged(ExactGaussian):
        def forward(self, x, t, y=None):
            output = super().forward(x, t, y).clone()
            output[1, 0, 3, 3] = torch.nan
            output[2] = torch.inf
            return output

    config = SamplerConfig(steps=2, batch_size=4)
    with pytest.raises(ValueError, match=r"2 of 4 images .*diverged in training"):
        draw(Diverged(2), config, range(4))
    assert sorted(draw(Diverged(2), config, [0, 3])) == [0, 3]  # which are sound


def test_guidance_and_labels_need_a_conditional_model():
    unconditional = ExactGaussian(2)
    with pytest.raises(ValueError, match="no null class"):
        sample_images(unconditional, SamplerConfig(guidance=2.0), [0])
    with pytest.raises(ValueError, match="pass no labels"):
        sample_images(unconditional, SamplerConfig(), [0], labels=[0])


def test_no_indices_give_no_images(model):
    assert draw(model, SamplerConfig(), []) == {}


def test_progress_counts_model_calls(model, capsys):
    draw(model, SamplerConfig(steps=3, batch_size=2), range(4), progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "images/s" in shown


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_on_a_gpu_too_an_image_has_its_own_bytes(model, config):
    on_gpu = DiT(**model.config).cuda()
    on_gpu.load_state_dict(model.state_dict())
    whole = {i: image.cpu() for i, image in draw(on_gpu, config, range(8)).items()}
    part = {i: image.cpu() for i, image in draw(on_gpu, config, [6, 1]).items()}
    assert_same_bytes(part, {6: whole[6], 1: whole[1]})

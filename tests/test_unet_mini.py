"""The U-Net: any size, any dtype, every parameter used, and the small pieces equal to their formulas."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from torch import nn

from mini_ddpm.models.blocks import MiniGroupNorm, MiniResnetBlock, timestep_embedding
from mini_ddpm.models.unet_mini import PRESETS, MiniUNet2DModel

TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}


def tiny(**overrides):
    """A network of a few thousand parameters whose zero-initialised layers are not zero, so that all of it matters."""
    torch.manual_seed(0)
    unet = MiniUNet2DModel(**{**TINY, **overrides})
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return unet.eval()


@pytest.mark.parametrize("size", [(28, 28), (7, 7), (33, 33), (5, 28), (1, 1)])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_any_size(size, patch_size):
    unet = tiny(patch_size=patch_size, down_block_types=("DownBlock2D", "AttnDownBlock2D"))
    sample = torch.randn(2, 1, *size)
    output = unet(sample, 5).sample
    assert output.shape == sample.shape
    assert output.isfinite().all() and output.std() > 0


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_channel_count_and_learned_variance(channels):
    unet = tiny(in_channels=channels, out_channels=2 * channels)
    assert unet(torch.randn(2, channels, 14, 14), 5).sample.shape == (2, 2 * channels, 14, 14)


def test_padding_of_odd_sizes_does_not_leak_into_even_ones():
    unet, seen = tiny(), []
    unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sample = torch.randn(1, 1, 28, 28)
    unet(sample, 3)
    assert torch.equal(seen[0], nn.functional.pixel_unshuffle(sample, 2))  # nothing was padded
    cropped, padded = sample[..., :27, :27], sample.clone()
    padded[..., 27, :], padded[..., :, 27] = padded[..., 26, :], padded[..., :, 26]
    padded[..., 27, 27] = sample[..., 26, 26]
    torch.testing.assert_close(unet(cropped, 3).sample, unet(padded, 3).sample[..., :27, :27])


@pytest.mark.parametrize("num_class_embeds", [None, 11])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_gets_a_gradient(preset, num_class_embeds):
    small = {"mini": TINY}.get(preset, {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4})
    torch.manual_seed(0)
    unet = MiniUNet2DModel.from_preset(preset, num_class_embeds=num_class_embeds, **small)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    labels = torch.arange(11) if num_class_embeds else None
    unet(torch.randn(11, 1, 28, 28), torch.arange(11) * 90, labels).sample.square().mean().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("preset", ["mini", "tutorial-32"])
def test_starts_near_zero(preset):
    # So the first loss is that of predicting the mean, but all of the network that is not behind a zero can learn.
    torch.manual_seed(0)
    unet = MiniUNet2DModel.from_preset(preset)
    output = unet(torch.randn(2, 1, 28, 28), 5).sample
    assert 0 < output.square().mean() < 0.05
    output.square().mean().backward()
    assert unet.conv_in.weight.grad.any()


@pytest.mark.parametrize(
    "timestep",
    [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7]), torch.full((3,), 7), torch.full((3,), 7.0)],
)
def test_timesteps_broadcast(timestep):
    unet, sample = tiny(), torch.randn(3, 1, 14, 14)
    torch.testing.assert_close(unet(sample, timestep).sample, unet(sample, torch.tensor([7, 7, 7])).sample)


def test_timesteps_and_labels_matter_row_by_row():
    unet = tiny(num_class_embeds=11)
    sample = torch.randn(1, 1, 14, 14).expand(4, -1, -1, -1)
    output = unet(sample, torch.tensor([1, 900, 1, 1]), torch.tensor([2, 2, 3, 10])).sample
    for row in (1, 2, 3):
        assert (output[0] - output[row]).abs().max() > 1e-4


def test_no_label_is_the_null_label():
    unet, sample = tiny(num_class_embeds=11), torch.randn(2, 1, 14, 14)
    assert torch.equal(unet(sample, 5).sample, unet(sample, 5, torch.tensor([10, 10])).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    unet, sample = tiny(), torch.randn(2, 1, 28, 28)
    expected = unet(sample, 999).sample
    actual = unet.to(dtype)(sample.to(dtype), 999).sample
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float16])
def test_timestep_embedding_is_its_formula_also_in_half_precision(dtype):
    emb = timestep_embedding(torch.tensor([999], dtype=dtype), 8)  # 999 is exact in float16
    assert emb.shape == (1, 8) and emb.dtype == torch.float32
    for i in range(4):
        phase = 999 * 10_000 ** (-i / 4)
        assert emb[0, i].item() == pytest.approx(math.cos(phase), abs=1e-4)
        assert emb[0, 4 + i].item() == pytest.approx(math.sin(phase), abs=1e-4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("count", [1, 3])
def test_the_fast_group_norm_is_the_plain_one(dtype, tolerance, count):
    norm = MiniGroupNorm(4, 12).to(dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    plain = (torch.randn(count, 12, 5, 6) * torch.rand(12, 1, 1) + torch.randn(12, 1, 1)).to(dtype).requires_grad_()
    fast = plain.detach().to(memory_format=torch.channels_last).requires_grad_()
    scale, shift = torch.randn(2, count, 12, dtype=dtype)
    weight = torch.randn(count, 12, 5, 6, dtype=dtype)
    for arguments in ((), (scale, shift)):
        expected, actual = norm(plain, *arguments), norm(fast, *arguments)
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
        gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y, x in ((expected, plain), (actual, fast))]
        assert (gradients[1] - gradients[0]).abs().max() <= 4 * tolerance * gradients[0].abs().max()


@pytest.mark.parametrize("count", [1, 3])
def test_the_fast_path_of_the_network_is_the_plain_one(monkeypatch, count):
    unet, sample, timesteps = tiny(), torch.randn(count, 1, 28, 20), torch.tensor([5, 500, 999])[:count]
    fast = unet(sample, timesteps).sample
    formats = []

    def plain(norm, x, scale=None, shift=None):
        formats.append(x.is_contiguous(memory_format=torch.channels_last))
        x = torch.nn.functional.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return x if scale is None else x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]

    monkeypatch.setattr(MiniGroupNorm, "forward", plain)
    torch.testing.assert_close(unet(sample, timesteps).sample, fast, atol=1e-5, rtol=1e-4)
    assert formats[0] == (count > 1)  # what the stem makes on a CPU
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(unet(sample, timesteps).sample, fast, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("traced", [1, 2])
def test_a_traced_network_takes_any_batch(traced):
    unet, sample, timesteps = tiny(num_class_embeds=11), torch.randn(3, 1, 28, 28), torch.tensor([5, 500, 999])
    labels = torch.tensor([3, 1, 4])
    given = (sample[:traced], timesteps[:traced], labels[:traced])
    unet.requires_grad_(False)
    network = torch.jit.trace(lambda *parts: unet(*parts, return_dict=False)[0], given)
    torch.testing.assert_close(network(sample, timesteps, labels), unet(sample, timesteps, labels).sample)


def test_images_of_a_batch_do_not_see_each_other():
    unet, sample, timesteps = tiny(), torch.randn(5, 1, 28, 28), torch.tensor([1, 10, 100, 500, 999])
    output = unet(sample, timesteps).sample
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(unet(sample[order], timesteps[order]).sample, output[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(unet(sample[2:3], timesteps[2:3]).sample, output[2:3], atol=1e-5, rtol=1e-4)


def test_config_round_trip(tmp_path):
    unet = tiny(num_class_embeds=11, patch_size=1, dropout=0.1, sample_size=(28, 20))
    unet.save_pretrained(tmp_path)
    again = MiniUNet2DModel.from_pretrained(tmp_path)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in unet.config.items() if k[0] != "_"} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in again.config.items() if k[0] != "_"
    }
    sample = torch.randn(1, 1, 28, 20)
    torch.testing.assert_close(again(sample, 5).sample, unet(sample, 5).sample)


def test_gradient_checkpointing_gives_the_same_gradients():
    sample, gradients = torch.randn(2, 1, 14, 14), []
    for checkpointing in (False, True):
        unet = tiny().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(sample, 5).sample.square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_fused_qkv_gives_the_same_output():
    unet, sample = tiny(), torch.randn(2, 1, 14, 14)
    expected = unet(sample, 5).sample
    unet.fuse_qkv_projections()
    assert any("to_qkv" in name for name, _ in unet.named_modules())
    torch.testing.assert_close(unet(sample, 5).sample, expected)
    unet.unfuse_qkv_projections()
    torch.testing.assert_close(unet(sample, 5).sample, expected)


def test_attention_is_softmax_attention():
    attention = tiny().mid_block.attentions[0]
    hidden = torch.randn(2, 16, 3, 5)
    tokens = attention.norm(hidden).flatten(2).transpose(1, 2)
    q, k, v = (
        layer(tokens).unflatten(-1, (2, 8)).transpose(1, 2)
        for layer in (attention.to_q, attention.to_k, attention.to_v)
    )
    mixed = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
    out = attention.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(hidden.shape)
    torch.testing.assert_close(attention(hidden), hidden + out)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"block_out_channels": (10, 16)}, '10, not divisible by norm_num_groups=4. norm_num_groups="auto" derives'),
        ({"block_out_channels": (15, 16), "norm_num_groups": "auto"}, "15, which must be even"),
        ({"norm_num_groups": "automatic"}, "norm_num_groups='automatic' must be a whole number"),
        ({"block_out_channels": "auto"}, "block_out_channels='auto' must be a list"),
        ({"block_out_channels": (8, 12), "norm_num_groups": 4}, "attention_head_dim=8"),
        ({"down_block_types": ("DownBlock2D",)}, 'block_out_channels 2.*down_block_types="auto" derives it'),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "CrossAttnDownBlock2D"),
        ({"num_class_embeds": 1}, "num_class_embeds=1"),
        *(({name: value}, name) for name, value in [
            ("layers_per_block", 0), ("layers_per_block", 10**6), ("layers_per_block", 1.0),
            ("layers_per_block", True), ("block_out_channels", (8,) * 5000), ("block_out_channels", (8, 10**9)),
            ("block_out_channels", 8),
            ("block_out_channels", ("8", 16)), ("down_block_types", "DownBlock2D"), ("down_block_types", (["x"], "y")),
            ("attention_head_dim", 0), ("norm_num_groups", 0), ("norm_eps", float("nan")), ("norm_eps", 0.0),
            ("norm_eps", "1e-5"), ("dropout", 1.0), ("dropout", float("nan")), ("patch_size", 0), ("patch_size", 1.5),
            ("sample_size", 0), ("sample_size", (8, 8, 8)), ("sample_size", 10**12), ("in_channels", 0),
            ("out_channels", -1), ("head_channels", -1), ("num_class_embeds", 10**12), ("add_attention", "NaN"),
        ]),
    ],
)  # fmt: skip
def test_impossible_shapes_are_refused_by_name(config, named):
    """Before anything is built, so that no number makes the check itself endless."""
    with torch.device("meta"), pytest.raises(ValueError, match=named):
        MiniUNet2DModel(**{**TINY, **config})
    with pytest.raises(ValueError, match=named):
        MiniUNet2DModel(**{**TINY, **config})


@pytest.mark.parametrize(
    ("config", "levels", "groups", "head_dim"),
    [
        ({}, "DA", 32, 32),
        ({"block_out_channels": (16, 32)}, "DA", 16, 32),
        ({"block_out_channels": [16, 24, 40]}, "DAA", 8, 8),
        ({"block_out_channels": (34, 66)}, "DA", 2, 22),
        ({"block_out_channels": (48,)}, "D", 24, 24),
        ({"block_out_channels": (16, 48), "add_attention": False}, "DA", 16, 24),
        ({"block_out_channels": (16, 48), "down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "AD", 16, 16),
        ({"block_out_channels": (16, 48), "norm_num_groups": 8, "attention_head_dim": 12}, "DA", 8, 12),
    ],
)
def test_widths_alone_make_a_network(config, levels, groups, head_dim, tmp_path):
    """Types of level, groups and heads are derived. What is saved holds them, as each version wants it."""
    unet = MiniUNet2DModel(**config, layers_per_block=1)
    types = [{"D": "DownBlock2D", "A": "AttnDownBlock2D"}[level] for level in levels]
    expected = {"down_block_types": types, "norm_num_groups": groups, "attention_head_dim": head_dim}
    assert unet.mid_block.resnets[0].norm1.num_groups == groups
    unet.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in expected} == expected
    sample = torch.randn(1, 1, 8, 8)
    loaded = MiniUNet2DModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == unet.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), unet.state_dict().values()))
    # The last bits of the output differed once on a CPU in CI, perhaps with the place of the weights in memory.
    torch.testing.assert_close(loaded(sample, 5).sample, unet.eval()(sample, 5).sample)


def test_other_widths_for_a_saved_network(tmp_path):
    """What a configuration says stays, and the error tells how to have it derived anew."""
    MiniUNet2DModel(layers_per_block=1).save_pretrained(tmp_path)
    saved, other = MiniUNet2DModel.load_config(tmp_path), {"block_out_channels": (16, 24, 24)}
    with pytest.raises(ValueError, match='2 entries and block_out_channels 3.*down_block_types="auto"'):
        MiniUNet2DModel.from_config(saved, **other)
    with pytest.raises(ValueError, match='16, not divisible by norm_num_groups=32. norm_num_groups="auto"'):
        MiniUNet2DModel.from_config(saved, **other, down_block_types="auto")
    derived = dict.fromkeys(("down_block_types", "norm_num_groups", "attention_head_dim"), "auto")
    unet = MiniUNet2DModel.from_config(saved, **other, **derived)
    assert unet.config.norm_num_groups == 8 and unet.config.attention_head_dim == 24
    # Not saved, the configuration knows what was left to the defaults.
    unet = MiniUNet2DModel.from_config(MiniUNet2DModel(layers_per_block=1).config, **other)
    assert unet.config.norm_num_groups == 8 and len(unet.down_blocks) == 3


def test_values_of_numpy_and_no_sample_size_are_taken():
    unet = MiniUNet2DModel(**{**TINY, "layers_per_block": np.int64(1), "norm_eps": np.float32(1e-5)})
    assert len(unet.down_blocks[0].resnets) == 1
    assert MiniUNet2DModel(**{**TINY, "sample_size": None}).config.sample_size is None
    assert MiniUNet2DModel(**{**TINY, "sample_size": (8, 12)}).config.sample_size == (8, 12)


def test_wrong_input_is_refused():
    unet = tiny()
    with pytest.raises(ValueError, match="3 channels"):
        unet(torch.randn(1, 3, 28, 28), 5)
    with pytest.raises(ValueError, match="unconditional"):
        unet(torch.randn(1, 1, 28, 28), 5, torch.tensor([1]))
    with pytest.raises(ValueError, match="tutorial-32"):
        MiniUNet2DModel.from_preset("huge")


def test_a_pickle_is_read_only_on_request(tiny_unet, tmp_path):
    """diffusers falls back to a pickle if there are no safetensors. Pipelines pass `use_safetensors=None`."""
    unet = tiny_unet()
    unet.save_pretrained(tmp_path, safe_serialization=False)
    assert [file.suffix for file in tmp_path.iterdir() if "diffusion" in file.name] == [".bin"]
    for options in ({}, {"use_safetensors": None}, {"use_safetensors": True}):
        with pytest.raises(OSError, match="safetensors"):
            MiniUNet2DModel.from_pretrained(tmp_path, **options)
    loaded = MiniUNet2DModel.from_pretrained(tmp_path, use_safetensors=False)
    assert all(map(torch.equal, loaded.state_dict().values(), unet.state_dict().values()))


def test_the_presets_of_the_tutorial():
    """Dim 32 or 64, multipliers 1, 2, 4, 8, one block per level, single pixels, no attention."""
    for name, dim in (("tutorial-32", 32), ("tutorial-64", 64)):
        unet = MiniUNet2DModel.from_preset(name)
        assert unet.config.block_out_channels == (dim, 2 * dim, 4 * dim, 8 * dim)
        assert unet.conv_in.in_channels == unet.conv_out.out_channels == 1  # patches of one pixel
        assert [len(block.resnets) for block in unet.down_blocks] == [1] * 4
        assert not any("to_q" in key for key in unet.state_dict())
    assert MiniUNet2DModel.from_preset("mini").config == MiniUNet2DModel(head_channels=8).config


def test_a_residual_block_adds_its_branch():
    block = MiniResnetBlock(4, 4, 8, norm_num_groups=2, norm_eps=1e-5, dropout=0.0)
    nn.init.ones_(block.conv2.bias)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x, torch.randn(2, 8)), x + 1)


def test_the_size_of_the_default_network():
    """That of the weights that ship: every layer has its place and its width."""
    unet = MiniUNet2DModel(num_class_embeds=11)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_960_100
    defaults = ("sample_size", "in_channels", "out_channels", "attention_head_dim", "norm_eps", "dropout")
    assert [unet.config[name] for name in defaults] == [28, 1, 1, 32, 1e-5, 0.0]
    one_class = MiniUNet2DModel(num_class_embeds=2, norm_num_groups=8, block_out_channels=(16, 32))
    assert one_class.class_embedding.num_embeddings == 2  # and the null label


def test_the_mid_block_attends_at_the_last_width():
    options = {"block_out_channels": (16, 32, 36), "down_block_types": ("DownBlock2D",) * 3, "norm_num_groups": 4}
    with pytest.raises(ValueError, match="36 with attention, not divisible by attention_head_dim=8"):
        MiniUNet2DModel(**options, attention_head_dim=8)
    assert MiniUNet2DModel(**options, attention_head_dim=12)  # which divides 36 alone


def test_offline_the_hub_is_not_asked(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(lambda cls, path, **kwargs: seen.append(kwargs)))
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        MiniUNet2DModel.from_pretrained(tmp_path)
    assert seen == [{"use_safetensors": True}, {"use_safetensors": True, "local_files_only": True}]


def test_a_new_head_changes_nothing_and_sees_across_the_patches():
    torch.manual_seed(0)
    plain = MiniUNet2DModel(block_out_channels=(32, 32), layers_per_block=1, out_channels=2).eval()
    torch.manual_seed(0)
    with_head = MiniUNet2DModel(
        block_out_channels=(32, 32), layers_per_block=1, out_channels=2, head_channels=3
    ).eval()
    with torch.no_grad():
        for name in ("weight", "bias"):  # the first channels of the patches are the prediction
            getattr(with_head.conv_out, name)[: 2 * 4] = getattr(plain.conv_out, name)
    weights = plain.state_dict()
    weights |= {key: value for key, value in with_head.state_dict().items() if "conv_out" in key or "head" in key}
    with_head.load_state_dict(weights)
    sample = torch.randn(2, 1, 9, 12)
    expected = plain(sample, 5).sample
    torch.testing.assert_close(with_head(sample, 5).sample, expected)
    torch.nn.init.normal_(with_head.head.conv2.weight)
    with torch.no_grad():
        for parameter in with_head.conv_out.parameters():
            parameter.zero_()
    changed = sample.clone()
    changed[0, 0, 3, 3] += 1  # the last pixel of a patch
    difference = (with_head(changed, 5).sample - with_head(sample, 5).sample)[0].abs().sum(0)
    assert difference[4, 4] > 0  # and the first of the next
    assert difference[1:6, 1:6].sum().item() == pytest.approx(
        difference.sum().item()
    )  # two convolutions reach two pixels


def test_networks_saved_without_a_head_load_as_they_were(tmp_path):
    unet = MiniUNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), layers_per_block=1)
    unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_channels"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = MiniUNet2DModel.from_pretrained(tmp_path)
    assert loaded.head is None
    assert torch.equal(loaded(torch.ones(1, 1, 4, 4), 3).sample, unet.eval()(torch.ones(1, 1, 4, 4), 3).sample)

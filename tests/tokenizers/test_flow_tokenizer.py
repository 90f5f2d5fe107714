"""Solver choices and saved step grids of the tokenizers that sample a flow."""

import dataclasses

import pytest
import torch

from headrace.flow.solver import SolverSettings
from headrace.flow.step_grid import GRID_FILE, GridMismatch, StepGrid
from headrace.nn.patch_flow import power_grid
from headrace.tokenizers.flowtok import FlowTok
from headrace.tokenizers.flowtok_bridge import transport
from headrace.tokenizers.flowtok_config import FlowTokConfig
from headrace.tokenizers.uniflow import UniFlow
from headrace.tokenizers.uniflow_config import UniFlowConfig
from headrace.tokenizers.uniflow_encoders import ENCODERS

TIMES = (0.0, 0.2, 1.0)
OTHER = SolverSettings(steps=3, method="heun")
CAPTIONS = ["red square top left", "blue circle bottom right"]


def uniflow():
    torch.manual_seed(0)
    encoder = dataclasses.replace(ENCODERS["tiny"], image_size=32, depth=1)
    return UniFlow(UniFlowConfig(encoder=encoder, latent_channels=16, global_depth=1, flow_depth=1, steps=3,
                                 schedule_power=0.5, init_gain=1.0)).eval()  # fmt: skip


def flowtok():
    torch.manual_seed(0)
    model = FlowTok(FlowTokConfig.tiny())
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def uniflow_pictures(model, **options):
    latents = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    return model.decode(latents, **options)


def flowtok_tokens(model, **options):
    return model.generate_tokens(CAPTIONS, **options)


@pytest.mark.parametrize(("build", "sample"), [(uniflow, uniflow_pictures), (flowtok, flowtok_tokens)])
@torch.no_grad()
def test_a_saved_grid_is_followed_and_a_tuned_network_refuses_others(build, sample, tmp_path):
    model = build()
    on_grid, by_heun = (sample(model, solver=s) for s in (SolverSettings(grid=TIMES), OTHER))
    assert not torch.allclose(on_grid, sample(model), atol=1e-3) and not torch.allclose(by_heun, on_grid, atol=1e-3)
    with pytest.raises(ValueError, match="either steps or solver"):
        sample(model, steps=2, solver=OTHER)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / GRID_FILE).exists()
    grid = StepGrid(times=TIMES)
    grid.save(tmp_path)
    untuned = type(model).from_pretrained(tmp_path)
    assert torch.equal(sample(untuned), on_grid) and torch.equal(sample(untuned, solver=OTHER), by_heun)
    dataclasses.replace(grid, tuned=True).save(tmp_path)
    type(model).from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    tuned = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(sample(tuned), on_grid) and torch.equal(sample(tuned, solver=grid.settings), on_grid)
    for options in ({"solver": OTHER}, {"steps": 2}):
        with pytest.raises(GridMismatch, match="straightened for 2 Euler steps"):
            sample(tuned, **options)
    model.save_pretrained(tmp_path / "again")  # other weights in its place
    assert type(model).from_pretrained(tmp_path / "again").step_grid is None


@torch.no_grad()
def test_the_default_of_uniflow_is_its_power_grid():
    model = uniflow()
    asked = SolverSettings(grid=power_grid(3, 0.5))
    assert torch.equal(uniflow_pictures(model), uniflow_pictures(model, solver=asked))


@torch.no_grad()
def test_a_step_count_means_the_same_beside_a_grid_that_binds_nobody():
    model = flowtok()
    model.config = dataclasses.replace(model.config, legacy_grid=True)
    before = model.generate(["red circle"], steps=4)
    model.step_grid = StepGrid(times=TIMES)
    assert torch.equal(model.generate(["red circle"], steps=4), before)
    assert not torch.equal(model.generate(["red circle"], solver=SolverSettings(steps=4)), before)


@torch.no_grad()
def test_captions_do_not_follow_the_grid_of_text_to_image():
    model = flowtok()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model.caption(images, steps=2)
    model.step_grid = StepGrid(times=TIMES, tuned=True)
    assert model.caption(images, steps=2) == before == model.caption(images, solver=SolverSettings(steps=2))


@torch.no_grad()
def test_guidance_acts_inside_its_interval_and_saves_rows_outside():
    net, source = flowtok().to_image.velocity, torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    rows = []
    hook = net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    some = transport(net, source, steps=4, guidance=3.0, interval=(0.25, 0.75))
    hook.remove()
    assert rows == [2, 4, 4, 2]
    assert not torch.allclose(some, transport(net, source, steps=4, guidance=3.0), atol=1e-4)
    assert not torch.allclose(some, transport(net, source, steps=4), atol=1e-4)
    everywhere = transport(net, source, solver=SolverSettings(steps=4), guidance=3.0, interval=(0.0, 1.0))
    assert torch.equal(everywhere, transport(net, source, steps=4, guidance=3.0))
    with pytest.raises(ValueError, match="interval must rise"):
        transport(net, source, steps=4, guidance=3.0, interval=(0.5, 0.5))
    with pytest.raises(ValueError, match="legacy grid knows no guidance interval"):
        transport(net, source, steps=4, guidance=3.0, interval=(0.0, 0.5), legacy_grid=True)
    with pytest.raises(ValueError, match="dopri5 steps across"):
        adaptive = SolverSettings(method="dopri5", tolerance=1e-3)
        transport(net, source, solver=adaptive, guidance=3.0, interval=(0.0, 0.5))
    with pytest.raises(ValueError, match="either steps or solver"):
        transport(net, source)

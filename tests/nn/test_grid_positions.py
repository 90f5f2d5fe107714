import pytest
import torch

from headrace.nn.grid_positions import GridPositions, sincos_1d, sincos_2d


def test_column_fills_the_first_half_and_row_the_second():
    table = sincos_2d((3, 5), 16).reshape(3, 5, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8])
    assert torch.equal(table[:, 0, 8:], table[:, 4, 8:])
    assert torch.equal(table[0, :, :8], sincos_1d(torch.arange(5), 8))


def test_native_grid_is_the_table_itself_and_others_keep_the_geometry():
    positions = GridPositions((4, 4), 16)
    assert positions((4, 4)) is positions.table
    smaller = positions((2, 2)).reshape(2, 2, 16)
    rows = smaller[:, :, 8:]
    torch.testing.assert_close(rows[:, 0], rows[:, 1])
    assert (rows[0, 0] - rows[1, 0]).abs().max() > 0.1


def test_a_ramp_keeps_its_slope_inside():
    positions = GridPositions((8, 8), 4)
    with torch.no_grad():
        ramp = torch.arange(8.0)
        positions.table.copy_(ramp[None, :, None].expand(8, 8, 4).reshape(1, 64, 4))
    wide = positions((8, 16)).reshape(8, 16, 4)[0, 4:12, 0]
    torch.testing.assert_close(wide[2:] - wide[:-2], torch.ones(6))


def test_refusing_other_grids():
    with pytest.raises(ValueError, match=r"4 x 4, got 8 x 8.*interpolate_positions"):
        GridPositions((4, 4), 16, interpolate=False)((8, 8))

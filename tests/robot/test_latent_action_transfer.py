import numpy as np
import pytest
import torch

from headrace.robot.latent_action import LatentActionModel
from headrace.robot.latent_action_config import LatentActionConfig
from headrace.robot.latent_action_transfer import carry_over, picture, write_page


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LatentActionModel(LatentActionConfig.tiny(image_size=32)).eval()


def test_a_clip_driven_by_itself_is_its_own_rollout(model):
    clips = torch.rand(2, 4, 3, 32, 32)
    other = torch.rand(2, 4, 3, 32, 32)
    same, crossed = carry_over(model, clips, clips), carry_over(model, other, clips)
    np.testing.assert_array_equal(same.driven, same.own)
    np.testing.assert_array_equal(same.own, crossed.own)
    np.testing.assert_array_equal(crossed.driven[:, 0], crossed.start[:, 0])
    assert (crossed.driven != crossed.own).any()
    np.testing.assert_array_equal(crossed.codes, model.encode(other).codes.numpy())
    with pytest.raises(ValueError, match="one shape"):
        carry_over(model, clips, clips[:, :2])


def test_the_page_holds_its_pictures_and_escapes_words(model, tmp_path):
    transfer = carry_over(model, torch.rand(2, 3, 3, 32, 32), torch.rand(2, 3, 3, 32, 32))
    assert picture(transfer, 0).size == (3 * 32 * 2, 4 * 32 * 2)
    write_page(transfer, tmp_path / "page.html", title="a < b")
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 2 and "a &lt; b" in text and "http" not in text

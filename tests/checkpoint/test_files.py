"""What is there already, and what cannot be written, where files are to be made."""

import pytest
import torch

from cosmos_mcore.checkpoint.convert import convert
from tests.checkpoint.models import random_weights, reduced, save_model

ARCH = reduced("4b")


@pytest.mark.parametrize("name", ["layers.1.feed_forward.w3.weight", "layers.2.attention.wo.weight"])
def test_what_is_stored_as_one_tensor_has_one_dtype(tmp_path, name):
    weights = random_weights(ARCH)
    weights[name] = weights[name].float()
    save_model(tmp_path / "model.pt", weights)
    with pytest.raises(ValueError, match=f"model.pt: layers.0.* and {name} differ in dtype: cannot be joined"):
        convert(tmp_path / "model.pt", tmp_path / "out", "distributed")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "model.pt", tmp_path / "out.pt", "monolithic")
    assert torch.load(tmp_path / "out.pt", weights_only=True)["model." + name].dtype is torch.float32

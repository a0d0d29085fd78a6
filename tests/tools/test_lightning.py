"""A Lightning ``Trainer`` trains a module with an invertible trunk as it would a plain one."""

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import invzoo as iz
from tests.tools.nets import BATCH, Net, assert_learns_and_saves, examples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*logging interval"),  # advice
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),  # and it may have no data
    pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore::FutureWarning"),  # its own use of others
]


class Regression(LightningModule):
    def __init__(self, depth: int = 8) -> None:
        super().__init__()
        self.net, self.losses = Net(depth), []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.net(**batch)["loss"]
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("validation", self.net(**batch)["loss"])

    def on_validation_epoch_end(self) -> None:
        self.losses.append(self.trainer.callback_metrics["validation"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def trainer(tmp_path, **options) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(default_root_dir=tmp_path, **{"max_epochs": 4, "accelerator": "cpu", **quiet, **options})


def loader(*, shuffle: bool = False, dtype: torch.dtype = torch.float64) -> DataLoader:
    return DataLoader([{k: v.to(dtype) for k, v in e.items()} for e in examples()], BATCH, shuffle=shuffle)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_fit(tmp_path, accumulated: int):
    def train(module: Regression) -> list[float]:
        fitter = trainer(tmp_path, gradient_clip_val=1.0, accumulate_grad_batches=accumulated)
        fitter.fit(module, loader(shuffle=True), loader())
        return module.losses

    assert_learns_and_saves(lambda: Regression().double(), train)


def test_fit_in_mixed_precision(tmp_path):
    def train(module: Regression) -> list[float]:
        data = loader(dtype=torch.float32)
        trainer(tmp_path, precision="bf16-mixed", max_epochs=3).fit(module, data, data)
        return module.losses

    assert_learns_and_saves(Regression, train, rtol=5e-2, less=2)


@pytest.mark.usual
def test_checkpoints(tmp_path):
    module = Regression(depth=2).double()
    fitter = trainer(tmp_path, max_epochs=1)
    fitter.fit(module, loader())
    fitter.save_checkpoint(tmp_path / "all.ckpt")
    loaded = Regression.load_from_checkpoint(tmp_path / "all.ckpt", depth=2, weights_only=True)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), check_dtype=False)
    trainer(tmp_path, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "all.ckpt")
    assert module.current_epoch == 2


@pytest.mark.usual
def test_an_error_of_a_layer_reaches_the_caller(tmp_path):
    class Careless(Regression):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            with torch.no_grad():
                self.net.trunk[0].f[0].weight.mul_(1.1)
            return loss

    module = Careless(depth=2).double()
    with iz.mode(module, "invert"), pytest.raises(RuntimeError, match="parameters and buffers to stay as they were"):
        trainer(tmp_path).fit(module, loader())

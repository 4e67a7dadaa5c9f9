"""Training on a GPU: every stage runs there, and a run goes on where another device left it."""

import pytest
import torch

from vot_kernels.models.checkpoint import on_device
from vot_kernels.models.encoder.configuration import VotEncoderConfig
from vot_kernels.models.perception.modeling import VotPerceptionModel
from vot_kernels.train.encoder.metrics import encoder_metrics
from vot_kernels.train.encoder.settings import EncoderTraining
from vot_kernels.train.encoder.stage import build, random_features, train_encoder
from vot_kernels.train.linearize.run import run as linearize
from vot_kernels.train.linearize.settings import Linearization
from vot_kernels.train.perception.batches import digitworld_config
from vot_kernels.train.perception.run import run
from vot_kernels.train.perception.settings import PerceptionTraining
from vot_kernels.train.perception.stage import train_perception

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def short_domain(monkeypatch):
    monkeypatch.setattr("vot_kernels.train.perception.stage._DOMAIN_STEPS", 3)
    monkeypatch.setattr("vot_kernels.train.perception.stage._DOMAIN_HELD_OUT", 1)


def test_perception_goes_on_from_the_cpu(tmp_path):
    settings = PerceptionTraining(steps=2, batch_size=2, warmup=2, dynamics_steps=1, name_steps=1)
    train_perception(tmp_path, settings, stop_at=1)
    assert "five_objects" in run(tmp_path, settings, eval_clips=1, device="cuda")


def test_the_encoder_is_trained_on_its_teachers_device(tmp_path):
    settings = EncoderTraining(steps=1, batch_size=2, num_frames=2, caption_width=16)
    config = VotEncoderConfig.preset("nano")
    teacher = random_features(config)
    on_cpu = teacher.fingerprint
    on_device(teacher.encoder, "cuda")
    assert teacher.fingerprint == on_cpu
    model = train_encoder(tmp_path, settings, config, teacher)
    assert model.encoder.device.type == build(settings, config, teacher).encoder.device.type == "cuda"
    assert "probe_count" in encoder_metrics(model, teacher, settings, clips=6)


def test_linearization(tmp_path, monkeypatch):
    monkeypatch.setattr("vot_kernels.train.linearize.run._BATCH", 1)
    torch.manual_seed(0)
    VotPerceptionModel(digitworld_config("softmax")).save_pretrained(tmp_path / "teacher")
    settings = Linearization(layer_steps=1, steps=1)
    table = linearize(tmp_path / "run", tmp_path / "teacher", settings, eval_clips=1, device="cuda")
    assert "distilled" in table

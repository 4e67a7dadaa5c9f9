"""A step of GRPO with TRL: the frames reach the model in the rollout and in the update."""

import pytest
import torch
from PIL import Image

from tests.models.vot.tiny import tiny_model, tiny_processor
from vot_kernels.data.digitworld import generate_episode

pytest.importorskip("trl", reason="reinforcement learning needs trl: pip install 'vot-kernels[rl]'")
datasets = pytest.importorskip("datasets", reason="trl needs datasets")


@pytest.mark.fixed_seed  # a step of training
def test_grpo_reads_the_frames(tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    model, processor = tiny_model(), tiny_processor()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[tuple[bool, tuple[int, ...]]] = []

    def note(encoder, given, options):
        pixels = options.get("pixel_values", given[0] if given else None)
        seen.append((torch.is_grad_enabled(), tuple(pixels.shape)))

    model.model.encoder.register_forward_pre_hook(note, with_kwargs=True)
    frames = [
        [Image.fromarray(frame) for frame in generate_episode("train", n).frames()[: 2 + n]] for n in range(2)
    ]
    rows = [{"prompt": [{"role": "user", "content": "what?"}], "images": images} for images in frames]
    rewards: list[float] = []

    def reward(completions, **_):
        rewards.extend(float(len(set(c[0]["content"]))) for c in completions)
        return rewards[-len(completions) :]

    settings = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        learning_rate=1e-2,
        beta=0.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model,
        reward,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.train()
    assert len(rewards) == 4
    patches = 64 * 2 * (2 + 3)  # two generations about clips of 2 and of 3 frames of 8 × 8 patches
    assert (False, (patches, 192)) in seen  # the rollout
    assert (True, (patches, 192)) in seen  # the update
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for part in ("encoder.blocks", "projector", "language_model"):
        assert any(part in name for name in changed)

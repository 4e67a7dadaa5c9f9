"""What a variant does in a run: it is trained for a few steps and measured, or measured as it is."""

from vot_kernels.pipelines.ablation.tasks.base import Task
from vot_kernels.pipelines.ablation.tasks.encoders import Encoder, Perception
from vot_kernels.pipelines.ablation.tasks.language import Answers, Reading, Reinforcement

TASKS: dict[str, Task] = {
    "perception": Perception(),
    "encoder": Encoder(),
    "reading": Reading(),
    "reinforcement": Reinforcement(),
    "answers": Answers(),
}

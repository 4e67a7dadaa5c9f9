"""Questions about a user's own videos: a JSONL file, its check, and converters of published data sets."""

from vot_kernels.data.questions.checking import Summary, check_questions
from vot_kernels.data.questions.converting import Conversion, convert_questions
from vot_kernels.data.questions.file import QuestionFile, split_questions
from vot_kernels.data.questions.lines import Line, read_lines
from vot_kernels.data.questions.question import (
    VideoQuestion,
    question_from_dict,
    question_to_dict,
)

__all__ = [
    "Conversion",
    "Line",
    "QuestionFile",
    "Summary",
    "VideoQuestion",
    "check_questions",
    "convert_questions",
    "question_from_dict",
    "question_to_dict",
    "read_lines",
    "split_questions",
]

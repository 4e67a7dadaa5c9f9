"""Other people's models on the kernels of this package, as far as they can be."""

from typing import Any

from vot_kernels.integrations.patching import patch, unpatch

_REFUSED = "vot_kernels.unpatch"  # every refusal of a patched attention says how to undo the patch


class Kernels:
    """A model after `vot_kernels.patch`; prints as what became of its modules.

    A model in which nothing can be replaced runs as it is, and so does one whose attention turns out, in a call, to ask
    for what the kernels do not have.

    Args:
        model: the model, which is patched.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        try:
            self.report = str(patch(model))
        except ValueError as error:
            self.report = f"Nothing runs on the kernels of vot-kernels: {error}"

    def __str__(self) -> str:
        return self.report

    def run(self, **inputs: Any) -> Any:
        """Call the model; take the patch back if it turns out not to serve this model."""
        try:
            return self.model(**inputs)
        except ValueError as error:
            if _REFUSED not in str(error):
                raise
            unpatch(self.model)
            self.report = f"Nothing runs on the kernels of vot-kernels: {str(error).split(';')[0]}."
        return self.model(**inputs)

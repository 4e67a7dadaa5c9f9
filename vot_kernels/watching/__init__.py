"""What looks at a clip: eyes, which see its scene graph, and readers, which answer questions about it."""

from vot_kernels.watching.protocols import Eyes, Reader, Sight

__all__ = ["Eyes", "Reader", "Sight"]

"""The ops in other libraries: drop-ins for their classes, named as they are, and patches. None of them is imported.

from longcat_kernels.integrations.vector_quantize_pytorch import ResidualVQ
from longcat_kernels.integrations import transformers; transformers.patch()
"""

"""Drop-ins for classes of other libraries, named as they are; none of those libraries is imported.

from longcat_kernels.integrations.vector_quantize_pytorch import ResidualVQ
"""

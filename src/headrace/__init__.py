"""headrace: from video to a robot arm.

Unified visual tokenizers and token pruning feed a video-language model; pretraining on videos without actions turns it
into a policy; a chunked flow-matching decoder drives a simulator or a real arm. Importing this package loads no torch.
"""

__version__ = "0.1.0"

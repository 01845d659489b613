"""Training: the PatchTST model, its data, its trainer, and the trial process that runs one attempt.

Never imports `scheduler`; the scheduler names these functions by dotted path, so a user's own can take their place.
`load_model` gives a trained model back.
"""

from training.model_file import TrainedModel, load_model

__all__ = ["TrainedModel", "load_model"]

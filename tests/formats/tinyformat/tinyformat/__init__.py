"""A format of somebody else's: ``weights.safetensors`` beside the model's configuration, run by transformers."""

"""What changes of weights do to a model, measured by forward passes: no file is written."""

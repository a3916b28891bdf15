"""Round matrices: what a quantizer is given and returns, error feedback, and rounded matrices that are kept."""

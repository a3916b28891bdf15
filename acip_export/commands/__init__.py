"""Commands that start in a fraction of a second: they must not import torch, numpy or the stages."""

"""seqrl: sequence-level reinforcement learning for language models, with GSPO at its heart."""

__version__ = "0.1.0"

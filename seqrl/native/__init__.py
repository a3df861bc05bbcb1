"""One forward of Llama, Qwen2, Qwen3 and Qwen3-MoE, for decoding and for training alike.

Both engines run these few operations on the trainer's own tensors, so that what the rollout says of a token
is what the training says of it. `weights.py` reads a transformers model, `forward.py` runs it, `experts.py`
has the mixture-of-experts layers.
"""

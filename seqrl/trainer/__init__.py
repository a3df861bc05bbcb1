"""The loop, and `python -m seqrl.trainer.main_ppo`."""

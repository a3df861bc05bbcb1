"""`actor_rollout_ref.actor`: the policy loss, its batches, and how it is spread over devices."""

from __future__ import annotations

from dataclasses import dataclass, field

from seqrl.config.schema.megatron import MegatronConfig, RefMegatronConfig
from seqrl.config.schema.model import FSDPConfig, OptimConfig


@dataclass
class PolicyLossConfig:
    loss_mode: str = "vanilla"
    """The policy loss: `gspo`, `gspo_token`, `vanilla` (PPO, GRPO, DAPO), `geo_mean` (GMPO), `sapo`, `cispo`,
    `gpg`, `clip_cov`, `kl_cov`, `dppo_tv`, `dppo_kl`, `dro`; or your own, as `module:function`."""
    clip_cov_ratio: float = 0.0002
    """`clip_cov`: the share of a mini-batch's tokens whose gradient is taken away."""
    clip_cov_lb: float = 1.0
    """`clip_cov`: these tokens are picked from those whose covariance is above this ..."""
    clip_cov_ub: float = 5.0
    """... and below this."""
    kl_cov_ratio: float = 0.0002
    """`kl_cov`: the share of a mini-batch's tokens, those of the largest covariance, that get a penalty."""
    ppo_kl_coef: float = 0.1
    """`kl_cov`: the weight of that penalty, the size of the token's log ratio."""
    dro_beta: float | None = None
    """`dro`: the weight of the squared log ratio; required there."""


@dataclass
class CheckpointConfig:
    save_contents: list[str] = field(default_factory=lambda: ["model", "optimizer", "extra", "hf_model"])
    """What a checkpoint holds: `model`, `optimizer` and `extra` always, so that a run can go on from any of
    them; `hf_model`, a Hugging Face directory with tokenizer, only where it is named."""


@dataclass
class ActorConfig:
    strategy: str = "fsdp"
    """The training engine: `fsdp` or `fsdp2` (on one device there is nothing to shard, and both are the plain
    model), or `megatron`."""
    ulysses_sequence_parallel_size: int = 1
    """`fsdp`: devices that share each sequence."""
    ppo_mini_batch_size: int = 256
    """Prompts per optimizer step; it divides `data.train_batch_size`."""
    ppo_micro_batch_size_per_gpu: int | None = None
    """Responses per forward and backward, where `use_dynamic_bsz` is off; null: the whole mini-batch."""
    use_dynamic_bsz: bool = False
    """Fill micro-batches by tokens, up to `ppo_max_token_len_per_gpu`, instead of by count."""
    ppo_max_token_len_per_gpu: int = 16384
    """Tokens per micro-batch, prompts included, under `use_dynamic_bsz`; also for log-probs. A group's prompt
    counts once where its responses read it in place: in seqrl's own forward on a CPU."""
    ppo_epochs: int = 1
    """Passes over each rollout batch."""
    shuffle: bool = False
    """Shuffle the responses before they are cut into mini-batches; else mini-batches hold whole groups."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    clip_ratio: float = 0.2
    """Both clip ranges, where `clip_ratio_low` and `clip_ratio_high` are null."""
    clip_ratio_low: float | None = None
    """The ratio is clipped below 1 - this. The GSPO paper: 3e-4. Under `geo_mean` the range is of log ratios,
    under `dppo_tv` and `dppo_kl` of divergences."""
    clip_ratio_high: float | None = None
    """The ratio is clipped above 1 + this. The GSPO paper: 4e-4."""
    clip_ratio_c: float = 3.0
    """Dual clip: with a negative advantage the loss never exceeds this times the advantage's size. Under
    `dppo_tv` and `dppo_kl` the bound of the ratio that weights a token."""
    clip_target_fraction: float | None = None
    """Auto clip, for `gspo` and `gspo_token`: each step moves both clip ranges towards the quantiles of the
    measured sequence ratios that would clip this share of the responses; the GSPO paper clips about 0.15.
    They stay within a tenth and ten times `clip_ratio_low` and `clip_ratio_high`; null: off."""
    tau_pos: float = 1.0
    """`sapo`: how steep the gate is where the advantage is positive."""
    tau_neg: float = 1.05
    """`sapo`: how steep the gate is elsewhere."""
    loss_agg_mode: str | None = None
    """How the surrogate becomes one number: `token-mean`, `seq-mean-token-sum`, `seq-mean-token-mean`,
    `seq-mean-token-sum-norm`, `token-sum`; null: the loss's own (`seq-mean-token-mean` for gspo, gspo_token,
    geo_mean and sapo, else `token-mean`)."""
    loss_scale_factor: float | None = None
    """The divisor of `seq-mean-token-sum-norm`, tokens; null: `data.max_response_length`."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    use_kl_loss: bool = False
    """Add the KL divergence from the reference model to the loss."""
    kl_loss_coef: float = 0.001
    """Its weight."""
    kl_loss_type: str = "low_var_kl"
    """Its estimator: `kl` (k1), `abs`, `mse` (k2) or `low_var_kl` (k3); with a `+` behind it, the estimator's
    value with k2's gradient, which is that of the true divergence on average; `full`: the divergence itself,
    over the whole vocabulary."""
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp_config: FSDPConfig = field(default_factory=FSDPConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class RefFSDPConfig:
    param_offload: bool = False
    """Keep the reference's weights in the CPU's memory while they are not used."""
    reshard_after_forward: bool = True
    """As the actor's."""
    forward_prefetch: bool = False
    """As the actor's."""
    model_dtype: str | None = None
    """Type the reference's weights are held in: `fp32` or `bf16`; null: as the actor's."""


@dataclass
class RefConfig:
    strategy: str | None = None
    """The reference's engine; null: the actor's, which it has to be."""
    log_prob_use_dynamic_bsz: bool | None = None
    """`actor.use_dynamic_bsz`, for the reference's log-probs; null: as there."""
    log_prob_max_token_len_per_gpu: int | None = None
    """Tokens per forward under `log_prob_use_dynamic_bsz`; null: `actor.ppo_max_token_len_per_gpu`."""
    log_prob_micro_batch_size_per_gpu: int | None = None
    """Responses per forward elsewhere; null: `actor.ppo_micro_batch_size_per_gpu`."""
    ulysses_sequence_parallel_size: int | None = None
    """As the actor's, which it is where null."""
    fsdp_config: RefFSDPConfig = field(default_factory=RefFSDPConfig)
    megatron: RefMegatronConfig = field(default_factory=RefMegatronConfig)

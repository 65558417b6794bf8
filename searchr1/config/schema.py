"""The typed tree behind a run's YAML; key names are RLinf's, additions are ours.

Each field has a type, a default and a line on its effect. Every other key is an error; RLinf's YAMLs go through
`searchr1/config/rlinf.py` first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from searchr1.algorithms.names import CorrectionBound, CorrectionLevel, LldsGate, LossAggregation
from searchr1.config.registered import Registered
from searchr1.config.schema_model import ActorConfig, CriticConfig, InferenceConfig, RolloutConfig
from searchr1.config.schema_reward import EvaluationConfig, HealthConfig, RewardConfig

DeviceSetting = Literal["auto", "cpu", "cuda"]
ALIASES = {"agentloop.maxturn": "agentloop.max_turns"}
"""Old names of keys, and their new ones."""


@dataclass
class ClusterConfig:
    """What runs where."""

    num_nodes: int = 1
    """Machines of a run: 1 only."""
    component_placement: dict[str, Any] = field(default_factory=lambda: {"actor,rollout,reward": "all"})
    """Group names (several with commas) -> slots: `all`, `0-3` or `0,2`. A slot is a GPU (slot 0 is the first that
    CUDA_VISIBLE_DEVICES names), or a process on a CPU."""
    device: DeviceSetting = "auto"
    """`auto` (a GPU if there is one), `cpu` or `cuda`."""
    slots: int | None = None
    """Number of slots that `all` stands for: null takes every GPU, or one process on a CPU."""


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.jsonl, and how many trajectories are written."""

    logger_backends: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of tensorboard, wandb, swanlab."""
    project_name: str = "searchr1"
    """Project in wandb and swanlab."""
    trajectories_per_step: int | None = 320
    """Trajectories of a training step that are written for the report, at most: whole groups, evenly spread over the step's
    questions. null writes all. A trajectory takes 2 to 15 kB. Evaluations are always written whole."""


@dataclass
class RunnerConfig:
    """The loop."""

    task_type: Literal["reasoning", "reasoning_eval"] | None = None
    """Task of the YAML: `reasoning` (training), `reasoning_eval` (evaluation), or null: an evaluation if
    `cluster.component_placement` places no actor."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """See `LoggerConfig`."""
    max_epochs: int = 1
    """Passes over the training questions."""
    max_steps: int = -1
    """Stop after this many steps; -1 goes by `max_epochs`."""
    val_check_interval: int = 25
    """Evaluate every so many steps and after the last; -1 never."""
    val_before_train: bool = True
    """Evaluate the starting point too."""
    save_interval: int = 25
    """Write a checkpoint every so many steps and after the last; -1 never."""
    keep_checkpoints: int | None = None
    """Delete all but the newest so many; null keeps all."""
    seq_length: int = 4096
    """Prompt and response tokens of one trajectory, at most."""
    max_tokens_per_mbs: int = 8192
    """Tokens of one packed micro-batch, at most."""
    async_save: bool = False
    """Write checkpoints while the next rollout runs; they take a copy of the actor's state in host memory."""
    resume_dir: str | None = None
    """A checkpoint folder `global_step_N`, or `auto` for the newest one of this run."""
    experiment_name: str = "searchr1"
    """Name of the run's folder."""
    output_dir: str = "results"
    """Where runs' folders are."""
    overwrite: bool = False
    """Write over an earlier run in the same folder."""
    seed: int = 1234
    """Seed of sampling and shuffling."""
    step_timeout_s: float = 3600.0
    """A phase of a step that takes longer ends the run with an error."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """See `HealthConfig`."""


@dataclass
class SamplingParams:
    """How the policy samples."""

    do_sample: bool = True
    """False is greedy."""
    temperature: float = 1.0
    """Softmax temperature; log-probabilities are taken at it too."""
    top_k: int = -1
    """-1 or anything above the vocabulary is off."""
    top_p: float = 1.0
    """1 is off."""
    repetition_penalty: float = 1.0
    """1 is off."""
    max_new_tokens: int | None = None
    """Response tokens, policy and tools, at most; null is what `runner.seq_length` leaves."""
    min_new_tokens: int = 1
    """Tokens of one generation, at least."""
    stop: list[str] = field(default_factory=lambda: ["</search>", "</access>", "</answer>"])
    """Strings that end a generation; they need `rollout.detokenize`."""


@dataclass
class MismatchCorrectionConfig:
    """Importance weights for the difference between engine and trainer: docs/algorithms/mismatch.md."""

    level: CorrectionLevel | None = None
    """`token`, `sequence` or `geometric`; null is off (the mismatch is measured all the same)."""
    bound: CorrectionBound = "truncate"
    """`truncate` (at `upper`), `clip` (into the bounds), `mask` (0 outside) or `reject` (1 inside, 0 outside)."""
    lower: float = 0.0
    """Smallest weight; 0 is no bound."""
    upper: float = 2.0
    """Largest weight."""
    veto: float = 0.0
    """Drop a sequence in which a token's probability fell below this factor of the sampled one; 0 is off."""
    normalize: bool = False
    """Divide by the mini-batch's mean weight; takes a forward pass more for the first mini-batch of a step."""


@dataclass
class AlgorithmConfig:
    """What is optimised, and how."""

    group_size: int = 5
    """Rollouts per question."""
    n_minibatches: int = 1
    """Optimizer steps per rollout step; a group is never split."""
    recompute_logprobs: bool = True
    """Old log-probabilities from the actor (True) or as sampled by the engine (False)."""
    shuffle_rollout: bool = False
    """Assign questions to mini-batches at random."""
    loss_type: Annotated[str, Registered("searchr1.algorithms.policy_losses:POLICY_LOSSES", own=True)] = "actor"
    """`actor` is PPO's clipped policy gradient; `gspo`, `cispo`, `sapo`, or `package.module:function`: see
    searchr1/algorithms/policy_losses."""
    loss_agg_func: LossAggregation = "token-mean"
    """`token-mean`, `seq-mean-token-sum`, `seq-mean-token-mean` or `seq-mean-token-sum-norm` (by the longest length)."""
    kl_beta: float = 0.001
    """Weight of the KL term; 0 needs no reference model and starts no inference group."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`loss`, or `reward`: the trajectory's KL at the weights that sampled, times `kl_beta`, is taken from its reward."""
    kl_penalty_type: Annotated[str, Registered("searchr1.algorithms.kl:KL_FUNCTIONS")] = "low_var_kl"
    """`low_var_kl` (k3), `kl` (k1), `mse` (k2) or `abs`."""
    ratio_clip_eps: float = 0.2
    """Clip range on both sides unless `clip_ratio_low` or `clip_ratio_high` says otherwise."""
    clip_ratio_low: float | None = None
    """Lower clip range; null is `ratio_clip_eps`."""
    clip_ratio_high: float | None = None
    """Upper clip range; null is `ratio_clip_eps`."""
    clip_ratio_c: float | None = None
    """Dual clip: bound of the loss for negative advantages; null is off."""
    sapo_tau_positive: float = 1.0
    """`loss_type: sapo`: how fast a token's weight falls off the policy, for positive advantages."""
    sapo_tau_negative: float = 1.05
    """The same for negative advantages."""
    llds_coef: float = 0.0
    """Weight of LLDS, which keeps the likelihood of good actions from falling; 0 is off, the paper has 0.1."""
    llds_gate: LldsGate = "action"
    """Unit that LLDS gates: `action` (a turn) or `response`."""
    mismatch_correction: MismatchCorrectionConfig = field(default_factory=MismatchCorrectionConfig)
    """See `MismatchCorrectionConfig`."""
    entropy_bonus: float = 0.0
    """Weight of the entropy bonus."""
    calculate_entropy: bool = False
    """Report the entropy even if the bonus is 0."""
    adv_type: Annotated[str, Registered("searchr1.algorithms.advantages:ADVANTAGES", more=("gae",), own=True)] = "grpo"
    """`grpo`, `grpo_dynamic`, `dr_grpo`, `rloo`, `reinforce++`, `reinforce++_baseline`, or `package.module:function`: see
    searchr1/algorithms/advantages."""
    loss_scales: list[str] = field(default_factory=list)
    """For `grpo_dynamic`; every scale is 1 for trajectories that are one sequence."""
    gamma: float = 1.0
    """`adv_type: gae`: discount per policy token."""
    gae_lambda: float = 1.0
    """`adv_type: gae`: 1 is the whole return, less is less varied and more biased."""
    advantage_mode: Literal["trajectory", "turn"] = "trajectory"
    """`trajectory`: all policy tokens of a trajectory share its advantage; `turn`: turns that search also get an
    advantage for what they retrieved (searchr1/algorithms/advantages/turn.py)."""
    turn_reward_weight: float = 1.0
    """`advantage_mode: turn`: weight of a turn's own part."""
    max_refills: int = 0
    """Replace groups without reward variance by new questions, at most so many times a step (DAPO's dynamic sampling)."""
    normalize_advantages: bool = False
    """Whiten advantages over the step's policy tokens."""
    early_stop_imp_ratio: float | None = None
    """Leave out the update of a mini-batch whose mean ratio is above this; null never does."""
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    """Training rollouts."""
    eval_sampling_params: SamplingParams | None = None
    """Evaluation; null is greedy with the training limits and stop strings."""


@dataclass
class AgentLoopConfig:
    """The multi-turn loop."""

    max_turns: int = 2
    """Turns that may call a tool; a last generation without tools follows."""
    force_final_turn: bool = True
    """After the last tool turn, generate once more without tools."""
    max_new_tokens_per_turn: int | None = None
    """Tokens of one generation, at most; null is what the trajectory has left."""
    max_tool_response_length: int = 500
    """Tokens of one tool text, at most; its tags are never cut."""
    tool_response_truncate_side: Literal["right", "left", "middle"] = "right"
    """Which end is cut off: `right`, `left` or `middle`."""
    information_style: Literal["searchr1", "rlinf"] = "searchr1"
    """How documents are shown: `searchr1` (`Doc 1(Title: …)`) or `rlinf` (`[Doc 1](url):`)."""
    invalid_action_message: str = (
        "\nThat was no valid action. To search, put the query between <search> and </search>. "
        "To answer, put the answer between <answer> and </answer>.\n"
    )
    """Shown to the policy after a turn that neither calls a tool nor answers."""
    toolcall_parser: Literal["tags", "searchr1", "searchr1-qwen"] = "tags"
    """How calls are read: `tags` (all of one kind), `searchr1` (Search-R1's one search) or `searchr1-qwen` (RLinf's)."""
    no_call_ends: bool = False
    """A turn without a tool call ends the rollout, as in RLinf."""
    end_token_ends: bool = True
    """A turn that calls nothing and ends with an end token ends the rollout; False drops the token and shows the message."""
    no_results_message: str | None = None
    """Shown where a search found nothing; null is `No search results are found.`, Search-R1 shows the empty text."""
    tool_text_tokens: Literal["parts", "whole"] = "parts"
    """How a tool text is tokenized: `parts` (tags and body apart) or `whole` (as one string, as Search-R1 and RLinf)."""
    generate_fn: str | None = None
    """Dotted path of an async function in place of `searchr1.agent.loop.run_trajectory`."""


@dataclass
class SearchToolConfig:
    """The search tool."""

    server_addr: Any = "127.0.0.1:8000"
    """`host:port`, or a list of them."""
    topk: int = 3
    """Documents per query."""
    timeout_s: float = 30.0
    """Deadline of one call, retries included."""
    retries: int = 8
    """Further requests within the deadline, with growing pauses once every server has failed."""
    max_failure_rate: float = 0.5
    """End the run once a larger share of the latest calls has failed."""
    dummy_mode: bool = False
    """No server: every search finds nothing. For evaluating without the tool."""


@dataclass
class AccessToolConfig:
    """The page tool."""

    enabled: bool = False
    """Let the policy read pages with `<access> url </access>`."""


@dataclass
class ToolsConfig:
    """What the policy may call."""

    search: SearchToolConfig = field(default_factory=SearchToolConfig)
    """See `SearchToolConfig`."""
    access: AccessToolConfig = field(default_factory=AccessToolConfig)
    """See `AccessToolConfig`."""


@dataclass
class DataConfig:
    """Questions."""

    train_data_paths: list[str] = field(default_factory=list)
    """jsonl, json, parquet, csv or tsv files, or data sets of the hub: `OWNER/NAME:SPLIT`, `OWNER/NAME/FILE`."""
    val_data_paths: list[str] = field(default_factory=list)
    """The same, for evaluation."""
    max_prompt_length: int = 1024
    """Prompt tokens, at most."""
    filter_prompt_by_length: bool = True
    """Leave longer prompts out, and count them; False makes one an error."""
    rollout_batch_size: int = 512
    """Questions per step."""
    val_rollout_batch_size: int | None = None
    """Questions per evaluation batch in a training run; null is all at once. `searchr1 eval` has no batches."""
    prompt_key: str = "prompt"
    """Column of the prompt."""
    answer_key: str = "solutions"
    """Column of the gold answers."""
    apply_chat_template: bool = False
    """Treat a plain prompt as a user message."""
    prompt_template: str | None = None
    """Makes the prompt from a row's question: `searchr1`, `asearcher`, `rag`, `direct`, `cot`, `demo`, or a .txt file."""
    data_size: int | None = None
    """Read only the first so many rows; null or -1 reads all."""
    shuffle: bool = True
    """Draw a new order each epoch."""
    seed: int = 1234
    """Seed of the questions' order."""


@dataclass
class Config:
    """A whole run."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """See `ClusterConfig`."""
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    """See `RunnerConfig`."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """See `AlgorithmConfig`."""
    agentloop: AgentLoopConfig = field(default_factory=AgentLoopConfig)
    """See `AgentLoopConfig`."""
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    """See `ToolsConfig`."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """See `RolloutConfig`."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """See `RewardConfig`."""
    actor: ActorConfig = field(default_factory=ActorConfig)
    """See `ActorConfig`."""
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    """See `InferenceConfig`."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """See `CriticConfig`."""
    data: DataConfig = field(default_factory=DataConfig)
    """See `DataConfig`."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """See `EvaluationConfig`."""
    vars: dict[str, Any] = field(default_factory=dict)
    """Free: values for interpolation elsewhere in the YAML (`${vars.name}`)."""

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        """One line per key that was ignored, renamed or set. Like `given`, not part of the tree, and never written."""
        self.given: frozenset[str] = frozenset()
        """Keys that the YAML and the overrides set."""

"""`searchr1 check-config`: what a YAML would run, or every problem in it."""

from __future__ import annotations

import argparse
import os

from searchr1.config.critic import critic_backend
from searchr1.config.layout import actor_layout, critic_layout, describe_device, group_ranks, is_evaluation
from searchr1.config.load import ConfigError, config_help, load_config
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.preflight.check import check_config, warnings
from searchr1.preflight.check_models import check_models


def explain(config: Config, for_training: bool) -> str:
    """Describe groups, placement, batch arithmetic and limits, for people."""
    device = Device.detect(config.cluster.device)
    runner, algorithm, data, agent = config.runner, config.algorithm, config.data, config.agentloop
    groups = ["rollout", "reward"]
    if for_training:
        groups += [*(["inference"] if algorithm.kl_beta > 0 else []), "actor"]
        groups += ["critic"] if config.critic.use_critic_model else []
    lines = [f"device      {describe_device(device, os.environ)}", "groups"]
    for component in groups:
        ranks = group_ranks(config, component, device)
        slots = " ".join("+".join(map(str, rank)) for rank in ranks)
        lines.append(f"  {component:<10}{len(ranks)} process{'es' if len(ranks) > 1 else ''} on slots {slots}")
    lines.append(f"model       {config.rollout.model.model_path}")
    if for_training:
        trajectories = data.rollout_batch_size * algorithm.group_size
        layout = actor_layout(config, len(group_ranks(config, "actor", device)))
        lines += [
            f"step        {data.rollout_batch_size} questions x {algorithm.group_size} rollouts = {trajectories} "
            f"trajectories, {algorithm.n_minibatches} optimizer step{'s' if algorithm.n_minibatches > 1 else ''} of "
            f"{trajectories // algorithm.n_minibatches}",
            f"actor       {config.actor.training_backend}, tensor x pipeline x data parallel {layout.tensor_parallel} x "
            f"{layout.pipeline_parallel} x {layout.data_parallel}; {trajectories // layout.data_parallel} trajectories "
            f"a data-parallel copy, in packed micro-batches of at most {runner.max_tokens_per_mbs} tokens",
            *([_critic(config, device)] if config.critic.use_critic_model else []),
            f"algorithm   {algorithm.adv_type}, {algorithm.loss_agg_func}, KL {algorithm.kl_beta:g} "
            f"({algorithm.kl_penalty_type}), learning rate {config.actor.optim.lr:g} "
            f"({config.actor.lr_sched.lr_decay_style})",
            f"length      {f'{runner.max_steps} steps' if runner.max_steps >= 0 else f'{runner.max_epochs} epoch(s)'}, "
            f"evaluation every {runner.val_check_interval}, checkpoint every {runner.save_interval}",
        ]
    else:
        lines.append(f"evaluation  {_evaluation(config)}")
    lines += [
        f"limits      prompt {data.max_prompt_length}, trajectory {runner.seq_length}, tool text "
        f"{agent.max_tool_response_length} tokens; {agent.max_turns} tool turns"
        + (" and a final one" if agent.force_final_turn else ""),
        f"search      {'off (dummy_mode)' if config.tools.search.dummy_mode else config.tools.search.server_addr}, "
        f"top {config.tools.search.topk}",
        f"output      {runner.output_dir}/{runner.experiment_name}",
    ]
    lines += [f"warning     {text}" for text in warnings(config, for_training)]
    lines += config.notes
    return "\n".join(lines)


def _evaluation(config: Config) -> str:
    from searchr1.evaluation.methods import METHODS, agent_settings, sampling_note

    methods, rollouts = config.evaluation.methods, config.algorithm.group_size
    return f"{', '.join(methods)}; {sampling_note(agent_settings(config, METHODS[methods[0]]), rollouts)}"


def _critic(config: Config, device: Device) -> str:
    layout = critic_layout(config, len(group_ranks(config, "critic", device)))
    backend, optim = critic_backend(config), config.critic.optim
    return (
        f"critic      {backend}, tensor x pipeline x data parallel {layout.tensor_parallel} x {layout.pipeline_parallel} x "
        f"{layout.data_parallel}; learning rate {optim.lr:g}, alone in the first {config.critic.warmup_steps} steps"
    )


def main(argv: list[str]) -> int:
    """Run the sub-command. Return its exit code."""
    parser = argparse.ArgumentParser(prog="searchr1 check-config", description=__doc__)
    parser.add_argument("config", help=config_help("tiny-cpu"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--eval", action="store_true", help="check it for `searchr1 eval` (an evaluation's YAML is known as one without it)"
    )
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    for_training = not (args.eval or is_evaluation(config))
    problems = [*check_config(config, for_training), *check_models(config, for_training, needs_weights=False)]
    if problems:
        raise ConfigError(args.config, problems)
    print(explain(config, for_training))
    return 0

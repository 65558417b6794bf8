"""Thin RLinf workers around rollout, rewards and actor: no algorithm lives here."""

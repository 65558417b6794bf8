"""Rewards: functions of what the policy wrote, never of what it read."""

"""Rewards with machinery of their own: one file each, imported by rewards.py when a reward of it is named."""

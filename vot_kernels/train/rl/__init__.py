"""Reinforcement learning of the video-language model: GRPO with TRL, and a reward model of preferences."""

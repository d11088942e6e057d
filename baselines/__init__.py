"""The baselines that our model is compared with: loading, prompts, and fine-tuning with LoRA."""

"""Pretraining launcher for Qwen3-Next: hybrid Gated DeltaNet, gated attention, MoE and MTP on DeepSpeed ZeRO."""

__version__ = "0.1.0"

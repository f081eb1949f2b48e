"""Fine-tuning with LoRA: `finetune.finetune`, its settings (`config`), examples and their order
(`batching`), checkpoints that continue a run exactly, and its progress on a terminal (`bars`).
"""

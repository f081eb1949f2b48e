"""The command line: `app` holds the commands, `export` and `finetune` those with many options."""

from lora_speech.cli.app import main

__all__ = ["main"]
